//! The page and the control socket of a run.

use std::net::TcpListener;
use std::sync::Arc;

use emulator::console::place::Claim;
use emulator::web::bind::Choice;
use emulator::web::guard::Gate;
use emulator::web::{self, Config, Facts, Network, Server};
use miette::{IntoDiagnostic, Result, WrapErr, miette};

use super::progress::Progress;
use super::{FleetArgs, Until};

/// The token, for addresses beyond loopback. Not an argument: other users see arguments.
const TOKEN: &str = "LINUX_ON_GPU_TOKEN";

/// An address that was taken for the page.
pub struct Bound {
    listener: TcpListener,
    gate: Gate,
}

/// The control socket and the page, served until dropped.
pub struct Served {
    /// The page's address, if there is one.
    pub url: Option<String>,
    _server: Server,
}

/// Takes the page's address, if one is wanted.
pub fn bind(args: &FleetArgs) -> Result<Option<Bound>> {
    let choice = args.web.unwrap_or(match args.until {
        Some(Until::Ready | Until::Http) => Choice::Off,
        _ => Choice::Default,
    });
    let Some(listener) = web::bind::bind(choice).into_diagnostic()? else { return Ok(None) };
    let token = match std::env::var(TOKEN) {
        Ok(token) if token.is_empty() => None,
        Ok(token) => Some(token),
        Err(std::env::VarError::NotPresent) => None,
        Err(error) => return Err(miette!("the variable {TOKEN}: {error}")),
    };
    let at = listener.local_addr().into_diagnostic()?;
    let gate = Gate::new(at, token).map_err(|why| miette!("the variable {TOKEN}: {why}"))?;
    Ok(Some(Bound { listener, gate }))
}

/// Serves. `ram` and `image` are the guests'.
pub fn serve(
    page: Option<Bound>,
    claim: &Claim,
    progress: &Arc<Progress>,
    net: Option<Network>,
    (ram, image): (u64, String),
) -> Result<Served> {
    let fleet = progress.fleet.clone();
    let facts = Facts {
        fleet: format!("{}-{image:.16}-{}", std::process::id(), epoch_millis()),
        version: env!("CARGO_PKG_VERSION"),
        vms: fleet.vms(),
        backend: fleet.backend(),
        engine: fleet.engine(),
        ram_bytes: ram,
        image,
        port_base: net.as_ref().map(|net| net.reach.base()),
        terminal: web::HAS_TERMINAL,
    };
    let status = progress.clone();
    let status = Box::new(move |vm: Option<u32>| vm.map_or_else(|| status.status(), |vm| status.link(vm)));
    let config = Config { fleet, facts, status, net };
    let url = page.as_ref().map(|page| page.gate.url());
    let socket = claim.place.socket();
    let server = Server::start(&socket, page.map(|page| (page.listener, page.gate)), config)
        .into_diagnostic()
        .wrap_err_with(|| format!("control socket {}", socket.display()))?;
    Ok(Served { url, _server: server })
}

/// Tells runs apart, nothing more.
fn epoch_millis() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_millis())
}

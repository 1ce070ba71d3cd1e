//! The builder `buildroot`: kernel and programs by Buildroot, from the BR2_EXTERNAL tree in buildroot-external/.
//!
//! Buildroot makes programs only. Overlays, /init and device tree are laid on by the same code as for the direct
//! builder, so a change of these costs no `make` at all. What a build gave is kept by what it was made of, so with
//! nothing changed Buildroot is not even started; else route.rs decides what is to be built anew.

pub mod choice;
mod config;
mod elf;
mod machine;
mod make;
pub mod menu;
mod plan;
mod prepare;
pub mod release;
pub mod report;
mod route;
mod sources;
mod timing;
pub mod write;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::direct::share::Shared;
use super::direct::store::Store;
use super::direct::{Built, host};
use super::error::Error;
use super::profile::Profile;
use super::request::Request;
use super::step::Progress;
use super::tree;
pub use config::Toolchain;
use make::Make;
use plan::Plan;
use release::{Origin, Pin, Tree, TreeId};
use route::{Inputs, Route};
pub use sources::Sources;
use timing::Timing;

/// What a person may say about Buildroot.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A tree to be used.
    pub dir: Option<PathBuf>,
    /// A site or folder with the downloads.
    pub mirror: Option<String>,
    /// Ask no network.
    pub offline: bool,
    /// Where the compiler comes from, where it was said.
    pub toolchain: Option<Toolchain>,
    /// Where sources come from.
    pub sources: Sources,
}

impl Options {
    /// Nothing was said.
    pub const NONE: Self =
        Self { dir: None, mirror: None, offline: false, toolchain: None, sources: Sources::Auto };

    /// Where the compiler comes from: of the distribution's packages, if there are any.
    pub fn toolchain(&self) -> Toolchain {
        self.toolchain.unwrap_or_else(|| match host::codename() {
            Ok(_) => Toolchain::External,
            Err(_) => Toolchain::Internal,
        })
    }

    /// The same, with what a profile says where nothing else was said.
    pub fn or(&self, profile: &Profile) -> Self {
        Self { toolchain: self.toolchain.or(profile.toolchain), ..self.clone() }
    }
}

/// Builds what is missing.
pub fn build(request: &Request) -> Result<Built, Error> {
    let folder = request.buildroot();
    let pin = Pin::read(request.repo)?;
    let origin = release::look(request, &folder, &pin)?;
    machine::check_folder(&folder)?;
    let store = Store::open(&folder)?;
    let mut progress = Progress::new(request.quiet);
    if let Origin::Given(tree, _) = &origin
        && let Some(warning) = pin.warning(tree)
    {
        eprintln!("{warning}");
    }

    // With nothing changed, neither a lock nor a network is needed; not even the tree, where it was one's last.
    let last = folder.join("last-tree.json");
    let id = match &origin {
        Origin::Given(tree, _) | Origin::Cached(tree) => Some(tree.id(&folder)?),
        Origin::Download => TreeId::recall(&last),
    };
    if let Some(id) = id {
        let shared = Shared::open(request.cache).ok();
        for sources in prepare::wanted_sources(request) {
            if let Some(plan) = Plan::new(request, &id, shared.as_ref(), sources)?
                && let Some(built) = plan.find(&store)?
            {
                return Ok(built);
            }
        }
    }

    machine::check_space(&folder)?;
    let _lock = store.lock(|| progress.say("waiting for another build that uses the same cache"))?;
    progress.expect(6);
    let table = machine::table(request.repo)?;
    let logs = folder.join("logs");
    let mut shared = match Shared::open(request.cache) {
        Ok(shared) => Some(shared),
        Err(error) if needs_distribution(request) => return Err(error),
        Err(_) => None,
    };
    prepare::install(request, &table, shared.as_ref(), &mut progress, &logs)?;
    let tree = match origin {
        Origin::Given(tree, _) | Origin::Cached(tree) => tree,
        Origin::Download => release::download(request, &folder, &pin, &mut progress)?,
    };
    let plan = {
        let _other = shared.as_ref().map(|s| s.lock(&progress)).transpose()?;
        // The other build may have recorded something.
        if shared.is_some() {
            shared = Some(Shared::open(request.cache)?);
        }
        prepare::settle(request, &tree, shared.as_mut(), &store, &table, &mut progress)?
    };
    if let Some(built) = plan.find(&store)? {
        return Ok(built);
    }
    let built = run(request, &tree, &plan, &store, &mut progress, &logs)?;
    plan.id.remember(&last)?;
    Ok(built)
}

/// Whether nothing can be done without the distribution's packages.
fn needs_distribution(request: &Request) -> bool {
    request.options.toolchain() == Toolchain::External || request.options.sources == Sources::Distribution
}

/// The tree of an image that Buildroot made, for looking into it.
pub fn tree(request: &Request) -> Result<Tree, Error> {
    let pin = Pin::read(request.repo)?;
    match release::look(request, &request.buildroot(), &pin)? {
        Origin::Given(tree, _) | Origin::Cached(tree) => Ok(tree),
        Origin::Download => Err(Error::plain(
            "the Buildroot tree that this image was made with is gone",
            format!("Name one with --buildroot or {}.", release::VARIABLE),
        )),
    }
}

/// Brings the output folder to where it can go on, and lets Buildroot go on.
fn run(
    request: &Request,
    tree: &Tree,
    plan: &Plan,
    store: &Store,
    progress: &mut Progress,
    logs: &Path,
) -> Result<Built, Error> {
    let output = plan.output(request);
    let make = Make::new(tree, &output, &output.join("lg/external"))?;
    let log = logs.join(format!("build-{}.log", request.name));
    let timing = Timing::new(&output, plan.weights.clone(), plan.weights.len() + 6);
    let title = format!("Buildroot {}: {}", tree.version, request.name);
    let expected: u64 = plan.weights.values().sum();
    progress.remaining(1);
    let built = progress.step(&title, Duration::from_secs(expected), &log, |step| {
        let old = Inputs::read(&output);
        match plan.route_inputs.route(old.as_ref(), output.join("build").exists()) {
            Route::Fresh(_) => {}
            Route::Go { rebuild, reconfigure, .. } => {
                for (packages, verb) in [(&rebuild, "dirclean"), (&reconfigure, "clean-for-reconfigure")] {
                    for package in packages.iter().filter(|p| *p != plan::AFTER) {
                        let target = format!("{package}-{verb}");
                        step.run(&format!("prepare {package}"), make.expression(&[&target]))?;
                    }
                }
                if !(rebuild.is_empty() && reconfigure.is_empty()) {
                    install_again(&output)?;
                }
            }
        }
        // From now on a build that is interrupted goes on from here.
        plan.route_inputs.write(&output)?;
        make.build(step, &[], &timing)?;
        store.make("image", &plan.recipe, |files| collect(&output, files))
    })?;
    let longest = timing.longest(4);
    if !longest.is_empty() {
        progress.say(&format!("  most of it: {longest}; log: {}", log.display()));
    }
    Ok(plan.built(&built))
}

/// Makes Buildroot install all packages into an empty root file system: what a package installed before it changed
/// would stay there otherwise.
fn install_again(output: &Path) -> Result<(), Error> {
    let target = output.join("target");
    if target.exists() {
        fs::remove_dir_all(&target).map_err(|e| Error::io("remove", &target, e))?;
    }
    let build = output.join("build");
    for entry in fs::read_dir(&build).into_iter().flatten().flatten() {
        let stamp = entry.path().join(".stamp_target_installed");
        if stamp.exists() {
            fs::remove_file(&stamp).map_err(|e| Error::io("remove", &stamp, e))?;
        }
    }
    Ok(())
}

/// More sections than any kernel's linker script makes.
const KERNEL_SECTIONS: usize = 200;

/// Takes what is wanted out of an output folder, every program checked.
fn collect(output: &Path, files: &Path) -> Result<(), Error> {
    let image = output.join("images/Image");
    fs::copy(&image, files.join("Image")).map_err(|e| Error::io("copy", &image, e))?;
    let target = output.join("target");
    let mut root = tree::read_folder(&target, &|_, _| Ok(()))?;
    root.remove("THIS_IS_NOT_YOUR_ROOT_FILESYSTEM");
    for (path, node) in &root {
        if let tree::Kind::File(bytes) = &node.kind
            && elf::is_elf(bytes)
        {
            elf::check(bytes).map_err(|what| refused(&format!("/{path}"), &what))?;
        }
    }
    let kernel = prepare::source_folder(output, "linux")?;
    for name in ["vmlinux", "arch/riscv/kernel/vdso/vdso.so"] {
        let path = kernel.join(name);
        if path.is_file() {
            let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            elf::check(&bytes).map_err(|what| refused(name, &what))?;
            // Its linker script gathers text and data; what lies elsewhere is text to nobody.
            if elf::sections(&bytes) > KERNEL_SECTIONS {
                return Err(Error::plain(
                    format!("the kernel's {name} has {} sections", elf::sections(&bytes)),
                    "Something gives the kernel -ffunction-sections, as BR2_TARGET_OPTIMIZATION does. Take it away.",
                ));
            }
        }
    }
    for (name, from) in
        [("config-linux", kernel.clone()), ("config-busybox", prepare::source_folder(output, "busybox")?)]
    {
        let from = from.join(".config");
        fs::copy(&from, files.join(name)).map_err(|e| Error::io("copy", &from, e))?;
    }
    tree::write_folder(&root, &files.join("root"))
}

fn refused(what: &str, why: &str) -> Error {
    Error::plain(
        format!("{what} cannot run on the machine, which is RV32IMA: {why}"),
        "Look for -march in its package's flags, or for a library that came from elsewhere.",
    )
}

#[cfg(test)]
mod tests;

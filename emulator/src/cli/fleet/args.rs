//! The arguments of `emulator fleet`.

use std::num::NonZero;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use emulator::fleet::capacity::parse_size;
use emulator::net::fault::Fault;
use emulator::net::policy::{Policy, Service, Services};
use emulator::net::rate::Limits;
use emulator::web::bind::Choice as WebChoice;

use super::super::{MachineArgs, pcap, seconds, vm_count};

/// After a packet, as long as two cores are not missed: longer than from one ping to the next.
const BUSY_POLL: Duration = Duration::from_secs(2);
/// As long as an answer takes.
const BUSY_POLL_FEW_CORES: Duration = Duration::from_millis(2);
const MANY_CORES: usize = 8;

/// `emulator fleet`.
#[derive(Clone, Debug, Args)]
pub struct FleetArgs {
    /// Folder with Image, initrd.cpio, vm.dtb and manifest.json.
    #[arg(long, value_name = "DIR")]
    pub image: PathBuf,

    /// Number of VMs, which are numbered from 0; max: as many as memory and ports allow.
    #[arg(long, value_name = "N|max", default_value = "16", value_parser = vm_count)]
    pub vms: u32,

    /// RAM of each VM, as in 16M [default: what the image was made for].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub ram: Option<u64>,

    /// Where the VMs run.
    #[command(flatten)]
    pub machine: MachineArgs,

    /// How the VMs' network reaches the host (docs/network.md).
    #[arg(long, value_enum, default_value_t = NetMode::User)]
    pub net: NetMode,

    /// VM N's web server is reached on port BASE + N of 127.0.0.1.
    #[arg(long, value_name = "BASE", default_value_t = 4000)]
    pub port_base: u16,

    /// Where the page with all VMs is served: an address, a port of 127.0.0.1, or off [default: 127.0.0.1, the first
    /// free port from 8080 on; off with --until ready or http]. Beyond loopback it demands a token, which is printed,
    /// or taken from the variable LINUX_ON_GPU_TOKEN.
    #[arg(long, value_name = "ADDR|off")]
    pub web: Option<WebChoice>,

    /// What the network allows, shows and breaks.
    #[command(flatten)]
    pub network: NetworkArgs,

    /// Guest time after the boot: with the wall clock, or with executed instructions, jumping over idle times.
    #[arg(long, value_enum, default_value_t = Time::Real)]
    pub time: Time,

    /// End with status 0 when all VMs are ready, when all have answered GET / with 200, or after so many seconds
    /// [default: serve until Ctrl-C].
    #[arg(long, value_name = "ready|http|SECONDS")]
    pub until: Option<Until>,

    /// Give up on --until ready or http after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub timeout: f64,

    /// Write a JSON report at the end (docs/report.md).
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,

    /// Folder for control socket and console logs [default: $XDG_RUNTIME_DIR/linux-on-gpu, or one in the temporary
    /// folder].
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// Say nothing unless something is wrong.
    #[arg(long, short)]
    pub quiet: bool,

    /// Print where the program's own time went.
    #[arg(long, hide = true)]
    pub profile_host: bool,
}

/// What the network allows, shows and breaks.
#[derive(Clone, Debug, Args)]
pub struct NetworkArgs {
    /// Write all packets to a file for Wireshark, or only VM N's.
    #[arg(long, value_name = "FILE[:N]", help_heading = "Network")]
    pub pcap: Option<pcap::Wanted>,

    /// Keep VMs from reaching one another.
    #[arg(long, help_heading = "Network")]
    pub isolate: bool,

    /// Let VMs use a TCP service of this host: port HOST of 127.0.0.1, at port GUEST of 10.77.0.1. May be repeated.
    #[arg(long = "service", value_name = "HOST:GUEST", help_heading = "Network")]
    pub services: Vec<Service>,

    /// Packets a second that a VM may send, and get; 0: no limit.
    #[arg(long, value_name = "K", default_value_t = Limits::default().packets, help_heading = "Network")]
    pub rate_packets: u64,

    /// Bytes a second that a VM may send, and get, as in 10M; 0: no limit.
    #[arg(long, value_name = "SIZE", value_parser = rate_size, default_value = "128M", help_heading = "Network")]
    pub rate_bytes: u64,

    /// Break something on purpose, for all VMs or VM N (docs/debugging-the-network.md).
    #[arg(long, value_name = "mac|arp|checksum[:N]", help_heading = "Network")]
    pub fault: Option<Fault>,

    /// Up to 64 VMs on a GPU, with tun: for so long after a packet its answer and the next packet are waited for without
    /// sleeping, on two of the host's cores; 0: never [default: 2000, with fewer than 8 cores 2].
    #[arg(long, value_name = "MS", help_heading = "Network",
        value_parser = clap::value_parser!(u32).range(..=3_600_000))]
    pub busy_poll: Option<u32>,
}

impl NetworkArgs {
    /// How long nobody sleeps after a packet.
    pub fn busy_poll(&self) -> Duration {
        let cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
        let usual = || if cores() < MANY_CORES { BUSY_POLL_FEW_CORES } else { BUSY_POLL };
        self.busy_poll.map_or_else(usual, |ms| Duration::from_millis(ms.into()))
    }

    /// For the bridge.
    pub fn policy(&self) -> Result<Policy, String> {
        Ok(Policy {
            services: Services::new(&self.services)?,
            isolated: self.isolate,
            limits: Limits { packets: self.rate_packets, bytes: self.rate_bytes },
            fault: self.fault,
        })
    }
}

fn rate_size(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { parse_size(text) }
}

/// How the network reaches the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NetMode {
    /// Host sockets on 127.0.0.1; needs no privileges.
    User,
    /// A network device: VMs' own addresses 10.77.0.2 and up too; needs CAP_NET_ADMIN.
    #[cfg(target_os = "linux")]
    Tun,
    /// WinDivert, as in the talk; needs an Administrator and WinDivert.dll.
    #[cfg(windows)]
    Windivert,
    /// Nothing is attached to the VMs' network devices.
    Off,
}

/// Guest time after the boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Time {
    /// With the wall clock.
    Real,
    /// With executed instructions.
    Virtual,
}

/// When to end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Until {
    /// All VMs are ready.
    Ready,
    /// All VMs have answered.
    Http,
    /// After a time.
    Seconds(f64),
}

impl FromStr for Until {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "ready" => Ok(Self::Ready),
            "http" => Ok(Self::Http),
            _ => seconds(text)
                .map(Self::Seconds)
                .map_err(|_| "expected ready, http, or a number of seconds".into()),
        }
    }
}

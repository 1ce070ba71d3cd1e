//! The emulator's command line.

pub mod bench;
#[cfg(unix)]
pub mod console;
pub mod fleet;
pub mod gpus;
pub mod live;
pub mod load;
pub mod lockstep;
mod machines;
pub mod pcap;
#[cfg_attr(not(unix), allow(dead_code, reason = "there is no control socket to ask"))]
mod profile;
mod progress;
mod web;

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use emulator::backend::cuda::{EngineChoice, Gpus};
use emulator::console::place::{self, Place};
use emulator::fleet::capacity::parse_size;
use emulator::net::fault::Fault;
use emulator::net::policy::{Policy, Service, Services};
use emulator::net::rate::Limits;
use emulator::web::bind::Choice as WebChoice;

/// A fleet of RV32IMA Linux virtual machines in one GPU, or on the CPU.
#[derive(Debug, Parser)]
#[command(name = "emulator", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a fleet and serve it until Ctrl-C.
    Fleet(FleetArgs),
    /// Measure fleets of several sizes, one after the other: booting, busy and serving.
    Bench(BenchArgs),
    /// Run the same VMs on the CPU and on a GPU, and compare them bit for bit while they boot and answer requests.
    Lockstep(LockstepArgs),
    /// List the GPUs that can run VMs, or say what is missing.
    Gpus(GpusArgs),
    /// Ask the VMs of a running fleet for their pages, over and over; print rate and times as JSON.
    Load(LoadArgs),
    /// Attach to the console of a VM of a running fleet; Ctrl-] leaves.
    #[cfg(unix)]
    Console(ConsoleArgs),
    /// Print what a running fleet does, as JSON.
    #[cfg(unix)]
    Status(StatusArgs),
    /// Keep VMs of a running fleet from running.
    #[cfg(unix)]
    Pause(ActArgs),
    /// Let paused VMs go on.
    #[cfg(unix)]
    Resume(ActArgs),
    /// Put VMs back to before their first instruction, and boot them; also those that have stopped or failed.
    #[cfg(unix)]
    Reset(ActArgs),
}

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
#[command(next_help_heading = "Network")]
pub struct NetworkArgs {
    /// Write all packets to a file for Wireshark, or only VM N's.
    #[arg(long, value_name = "FILE[:N]")]
    pub pcap: Option<pcap::Wanted>,

    /// Keep VMs from reaching one another.
    #[arg(long)]
    pub isolate: bool,

    /// Let VMs use a TCP service of this host: port HOST of 127.0.0.1, at port GUEST of 10.77.0.1. May be repeated.
    #[arg(long = "service", value_name = "HOST:GUEST")]
    pub services: Vec<Service>,

    /// Packets a second that a VM may send, and get; 0: no limit.
    #[arg(long, value_name = "K", default_value_t = Limits::default().packets)]
    pub rate_packets: u64,

    /// Bytes a second that a VM may send, and get, as in 10M; 0: no limit.
    #[arg(long, value_name = "SIZE", value_parser = rate_size, default_value = "128M")]
    pub rate_bytes: u64,

    /// Break something on purpose, for all VMs or VM N (docs/debugging-the-network.md).
    #[arg(long, value_name = "mac|arp|checksum[:N]")]
    pub fault: Option<Fault>,
}

impl NetworkArgs {
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

/// Where the VMs run, and how.
#[derive(Clone, Debug, Args)]
pub struct MachineArgs {
    /// Where the VMs run; auto takes a GPU if there is one.
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    pub backend: Backend,

    /// CPU threads that run VMs [default: one per core].
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,

    /// GPUs that share the fleet, by their numbers, or all of them.
    #[arg(long, value_name = "N,N...|all", default_value = "0")]
    pub gpus: Gpus,

    /// Make boots repeatable: the guests' randomness comes from this number, and their clocks start at a fixed date.
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,

    /// How many VMs share a warp of the GPU: w: one; auto: by the fleet's size.
    #[arg(long, value_name = "auto|w|l2|l4|l8|l16|l32", default_value = "auto", help_heading = "GPU tuning")]
    pub engine: EngineChoice,

    /// Launch queues of each GPU: while one runs, the host serves the VMs of another [default: by the fleet's size].
    #[arg(long, value_name = "K", help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(1..=16))]
    pub gpu_queues: Option<u32>,

    /// How long a launch is to take [default: by the fleet's size].
    #[arg(long, value_name = "MS", help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(1..=500))]
    pub gpu_slice: Option<u32>,

    /// Registers of each GPU thread [default: by the fleet's size].
    #[arg(long, value_name = "K", help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(32..=255))]
    pub gpu_registers: Option<u32>,

    /// Warps in each block [default: by the fleet's size].
    #[arg(long, value_name = "K", help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(1..=16))]
    pub gpu_warps: Option<u32>,

    /// Begin without the decoded code of earlier starts, and keep none for later ones.
    #[arg(long, help_heading = "GPU tuning")]
    pub no_code_cache: bool,
}

/// `emulator bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Folder with Image, initrd.cpio, vm.dtb and manifest.json.
    #[arg(long, value_name = "DIR")]
    pub image: PathBuf,

    /// Sizes of the fleets; max: as many as memory allows. What does not fit is left out.
    #[arg(long, value_name = "N,N...", value_delimiter = ',', value_parser = vm_count,
        default_value = "1,64,256,1024,4096,8192,16384,32768")]
    pub vms: Vec<u32>,

    /// Sizes of fleets on the CPU, to compare with.
    #[arg(long, value_name = "N,N...", value_delimiter = ',', value_parser = vm_count)]
    pub cpu_vms: Vec<u32>,

    /// RAM of each VM, as in 8M,16M [default: what the image was made for].
    #[arg(long, value_name = "SIZE,SIZE...", value_delimiter = ',', value_parser = parse_size)]
    pub ram: Vec<u64>,

    /// Where the VMs run.
    #[command(flatten)]
    pub machine: MachineArgs,

    /// Engines of the GPU to measure one after the other [default: --engine].
    #[arg(long, value_name = "NAME,NAME...", value_delimiter = ',', help_heading = "GPU tuning")]
    pub engines: Vec<EngineChoice>,

    /// Lengths of launches to measure one after the other [default: --gpu-slice].
    #[arg(long, value_name = "MS,MS...", value_delimiter = ',', help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(1..=500))]
    pub slices: Vec<u32>,

    /// Runs of each size; medians are shown.
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,

    /// After the boot, keep every VM's shell busy for so many seconds and measure; 0: don't.
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub steady: f64,

    /// Boot once more with a network, and ask all VMs for their page for so many seconds; 0: don't.
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub http: f64,

    /// Other emulators to measure beside: a file that `cargo xtask bench --peer` writes.
    #[arg(long, value_name = "FILE")]
    pub peers: Option<PathBuf>,

    /// Give up on a boot after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    pub timeout: f64,

    /// Write the figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// The commit that is measured, for the JSON.
    #[arg(long, value_name = "HASH")]
    pub commit: Option<String>,
}

/// `emulator gpus`.
#[derive(Debug, Args)]
pub struct GpusArgs {
    /// Which, by their numbers, or all of them.
    #[arg(long, value_name = "N,N...|all", default_value = "all")]
    pub gpus: Gpus,
}

/// `emulator lockstep`.
#[derive(Debug, Args)]
pub struct LockstepArgs {
    /// Folder with Image, initrd.cpio, vm.dtb and manifest.json.
    #[arg(long, value_name = "DIR")]
    pub image: PathBuf,

    /// Number of VMs.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub vms: u32,

    /// RAM of each VM, as in 16M [default: what the image was made for].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub ram: Option<u64>,

    /// HTTP requests that each VM answers once all are READY.
    #[arg(long, value_name = "K", default_value_t = 100)]
    pub requests: u32,

    /// End after so many steps of each VM [default: when all requests are answered].
    #[arg(long, value_name = "STEPS")]
    pub steps: Option<u64>,

    /// Steps between two comparisons.
    #[arg(long, value_name = "STEPS", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub every: u64,

    /// The guests' randomness comes from this number.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,

    /// GPUs that share the VMs, by their numbers, or all of them.
    #[arg(long, value_name = "N,N...|all", default_value = "0")]
    pub gpus: Gpus,

    /// How many VMs share a warp of the GPU: w: one; auto: by the fleet's size.
    #[arg(long, value_name = "auto|w|l2|l4|l8|l16|l32", default_value = "auto")]
    pub engine: EngineChoice,

    /// Registers of each GPU thread [default: by the fleet's size].
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(32..=255))]
    pub gpu_registers: Option<u32>,

    /// Begin without the decoded code of earlier starts, and keep none for later ones.
    #[arg(long)]
    pub no_code_cache: bool,

    /// Where both states go if they differ.
    #[arg(long, value_name = "DIR", default_value = "lockstep-mismatch")]
    pub mismatch: PathBuf,
}

/// `emulator load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// The fleet's first port.
    #[arg(long, value_name = "BASE", default_value_t = 4000)]
    pub port_base: u16,

    /// VMs to ask, from VM 0 on.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub vms: u32,

    /// Connections at once.
    #[arg(long, value_name = "K", default_value_t = 64)]
    pub connections: usize,

    /// Threads that share them.
    #[arg(long, value_name = "K", default_value_t = 1)]
    pub threads: usize,

    /// For how long to ask.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub seconds: f64,

    /// Requests a second [default: each connection asks again as soon as it was answered].
    #[arg(long, value_name = "K", value_parser = rate)]
    pub rate: Option<f64>,

    /// Ask again on the same connection instead of a new one.
    #[arg(long)]
    pub keep_alive: bool,

    /// Ask the VMs at their own addresses; needs --net tun.
    #[arg(long)]
    pub direct: bool,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.001..=1e7).contains(&rate) => Ok(rate),
        _ => Err("expected a number of requests a second".into()),
    }
}

/// Which fleet is meant.
#[cfg(unix)]
#[derive(Debug, Args)]
pub struct FleetChoice {
    /// The fleet's first port.
    #[arg(long, value_name = "BASE", default_value_t = 4000)]
    pub port_base: u16,

    /// The fleet's --state-dir, if it was given one.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// `emulator console`.
#[cfg(unix)]
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// Number of the VM.
    #[arg(value_name = "N")]
    pub vm: u32,

    /// Which fleet.
    #[command(flatten)]
    pub fleet: FleetChoice,

    /// With input from a pipe: leave when nothing was printed for so many seconds after the input's end.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub linger: f64,
}

/// `emulator status`.
#[cfg(unix)]
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Only the counters of VM N's network link, as `ethtool -S` shows them.
    #[arg(value_name = "N")]
    pub vm: Option<u32>,

    /// Which fleet.
    #[command(flatten)]
    pub fleet: FleetChoice,
}

/// `emulator pause`, `resume` and `reset`.
#[cfg(unix)]
#[derive(Debug, Args)]
pub struct ActArgs {
    /// Numbers and ranges, as in 0-9,20, or all.
    #[arg(value_name = "VMS")]
    pub vms: String,

    /// Which fleet.
    #[command(flatten)]
    pub fleet: FleetChoice,
}

/// Where the VMs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// A GPU if there is one, else the CPU.
    Auto,
    /// An NVIDIA GPU.
    Cuda,
    /// The CPU.
    Cpu,
    /// No machine at all: what answers is a stub, to measure what stands before it.
    #[value(hide = true)]
    Stub,
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

/// `--vms max`.
pub const MAX_VMS: u32 = u32::MAX;

fn vm_count(text: &str) -> Result<u32, String> {
    match text {
        "max" => Ok(MAX_VMS),
        _ => text.parse().map_err(|_| "expected a number of VMs, or max".into()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=1e9).contains(&seconds) => Ok(seconds),
        _ => Err("expected a number of seconds".into()),
    }
}

/// The folder of the fleet with that port base.
fn find_place(state_dir: Option<&PathBuf>, port_base: u16) -> Place {
    Place::new(&state_dir.cloned().unwrap_or_else(place::default_root), port_base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["emulator", "fleet", "--image", "x", "--ram", "8M", "--until", "2.5"]);
        let Ok(Cli { command: Command::Fleet(args) }) = cli else { panic!("not parsed: {cli:?}") };
        assert_eq!((args.ram, args.until), (Some(8 << 20), Some(Until::Seconds(2.5))));
        for bad in [
            ["--until", "soon"],
            ["--until", "-1"],
            ["--port-base", "70000"],
            ["--ram", "8X"],
            ["--vms", "-1"],
            ["--web", "here"],
        ] {
            assert!(
                Cli::try_parse_from(["emulator", "fleet", "--image", "x", bad[0], bad[1]]).is_err(),
                "{bad:?}"
            );
        }
    }
}

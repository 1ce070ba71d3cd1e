//! The whole command line, in one place. A subcommand is a variant of `Command` with its arguments below, and an arm
//! of the match in main.rs.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::image::buildroot::menu::Menu;
use crate::image::buildroot::{self, Sources, Toolchain};
use crate::image::profile::{BuilderName, Ram};
use crate::image::try_it::Other;

/// Linux on GPU: builds guest images and runs fleets of them.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build a guest image: kernel, initrd, device tree and manifest.
    Image(ImageArgs),
    /// Boot a fleet and serve it until Ctrl-C, building first what is missing.
    Run(Box<RunArgs>),
    /// Attach to the console of a VM of a running fleet; Ctrl-] leaves.
    Console(EmulatorArgs),
    /// Print what a running fleet does, as JSON.
    Status(EmulatorArgs),
    /// Ask the VMs of a running fleet for their pages, over and over; print rate and times as JSON.
    Load(EmulatorArgs),
    /// Keep VMs of a running fleet from running.
    Pause(EmulatorArgs),
    /// Let paused VMs go on.
    Resume(EmulatorArgs),
    /// Put VMs back to before their first instruction, and boot them; also those that have stopped or failed.
    Reset(EmulatorArgs),
    /// Check what this machine has, and say what each thing is for.
    Doctor(DoctorArgs),
    /// Measure fleets of several sizes, booting, busy and serving, and other emulators beside them.
    Bench(Box<BenchArgs>),
    /// Run all checks and tests; installs what they need, and says what it skips and why.
    Test(TestArgs),
}

/// Arguments that say which image; shared by all commands that need one.
#[derive(Clone, Debug, Args)]
pub struct ImageChoice {
    /// A profile of profiles/ by name, or the path of a .yaml file.
    #[arg(long, value_name = "NAME|PATH", default_value = "lean")]
    pub profile: String,

    /// RAM of each VM, with unit, as in 16MiB [default: the profile's].
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<Ram>,

    /// Who makes kernel and programs [default: the profile's].
    #[arg(long, value_name = "NAME")]
    pub builder: Option<Builder>,

    /// Say nothing unless something is wrong.
    #[arg(long, short)]
    pub quiet: bool,

    /// How Buildroot is used.
    #[command(flatten)]
    pub buildroot: BuildrootChoice,
}

/// Where Buildroot, its compiler and its sources come from. docs/buildroot.md explains them.
#[derive(Clone, Debug, Default, Args)]
pub struct BuildrootChoice {
    /// A Buildroot tree, instead of the pinned release [also: $BUILDROOT_DIR].
    #[arg(long = "buildroot", value_name = "DIR", help_heading = "Buildroot")]
    pub dir: Option<PathBuf>,

    /// A site or folder that has the release and the sources, asked before all others.
    #[arg(long, value_name = "URL|DIR", help_heading = "Buildroot")]
    pub mirror: Option<String>,

    /// Ask no network; what is missing is an error.
    #[arg(long, help_heading = "Buildroot")]
    pub offline: bool,

    /// Where the cross compiler comes from: of the distribution's packages (minutes), or built by Buildroot (the
    /// better part of an hour) [default: the profile's, else the distribution's where it is Debian].
    #[arg(long, value_name = "WHICH", value_enum, help_heading = "Buildroot")]
    pub toolchain: Option<ToolchainWord>,

    /// Where sources come from: their own sites, the distribution's source packages, or the first of these that can be
    /// reached.
    #[arg(long, value_name = "WHICH", value_enum, default_value_t = SourcesWord::Auto, help_heading = "Buildroot")]
    pub sources: SourcesWord,
}

/// Toolchains on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ToolchainWord {
    /// The distribution's compiler.
    External,
    /// Buildroot's own.
    Internal,
}

/// Sources on the command line.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum SourcesWord {
    /// The first that can be reached.
    #[default]
    Auto,
    /// The released archives.
    Release,
    /// The distribution's source packages.
    Distribution,
}

impl From<&BuildrootChoice> for buildroot::Options {
    fn from(choice: &BuildrootChoice) -> Self {
        Self {
            dir: choice.dir.clone(),
            mirror: choice.mirror.clone(),
            offline: choice.offline,
            toolchain: choice.toolchain.map(|word| match word {
                ToolchainWord::External => Toolchain::External,
                ToolchainWord::Internal => Toolchain::Internal,
            }),
            sources: match choice.sources {
                SourcesWord::Auto => Sources::Auto,
                SourcesWord::Release => Sources::Release,
                SourcesWord::Distribution => Sources::Distribution,
            },
        }
    }
}

/// `cargo xtask image`.
#[derive(Debug, Args)]
#[command(
    after_help = "The image lands in out/PROFILE/; what was built is kept in $XDG_CACHE_HOME/linux-on-gpu \
                        (else ~/.cache/linux-on-gpu). See docs/guest.md."
)]
pub struct ImageArgs {
    /// Which image.
    #[command(flatten)]
    pub choice: ImageChoice,

    /// List profiles and overlays with their descriptions, and build nothing.
    #[arg(long)]
    pub list: bool,

    /// Boot the image on another emulator, to tell a problem of the guest from one of ours.
    #[arg(long = "try", value_name = "WHERE", value_enum)]
    pub try_on: Option<Other>,

    /// Edit a configuration, and write the changes back to its fragment (builder buildroot).
    #[arg(long, value_name = "WHOSE", value_enum)]
    pub menuconfig: Option<Menu>,

    /// Write what takes how much room, as a table and a picture (builder buildroot).
    #[arg(long)]
    pub graph_size: bool,

    /// Write a bill of materials in CycloneDX' format (builder buildroot).
    #[arg(long)]
    pub sbom: bool,

    /// Write licence texts and sources of all that is in the image (builder buildroot).
    #[arg(long)]
    pub legal_info: bool,

    /// Write the files for Buildroot by hand (configs/, board/) from profiles, pieces and overlays, and build nothing.
    #[arg(long)]
    pub write_defconfigs: bool,
    /// Leave the host's ARP entry or all routes out, in all VMs or in VM N (docs/debugging-the-network.md); the image
    /// lands in out/PROFILE-fault-NAME/.
    #[arg(long, value_name = "arp|route[:N]")]
    pub fault: Option<String>,
}

/// The builders on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Builder {
    /// From the distribution's source packages.
    Direct,
    /// By Buildroot.
    Buildroot,
}

impl From<Builder> for BuilderName {
    fn from(builder: Builder) -> Self {
        match builder {
            Builder::Direct => Self::Direct,
            Builder::Buildroot => Self::Buildroot,
        }
    }
}

/// `cargo xtask run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask run --vms 16                    16 VMs, their web pages on ports 4000 to 4015
  cargo xtask run --vms 64 --until http       end when every VM has answered GET / with 200
  cargo xtask run --profile debug --vms 2     with tcpdump, ethtool and iptables in the guest
  cargo xtask console 3                       in another terminal: a shell in VM 3")]
pub struct RunArgs {
    /// Which image.
    #[command(flatten)]
    pub choice: ImageChoice,

    /// Run the image in this folder, built here or elsewhere, and build nothing.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["profile", "ram", "builder"])]
    pub image: Option<PathBuf>,

    /// Number of VMs, which are numbered from 0; max: as many as memory and ports allow [default: the profile's].
    #[arg(long, value_name = "N|max", value_parser = vm_count)]
    pub vms: Option<String>,

    /// Where the VMs run; auto takes a GPU if there is one.
    #[arg(long, value_parser = ["auto", "cuda", "cpu"], default_value = "auto")]
    pub backend: String,

    /// GPUs that share the fleet, by their numbers, or all of them [default: 0].
    #[arg(long, value_name = "N,N...|all")]
    pub gpus: Option<String>,

    /// How GPUs run them.
    #[command(flatten)]
    pub tuning: TuningArgs,

    /// How the VMs' network reaches the host: TCP to 127.0.0.1 (user), a network device that needs privileges (tun), or
    /// not at all (off) [default: the profile's].
    #[arg(long, value_parser = ["user", "tun", "off"])]
    pub net: Option<String>,

    /// What the network allows, shows and breaks.
    #[command(flatten)]
    pub network: NetworkArgs,

    /// VM N's web server is reached at http://127.0.0.1:(BASE + N)/.
    #[arg(long, value_name = "BASE", default_value_t = 4000)]
    pub port_base: u16,

    /// Where the page with all VMs is served: an address, a port of 127.0.0.1, or off [default: 127.0.0.1, the first
    /// free port from 8080 on; off with --until ready or http]. Beyond loopback it demands a token: docs/web.md.
    #[arg(long, value_name = "ADDR|off", value_parser = web)]
    pub web: Option<String>,

    /// Guest time after the boot: with the wall clock (real), or with executed instructions, jumping over idle times
    /// (virtual) [default: the profile's].
    #[arg(long, value_parser = ["real", "virtual"])]
    pub time: Option<String>,

    /// CPU threads that run VMs [default: one per core].
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,

    /// End with status 0 when all VMs are ready (ready), when all have answered GET / with 200 (http), or after so
    /// many seconds [default: serve until Ctrl-C].
    #[arg(long, value_name = "ready|http|SECONDS", value_parser = until)]
    pub until: Option<String>,

    /// Give up on --until ready or http after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u32,

    /// Write a JSON report at the end; docs/report.md explains its keys.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,

    /// Make boots repeatable: the guests' randomness comes from this number, and their clocks start at a fixed date.
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,

    /// Folder for control socket and console logs [default: $XDG_RUNTIME_DIR/linux-on-gpu, or one in the temporary
    /// folder].
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// How GPUs run VMs. The emulator checks the values.
#[derive(Debug, Args)]
pub struct TuningArgs {
    /// How many VMs share a warp of the GPU: w: one; auto: by the fleet's size [default: auto].
    #[arg(long, value_name = "auto|w|l2|l4|l8|l16|l32", help_heading = "GPU tuning")]
    pub engine: Option<String>,

    /// Launch queues of each GPU: while one runs, the host serves the VMs of another [default: by the fleet's size].
    #[arg(long, value_name = "K", help_heading = "GPU tuning")]
    pub gpu_queues: Option<u32>,

    /// How long a launch is to take; one of VMs that boot takes twice as long [default: by the fleet's size].
    #[arg(long, value_name = "MS", help_heading = "GPU tuning")]
    pub gpu_slice: Option<u32>,

    /// Registers of each GPU thread [default: by the fleet's size].
    #[arg(long, value_name = "K", help_heading = "GPU tuning")]
    pub gpu_registers: Option<u32>,

    /// Warps in each block [default: as few as the device takes].
    #[arg(long, value_name = "K", help_heading = "GPU tuning")]
    pub gpu_warps: Option<u32>,

    /// Begin without the decoded code of earlier starts, and keep none for later ones.
    #[arg(long, help_heading = "GPU tuning")]
    pub no_code_cache: bool,
}

/// What the network allows, shows and breaks. The emulator checks the values.
#[derive(Debug, Args)]
pub struct NetworkArgs {
    /// Write all packets to a file for Wireshark, or only VM N's.
    #[arg(long, value_name = "FILE[:N]", help_heading = "Network")]
    pub pcap: Option<String>,

    /// Keep VMs from reaching one another [default: the profile's].
    #[arg(long, help_heading = "Network")]
    pub isolate: bool,

    /// Let VMs use a TCP service of this host, beside those of the profile: port HOST of 127.0.0.1, at port GUEST of
    /// 10.77.0.1. May be repeated.
    #[arg(long = "service", value_name = "HOST:GUEST", help_heading = "Network")]
    pub services: Vec<String>,

    /// Packets a second that a VM may send, and get; 0: no limit [default: 100000].
    #[arg(long, value_name = "K", help_heading = "Network")]
    pub rate_packets: Option<u64>,

    /// Bytes a second that a VM may send, and get, as in 10M; 0: no limit [default: 128M].
    #[arg(long, value_name = "SIZE", help_heading = "Network")]
    pub rate_bytes: Option<String>,

    /// Break something on purpose, for all VMs or VM N (docs/debugging-the-network.md).
    #[arg(long, value_name = "mac|arp|checksum|route[:N]", help_heading = "Network")]
    pub fault: Option<String>,

    /// Up to 64 VMs on a GPU, with tun: for so long after a packet its answer and the next packet are waited for without
    /// sleeping, on two of the host's cores; 0: never [default: 2000, with fewer than 8 cores 2].
    #[arg(long, value_name = "MS", help_heading = "Network")]
    pub busy_poll: Option<u32>,
}

/// Commands that are the emulator's own: it takes the arguments as they are, --help among them.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct EmulatorArgs {
    /// As the emulator's; --help lists them.
    #[arg(value_name = "ARGUMENTS", trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<std::ffi::OsString>,
}

/// `cargo xtask doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Install what is missing: as root the distribution's packages, and NVRTC into our cache.
    #[arg(long)]
    pub fix: bool,
}

/// `cargo xtask bench`. The emulator checks lists and numbers.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench --backend cpu --vms 1,16 --runs 3
  cargo xtask bench --cpu-vms 1,64,1024 --peer semu=./semu --peer qemu=qemu-system-riscv32")]
pub struct BenchArgs {
    /// Which image.
    #[arg(long, value_name = "NAME|PATH", default_value = "lean")]
    pub profile: String,

    /// Sizes of the fleets; max: as many as memory allows. What does not fit is left out [default:
    /// 1,64,256,1024,4096,8192,16384,32768].
    #[arg(long, value_name = "N,N...")]
    pub vms: Option<String>,

    /// Sizes of fleets on all cores of the CPU, to compare with [default: none].
    #[arg(long, value_name = "N,N...")]
    pub cpu_vms: Option<String>,

    /// RAM of each VM, as in 8M,16M [default: the profile's].
    #[arg(long, value_name = "SIZE,SIZE...")]
    pub ram: Option<String>,

    /// Where the VMs run; auto takes a GPU if there is one.
    #[arg(long, value_parser = ["auto", "cuda", "cpu"], default_value = "auto")]
    pub backend: String,

    /// GPUs that share the fleet, by their numbers, or all of them [default: 0].
    #[arg(long, value_name = "N,N...|all")]
    pub gpus: Option<String>,

    /// Engines of the GPU, measured one after the other [default: auto].
    #[arg(long, value_name = "NAME,NAME...")]
    pub engine: Option<String>,

    /// How long a launch is to take; several are measured one after the other [default: by the
    /// fleet's size].
    #[arg(long, value_name = "MS,MS...")]
    pub slice: Option<String>,

    /// CPU threads that run VMs [default: one per core].
    #[arg(long, value_name = "K")]
    pub threads: Option<String>,

    /// Runs of each size; medians are shown [default: 1].
    #[arg(long, value_name = "K")]
    pub runs: Option<String>,

    /// After the boot, keep every VM's shell busy for so many seconds and measure; 0: don't [default: 3].
    #[arg(long, value_name = "SECONDS")]
    pub steady: Option<String>,

    /// Boot once more with a network, and ask all VMs for their page for so many seconds; 0: don't [default: 3].
    #[arg(long, value_name = "SECONDS")]
    pub http: Option<String>,

    /// Give up on a boot after so many seconds [default: 120].
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<String>,

    /// Another emulator to measure with the same guest on this machine: one process, and one for each core. May be
    /// repeated.
    #[arg(long = "peer", value_name = "semu|qemu=PATH")]
    pub peers: Vec<Peer>,

    /// Where the figures go [default: bench/results/DATE-bench.json].
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Another emulator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Which one.
    pub name: String,
    /// Its program.
    pub path: PathBuf,
}

impl std::str::FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name @ ("semu" | "qemu"), path)) if !path.is_empty() => {
                Ok(Self { name: name.into(), path: path.into() })
            }
            _ => Err("expected semu=PATH or qemu=PATH".into()),
        }
    }
}

/// `cargo xtask test`.
#[derive(Debug, Args)]
pub struct TestArgs {
    /// Skip what needs a guest image: seconds instead of minutes when none is built yet.
    #[arg(long)]
    pub no_guest: bool,

    /// Run the machine's tests once more with undefined behaviour trapped.
    #[arg(long)]
    pub sanitize: bool,

    /// Compare privileged programs with Spike too: a download of 210 MB, once.
    #[arg(long)]
    pub spike: bool,

    /// Install nothing; skip the tests whose tools are missing.
    #[arg(long)]
    pub no_install: bool,

    /// cpu: all that needs no GPU; cuda: the machine's tests on a GPU, and guests in lockstep with the CPU.
    #[arg(long, value_parser = ["cpu", "cuda"], default_value = "cpu")]
    pub backend: String,

    /// With --backend cuda: the GPU's engines to test.
    #[arg(long, value_name = "NAME,NAME...", value_delimiter = ',', default_value = "w")]
    pub engine: Vec<String>,

    /// With --backend cuda: test nothing, but make a folder that does it on a GPU machine without Rust or network (sh
    /// run.sh there).
    #[arg(long, value_name = "DIR")]
    pub archive: Option<PathBuf>,
}

/// As `until`.
fn web(text: &str) -> Result<String, String> {
    use std::net::{IpAddr, SocketAddr};
    let address = text.parse::<SocketAddr>().is_ok() || text.parse::<IpAddr>().is_ok();
    if text == "off" || text.parse::<u16>().is_ok() || address {
        return Ok(text.to_owned());
    }
    Err("expected off, a port, or an address as in 127.0.0.1:8080".to_owned())
}

/// The emulator reads the value; a mistake should not wait for it.
fn vm_count(text: &str) -> Result<String, String> {
    match text {
        "max" => Ok(text.into()),
        _ => match text.parse::<u32>() {
            Ok(1..) => Ok(text.into()),
            _ => Err("expected a number of VMs from 1 on, or max".into()),
        },
    }
}

fn until(text: &str) -> Result<String, String> {
    let seconds = text.parse::<f64>().is_ok_and(|seconds| (0.0..=1e9).contains(&seconds));
    match text {
        "ready" | "http" => Ok(text.to_owned()),
        _ if seconds => Ok(text.to_owned()),
        _ => Err("expected ready, http, or a number of seconds".to_owned()),
    }
}

//! The whole command line, in one place. A subcommand is a variant of `Command` with its arguments below, and an arm
//! of the match in main.rs.

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::image::profile::{BuilderName, Ram};

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
}

/// The builders on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Builder {
    /// From the distribution's source packages.
    Direct,
    /// By Buildroot (not in this release).
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

//! The builder `direct`: the guest from nothing but a Debian machine's packages.
//!
//! Compiler and binutils are the distribution's for riscv64, with a sysroot of our own for rv32ima and musl; kernel
//! and programs come from its source packages. Each piece is cached by what it was made of (store.rs). How a program is
//! built is told by a script in buildroot-external/package; this module only decides what is to be built, and when.

pub mod apt;
pub mod host;
pub mod kconfig;
#[cfg(test)]
mod lg_init;
pub mod make;
pub mod package;
mod plan;
pub mod share;
mod sources;
pub mod store;
mod version;

use std::path::{Path, PathBuf};

use super::error::Error;
use super::manifest::Input;
use super::request::Request;
use super::step::Progress;
use apt::{Archive, Want};
use plan::Plan;
use store::Store;

pub use package::names as package_names;

/// What was built, or was there.
#[derive(Debug)]
pub struct Built {
    /// The kernel Image.
    pub kernel: PathBuf,
    /// Folders that together are the root file system.
    pub roots: Vec<PathBuf>,
    /// All that it was made of.
    pub inputs: Vec<Input>,
}

/// Builds what is missing. With everything in the cache, neither apt nor the network is asked.
pub fn build(request: &Request) -> Result<Built, Error> {
    let folder = request.cache.join("direct");
    check_folder(&folder)?;
    let packages = package::closure(request.repo, request.packages)?;
    let store = Store::open(&folder)?;
    let codename = host::codename()?;
    let mut archive = Archive::open(&store, &codename);

    if let Some(plan) = Plan::new(request, &packages, &archive)?
        && let Some(built) = plan.find(&store)?
    {
        return Ok(built);
    }

    let mut progress = Progress::new(request.quiet);
    let logs = folder.join("logs");
    let _lock = store.lock(|| progress.say("waiting for another build that uses the same cache"))?;
    // The other build may have recorded or made something.
    archive = Archive::open(&store, &codename);
    check_space(&folder)?;
    let wants = wants(&packages);
    let host: Vec<(String, String)> =
        packages.iter().flat_map(|p| p.info.host.iter().map(|(a, b)| (a.clone(), b.clone()))).collect();
    let pip = wants.iter().any(|w| archive.may_need_pip(w));
    host::ensure(&mut progress, &logs.join("install.log"), &host::needs(&host), pip)?;

    // Recipes depend on what is taken, so that is settled first.
    let unknown: Vec<&Want> = wants.iter().filter(|w| archive.taken(w).is_none()).collect();
    if !unknown.is_empty() {
        progress.expect(1 + unknown.len() + packages.len() + 3);
        for want in unknown {
            archive.get(&mut progress, &logs, want)?;
        }
    }
    let settled = |archive: &Archive| {
        Plan::new(request, &packages, archive)?.ok_or_else(|| {
            Error::plain(
                "the cross compiler cannot be run",
                "Try `riscv64-linux-gnu-gcc --version`, and look why.",
            )
        })
    };
    let mut plan = settled(&archive)?;
    let missing = plan.missing(&store)?;
    // What was recorded may be gone from the store, and from the archive: then a newer version takes its place.
    let before = archive.record();
    for want in missing.wants(&plan) {
        archive.get(&mut progress, &logs, &want)?;
    }
    if archive.record() != before {
        plan = settled(&archive)?;
        for want in plan.missing(&store)?.wants(&plan) {
            archive.get(&mut progress, &logs, &want)?;
        }
    }
    progress.remaining(plan.missing(&store)?.steps());
    make::build(&plan, &store, &archive, &mut progress, &logs)
}

/// Sources that a build of these packages takes.
fn wants(packages: &[package::Package]) -> Vec<Want> {
    let sources = packages.iter().filter_map(|p| p.info.source.clone());
    let mut wants = vec![Want::Linux, Want::Musl];
    wants.extend(sources.map(Want::Source));
    wants
}

/// The kernel's build and configure scripts cannot bear some characters in paths.
pub fn check_folder(folder: &Path) -> Result<(), Error> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "/._-+@%=".contains(c);
    match folder.to_str().is_some_and(|f| f.chars().all(fine)) {
        true => Ok(()),
        false => Err(Error::plain(
            format!("nothing can be built in {}: make and configure stumble over its name", folder.display()),
            "Set XDG_CACHE_HOME to a folder whose path has only letters, digits and - . _ / in it.",
        )),
    }
}

/// What building the kernel takes at most, its source included.
const SPACE: u64 = 3 << 30;

fn check_space(folder: &Path) -> Result<(), Error> {
    check_space_of(folder, SPACE)
}

/// Checks that the disk of a folder, or of the nearest one above that exists, has room.
pub fn check_space_of(folder: &Path, need: u64) -> Result<(), Error> {
    let there = folder.ancestors().find(|f| f.exists()).unwrap_or(folder);
    let status = rustix::fs::statvfs(there).map_err(|e| Error::io("look at the disk of", there, e.into()))?;
    let free = status.f_bavail.saturating_mul(status.f_frsize);
    match free >= need {
        true => Ok(()),
        false => Err(Error::plain(
            format!(
                "the disk of {} has {} MB free, and building takes up to {} MB",
                folder.display(),
                free >> 20,
                need >> 20
            ),
            "Free some space there, or set XDG_CACHE_HOME to a folder on another disk.",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_that_make_cannot_bear_are_refused() {
        assert!(check_folder(Path::new("/home/me/.cache/linux-on-gpu/direct")).is_ok());
        for bad in ["/home/my self/x", "/a:b", "/a'b", "/ü"] {
            assert!(check_folder(Path::new(bad)).is_err(), "{bad}");
        }
    }
}

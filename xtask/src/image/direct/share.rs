//! What the builder `buildroot` takes from this one: the distribution's sources, and a cross compiler made of its
//! packages.

use std::path::{Path, PathBuf};

use super::super::buildroot::Options;
use super::super::error::Error;
use super::super::manifest::Input;
use super::super::request::Request;
use super::super::step::Progress;
use super::apt::{Archive, Taken, Want};
use super::plan::Plan;
use super::store::{Lock, Store};
use super::{check_folder, host, make};

/// The direct builder's cache.
#[derive(Debug)]
pub struct Shared {
    store: Store,
    archive: Archive,
    logs: PathBuf,
}

/// The cross compiler's key, its inputs, and the series of its kernel headers.
#[derive(Debug)]
pub struct ToolchainKey {
    /// Of the piece.
    pub key: String,
    /// What it is made of.
    pub inputs: Vec<Input>,
    /// As 6.1.
    pub headers: String,
}

impl Shared {
    /// Opens it; an error where the machine has no distribution's packages.
    pub fn open(cache: &Path) -> Result<Self, Error> {
        let folder = cache.join("direct");
        check_folder(&folder)?;
        let store = Store::open(&folder)?;
        let archive = Archive::open(&store, &host::codename()?);
        Ok(Self { store, archive, logs: folder.join("logs") })
    }

    /// Waits for other builds.
    pub fn lock(&self, progress: &Progress) -> Result<Lock, Error> {
        self.store.lock(|| progress.say("waiting for another build that uses the same cache"))
    }

    /// What was taken for a want.
    pub fn taken(&self, want: &Want) -> Option<&Taken> {
        self.archive.taken(want)
    }

    /// Whether getting these needs pip.
    pub fn may_need_pip(&self, wants: &[Want]) -> bool {
        wants.iter().any(|w| self.archive.may_need_pip(w))
    }

    /// The files of what was taken, if they are there.
    pub fn find(&self, want: &Want) -> Result<Option<PathBuf>, Error> {
        self.archive.find(want)
    }

    /// Gets a want's files.
    pub fn get(&mut self, progress: &mut Progress, want: &Want) -> Result<PathBuf, Error> {
        self.archive.get(progress, &self.logs, want)
    }

    /// The cross compiler's key, if its sources are settled and the distribution's compiler is installed.
    pub fn toolchain_key(&self, repo: &Path) -> Result<Option<ToolchainKey>, Error> {
        let request = request(repo, &self.store);
        Ok(Plan::new(&request, &[], &self.archive)?.map(|plan| ToolchainKey {
            key: plan.toolchain.key(),
            headers: plan.linux.series().to_owned(),
            inputs: plan.built(Path::new(""), Vec::new()).inputs,
        }))
    }

    /// Makes the cross compiler where it is not there.
    pub fn toolchain(&mut self, repo: &Path, progress: &mut Progress) -> Result<PathBuf, Error> {
        for want in [Want::Linux, Want::Musl] {
            if self.taken(&want).is_none() {
                self.get(progress, &want)?;
            }
        }
        let request = request(repo, &self.store);
        let settled = |archive: &Archive| {
            Plan::new(&request, &[], archive)?.ok_or_else(|| {
                Error::plain(
                    "the cross compiler cannot be run",
                    "Try `riscv64-linux-gnu-gcc --version`, and look why.",
                )
            })
        };
        let plan = settled(&self.archive)?;
        if let Some(files) = self.store.find("toolchain", &plan.toolchain)? {
            return Ok(files);
        }
        for want in [Want::Linux, Want::Musl] {
            self.archive.get(progress, &self.logs, &want)?;
        }
        // What could still be had may be another version.
        let plan = settled(&self.archive)?;
        make::toolchain(&plan, &self.store, &self.archive, progress, &self.logs)
    }
}

fn request<'a>(repo: &'a Path, store: &'a Store) -> Request<'a> {
    Request {
        packages: &[],
        kernel_fragments: &[],
        busybox_fragments: &[],
        repo,
        cache: store.root(),
        quiet: true,
        name: "",
        options: &Options::NONE,
    }
}

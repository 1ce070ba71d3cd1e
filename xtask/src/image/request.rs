//! What is asked of a builder.

use std::path::{Path, PathBuf};

use super::buildroot::Options;

/// Kernel and programs that are wanted, and where.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The profile's name; it names Buildroot's output folder.
    pub name: &'a str,
    /// Folders of buildroot-external/package.
    pub packages: &'a [String],
    /// Kernel fragments, the last one wins. The kernel series' own fragment (linux-6.1.config) comes by itself.
    pub kernel_fragments: &'a [PathBuf],
    /// busybox fragments, the last one wins.
    pub busybox_fragments: &'a [PathBuf],
    /// The repository.
    pub repo: &'a Path,
    /// Our cache folder.
    pub cache: &'a Path,
    /// Whether only errors and warnings are said.
    pub quiet: bool,
    /// What was said about Buildroot.
    pub options: &'a Options,
}

impl Request<'_> {
    /// Buildroot's folder in the cache.
    pub fn buildroot(&self) -> PathBuf {
        self.cache.join("buildroot")
    }
}

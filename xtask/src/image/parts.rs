//! What a builder gives: kernel, programs and the list of what they were made of.

use std::path::{Path, PathBuf};

use super::cache::Cache;
use super::error::Error;
use super::manifest::Input;
use super::profile::{BuilderName, Profile, names_in};
use super::request::Request;
use super::text::{Located, did_you_mean, list};
use super::tree::{self, Tree};
use super::{buildroot, direct};

/// The interpreter of /init, in every image.
const INIT_PACKAGE: &str = "lg-init";
/// Fragments that come by themselves, by the kernel's version.
const SERIES_PREFIX: &str = "linux-";

/// A builder's products.
#[derive(Debug)]
pub struct Parts {
    /// The kernel Image.
    pub image: Vec<u8>,
    /// Where the Image lies.
    pub image_path: PathBuf,
    /// The root file system: programs and what belongs to them.
    pub tree: Tree,
    /// Sources, fragments, patches and tools, with their hashes.
    pub inputs: Vec<Input>,
}

/// What a profile asks of the builder, found in the repository.
#[derive(Debug)]
pub struct Wanted {
    /// The profile's name.
    name: String,
    packages: Vec<String>,
    kernel_fragments: Vec<PathBuf>,
    busybox_fragments: Vec<PathBuf>,
}

impl Wanted {
    /// Looks for packages and fragments.
    pub fn find(root: &Path, profile: &Profile) -> Result<Self, Error> {
        let known = direct::package_names(root);
        let mut packages = vec![INIT_PACKAGE.to_owned()];
        for name in &profile.packages {
            if !known.contains(&name.value) {
                return Err(name.error(
                    format!("packages: there is no package `{}`", name.value),
                    format!(
                        "{}The packages are: {}. Each is a folder of buildroot-external/package/.",
                        did_you_mean(&name.value, &known),
                        list(&known)
                    ),
                ));
            }
            if name.value != INIT_PACKAGE {
                packages.push(name.value.clone());
            }
        }
        Ok(Self {
            name: profile.name.clone(),
            packages,
            kernel_fragments: fragments(root, "kernel", &profile.kernel_fragments)?,
            busybox_fragments: fragments(root, "busybox", &profile.busybox_fragments)?,
        })
    }

    /// Packages, kernel fragments and busybox fragments.
    pub fn lists(&self) -> (&[String], &[PathBuf], &[PathBuf]) {
        (&self.packages, &self.kernel_fragments, &self.busybox_fragments)
    }

    /// What is asked of a builder.
    pub fn request<'a>(
        &'a self,
        root: &'a Path,
        cache: &'a Cache,
        quiet: bool,
        options: &'a buildroot::Options,
    ) -> Request<'a> {
        Request {
            name: &self.name,
            packages: &self.packages,
            kernel_fragments: &self.kernel_fragments,
            busybox_fragments: &self.busybox_fragments,
            repo: root,
            cache: cache.root(),
            quiet,
            options,
        }
    }

    /// Builds what is missing.
    pub fn build(
        &self,
        root: &Path,
        cache: &Cache,
        builder: BuilderName,
        quiet: bool,
        options: &buildroot::Options,
    ) -> Result<Parts, Error> {
        let request = self.request(root, cache, quiet, options);
        let built = match builder {
            BuilderName::Buildroot => buildroot::build(&request)?,
            BuilderName::Direct => direct::build(&request)?,
        };
        let image = std::fs::read(&built.kernel).map_err(|e| Error::io("read", &built.kernel, e))?;
        let mut tree = Tree::new();
        for folder in &built.roots {
            // Links of programs are the guest's: absolute ones are fine.
            for (path, node) in tree::read_folder(folder, &|_, _| Ok(()))? {
                match tree.get(&path) {
                    Some(old) if old.is_folder() && node.is_folder() => {}
                    Some(old) if *old != node => {
                        return Err(Error::plain(
                            format!("two packages bring /{path}: {} and {}", old.describe(), node.describe()),
                            "Let only one of them install it (buildroot-external/package/*/direct.sh).",
                        ));
                    }
                    _ => drop(tree.insert(path, node)),
                }
            }
        }
        Ok(Parts { image, image_path: built.kernel, tree, inputs: built.inputs })
    }
}

/// The files of configuration fragments.
fn fragments(root: &Path, kind: &str, names: &[Located<String>]) -> Result<Vec<PathBuf>, Error> {
    let folder = root.join("buildroot-external").join(kind);
    let known = names_in(&folder, |p| {
        let name = p.file_name()?.to_str()?.strip_suffix(".config")?;
        (!name.starts_with(SERIES_PREFIX)).then(|| name.to_owned())
    });
    let find = |name: &Located<String>| match known.contains(&name.value) {
        true => Ok(folder.join(format!("{}.config", name.value))),
        false => Err(name.error(
            format!("{kind}_fragments: there is no fragment `{}`", name.value),
            format!(
                "{}The fragments are: {}. Each is a file buildroot-external/{kind}/NAME.config.",
                did_you_mean(&name.value, &known),
                list(&known)
            ),
        )),
    };
    names.iter().map(find).collect()
}

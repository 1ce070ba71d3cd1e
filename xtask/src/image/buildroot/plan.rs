//! What an image by Buildroot is made of. Nothing here starts anything.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::super::direct::Built;
use super::super::direct::apt::Want;
use super::super::direct::kconfig::{self, Fragment, Setting};
use super::super::direct::package::{self, Package};
use super::super::direct::share::{Shared, ToolchainKey};
use super::super::direct::store::{Recipe, Store};
use super::super::error::Error;
use super::super::manifest::Input;
use super::super::request::Request;
use super::Sources;
use super::config::{Defconfig, Kernel, Toolchain, Wanted};
use super::release::TreeId;
use super::route::Inputs;

/// Raised whenever the builder makes other bytes from the same inputs.
const VERSION: &str = "1";
/// About how long the kernel takes on two cores.
const LINUX_SECONDS: u64 = 200;
/// About how long Buildroot's own compiler takes on two cores.
const COMPILER_SECONDS: [(&str, u64); 3] =
    [("host-binutils", 150), ("host-gcc-initial", 700), ("host-gcc-final", 900)];
/// Not a package, but what Buildroot does when all of them are installed.
pub const AFTER: &str = "(after all packages)";
/// What of our tree shapes every package.
const SHARED: &[&str] =
    &["external.mk", "external.desc", "Config.in", "board/skeleton", "support", "buildroot/machine.mk"];

/// The inputs of an image, settled.
#[derive(Debug)]
pub struct Plan {
    /// Which Buildroot.
    pub id: TreeId,
    /// The packages, each after what it needs.
    pub packages: Vec<Package>,
    /// Of the finished image.
    pub recipe: Recipe,
    /// What decides how a build goes on.
    pub route_inputs: Inputs,
    /// About how many seconds each package takes.
    pub weights: BTreeMap<String, u64>,
    inputs: Vec<Input>,
}

impl Plan {
    /// `None` where a source is not settled, or no compiler is installed.
    pub fn new(
        request: &Request,
        id: &TreeId,
        shared: Option<&Shared>,
        sources: Sources,
    ) -> Result<Option<Self>, Error> {
        let packages = package::closure(request.repo, request.packages)?;
        let mut inputs = vec![Input {
            name: "buildroot".to_owned(),
            version: Some(id.version.clone()),
            sha256: id.hash.clone(),
        }];
        let mut base = Recipe::default();
        base.add("builder", VERSION);
        base.add("buildroot", &id.hash);
        base.add("sources", &format!("{sources:?}"));
        let toolchain: Option<ToolchainKey> = match (request.options.toolchain(), shared) {
            (Toolchain::Internal, _) => None,
            (Toolchain::External, None) => return Ok(None),
            (Toolchain::External, Some(shared)) => match shared.toolchain_key(request.repo)? {
                None => return Ok(None),
                some => some,
            },
        };
        base.add("toolchain", toolchain.as_ref().map_or("internal", |t| &t.key));
        inputs.extend(toolchain.iter().flat_map(|t| t.inputs.iter().cloned()));
        let external = request.repo.join("buildroot-external");
        base.add_folder("toolchain", &external.join("buildroot/toolchain"), |_| false)?;
        for name in SHARED {
            let path = external.join(name);
            match path.is_dir() {
                true => base.add_folder(name, &path, is_text)?,
                false => base.add(name, &read(&path)?),
            }
        }

        let kernel = match (sources, shared.and_then(|s| s.taken(&Want::Linux))) {
            (Sources::Distribution, None) => return Ok(None),
            (Sources::Distribution, Some(taken)) => {
                Kernel::Archive { path: "linux.tar.xz".into(), series: taken.series().to_owned() }
            }
            _ => Kernel::Release,
        };
        let defconfig = Defconfig::new(&wanted(request), request.options.toolchain(), &kernel)?;
        let base_piece = read(&external.join("buildroot/base.config"))?;
        base.add("base.config", &base_piece);

        let mut own: BTreeMap<String, Recipe> = BTreeMap::new();
        for package in &packages {
            let mut recipe = Recipe::default();
            if let Some((_, text)) = defconfig.packages.iter().find(|(name, _)| *name == package.name) {
                recipe.add("settings", text);
            }
            if let (Sources::Distribution, Some(name)) = (sources, &package.info.source) {
                let Some(taken) = shared.and_then(|s| s.taken(&Want::Source(name.clone()))) else {
                    return Ok(None);
                };
                recipe.add("source", &taken.summary());
                if !package.info.patched {
                    recipe.add("patched", "no");
                }
                add_taken(&mut inputs, taken);
            }
            match package.folder.join("Config.in").is_file() {
                true => recipe.add_folder("package", &package.folder, is_text)?,
                false => recipe.add_folder("package", &package.folder, |path| !path.ends_with(".mk"))?,
            }
            own.insert(package.name.clone(), recipe);
        }
        let mut linux = Recipe::default();
        match (&kernel, shared.and_then(|s| s.taken(&Want::Linux))) {
            (Kernel::Archive { .. }, Some(taken)) => {
                linux.add("source", &taken.summary());
                if toolchain.is_none() {
                    add_taken(&mut inputs, taken);
                }
            }
            _ => {
                linux.add("release", &read(&external.join("buildroot/linux-release.config"))?);
                linux.add_folder("patches", &external.join("patches"), is_text)?;
            }
        }
        linux.add("fast", &read(&external.join("kernel/fast.mk"))?);
        own.insert("linux".to_owned(), linux);
        let mut after = Recipe::default();
        after.add("script", &read(&external.join("board/post-build.sh"))?);
        own.insert(AFTER.to_owned(), after);

        let mut fragments = BTreeMap::new();
        let series = external.join(format!("kernel/linux-{}.config", super::config::series(&kernel)));
        let first: Vec<PathBuf> = series.is_file().then_some(series).into_iter().collect();
        let paths: Vec<PathBuf> = first.into_iter().chain(request.kernel_fragments.iter().cloned()).collect();
        fragments.insert("linux".to_owned(), settings(request.repo, &paths, &mut inputs)?);
        if own.contains_key("busybox") {
            let settings = settings(request.repo, request.busybox_fragments, &mut inputs)?;
            fragments.insert("busybox".to_owned(), settings);
        }

        let mut recipe = Recipe::default();
        recipe.add("base", &base.key());
        recipe.add("defconfig", &defconfig.text());
        for (name, part) in &own {
            recipe.add(name, &part.key());
        }
        for (name, settings) in &fragments {
            recipe.add(&format!("fragments of {name}"), &kconfig::text(settings));
        }
        for name in ["external.mk", "buildroot/base.config", "board/post-build.sh", "kernel/fast.mk"] {
            let path = external.join(name);
            inputs.push(Input {
                name: format!("buildroot-external/{name}"),
                version: None,
                sha256: hex::encode(Sha256::digest(read(&path)?.as_bytes())),
            });
        }
        inputs.sort();
        inputs.dedup();
        let base_text = format!(
            "Buildroot {}, {} and {} ({})",
            id.version,
            match sources {
                Sources::Distribution => "the distribution's sources",
                _ => "released sources",
            },
            match toolchain {
                Some(_) => "the distribution's compiler",
                None => "its own compiler",
            },
            base.key().get(..8).unwrap_or_default(),
        );
        let key = |settings: &Vec<Setting>| hex::encode(Sha256::digest(kconfig::text(settings).as_bytes()));
        let route_inputs = Inputs {
            base: base.key(),
            base_text,
            distribution: sources == Sources::Distribution,
            defconfig: hex::encode(Sha256::digest(defconfig.text().as_bytes())),
            packages: own.iter().map(|(name, recipe)| (name.clone(), recipe.key())).collect(),
            fragments: fragments.iter().map(|(name, settings)| (name.clone(), key(settings))).collect(),
        };
        let mut weights: BTreeMap<String, u64> =
            packages.iter().map(|p| (p.name.clone(), p.info.seconds)).collect();
        weights.insert("linux".to_owned(), LINUX_SECONDS);
        if toolchain.is_none() {
            weights.extend(COMPILER_SECONDS.map(|(name, seconds)| (name.to_owned(), seconds)));
        }
        Ok(Some(Self { id: id.clone(), packages, recipe, route_inputs, weights, inputs }))
    }

    /// The image, if it is there and sound.
    pub fn find(&self, store: &Store) -> Result<Option<Built>, Error> {
        Ok(store.find("image", &self.recipe)?.map(|files| self.built(&files)))
    }

    /// The image, from its place in the store.
    pub fn built(&self, files: &Path) -> Built {
        Built { kernel: files.join("Image"), roots: vec![files.join("root")], inputs: self.inputs.clone() }
    }

    /// Where Buildroot works.
    pub fn output(&self, request: &Request) -> PathBuf {
        output(request)
    }
}

/// The output folder of a profile.
pub fn output(request: &Request) -> PathBuf {
    let kind = match request.options.toolchain() {
        Toolchain::External => "",
        Toolchain::Internal => "-internal",
    };
    request.buildroot().join("out").join(format!("{}{kind}", request.name))
}

/// What the defconfig is made for.
pub fn wanted<'a>(request: &Request<'a>) -> Wanted<'a> {
    Wanted {
        repo: request.repo,
        packages: request.packages,
        kernel_fragments: request.kernel_fragments,
        busybox_fragments: request.busybox_fragments,
    }
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|e| Error::io("read", path, e))
}

/// Files that say nothing to a build.
fn is_text(path: &str) -> bool {
    path.ends_with(".md") || path.ends_with("package.yaml") || path.ends_with("direct.sh")
}

fn add_taken(inputs: &mut Vec<Input>, taken: &super::super::direct::apt::Taken) {
    for (name, sum) in &taken.files {
        inputs.push(Input { name: name.clone(), version: Some(taken.version.clone()), sha256: sum.clone() });
    }
}

fn settings(repo: &Path, paths: &[PathBuf], inputs: &mut Vec<Input>) -> Result<Vec<Setting>, Error> {
    let fragments: Vec<Fragment> = paths.iter().map(|p| Fragment::read(repo, p)).collect::<Result<_, _>>()?;
    for fragment in &fragments {
        inputs.push(Input {
            name: fragment.name.display().to_string(),
            version: None,
            sha256: hex::encode(Sha256::digest(fragment.text.as_bytes())),
        });
    }
    kconfig::settings(&fragments)
}

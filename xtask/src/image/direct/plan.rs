//! What is made of what: the pieces of a request and their recipes. Nothing here needs the sources to be there.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::super::error::Error;
use super::super::manifest::Input;
use super::super::request::Request;
use super::Built;
use super::apt::{Archive, Taken, Want};
use super::host;
use super::kconfig::{self, Fragment, Setting};
use super::package::Package;
use super::store::{Recipe, Store};

/// Raised whenever the builder makes other bytes from the same inputs.
const VERSION: &str = "1";
/// blake2s' self-test costs each boot about six million instructions. It runs unless tests are off in a part of the
/// configuration (CRYPTO) that is off as a whole here, so no fragment can say it.
pub const KCFLAGS: &str = "KCFLAGS=-DCONFIG_CRYPTO_MANAGER_DISABLE_TESTS=1";
/// What make reads first in the kernel's tree: which objects are compiled for speed. Below buildroot-external/.
pub const FAST: &str = "kernel/fast.mk";

/// The pieces of a request and their recipes.
pub struct Plan<'a> {
    /// The repository.
    pub repo: &'a Path,
    /// The packages, each after what it needs.
    pub packages: &'a [Package],
    /// The kernel's source.
    pub linux: Taken,
    /// The C library's source.
    pub musl: Taken,
    /// The recipe of the cross toolchain.
    pub toolchain: Recipe,
    /// The recipe of the kernel.
    pub kernel: Recipe,
    /// What its configuration must hold.
    pub kernel_settings: Vec<Setting>,
    /// What busybox' configuration must hold.
    pub busybox_settings: Vec<Setting>,
    /// The packages' recipes, in the order of the packages.
    pub recipes: Vec<Recipe>,
    inputs: Vec<Input>,
}

/// What is not in the store yet.
#[derive(Debug, Default)]
pub struct Missing {
    /// The kernel.
    pub kernel: bool,
    /// The toolchain, and a package that is to be built with it.
    pub toolchain: bool,
    /// Packages, in the order of the plan.
    pub packages: Vec<bool>,
}

impl<'a> Plan<'a> {
    /// `None` where a source is not settled, or the compilers are not installed.
    pub fn new(
        request: &Request<'a>,
        packages: &'a [Package],
        archive: &Archive,
    ) -> Result<Option<Self>, Error> {
        let (Some(linux), Some(musl)) = (archive.taken(&Want::Linux), archive.taken(&Want::Musl)) else {
            return Ok(None);
        };
        let Some((tools, mut inputs)) = tools()? else { return Ok(None) };
        add_taken(&mut inputs, linux);
        add_taken(&mut inputs, musl);
        let external = request.repo.join("buildroot-external");

        let scripts = external.join("direct");
        let mut toolchain = tools.clone();
        toolchain.add("musl", &musl.summary());
        toolchain.add("headers", &linux.summary());
        toolchain.add_folder("script", &scripts.join("toolchain"), is_text)?;
        add_folder(&mut inputs, request.repo, &scripts)?;

        let mut fragments = Vec::new();
        let series = external.join(format!("kernel/linux-{}.config", linux.series()));
        if series.is_file() {
            // Before the profile's, which may decide otherwise.
            fragments.push(Fragment::read(request.repo, &series)?);
        }
        let kernel_settings = settings(request.repo, fragments, request.kernel_fragments, &mut inputs)?;
        let mut kernel = tools;
        kernel.add("linux", &linux.summary());
        kernel.add("settings", &kconfig::text(&kernel_settings));
        kernel.add("flags", KCFLAGS);
        let fast = external.join(FAST);
        kernel.add("fast", &fs::read_to_string(&fast).map_err(|e| Error::io("read", &fast, e))?);
        inputs.push(input(&format!("buildroot-external/{FAST}"), None, &fast)?);

        let busybox_settings = settings(request.repo, Vec::new(), request.busybox_fragments, &mut inputs)?;

        let path = scripts.join("env.sh");
        let environment = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        let mut recipes: Vec<Recipe> = Vec::new();
        for package in packages {
            let mut recipe = Recipe::default();
            recipe.add("toolchain", &toolchain.key());
            recipe.add("environment", &environment);
            if let Some(source) = &package.info.source {
                let Some(taken) = archive.taken(&Want::Source(source.clone())) else { return Ok(None) };
                recipe.add("source", &taken.summary());
                add_taken(&mut inputs, taken);
            }
            for (other, made) in packages.iter().zip(&recipes) {
                if package.info.needs.contains(&other.name) {
                    recipe.add(&other.name, &made.key());
                }
            }
            if package.info.kconfig {
                recipe.add("settings", &kconfig::text(&busybox_settings));
            }
            recipe.add_folder("script", &package.folder, is_text)?;
            add_folder(&mut inputs, request.repo, &package.folder)?;
            recipes.push(recipe);
        }
        Ok(Some(Self {
            repo: request.repo,
            packages,
            linux: linux.clone(),
            musl: musl.clone(),
            toolchain,
            kernel,
            kernel_settings,
            busybox_settings,
            recipes,
            inputs,
        }))
    }

    /// The products, if all of them are there and sound.
    pub fn find(&self, store: &Store) -> Result<Option<Built>, Error> {
        let Some(kernel) = store.find("kernel", &self.kernel)? else { return Ok(None) };
        let mut roots = Vec::new();
        for (package, recipe) in self.packages.iter().zip(&self.recipes) {
            if package.info.image {
                let Some(root) = store.find(&package.name, recipe)? else { return Ok(None) };
                roots.push(root);
            }
        }
        Ok(Some(self.built(&kernel, roots)))
    }

    /// The products, from their places in the store.
    pub fn built(&self, kernel: &Path, roots: Vec<PathBuf>) -> Built {
        Built { kernel: kernel.join("Image"), roots, inputs: self.inputs.clone() }
    }

    /// What is to be made. A package that is not for the image counts only if another one needs it now.
    pub fn missing(&self, store: &Store) -> Result<Missing, Error> {
        let mut packages = vec![false; self.packages.len()];
        for (i, package) in self.packages.iter().enumerate().rev() {
            let wanted = package.info.image
                || self
                    .packages
                    .iter()
                    .zip(&packages)
                    .any(|(p, missing)| *missing && p.info.needs.contains(&package.name));
            packages[i] = wanted && store.find(&package.name, &self.recipes[i])?.is_none();
        }
        let toolchain = packages.contains(&true) && store.find("toolchain", &self.toolchain)?.is_none();
        Ok(Missing { kernel: store.find("kernel", &self.kernel)?.is_none(), toolchain, packages })
    }
}

impl Missing {
    /// The sources of what is missing.
    pub fn wants(&self, plan: &Plan) -> Vec<Want> {
        let mut wants = Vec::new();
        if self.kernel || self.toolchain {
            wants.push(Want::Linux);
        }
        if self.toolchain {
            wants.push(Want::Musl);
        }
        for (package, missing) in plan.packages.iter().zip(&self.packages) {
            if let (true, Some(source)) = (missing, &package.info.source) {
                wants.push(Want::Source(source.clone()));
            }
        }
        wants
    }

    /// How many steps making it takes.
    pub fn steps(&self) -> usize {
        let unpack = usize::from(self.kernel || self.toolchain);
        let packages = self.packages.iter().filter(|m| **m).count();
        unpack + usize::from(self.kernel) + usize::from(self.toolchain) + packages
    }
}

/// Files that say nothing to this builder: changing them makes nothing anew.
fn is_text(path: &str) -> bool {
    [".md", ".mk", "package.yaml", "Config.in", "buildroot.config"].iter().any(|end| path.ends_with(end))
}

/// The compilers that everything depends on, as recipe and inputs; `None` where one is not installed.
fn tools() -> Result<Option<(Recipe, Vec<Input>)>, Error> {
    let mut recipe = Recipe::default();
    let mut inputs = Vec::new();
    recipe.add("builder", VERSION);
    for program in ["riscv64-linux-gnu-gcc", "riscv64-linux-gnu-ld"] {
        let Some(path) = host::find(program) else { return Ok(None) };
        let Some(line) = first_line(&path, "--version") else { return Ok(None) };
        recipe.add(program, &line);
        inputs.push(input(program, Some(line), &path)?);
    }
    let Some(path) = host::find("riscv64-unknown-elf-gcc") else { return Ok(None) };
    let options = ["-march=rv32im", "-mabi=ilp32", "-print-libgcc-file-name"];
    let Ok(libgcc) = quietly(&path, options).stderr_null().read() else { return Ok(None) };
    let libgcc = input("libgcc.a (rv32im/ilp32)", first_line(&path, "--version"), Path::new(libgcc.trim()))?;
    recipe.add("libgcc", &libgcc.sha256);
    inputs.push(libgcc);
    Ok(Some((recipe, inputs)))
}

fn quietly<const N: usize>(program: &Path, words: [&str; N]) -> duct::Expression {
    duct::cmd(program, words).env("LC_ALL", "C").stdin_null()
}

fn first_line(program: &Path, option: &str) -> Option<String> {
    let text = quietly(program, [option]).stderr_null().read().ok()?;
    text.lines().next().map(str::to_owned)
}

fn input(name: &str, version: Option<String>, path: &Path) -> Result<Input, Error> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    Ok(Input { name: name.to_owned(), version, sha256: hex::encode(Sha256::digest(bytes)) })
}

fn add_taken(inputs: &mut Vec<Input>, taken: &Taken) {
    for (name, sum) in &taken.files {
        let version = Some(taken.version.clone());
        inputs.push(Input { name: name.clone(), version, sha256: sum.clone() });
    }
}

/// Adds a folder's files to the inputs, named as in the repository.
fn add_folder(inputs: &mut Vec<Input>, repo: &Path, folder: &Path) -> Result<(), Error> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .and_then(|d| d.map(|e| e.map(|e| e.path())).collect())
        .map_err(|e| Error::io("read the folder", folder, e))?;
    entries.sort();
    for path in entries {
        let name = path.strip_prefix(repo).unwrap_or(&path).display().to_string();
        if path.is_dir() {
            add_folder(inputs, repo, &path)?;
        } else if !is_text(&name) {
            inputs.push(input(&name, None, &path)?);
        }
    }
    Ok(())
}

/// Reads fragments after those that are given, and adds them all to the inputs.
fn settings(
    repo: &Path,
    mut fragments: Vec<Fragment>,
    paths: &[PathBuf],
    inputs: &mut Vec<Input>,
) -> Result<Vec<Setting>, Error> {
    for path in paths {
        fragments.push(Fragment::read(repo, path)?);
    }
    for fragment in &fragments {
        let name = fragment.name.display().to_string();
        let sha256 = hex::encode(Sha256::digest(fragment.text.as_bytes()));
        inputs.push(Input { name, version: None, sha256 });
    }
    kconfig::settings(&fragments)
}

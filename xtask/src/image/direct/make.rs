//! How each piece is made.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use duct::Expression;

use super::super::error::Error;
use super::super::step::{Progress, Step};
use super::Built;
use super::apt::{Archive, Want};
use super::host;
use super::kconfig;
use super::package::Package;
use super::plan::{FAST, KCFLAGS, Plan};
use super::store::{Recipe, Store};

/// 2026-01-01: no build may know the real date.
const DATE: &str = "1767225600";
/// Parts of the kernel's source that no configuration of ours reads; their Kconfig files stay. Halves the unpacking.
const LEFT_OUT: &[&str] = &[
    "*/Documentation/*/*",
    "*/drivers/gpu/drm/*.[ch]",
    "*/drivers/infiniband/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/drivers/scsi/*.[ch]",
    "*/drivers/staging/*.[ch]",
    "*/sound/*.[ch]",
    "*/tools/perf/*",
    "*/tools/testing/*",
];

/// Everything that making a piece needs.
struct Maker<'a> {
    plan: &'a Plan<'a>,
    store: &'a Store,
    archive: &'a Archive,
    logs: &'a Path,
    jobs: usize,
}

/// Makes what is missing of a plan. The sources must be there.
pub fn build(
    plan: &Plan,
    store: &Store,
    archive: &Archive,
    progress: &mut Progress,
    logs: &Path,
) -> Result<Built, Error> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let maker = Maker { plan, store, archive, logs, jobs };
    let missing = plan.missing(store)?;
    let tree = (missing.kernel || missing.toolchain).then(|| maker.unpack_linux(progress)).transpose()?;
    let tree = tree.as_ref().map(tempfile::TempDir::path);
    let toolchain = match missing.packages.contains(&true) {
        true => Some(maker.piece("toolchain", &plan.toolchain, || maker.toolchain(progress, tree))?),
        false => None,
    };
    let kernel = maker.piece("kernel", &plan.kernel, || maker.kernel(progress, tree))?;
    let mut files: Vec<PathBuf> = Vec::new();
    let mut roots = Vec::new();
    for ((package, recipe), missing) in plan.packages.iter().zip(&plan.recipes).zip(&missing.packages) {
        let made = match (missing, &toolchain) {
            (true, Some(toolchain)) => maker.package(progress, package, recipe, toolchain, &files)?,
            _ => store.find(&package.name, recipe)?.unwrap_or_default(),
        };
        if package.info.image {
            roots.push(made.clone());
        }
        files.push(made);
    }
    Ok(plan.built(&kernel, roots))
}

/// The cross toolchain of a plan, made if it is not there. Its sources must be there.
pub fn toolchain(
    plan: &Plan,
    store: &Store,
    archive: &Archive,
    progress: &mut Progress,
    logs: &Path,
) -> Result<PathBuf, Error> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let maker = Maker { plan, store, archive, logs, jobs };
    if let Some(files) = store.find("toolchain", &plan.toolchain)? {
        return Ok(files);
    }
    let tree = maker.unpack_linux(progress)?;
    maker.toolchain(progress, Some(tree.path()))
}

impl Maker<'_> {
    /// A piece that is there, or is made.
    fn piece(
        &self,
        name: &str,
        recipe: &Recipe,
        make: impl FnOnce() -> Result<PathBuf, Error>,
    ) -> Result<PathBuf, Error> {
        match self.store.find(name, recipe)? {
            Some(files) => Ok(files),
            None => make(),
        }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// About how long something takes that takes this long on two cores.
    fn expect(&self, seconds: u64) -> Duration {
        let cores = u64::try_from(self.jobs).unwrap_or(2).min(8);
        Duration::from_secs((seconds * 2 / cores).max(seconds / 3))
    }

    fn source(&self, want: &Want) -> Result<PathBuf, Error> {
        self.archive.find(want)?.ok_or_else(|| {
            Error::plain(
                format!("the source of {} is gone from the cache", want.name()),
                "Run the command again.",
            )
        })
    }

    fn unpack_linux(&self, progress: &mut Progress) -> Result<tempfile::TempDir, Error> {
        let folder = self.store.scratch("linux")?;
        let files = self.source(&Want::Linux)?;
        let title = format!("unpack linux {}", self.plan.linux.version);
        progress.step(&title, Duration::from_secs(15), &self.log("unpack-linux"), |step| {
            let deb = only_file(&files, ".deb")?;
            let tar = |words: Vec<OsString>| duct::cmd("tar", words).env("LC_ALL", "C");
            let mut words: Vec<OsString> =
                ["--extract", "--xz", "--strip-components=1", "--file=-", "-C"].map(Into::into).to_vec();
            words.push(folder.path().into());
            words.extend(LEFT_OUT.iter().map(|l| format!("--exclude={l}").into()));
            let inner =
                ["--extract", "--to-stdout", "--wildcards", "--file=-", "./usr/src/linux-source-*.tar.xz"];
            let pipe = duct::cmd!("dpkg-deb", "--fsys-tarfile", deb)
                .pipe(tar(inner.map(Into::into).to_vec()))
                .pipe(tar(words));
            step.run("unpack the kernel's source", pipe)
        })?;
        Ok(folder)
    }

    fn toolchain(&self, progress: &mut Progress, tree: Option<&Path>) -> Result<PathBuf, Error> {
        let tree = tree.ok_or_else(no_tree)?;
        let musl = self.source(&Want::Musl)?;
        let scratch = self.store.scratch("toolchain")?;
        let work = new_folder(scratch.path(), "work")?;
        let tools = copy_folder(
            &self.plan.repo.join("buildroot-external/direct/toolchain"),
            &scratch.path().join("tools"),
        )?;
        progress.step("toolchain", self.expect(55), &self.log("toolchain"), |step| {
            self.store.make("toolchain", &self.plan.toolchain, |out| {
                let unpacked = scratch.path().join("musl");
                let source = match self.plan.musl.is_wheel() {
                    true => {
                        step.run("unpack musl", unzip(&only_file(&musl, ".whl")?, &unpacked))?;
                        unpacked.join("ziglang/lib/libc")
                    }
                    false => {
                        step.run("unpack musl", unpack_source(&musl, &unpacked)?)?;
                        unpacked.clone()
                    }
                };
                let make = self.kernel_make(tree).after("headers");
                step.run("make the kernel's headers", make)?;
                let headers = tree.join("usr/include");
                let own: [(&str, &Path); 4] =
                    [("OUT", out), ("TOOLS", &tools), ("MUSL", &source), ("HEADERS", &headers)];
                let mut environment = self.environment(None, scratch.path());
                environment.extend(own.map(|(name, path)| (name.into(), path.into())));
                let child = duct::cmd!("sh", tools.join("build.sh")).dir(&work).full_env(environment);
                step.run("build musl", child)
            })
        })
    }

    /// The environment of every child: nothing of the user's can change what comes out.
    fn environment(&self, toolchain: Option<&Path>, home: &Path) -> Vec<(OsString, OsString)> {
        let mut path = OsString::new();
        if let Some(toolchain) = toolchain {
            path.push(toolchain.join("bin"));
            path.push(":");
        }
        path.push(host::PATH);
        let mut all: Vec<(OsString, OsString)> = vec![
            ("PATH".into(), path),
            ("HOME".into(), home.into()),
            ("LC_ALL".into(), "C".into()),
            ("TZ".into(), "UTC".into()),
            ("SOURCE_DATE_EPOCH".into(), DATE.into()),
            ("JOBS".into(), self.jobs.to_string().into()),
        ];
        if let Some(folder) = std::env::var_os("TMPDIR") {
            all.push(("TMPDIR".into(), folder));
        }
        all
    }

    fn kernel_make(&self, tree: &Path) -> KernelMake {
        let mut environment = self.environment(None, tree);
        let fixed = [
            ("KBUILD_BUILD_TIMESTAMP", format!("@{DATE}").as_str()),
            ("KBUILD_BUILD_USER", "lg"),
            ("KBUILD_BUILD_HOST", "lg"),
            ("KBUILD_BUILD_VERSION", "1"),
        ]
        .map(|(name, value)| (OsString::from(name), OsString::from(value)));
        environment.extend(fixed);
        environment.push(("KCONFIG_ALLCONFIG".into(), tree.join(KernelMake::FRAGMENT).into()));
        let fast = self.plan.repo.join("buildroot-external").join(FAST);
        environment.push(("MAKEFILES".into(), fast.into()));
        KernelMake { tree: tree.to_owned(), jobs: self.jobs, environment }
    }

    fn kernel(&self, progress: &mut Progress, tree: Option<&Path>) -> Result<PathBuf, Error> {
        let tree = tree.ok_or_else(no_tree)?;
        let title = format!("linux {}", self.plan.linux.version);
        progress.step(&title, self.expect(200), &self.log("kernel"), |step| {
            self.store.make("kernel", &self.plan.kernel, |out| {
                let make = self.kernel_make(tree);
                let all = tree.join(KernelMake::FRAGMENT);
                let settings = kconfig::text(&self.plan.kernel_settings);
                fs::write(&all, settings).map_err(|e| Error::io("write", &all, e))?;
                step.run("configure", make.after("allnoconfig"))?;
                let config = tree.join(".config");
                let text = fs::read_to_string(&config).map_err(|e| Error::io("read", &config, e))?;
                let what = format!("the configuration of linux {}", self.plan.linux.version);
                kconfig::check(&what, &self.plan.kernel_settings, &text)?;
                step.run("build the kernel", make.after("Image"))?;
                copy(&tree.join("arch/riscv/boot/Image"), &out.join("Image"))?;
                copy(&config, &out.join("config"))
            })
        })
    }

    fn package(
        &self,
        progress: &mut Progress,
        package: &Package,
        recipe: &Recipe,
        toolchain: &Path,
        others: &[PathBuf],
    ) -> Result<PathBuf, Error> {
        let scratch = self.store.scratch(&package.name)?;
        let folder = copy_folder(&package.folder, &scratch.path().join("package"))?;
        let environment = scratch.path().join("env.sh");
        copy(&self.plan.repo.join("buildroot-external/direct/env.sh"), &environment)?;
        let mut title = package.name.clone();
        let mut source = None;
        if let Some(name) = &package.info.source {
            let want = Want::Source(name.clone());
            source = Some(self.source(&want)?);
            if let Some(taken) = self.archive.taken(&want) {
                title = format!("{title} {}", taken.version);
            }
        }
        progress.step(&title, self.expect(package.info.seconds), &self.log(&package.name), |step| {
            self.store.make(&package.name, recipe, |out| {
                let work = scratch.path().join("source");
                match &source {
                    Some(files) => step.run("unpack the source", unpack_source(files, &work)?)?,
                    None => fs::create_dir(&work).map_err(|e| Error::io("make the folder", &work, e))?,
                }
                let mut all = self.environment(Some(toolchain), scratch.path());
                let own: [(&str, &Path); 3] = [("ENVIRONMENT", &environment), ("PKG", &folder), ("OUT", out)];
                all.extend(own.map(|(name, path)| (name.into(), path.into())));
                for (other, files) in self.plan.packages.iter().zip(others) {
                    if package.info.needs.contains(&other.name) {
                        all.push((format!("DEP_{}", other.name.replace('-', "_")).into(), files.into()));
                    }
                }
                let child = |script: &str| {
                    duct::cmd!("sh", "-e", "-u", "-c", script).dir(&work).full_env(all.iter().cloned())
                };
                if package.info.kconfig {
                    self.configure(step, package, &work, &child)?;
                }
                step.run("build", child(". \"$ENVIRONMENT\"; . \"$PKG/direct.sh\""))
            })
        })
    }

    /// busybox' Kconfig reads no fragments: they are laid over its smallest configuration, and what becomes visible by
    /// that is declined.
    fn configure(
        &self,
        step: &Step,
        package: &Package,
        work: &Path,
        child: &dyn Fn(&str) -> Expression,
    ) -> Result<(), Error> {
        step.run("configure", child("make -s allnoconfig"))?;
        let path = work.join(".config");
        let read = || fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e));
        let merged = kconfig::merge(&read()?, &self.plan.busybox_settings);
        fs::write(&path, merged).map_err(|e| Error::io("write", &path, e))?;
        step.run(
            "configure",
            child("i=0; while [ $i -lt 3000 ]; do echo n; i=$((i + 1)); done | make -s oldconfig"),
        )?;
        let what = format!("the configuration of {}", package.name);
        kconfig::check(&what, &self.plan.busybox_settings, &read()?)
    }
}

/// `make` in the kernel's tree.
struct KernelMake {
    tree: PathBuf,
    jobs: usize,
    environment: Vec<(OsString, OsString)>,
}

impl KernelMake {
    /// What allnoconfig reads.
    const FRAGMENT: &str = ".all.config";

    fn after(&self, target: &str) -> Expression {
        let jobs = format!("-j{}", self.jobs);
        let words = ["-s", &jobs, "ARCH=riscv", "CROSS_COMPILE=riscv64-linux-gnu-", KCFLAGS, target];
        duct::cmd("make", words).dir(&self.tree).full_env(self.environment.iter().cloned())
    }
}

fn no_tree() -> Error {
    Error::plain("the kernel's source was not unpacked", "This is a bug; run the command again.")
}

/// The file of a folder whose name ends so.
pub fn only_file(folder: &Path, end: &str) -> Result<PathBuf, Error> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("read the folder", folder, e))?;
    entries.flatten().map(|e| e.path()).find(|p| p.to_string_lossy().ends_with(end)).ok_or_else(|| {
        Error::plain(
            format!("{} holds no *{end}", folder.display()),
            "Remove that folder and run the command again.",
        )
    })
}

/// Unpacks a source package, the distribution's patches applied.
pub fn unpack_source(files: &Path, to: &Path) -> Result<Expression, Error> {
    let dsc = only_file(files, ".dsc")?;
    Ok(duct::cmd!("dpkg-source", "--no-check", "--extract", dsc, to).env("LC_ALL", "C").env("TZ", "UTC"))
}

/// Unpacks a source package as its authors released it.
pub fn unpack_upstream(files: &Path, to: &Path) -> Result<Expression, Error> {
    let dsc = only_file(files, ".dsc")?;
    let words = ["--no-check", "--skip-patches", "--extract"].map(OsString::from);
    let words = words.into_iter().chain([dsc.into(), to.into()]);
    Ok(duct::cmd("dpkg-source", words).env("LC_ALL", "C").env("TZ", "UTC"))
}

/// Unpacks musl from a wheel. pip came with a Python, so that is there.
fn unzip(wheel: &Path, to: &Path) -> Expression {
    let script = "import sys, zipfile\n\
                  wheel = zipfile.ZipFile(sys.argv[1])\n\
                  start = ('ziglang/lib/libc/musl/', 'ziglang/lib/libc/include/riscv32-linux-musl/')\n\
                  wheel.extractall(sys.argv[2], [n for n in wheel.namelist() if n.startswith(start)])\n";
    duct::cmd!("python3", "-c", script, wheel, to)
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    fs::copy(from, to).map(drop).map_err(|e| Error::io("copy to", to, e))
}

fn new_folder(parent: &Path, name: &str) -> Result<PathBuf, Error> {
    let path = parent.join(name);
    fs::create_dir(&path).map_err(|e| Error::io("make the folder", &path, e))?;
    Ok(path)
}

/// A copy to work with: its path is the cache's, and editing the repository meanwhile does no harm.
fn copy_folder(from: &Path, to: &Path) -> Result<PathBuf, Error> {
    fs::create_dir(to).map_err(|e| Error::io("make the folder", to, e))?;
    let entries = fs::read_dir(from).map_err(|e| Error::io("read the folder", from, e))?;
    for entry in entries {
        let path = entry.map_err(|e| Error::io("read the folder", from, e))?.path();
        if let Some(name) = path.file_name() {
            match path.is_dir() {
                true => drop(copy_folder(&path, &to.join(name))?),
                false => copy(&path, &to.join(name))?,
            }
        }
    }
    Ok(to.to_owned())
}

//! The defconfig: pieces of buildroot-external, and what depends on the machine and the profile.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::super::direct::kconfig::{self, Fragment, Setting};
use super::super::error::Error;

/// The variable by which Buildroot knows our tree.
const EXTERNAL: &str = "$(BR2_EXTERNAL_LG_PATH)";
/// The kernel series of a release build.
const RELEASE_SERIES: &str = "6.12";

/// Where the compiler comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Toolchain {
    /// The distribution's compiler.
    #[default]
    External,
    /// Buildroot builds one first.
    Internal,
}

/// Which kernel is built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// What linux-release.config says.
    Release,
    /// An archive of the distribution's.
    Archive {
        /// Its path.
        path: PathBuf,
        /// As 6.1.
        series: String,
    },
}

/// The series of a kernel, as 6.1.
pub fn series(kernel: &Kernel) -> &str {
    match kernel {
        Kernel::Release => RELEASE_SERIES,
        Kernel::Archive { series, .. } => series,
    }
}

/// An external toolchain, as Buildroot wants it described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiler {
    /// Its folder.
    pub folder: PathBuf,
    /// The compiler's major version.
    pub gcc: String,
    /// The series of its kernel headers, as 6.1.
    pub headers: String,
}

/// What a defconfig is made for.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// The repository.
    pub repo: &'a Path,
    /// Packages of buildroot-external/package.
    pub packages: &'a [String],
    /// Kernel fragments, by path.
    pub kernel_fragments: &'a [PathBuf],
    /// busybox fragments, by path.
    pub busybox_fragments: &'a [PathBuf],
}

/// A defconfig whose settings know where they were written.
#[derive(Clone, Debug)]
pub struct Defconfig {
    fragments: Vec<Fragment>,
    /// What each package's own piece says, by name.
    pub packages: Vec<(String, String)>,
}

impl Defconfig {
    /// The pieces that every image has, those of its packages, and its fragments.
    pub fn new(wanted: &Wanted, toolchain: Toolchain, kernel: &Kernel) -> Result<Self, Error> {
        let folder = wanted.repo.join("buildroot-external");
        let piece = |name: &str| Fragment::read(wanted.repo, &folder.join("buildroot").join(name));
        let mut fragments = vec![
            piece("base.config")?,
            piece(match toolchain {
                Toolchain::External => "toolchain-external.config",
                Toolchain::Internal => "toolchain-internal.config",
            })?,
        ];
        let mut packages = Vec::new();
        for name in wanted.packages {
            let path = folder.join("package").join(name).join("buildroot.config");
            if path.is_file() {
                let fragment = Fragment::read(wanted.repo, &path)?;
                packages.push((name.clone(), fragment.text.clone()));
                fragments.push(fragment);
            } else if !folder.join("package").join(name).join("Config.in").is_file() {
                return Err(Error::plain(
                    format!(
                        "the package `{name}` cannot be built by Buildroot: {} is missing",
                        path.display()
                    ),
                    "Write there which BR2_ symbols it is made of, or use `--builder direct`.",
                ));
            }
        }
        let mut text = String::new();
        match kernel {
            Kernel::Release => fragments.push(piece("linux-release.config")?),
            Kernel::Archive { path, .. } => {
                put(&mut text, "BR2_LINUX_KERNEL_CUSTOM_TARBALL=y");
                let location =
                    format!("BR2_LINUX_KERNEL_CUSTOM_TARBALL_LOCATION=\"file://{}\"", path.display());
                put(&mut text, &location);
            }
        }
        let mut files = wanted.kernel_fragments.iter().map(|p| external(&folder, p)).collect::<Vec<_>>();
        if folder.join(format!("kernel/linux-{}.config", series(kernel))).is_file() {
            // Before the profile's, which may decide otherwise.
            files.insert(0, format!("{EXTERNAL}/kernel/linux-{}.config", series(kernel)));
        }
        put_files(
            &mut text,
            "BR2_LINUX_KERNEL_CUSTOM_CONFIG_FILE",
            "BR2_LINUX_KERNEL_CONFIG_FRAGMENT_FILES",
            &files,
        );
        let files = wanted.busybox_fragments.iter().map(|p| external(&folder, p)).collect::<Vec<_>>();
        put_files(
            &mut text,
            "BR2_PACKAGE_BUSYBOX_CONFIG",
            "BR2_PACKAGE_BUSYBOX_CONFIG_FRAGMENT_FILES",
            &files,
        );
        fragments.push(generated(text));
        Ok(Self { fragments, packages })
    }

    /// Adds what is so on this machine.
    pub fn add(&mut self, lines: &[String]) {
        self.fragments.push(generated(lines.iter().map(|l| format!("{l}\n")).collect()));
    }

    /// Adds an external toolchain.
    pub fn add_compiler(&mut self, compiler: &Compiler) {
        let headers = compiler.headers.replace('.', "_");
        self.add(&[
            format!("BR2_TOOLCHAIN_EXTERNAL_PATH=\"{}\"", compiler.folder.display()),
            format!("BR2_TOOLCHAIN_EXTERNAL_GCC_{}=y", compiler.gcc),
            format!("BR2_TOOLCHAIN_EXTERNAL_HEADERS_{headers}=y"),
        ]);
    }

    /// The file for Buildroot.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for fragment in &self.fragments {
            text.push_str(fragment.text.trim_end());
            text.push_str("\n\n");
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    }

    /// Every setting, with its place.
    pub fn settings(&self) -> Result<Vec<Setting>, Error> {
        kconfig::settings(&self.fragments)
    }
}

/// A path of ours as a defconfig names it.
fn external(folder: &Path, path: &Path) -> String {
    match path.strip_prefix(folder) {
        Ok(inside) => format!("{EXTERNAL}/{}", inside.display()),
        Err(_) => path.display().to_string(),
    }
}

fn generated(text: String) -> Fragment {
    Fragment { name: PathBuf::from("(from the profile and the machine)"), text }
}

fn put(text: &mut String, line: &str) {
    let _ = writeln!(text, "{line}");
}

fn put_files(text: &mut String, first: &str, others: &str, files: &[String]) {
    if let Some((file, rest)) = files.split_first() {
        put(text, &format!("{first}=\"{file}\""));
        if !rest.is_empty() {
            put(text, &format!("{others}=\"{}\"", rest.join(" ")));
        }
    }
}

/// The head of a committed defconfig.
const HEAD: &str = "# Written by `cargo xtask image --write-defconfigs` from ../buildroot and the packages' \
                    buildroot.config.\n# By hand: make -C BUILDROOT BR2_EXTERNAL=THIS_TREE O=OUT NAME_defconfig && make \
                    -C OUT\n";

/// configs/NAME_defconfig: what a profile is made of, for builds by hand.
pub fn by_hand(wanted: &Wanted) -> Result<String, Error> {
    let defconfig = Defconfig::new(wanted, Toolchain::Internal, &Kernel::Release)?;
    Ok(format!("{HEAD}\n{}", defconfig.text()))
}

/// All BR2_ symbols that some files name, sorted.
pub fn symbols<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<String> {
    let lines = texts.flat_map(str::lines);
    let mut all: Vec<String> =
        lines.filter_map(|l| kconfig::parse(l).ok().flatten().map(|(symbol, _)| symbol.to_owned())).collect();
    all.sort();
    all.dedup();
    all
}

/// Every symbol that a tree's Kconfig files define.
pub fn defined(tree: &Path) -> Result<std::collections::BTreeSet<String>, Error> {
    let mut all = std::collections::BTreeSet::new();
    let mut folders = vec![tree.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).map_err(|e| Error::io("read the folder", &folder, e))?;
        for entry in entries.flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                folders.push(path);
            } else if name.to_string_lossy().starts_with("Config.in") {
                let text = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
                for line in String::from_utf8_lossy(&text).lines() {
                    let line = line.trim();
                    if let Some(symbol) =
                        line.strip_prefix("config ").or_else(|| line.strip_prefix("menuconfig "))
                    {
                        all.insert(symbol.trim().to_owned());
                    }
                }
            }
        }
    }
    Ok(all)
}

//! `cargo xtask doctor`: what this machine has, and what each thing is for.

use std::fs;
use std::path::{Path, PathBuf};

use crate::flags::DoctorArgs;
use crate::image::cache::Cache;
use crate::image::direct::host;
use crate::image::error::Error;
use crate::image::step::Progress;
use crate::repo;
use crate::test::NVRTC;

/// Free disk space that building everything takes.
const DISK: u64 = 6 << 30;
/// Memory that building the kernel and a small fleet take.
const MEMORY: u64 = 2 << 30;

/// What became of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// As it should be.
    Good,
    /// Something works less well, or not yet.
    Note,
    /// Something that `cargo xtask run` needs is missing.
    Missing,
}

struct Check {
    verdict: Verdict,
    what: &'static str,
    found: String,
    purpose: &'static str,
}

/// Prints all checks; fails if something is missing that `cargo xtask run` needs. --fix installs first what is missing;
/// else a person is asked about NVRTC, which does not touch the system.
pub fn command(args: &DoctorArgs) -> miette::Result<()> {
    let root = repo::root()?;
    let folder = nvrtc_folder();
    if args.fix {
        let nvrtc = library_of_nvrtc().is_none();
        let packages = install_packages(nvrtc);
        if nvrtc {
            install_nvrtc(&folder)?;
            println!("installed: {}", folder.display());
        }
        packages?;
        return show(&root);
    }
    show(&root)?;
    if library_of_nvrtc().is_none()
        && yes(&format!("Install NVRTC (about 100 MB) into {}?", folder.display()))
    {
        install_nvrtc(&folder)?;
        println!("installed: {}", folder.display());
    }
    Ok(())
}

/// Installs the packages that building wants, as root; else the error is the line to be run.
fn install_packages(pip: bool) -> Result<(), Error> {
    let more = [("c++", "g++"), ("npm", "npm")].map(|(need, package)| (need.to_owned(), package.to_owned()));
    let log = Cache::open()?.root().join("direct/logs/install.log");
    host::ensure(&mut Progress::new(false), &log, &host::needs(&more), pip)
}

/// Asks a person, where one sits at a terminal.
fn yes(question: &str) -> bool {
    use std::io::{BufRead, IsTerminal, Write};
    if !(std::io::stdin().is_terminal() && std::io::stdout().is_terminal()) {
        return false;
    }
    print!("{question} [y/N] ");
    let mut answer = String::new();
    let asked = std::io::stdout().flush().and_then(|()| std::io::stdin().lock().read_line(&mut answer));
    asked.is_ok() && ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str())
}

/// Where the emulator looks for NVRTC, beside the system's folders.
fn nvrtc_folder() -> PathBuf {
    let cache = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) if Path::new(&cache).is_absolute() => PathBuf::from(cache),
        (_, home) => PathBuf::from(home.unwrap_or_else(|| "/".into())).join(".cache"),
    };
    cache.join("linux-on-gpu/nvrtc")
}

/// Installs the library from the Python package index, all of it or nothing.
fn install_nvrtc(folder: &Path) -> miette::Result<()> {
    let failed = |what: String| {
        miette::miette!(
            help = "Check the network and pip's settings; the CUDA toolkit has the library too.",
            "NVRTC was not installed: {what}"
        )
    };
    if !host::has_pip() {
        return Err(failed(format!("Python has no pip; run: sudo apt-get install {}", host::PIP)));
    }
    let parent = folder.parent().unwrap_or(Path::new("/"));
    let io = |e: std::io::Error| failed(format!("{}: {e}", parent.display()));
    fs::create_dir_all(parent).map_err(io)?;
    let fresh = tempfile::Builder::new().prefix(".tmp-nvrtc-").tempdir_in(parent).map_err(io)?;
    let words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"];
    let mut words: Vec<std::ffi::OsString> = words.map(Into::into).to_vec();
    words.extend(["--target".into(), fresh.path().into(), NVRTC.into()]);
    let output = duct::cmd("python3", words)
        .stdin_null()
        .stderr_capture()
        .unchecked()
        .run()
        .map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("pip failed");
        return Err(failed(last.to_owned()));
    }
    if nvrtc_in(fresh.path()).is_none() {
        return Err(failed(format!("{NVRTC} has no library for this machine")));
    }
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(io)?;
    }
    fs::rename(fresh.path(), folder).map_err(io)?;
    drop(fresh.keep());
    Ok(())
}

/// The library in a folder of Python packages, or in an environment.
fn nvrtc_in(folder: &Path) -> Option<PathBuf> {
    let lib = folder.join("lib");
    let sites = fs::read_dir(lib).into_iter().flatten().flatten().map(|e| e.path().join("site-packages"));
    let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
    let mut all = std::iter::once(folder.to_owned())
        .chain(sites)
        .flat_map(|site| ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|sub| site.join(sub)));
    all.find_map(|sub| names.iter().map(|name| sub.join(name)).find(|path| path.is_file()))
}

/// Where NVRTC lies, if it is installed where the emulator looks.
pub fn library_of_nvrtc() -> Option<PathBuf> {
    let system = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"].into_iter().find_map(library);
    system.or_else(|| nvrtc_in(&nvrtc_folder()))
}

fn show(root: &Path) -> miette::Result<()> {
    let checks = [
        system(),
        cores(),
        memory(),
        disk(root),
        compiler(),
        packages(),
        tun(),
        terminal(),
        driver(),
        nvrtc(),
    ];
    for check in &checks {
        let mark = match check.verdict {
            Verdict::Good => "ok     ",
            Verdict::Note => "note   ",
            Verdict::Missing => "MISSING",
        };
        println!("{mark} {:<14} {}\n{:>22} {}", check.what, check.found, "for", check.purpose);
    }
    let missing = checks.iter().filter(|check| check.verdict == Verdict::Missing).count();
    match missing {
        0 => Ok(()),
        _ => Err(miette::miette!("{missing} of {} checks found something missing", checks.len())),
    }
}

fn system() -> Check {
    let found = host::codename();
    Check {
        verdict: if found.is_ok() { Verdict::Good } else { Verdict::Note },
        what: "system",
        found: found
            .map_or_else(|error| error.to_string(), |name| format!("Debian's packages, release {name}")),
        purpose: "building guest images; a finished image runs on any Linux",
    }
}

fn cores() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    Check {
        verdict: Verdict::Good,
        what: "cores",
        found: cores.to_string(),
        purpose: "the CPU back end: each core runs one VM at a time",
    }
}

fn memory() -> Check {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo(&text, "MemAvailable:");
    Check {
        verdict: if available.is_some_and(|bytes| bytes >= MEMORY) { Verdict::Good } else { Verdict::Note },
        what: "memory",
        found: available.map_or("unknown".into(), |bytes| format!("{} MiB available", bytes >> 20)),
        purpose: "building takes 2 GiB; a lean VM takes 3 to 8 MiB",
    }
}

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

fn disk(root: &Path) -> Check {
    let free = rustix::fs::statvfs(root).map(|stat| stat.f_bavail * stat.f_frsize);
    Check {
        verdict: if free.is_ok_and(|bytes| bytes >= DISK) { Verdict::Good } else { Verdict::Note },
        what: "disk",
        found: free.map_or_else(|error| error.to_string(), |bytes| format!("{} MiB free", bytes >> 20)),
        purpose: "building everything takes up to 6 GiB (sources, kernel, the emulator)",
    }
}

fn compiler() -> Check {
    let found = ["c++", "g++", "clang++"].into_iter().find_map(host::find);
    Check {
        verdict: if found.is_some() { Verdict::Good } else { Verdict::Missing },
        what: "C++ compiler",
        found: found.map_or("none; apt-get install g++".into(), |path| path.display().to_string()),
        purpose: "the machine of the CPU back end",
    }
}

fn packages() -> Check {
    let missing: Vec<String> = host::missing([]).into_iter().collect();
    let root = rustix::process::geteuid().is_root();
    let (verdict, found) = match missing.as_slice() {
        [] => (Verdict::Good, "all there".into()),
        names if root => (Verdict::Note, format!("the first build installs {}", names.join(" "))),
        names => {
            let line = names.join(" ");
            (Verdict::Missing, format!("sudo apt-get install --no-install-recommends {line}"))
        }
    };
    Check { verdict, what: "packages", found, purpose: "building kernel and programs of the guest" }
}

fn tun() -> Check {
    let there = Path::new("/dev/net/tun").exists();
    Check {
        verdict: Verdict::Good,
        what: "/dev/net/tun",
        found: if there { "there" } else { "not there" }.into(),
        purpose: "--net tun, which needs CAP_NET_ADMIN; --net user needs neither",
    }
}

fn terminal() -> Check {
    let found = host::find("npm");
    Check {
        verdict: if found.is_some() { Verdict::Good } else { Verdict::Note },
        what: "npm",
        found: found
            .map_or("none; the first run takes one from PyPI".into(), |path| path.display().to_string()),
        purpose: "getting the page's terminal, once; without it the page has none",
    }
}

fn driver() -> Check {
    let found = library("libcuda.so.1");
    Check {
        verdict: if found.is_some() { Verdict::Good } else { Verdict::Note },
        what: "NVIDIA driver",
        found: found.map_or("no libcuda.so.1".into(), |path| path.display().to_string()),
        purpose: "running VMs on a GPU (--backend cuda); the CPU back end needs none",
    }
}

fn nvrtc() -> Check {
    let (verdict, found) = match library_of_nvrtc() {
        Some(path) => (Verdict::Good, path.display().to_string()),
        None => (
            Verdict::Note,
            "no libnvrtc.so; the CUDA toolkit has it, or: cargo xtask doctor --fix installs it for you alone"
                .to_owned(),
        ),
    };
    Check {
        verdict,
        what: "NVRTC",
        found,
        purpose: "compiling the machine for a GPU; the CPU back end needs none",
    }
}

/// Where a shared library lies: in the folders of the environment, then of the system.
fn library(name: &str) -> Option<PathBuf> {
    let own = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let toolkit = std::env::var("CUDA_HOME").map(|home| format!("{home}/lib64")).unwrap_or_default();
    let machine = std::env::consts::ARCH;
    let system = format!(
        "/usr/lib/{machine}-linux-gnu:/lib/{machine}-linux-gnu:/usr/lib64:/usr/lib:/usr/lib/wsl/lib:\
         /usr/local/cuda/lib64:/usr/local/nvidia/lib64"
    );
    let folders = [own, toolkit, system].join(":");
    let mut paths = folders.split(':').filter(|folder| !folder.is_empty()).map(|f| Path::new(f).join(name));
    paths.find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_where_they_are() {
        assert_eq!(library("libnone-such.so.7"), None);
        assert!(library("libc.so.6").is_some_and(|path| path.exists()));
    }

    #[test]
    fn nvrtc_is_found_in_both_layouts_of_python() {
        for sub in ["nvidia/cu13/lib", "lib/python3.11/site-packages/nvidia/cu13/lib"] {
            let dir = tempfile::tempdir().unwrap();
            assert_eq!(nvrtc_in(dir.path()), None);
            fs::create_dir_all(dir.path().join(sub)).unwrap();
            assert_eq!(nvrtc_in(dir.path()), None);
            let file = dir.path().join(sub).join("libnvrtc.so.13");
            fs::write(&file, "").unwrap();
            assert_eq!(nvrtc_in(dir.path()), Some(file));
        }
    }

    #[test]
    fn memory_is_read() {
        assert_eq!(meminfo("MemTotal: 9 kB\nMemAvailable:   4 kB\n", "MemAvailable:"), Some(4096));
        assert_eq!(meminfo("", "MemAvailable:"), None);
    }
}

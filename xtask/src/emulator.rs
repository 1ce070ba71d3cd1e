//! Builds the emulator in release mode and becomes it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use miette::Diagnostic;

/// Why the emulator could not be started.
#[derive(Debug, thiserror::Error, Diagnostic)]
pub enum Error {
    /// Cargo is not there, or can't be run.
    #[error("cargo can't be run: {0}")]
    #[diagnostic(help("Install Rust, or start this command through cargo: cargo xtask run"))]
    Cargo(std::io::Error),
    /// It does not compile.
    #[error("the emulator does not build; cargo says why above")]
    #[diagnostic(help(
        "It needs a C++ compiler too. `cargo xtask doctor` tells what is missing on this machine."
    ))]
    Build,
    /// It was built, but can't be run.
    #[error("the emulator {} can't be started: {source}", path.display())]
    Start {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// How much of the build is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// Cargo's progress, and how long it may take if it was never built.
    Progress,
    /// Errors only.
    Errors,
}

/// Builds the emulator if need be; returns its path.
pub fn build(root: &Path, show: Show) -> Result<PathBuf, Error> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root).args(["build", "--release", "--package", "emulator", "--bin", "emulator"]);
    command.arg("--message-format=json-render-diagnostics").stdin(Stdio::null()).stdout(Stdio::piped());
    match show {
        Show::Errors => drop(command.arg("--quiet")),
        Show::Progress => {
            let target =
                std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
            if !root.join(target).join("release/emulator").exists() {
                eprintln!("Building the emulator in release mode: one to three minutes, this once.");
            }
        }
    }
    let mut child = command.spawn().map_err(Error::Cargo)?;
    let mut path = None;
    if let Some(messages) = child.stdout.take() {
        for line in BufReader::new(messages).lines().map_while(Result::ok) {
            path = executable(&line).or(path);
        }
    }
    let status = child.wait().map_err(Error::Cargo)?;
    path.filter(|_| status.success()).ok_or(Error::Build)
}

/// The emulator's path, if this message of cargo's tells it.
fn executable(line: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let ours = message["reason"] == "compiler-artifact" && message["target"]["name"] == "emulator";
    message["executable"].as_str().filter(|_| ours).map(PathBuf::from)
}

/// Becomes the emulator: its signals, terminal and status are this command's. Returns only if that fails.
pub fn become_it(path: PathBuf, args: Vec<OsString>) -> Error {
    let source = Command::new(&path).args(args).exec();
    Error::Start { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_tells_where_the_emulator_is() {
        let line = |reason, name, executable| {
            format!(r#"{{"reason":"{reason}","target":{{"name":"{name}"}},"executable":{executable}}}"#)
        };
        let found = executable(&line("compiler-artifact", "emulator", "\"/t/release/emulator\""));
        assert_eq!(found, Some(PathBuf::from("/t/release/emulator")));
        assert_eq!(executable(&line("compiler-artifact", "emulator", "null")), None);
        assert_eq!(executable(&line("compiler-artifact", "xtask", "\"/t/xtask\"")), None);
        assert_eq!(executable("warning: not JSON"), None);
    }
}

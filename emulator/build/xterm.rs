//! Embeds xterm.js if `cargo xtask` has put it into the cache. Without it the emulator builds as well, and its page says
//! what is missing.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Which files, and their hashes.
const PINS: &str = "web/xterm.txt";

/// Writes `xterm.rs`, a list of names and contents, to `out`.
pub fn embed(out: &Path) -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed={PINS}");
    println!("cargo::rerun-if-changed=build/xterm.rs");
    println!("cargo::rerun-if-env-changed=XDG_CACHE_HOME");
    let pins = std::fs::read_to_string(PINS)?;
    let mut list = String::from("&[");
    for line in pins.lines().filter(|line| line.starts_with("sha256 ")) {
        let mut words = line.split_whitespace().skip(1);
        let (Some(hash), Some(path)) = (words.next(), words.next()) else {
            return Err(format!("{PINS}: expected `sha256 HASH PATH`: {line}").into());
        };
        let Some(file) = cache().map(|folder| folder.join("xterm").join(hash)) else { continue };
        // A file that is not there is not watched, or each build would start with this script. xtask touches the pins.
        let Ok(bytes) = std::fs::read(&file) else {
            list = String::from("&[");
            break;
        };
        println!("cargo::rerun-if-changed={}", file.display());
        let digest = Sha256::digest(&bytes);
        if digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>() != hash {
            return Err(format!("{}: its content does not have its hash; remove it", file.display()).into());
        }
        let name =
            Path::new(path).file_name().and_then(|name| name.to_str()).ok_or("a path without a name")?;
        let copy = out.join(name);
        std::fs::write(&copy, bytes)?;
        write!(list, "(\"xterm/{name}\", include_bytes!({:?})),", copy.display().to_string())?;
    }
    list.push(']');
    std::fs::write(out.join("xterm.rs"), list)?;
    Ok(())
}

/// The folder that xtask keeps things in.
fn cache() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    Some(absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?.join("linux-on-gpu"))
}

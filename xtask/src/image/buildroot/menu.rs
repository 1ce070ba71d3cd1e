//! `cargo xtask image --menuconfig`: edits a configuration with its own editor, and writes what was changed, and no
//! more, back to the fragment or piece that it came from.

use std::collections::BTreeMap;
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::super::cache::write_if_changed;
use super::super::direct::kconfig::{self, Fragment};
use super::super::error::Error;
use super::super::request::Request;
use super::make::Make;
use super::plan;
use super::prepare::source_folder;
use super::release::Tree;

/// Whose configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Menu {
    /// The kernel's.
    Kernel,
    /// busybox'.
    Busybox,
    /// Buildroot's own.
    Buildroot,
}

/// Symbols with their values; `None` is "is not set".
type Settings = BTreeMap<String, Option<String>>;

/// Runs the editor on this terminal; the files that were written.
pub fn edit(request: &Request, tree: &Tree, menu: Menu) -> Result<Vec<PathBuf>, Error> {
    if !(std::io::stdin().is_terminal() && std::io::stdout().is_terminal()) {
        return Err(Error::plain("--menuconfig wants a terminal", "Edit the fragment's file instead."));
    }
    if !Path::new("/usr/include/ncurses.h").is_file() {
        return Err(Error::plain(
            "the editor of configurations needs ncurses",
            "Run: sudo apt-get install libncurses-dev",
        ));
    }
    let output = plan::output(request);
    let make = Make::new(tree, &output, &output.join("lg/external"))?;
    match menu {
        Menu::Buildroot => buildroot(request, &make),
        Menu::Kernel => {
            let cross = output.join("host/bin/riscv32-linux-");
            let cross = format!("CROSS_COMPILE={}", cross.display());
            let words = ["ARCH=riscv".to_owned(), cross];
            fragment(&make, &source_folder(&output, "linux")?, &words, request.kernel_fragments, true)
        }
        Menu::Busybox => {
            fragment(&make, &source_folder(&output, "busybox")?, &[], request.busybox_fragments, false)
        }
    }
}

/// A package's editor. The configuration that is built from stays as it was: the fragments decide.
fn fragment(
    make: &Make,
    source: &Path,
    words: &[String],
    fragments: &[PathBuf],
    saves: bool,
) -> Result<Vec<PathBuf>, Error> {
    let Some(file) = fragments.last() else {
        return Err(Error::plain("the profile names no fragment to be written to", "Add one to it."));
    };
    let config = source.join(".config");
    let kept = read(&config)?;
    let run = |target: &str, terminal: bool| -> Result<(), Error> {
        let mut all = words.to_vec();
        all.push(target.to_owned());
        make.editor(source, &all, terminal)
    };
    // The kernel can tell what differs from its defaults: that leaves out what only follows from something else.
    let minimal = |run: &dyn Fn(&str, bool) -> Result<(), Error>| -> Result<String, Error> {
        match saves {
            true => {
                run("savedefconfig", false)?;
                read(&source.join("defconfig"))
            }
            false => read(&config),
        }
    };
    let result = (|| {
        let before = minimal(&run)?;
        run("menuconfig", true)?;
        let after = minimal(&run)?;
        Ok((before, after, read(&config)?))
    })();
    fs::write(&config, &kept).map_err(|e| Error::write(&config, kept.len() as u64, e))?;
    let (before, after, new) = result?;
    let changes = changes(&settings(&before), &settings(&after), &settings(&new));
    write(file, &changes)
}

/// Buildroot's editor.
fn buildroot(request: &Request, make: &Make) -> Result<Vec<PathBuf>, Error> {
    let saved = make.output.join("lg/saved");
    let save = format!("BR2_DEFCONFIG={}", saved.display());
    let config = make.output.join(".config");
    let kept = read(&config)?;
    let result = (|| {
        make.quietly(&[&save, "savedefconfig"])?;
        let before = read(&saved)?;
        make.terminal(&["menuconfig"])?;
        make.quietly(&[&save, "savedefconfig"])?;
        Ok((before, read(&saved)?, read(&config)?))
    })();
    fs::write(&config, &kept).map_err(|e| Error::write(&config, kept.len() as u64, e))?;
    let (before, after, new) = result?;
    let changes = changes(&settings(&before), &settings(&after), &settings(&new));
    // Each where it stands already, the rest in the piece that all images have.
    let external = request.repo.join("buildroot-external");
    let base = external.join("buildroot/base.config");
    let mut places = vec![base.clone()];
    places.extend(request.packages.iter().map(|p| external.join("package").join(p).join("buildroot.config")));
    let mut written = Vec::new();
    let mut left = changes;
    for place in places.iter().skip(1).filter(|p| p.is_file()) {
        let own = settings(&read(place)?);
        let (here, rest) = left.into_iter().partition(|(symbol, _)| own.contains_key(symbol));
        written.extend(write(place, &here)?);
        left = rest;
    }
    written.extend(write(&base, &left)?);
    Ok(written)
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|e| Error::io("read", path, e))
}

fn settings(text: &str) -> Settings {
    let lines = text.lines().filter_map(|l| kconfig::parse(l).ok().flatten());
    lines.map(|(symbol, value)| (symbol.to_owned(), value.map(str::to_owned))).collect()
}

/// What differs between two minimal configurations, with the values of the whole new one.
fn changes(before: &Settings, after: &Settings, new: &Settings) -> Settings {
    let symbols = before.keys().chain(after.keys());
    let differ = symbols.filter(|s| before.get(*s) != after.get(*s));
    differ.map(|s| (s.clone(), new.get(s).cloned().flatten())).collect()
}

/// Writes changes into a file: in place of what it said, or at its end.
fn write(path: &Path, changes: &Settings) -> Result<Vec<PathBuf>, Error> {
    if changes.is_empty() {
        return Ok(Vec::new());
    }
    let text = merged(&read(path)?, changes);
    // A mistake here would only be seen in the next build.
    kconfig::settings(&[Fragment { name: path.to_owned(), text: text.clone() }])?;
    Ok(match write_if_changed(path, text.as_bytes())? {
        true => vec![path.to_owned()],
        false => Vec::new(),
    })
}

fn merged(text: &str, changes: &Settings) -> String {
    let line = |symbol: &str, value: &Option<String>| match value {
        Some(value) => format!("{symbol}={value}\n"),
        None => format!("# {symbol} is not set\n"),
    };
    let mut left = changes.clone();
    let mut new = String::new();
    for old in text.lines() {
        let symbol = kconfig::parse(old).ok().flatten().map(|(symbol, _)| symbol);
        match symbol.and_then(|s| Some((s, left.remove(s)?))) {
            Some((symbol, value)) => new.push_str(&line(symbol, &value)),
            None => {
                new.push_str(old);
                new.push('\n');
            }
        }
    }
    if !left.is_empty() {
        new.push_str("\n# From the editor.\n");
        new.extend(left.iter().map(|(symbol, value)| line(symbol, value)));
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_changed_is_written_and_comments_stay() {
        let before = settings("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=3\n");
        let after = settings("CONFIG_A=y\nCONFIG_C=4\nCONFIG_D=\"x\"\n");
        // B is now as by default: its value stands in the whole configuration only.
        let new = settings("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=4\nCONFIG_D=\"x\"\nCONFIG_FOLLOWS=y\n");
        let changes = changes(&before, &after, &new);
        let text = merged("# Why A.\nCONFIG_A=y\n# CONFIG_B is not set\n", &changes);
        assert_eq!(
            text,
            "# Why A.\nCONFIG_A=y\nCONFIG_B=y\n\n# From the editor.\nCONFIG_C=4\nCONFIG_D=\"x\"\n"
        );
        assert!(super::changes(&before, &before, &new).is_empty());
    }
}

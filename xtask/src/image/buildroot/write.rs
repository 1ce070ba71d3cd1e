//! Files for builds by hand, written from profiles, pieces and overlays: configs/NAME_defconfig, board/NAME/ with what
//! is otherwise generated, and board/devices.txt. They are committed; a test compares.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::super::error::Error;
use super::super::init;
use super::super::overlay::Overlay;
use super::super::parts;
use super::super::profile::Profile;
use super::super::tree::{Kind, Node, Tree};
use super::config::{self, Wanted};
use super::release;

/// The text of each file, by its path in the repository, and whether it is a program.
pub type Files = BTreeMap<PathBuf, (String, bool)>;

/// All files.
pub fn files(repo: &Path) -> Result<Files, Error> {
    let external = PathBuf::from("buildroot-external");
    let mut all = Files::new();
    let mut nodes = Tree::new();
    for name in Profile::names(repo) {
        let profile = Profile::load(repo, &name)?;
        let wanted = parts::Wanted::find(repo, &profile)?;
        let (packages, kernel_fragments, busybox_fragments) = wanted.lists();
        let mut text = config::by_hand(&Wanted { repo, packages, kernel_fragments, busybox_fragments })?;
        let mut folders = Vec::new();
        for overlay in &profile.overlays {
            let loaded = Overlay::load(repo, overlay)?;
            nodes.extend(loaded.tree);
            folders.push(format!("../../overlays/{}/files", overlay.value));
        }
        folders.push(name.clone());
        let _ = writeln!(text, "\nBR2_ROOTFS_POST_BUILD_SCRIPT_ARGS=\"{}\"", folders.join(" "));
        all.insert(external.join(format!("configs/{name}_defconfig")), (text, false));
        for (path, node) in init::layer(&profile, None)? {
            if let Kind::File(bytes) = &node.kind {
                let text = String::from_utf8_lossy(bytes).into_owned();
                all.insert(external.join("board").join(&name).join(&path), (text, node.mode & 0o100 != 0));
            }
        }
    }
    all.insert(external.join("board/devices.txt"), (devices(&nodes), false));
    Ok(all)
}

/// Writes those that differ; their names.
pub fn write(repo: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut changed = Vec::new();
    for (path, (text, program)) in files(repo)? {
        let whole = repo.join(&path);
        if super::super::cache::write_if_changed(&whole, text.as_bytes())? {
            if program {
                super::super::tree::set_mode(&whole, 0o755)
                    .map_err(|e| Error::io("set the mode of", &whole, e))?;
            }
            changed.push(path);
        }
    }
    Ok(changed)
}

/// The symbols that our pieces name and a tree was seen to define.
const SYMBOLS: &str = "buildroot-external/buildroot/symbols.txt";

/// All symbols that the defconfigs name, but our own packages'.
fn named(repo: &Path, files: &Files) -> Vec<String> {
    let external = repo.join("buildroot-external/buildroot/toolchain-external.config");
    let external = std::fs::read_to_string(external).unwrap_or_default();
    let texts = files
        .iter()
        .filter(|(path, _)| path.to_string_lossy().ends_with("_defconfig"))
        .map(|(_, (text, _))| text.as_str());
    let mut all = config::symbols(texts.chain([external.as_str()]));
    all.retain(|s| s != "BR2_PACKAGE_LG_INIT");
    all
}

/// Compares with a tree, and records what it defines.
pub fn record(repo: &Path, tree: &release::Tree) -> Result<(), Error> {
    let defined = config::defined(&tree.folder)?;
    let named = named(repo, &files(repo)?);
    let strange: Vec<&str> = named.iter().filter(|s| !defined.contains(*s)).map(String::as_str).collect();
    if !strange.is_empty() {
        return Err(Error::plain(
            format!("Buildroot {} knows nothing of: {}", tree.version, strange.join(", ")),
            "Look in buildroot-external/buildroot and the packages' buildroot.config for the spelling.",
        ));
    }
    let mut text = format!("# What the defconfigs name; seen in Buildroot {}.\n", tree.version);
    text.extend(named.iter().map(|s| format!("{s}\n")));
    super::super::cache::write_if_changed(&repo.join(SYMBOLS), text.as_bytes()).map(drop)
}

/// Buildroot's device table: devices, and all owners and modes that a checkout does not keep.
fn devices(nodes: &Tree) -> String {
    let mut text =
        "# Devices, folders and modes of all overlays, for builds by hand. Written by `cargo xtask image \
                    --write-defconfigs`.\n/dev d 755 0 0 - - - - -\n"
            .to_owned();
    for (path, node) in nodes {
        let Node { kind, mode, uid, gid } = node;
        let line = match kind {
            Kind::Device { block, major, minor } => {
                format!("{} {mode:o} {uid} {gid} {major} {minor} - - -", if *block { 'b' } else { 'c' })
            }
            Kind::Folder { asked: true } => format!("d {mode:o} {uid} {gid} - - - - -"),
            // F: not every profile has every overlay.
            Kind::File(_) if ![0o644, 0o755].contains(mode) || *uid != 0 || *gid != 0 => {
                format!("F {mode:o} {uid} {gid} - - - - -")
            }
            _ => continue,
        };
        let _ = writeln!(text, "/{path} {line}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_committed_is_what_would_be_written() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for (path, (text, _)) in files(repo).unwrap() {
            let committed = std::fs::read_to_string(repo.join(&path)).unwrap_or_default();
            assert!(
                committed == text,
                "{} is out of date: run `cargo xtask image --write-defconfigs`",
                path.display()
            );
        }
    }

    #[test]
    fn every_symbol_was_seen_in_a_tree() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let recorded = std::fs::read_to_string(repo.join(SYMBOLS)).unwrap();
        let recorded: Vec<&str> = recorded.lines().filter(|l| !l.starts_with('#')).collect();
        let named = named(repo, &files(repo).unwrap());
        for symbol in &named {
            assert!(
                recorded.contains(&symbol.as_str()),
                "{symbol} is not in {SYMBOLS}: misspelt? If not: cargo xtask image --write-defconfigs --buildroot DIR"
            );
        }
        assert_eq!(recorded.len(), named.len(), "{SYMBOLS} holds more than is used");
        let Some(dir) = std::env::var_os(release::VARIABLE) else { return };
        let defined = config::defined(Path::new(&dir)).unwrap();
        for symbol in &named {
            assert!(defined.contains(symbol), "{symbol} is unknown to the tree {}", dir.display());
        }
    }

    #[test]
    fn every_piece_is_a_list_of_settings() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for (path, (text, _)) in files(repo).unwrap() {
            if path.to_string_lossy().ends_with("_defconfig") {
                let fragment = super::super::super::direct::kconfig::Fragment { name: path.clone(), text };
                let settings = super::super::super::direct::kconfig::settings(&[fragment]).unwrap();
                assert!(settings.len() > 20, "{}", path.display());
                assert!(settings.iter().all(|s| s.symbol.starts_with("BR2_")), "{}", path.display());
            }
        }
    }

    #[test]
    fn the_device_table_has_devices_folders_and_unusual_modes() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let all = files(repo).unwrap();
        let (text, _) = &all[Path::new("buildroot-external/board/devices.txt")];
        for line in [
            "/dev/console c 600 0 0 5 1 - - -",
            "/root d 700 0 0 - - - - -",
            "/var/spool/cron/crontabs/root F 600 0 0 - - - - -",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}

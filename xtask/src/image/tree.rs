//! The guest's files as a tree: what lies where, and which layer put it there.

use std::collections::BTreeMap;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::error::Error;

/// What a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file and its bytes.
    File(Vec<u8>),
    /// A folder. One that is only somebody's parent gives way to one that was asked for.
    Folder {
        /// Whether somebody asked for this folder, with this mode and owner.
        asked: bool,
    },
    /// A symbolic link and its target.
    Link(String),
    /// A device node.
    Device {
        /// Block or character.
        block: bool,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// One file, folder, link or device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Nodes by path; a path has no leading slash. Sorted, so parents come before their children.
pub type Tree = BTreeMap<String, Node>;

impl Node {
    /// A file of root's.
    pub fn file(bytes: impl Into<Vec<u8>>, mode: u32) -> Self {
        Self { kind: Kind::File(bytes.into()), mode, uid: 0, gid: 0 }
    }

    /// A folder of root's that is only there for what is in it.
    pub fn parent() -> Self {
        Self { kind: Kind::Folder { asked: false }, mode: 0o755, uid: 0, gid: 0 }
    }

    /// A symbolic link.
    pub fn link(target: impl Into<String>) -> Self {
        Self { kind: Kind::Link(target.into()), mode: 0o777, uid: 0, gid: 0 }
    }

    /// Whether it is a folder.
    pub fn is_folder(&self) -> bool {
        matches!(self.kind, Kind::Folder { .. })
    }

    /// In words, for messages.
    pub fn describe(&self) -> String {
        let what = match &self.kind {
            Kind::File(bytes) => format!("a file of {} bytes", bytes.len()),
            Kind::Folder { .. } => "a folder".to_owned(),
            Kind::Link(target) => format!("a link to {target}"),
            Kind::Device { block, major, minor } => {
                format!("a {} device {major},{minor}", if *block { "block" } else { "character" })
            }
        };
        match self.kind {
            Kind::Link(_) => what,
            _ => format!("{what}, mode {:04o}, owner {}:{}", self.mode, self.uid, self.gid),
        }
    }
}

/// Adds the folders that a path lies in, where they are missing.
pub fn add_parents(tree: &mut Tree, path: &str) {
    for (end, _) in path.match_indices('/') {
        tree.entry(path[..end].to_owned()).or_insert_with(Node::parent);
    }
}

/// Reads a folder of the host as a tree. `check_link` judges a link before it is taken.
pub fn read_folder(
    folder: &Path,
    check_link: &dyn Fn(&str, &str) -> Result<(), Error>,
) -> Result<Tree, Error> {
    let mut tree = Tree::new();
    read_into(folder, "", check_link, &mut tree)?;
    Ok(tree)
}

/// Writes a tree of files, folders and links to a folder, which is made.
pub fn write_folder(tree: &Tree, folder: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("make the folder", folder, e))?;
    for (path, node) in tree {
        let to = folder.join(path);
        match &node.kind {
            Kind::Folder { .. } => {
                std::fs::create_dir_all(&to).map_err(|e| Error::io("make the folder", &to, e))?;
            }
            Kind::File(bytes) => {
                std::fs::write(&to, bytes).map_err(|e| Error::write(&to, bytes.len() as u64, e))?;
                set_mode(&to, node.mode).map_err(|e| Error::io("set the mode of", &to, e))?;
            }
            Kind::Link(target) => link(target, &to).map_err(|e| Error::io("make the link", &to, e))?,
            Kind::Device { .. } => {
                return Err(Error::plain(format!("/{path}: a device here"), "Declare it in an overlay."));
            }
        }
    }
    Ok(())
}

/// Sets a file's permission bits.
#[cfg(unix)]
pub fn set_mode(path: &Path, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

#[cfg(unix)]
fn link(target: &str, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

fn read_into(
    folder: &Path,
    prefix: &str,
    check_link: &dyn Fn(&str, &str) -> Result<(), Error>,
    tree: &mut Tree,
) -> Result<(), Error> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io("read the folder", folder, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("read the folder", folder, e))?;
        let path = entry.path();
        let name = entry.file_name().into_string().map_err(|name| {
            Error::plain(
                format!("{}: the name {name:?} is not UTF-8", folder.display()),
                "Rename the file.".to_owned(),
            )
        })?;
        let inside = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let meta = path.symlink_metadata().map_err(|e| Error::io("read", &path, e))?;
        let kind = meta.file_type();
        if kind.is_symlink() {
            let target = path.read_link().map_err(|e| Error::io("read the link", &path, e))?;
            let target = target.into_os_string().into_string().map_err(|t| {
                Error::plain(format!("{}: its target {t:?} is not UTF-8", path.display()), "Change the link.")
            })?;
            check_link(&inside, &target)?;
            tree.insert(inside, Node::link(target));
        } else if kind.is_dir() {
            tree.insert(inside.clone(), Node::parent());
            read_into(&path, &inside, check_link, tree)?;
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            // Only the owner's x bit counts: the rest depends on the umask of whoever checked the tree out.
            let mode = if executable(&meta) { 0o755 } else { 0o644 };
            tree.insert(inside, Node::file(bytes, mode));
        } else {
            return Err(Error::plain(
                format!("{}: this is neither a file, a folder nor a link", path.display()),
                "Device nodes are declared in overlay.yaml, under `paths`: `dev/x: {device: char 1 3}`.",
            ));
        }
    }
    Ok(())
}

#[cfg(unix)]
fn executable(meta: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt;
    meta.permissions().mode() & 0o100 != 0
}

#[cfg(not(unix))]
fn executable(_: &std::fs::Metadata) -> bool {
    false
}

/// SHA-256 in hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// A path with `.` and `..` resolved by words alone; `None` where it leaves the root.
pub fn normalize(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalize_knows_the_root() {
        assert_eq!(normalize("etc/../bin/./sh").as_deref(), Some("bin/sh"));
        assert_eq!(normalize("etc/../../bin"), None);
        assert_eq!(normalize("/"), Some(String::new()));
    }

    #[test]
    fn parents_are_added_once_and_sorted_first() {
        let mut tree = Tree::new();
        tree.insert("a/b/c".to_owned(), Node::file("x", 0o644));
        add_parents(&mut tree, "a/b/c");
        assert_eq!(tree.keys().collect::<Vec<_>>(), ["a", "a/b", "a/b/c"]);
    }
}

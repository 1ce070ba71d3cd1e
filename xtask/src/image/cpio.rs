//! The initrd: newc archives, one after the other. Same tree, same bytes.

use ::cpio::newc;

use super::error::Error;
use super::tree::{Kind, Node, Tree};

/// Each archive begins at a multiple of this; the kernel skips the zeros between them.
const BLOCK: usize = 512;

/// Writes a tree as one archive. Owners as given, times 0, inodes counted from `first_inode`.
///
/// A tree is sorted by path, so a folder comes before what is in it, as the kernel wants it.
pub fn archive(tree: &Tree, first_inode: u32) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    for (index, (path, node)) in tree.iter().enumerate() {
        let inode = u32::try_from(index).ok().and_then(|i| first_inode.checked_add(i));
        let inode = inode.ok_or_else(|| Error::plain("the initrd holds too many files", "Take some out."))?;
        out = write(out, path, node, inode).map_err(|e| {
            Error::plain(format!("{path}: cannot be written into the initrd: {e}"), "See the message above.")
        })?;
    }
    let mut out = newc::trailer(out)
        .map_err(|e| Error::plain(format!("the initrd's end cannot be written: {e}"), "Try again."))?;
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    Ok(out)
}

fn write(out: Vec<u8>, path: &str, node: &Node, inode: u32) -> std::io::Result<Vec<u8>> {
    let (kind, bytes): (u32, &[u8]) = match &node.kind {
        Kind::File(bytes) => (0o100_000, bytes),
        Kind::Folder { .. } => (0o040_000, &[]),
        Kind::Link(target) => (0o120_000, target.as_bytes()),
        Kind::Device { block: true, .. } => (0o060_000, &[]),
        Kind::Device { block: false, .. } => (0o020_000, &[]),
    };
    let mut entry = newc::Builder::new(path)
        .ino(inode)
        .mode(kind | node.mode)
        .uid(node.uid)
        .gid(node.gid)
        .nlink(if node.is_folder() { 2 } else { 1 })
        .mtime(0);
    if let Kind::Device { major, minor, .. } = node.kind {
        entry = entry.rdev_major(major).rdev_minor(minor);
    }
    let size = u32::try_from(bytes.len())
        .map_err(|_| std::io::Error::new(std::io::ErrorKind::FileTooLarge, "more than 4 GiB"))?;
    let mut writer = entry.write(out, size);
    std::io::Write::write_all(&mut writer, bytes)?;
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        let mut tree = Tree::new();
        tree.insert("bin/sh".to_owned(), Node::link("busybox"));
        tree.insert("bin/busybox".to_owned(), Node::file(vec![7; 1001], 0o755));
        tree.insert("bin".to_owned(), Node::parent());
        tree.insert("dev".to_owned(), Node::parent());
        let console = Kind::Device { block: false, major: 5, minor: 1 };
        tree.insert("dev/console".to_owned(), Node { kind: console, mode: 0o600, uid: 0, gid: 5 });
        tree
    }

    #[test]
    fn an_archive_reads_back() {
        let bytes = archive(&tree(), 10).unwrap();
        assert_eq!(bytes.len() % 512, 0);
        let mut rest = bytes.as_slice();
        let mut seen = Vec::new();
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let e = reader.entry().clone();
            assert_eq!((e.mtime(), e.uid()), (0, 0));
            seen.push((
                e.name().to_owned(),
                e.ino(),
                e.mode(),
                e.file_size(),
                e.rdev_major(),
                e.rdev_minor(),
            ));
            rest = reader.finish().unwrap();
        }
        assert_eq!(
            seen,
            [
                ("bin".to_owned(), 10, 0o040_755, 0, 0, 0),
                ("bin/busybox".to_owned(), 11, 0o100_755, 1001, 0, 0),
                ("bin/sh".to_owned(), 12, 0o120_777, 7, 0, 0),
                ("dev".to_owned(), 13, 0o040_755, 0, 0, 0),
                ("dev/console".to_owned(), 14, 0o020_600, 0, 5, 1),
            ]
        );
    }

    #[test]
    fn same_tree_same_bytes() {
        assert_eq!(archive(&tree(), 1).unwrap(), archive(&tree(), 1).unwrap());
    }
}

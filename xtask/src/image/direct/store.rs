//! Finished pieces of a build, each in a folder named after what it was made of.
//!
//! A piece is made in a folder beside its place and renamed when it is complete; its checksums are compared whenever
//! it is used. So an interrupted build leaves nothing that a later one trusts, and damage is noticed.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::super::error::Error;

/// What unfinished folders' names begin with.
const UNFINISHED: &str = ".tmp-";
/// The last line of a list of checksums.
const COMPLETE: &str = "complete";

/// What a piece is made of: the source of its key, and its record.
#[derive(Clone, Debug, Default)]
pub struct Recipe {
    lines: Vec<String>,
}

impl Recipe {
    /// Adds a named value.
    pub fn add(&mut self, name: &str, value: &str) {
        let value = value.replace('\\', "\\\\").replace('\n', "\\n");
        self.lines.push(format!("{name}: {value}"));
    }

    /// Adds all files of a folder with their names, except those that `skip` picks by path.
    pub fn add_folder(
        &mut self,
        name: &str,
        folder: &Path,
        skip: impl Fn(&str) -> bool,
    ) -> Result<(), Error> {
        let mut entries = Vec::new();
        walk(folder, Path::new(""), &mut entries)?;
        for entry in entries.iter().filter(|e| !skip(path_of(e))) {
            self.add(name, entry);
        }
        Ok(())
    }

    /// The key: SHA-256 of all of it, in hex.
    pub fn key(&self) -> String {
        hex::encode(Sha256::digest(self.text().as_bytes()))
    }

    fn text(&self) -> String {
        self.lines.iter().map(|l| format!("{l}\n")).collect()
    }
}

/// The folder with all pieces.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// A right to build: one process at a time.
#[derive(Debug)]
pub struct Lock {
    _file: fs::File,
}

impl Store {
    /// Opens the store in a folder, making it if need be.
    pub fn open(root: &Path) -> Result<Self, Error> {
        fs::create_dir_all(root).map_err(|e| Error::io("make the folder", root, e))?;
        Ok(Self { root: root.to_owned() })
    }

    /// Its folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Waits for other processes that build here, calling `waiting` first if there is one. Then nothing unfinished is
    /// anybody's: what interrupted builds left is removed.
    pub fn lock(&self, waiting: impl FnOnce()) -> Result<Lock, Error> {
        use rustix::fs::{FlockOperation, flock};
        let path = self.root.join("lock");
        let file = fs::File::create(&path).map_err(|e| Error::io("make", &path, e))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            waiting();
            flock(&file, FlockOperation::LockExclusive).map_err(|e| Error::io("lock", &path, e.into()))?;
        }
        let entries = fs::read_dir(&self.root).map_err(|e| Error::io("read the folder", &self.root, e))?;
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                remove(&entry.path())?;
            }
        }
        Ok(Lock { _file: file })
    }

    fn folder(&self, name: &str, recipe: &Recipe) -> PathBuf {
        let key = recipe.key();
        self.root.join(format!("{name}-{}", &key[..16]))
    }

    /// The files of a piece that is there and sound. A damaged one is removed, which is said.
    pub fn find(&self, name: &str, recipe: &Recipe) -> Result<Option<PathBuf>, Error> {
        let folder = self.folder(name, recipe);
        if !folder.exists() {
            return Ok(None);
        }
        match verify(&folder, recipe) {
            Ok(()) => Ok(Some(folder.join("files"))),
            Err(what) => {
                eprintln!("warning: {} is damaged ({what}); making it again", folder.display());
                remove(&folder)?;
                Ok(None)
            }
        }
    }

    /// A folder for work that goes away with the guard.
    pub fn scratch(&self, name: &str) -> Result<tempfile::TempDir, Error> {
        tempfile::Builder::new()
            .prefix(&format!("{UNFINISHED}{name}-"))
            .tempdir_in(&self.root)
            .map_err(|e| Error::io("make a folder in", &self.root, e))
    }

    /// Makes a piece: `fill` fills the folder that it is given.
    pub fn make(
        &self,
        name: &str,
        recipe: &Recipe,
        fill: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<PathBuf, Error> {
        let unfinished = self.scratch(name)?;
        let files = unfinished.path().join("files");
        fs::create_dir(&files).map_err(|e| Error::io("make the folder", &files, e))?;
        fill(&files)?;
        let mut sums = Vec::new();
        walk(&files, Path::new(""), &mut sums)?;
        sums.push(COMPLETE.to_owned());
        write(&unfinished.path().join("recipe"), &recipe.text())?;
        write(&unfinished.path().join("sums"), &(sums.join("\n") + "\n"))?;
        open_to_all(unfinished.path())?;

        let folder = self.folder(name, recipe);
        if folder.exists() {
            remove(&folder)?;
        }
        fs::rename(unfinished.path(), &folder).map_err(|e| Error::io("put in place", &folder, e))?;
        // It has moved: there is nothing left for the guard to remove.
        let _moved = unfinished.keep();
        Ok(folder.join("files"))
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|e| Error::write(path, text.len() as u64, e))
}

fn remove(path: &Path) -> Result<(), Error> {
    fs::remove_dir_all(path).map_err(|e| Error::io("remove", path, e))
}

/// tempfile's folders are their owner's alone.
fn open_to_all(folder: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
        .map_err(|e| Error::io("set the mode of", folder, e))
}

fn verify(folder: &Path, recipe: &Recipe) -> Result<(), String> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).map_err(|e| format!("{name}: {e}"));
    if read("recipe")? != recipe.text() {
        return Err("it was made from something else".to_owned());
    }
    let sums = read("sums")?;
    let mut expected: Vec<&str> = sums.lines().collect();
    if expected.pop() != Some(COMPLETE) {
        return Err("its list of checksums is cut short".to_owned());
    }
    let mut found = Vec::new();
    walk(&folder.join("files"), Path::new(""), &mut found).map_err(|e| e.to_string())?;
    let path = path_of;
    for (expected, found) in expected.iter().zip(&found) {
        if expected != found {
            return Err(format!("{} has changed", path(expected)));
        }
    }
    match expected.len().cmp(&found.len()) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(format!("{} is too much", path(&found[expected.len()]))),
        std::cmp::Ordering::Greater => Err(format!("{} is missing", path(expected[found.len()]))),
    }
}

/// The path in a line of `walk`.
fn path_of(line: &str) -> &str {
    line.split_once('/').map_or(line, |(_, path)| path)
}

/// Lists a folder's content, sorted: kind, mode or target, checksum, and path after a slash.
fn walk(root: &Path, inside: &Path, lines: &mut Vec<String>) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    let folder = root.join(inside);
    let failed = |e| Error::io("read the folder", &folder, e);
    let mut names: Vec<_> = fs::read_dir(&folder)
        .map_err(failed)?
        .map(|entry| entry.map(|e| e.file_name()))
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    names.sort();
    for name in names {
        let inside = inside.join(name);
        let path = root.join(&inside);
        let meta = path.symlink_metadata().map_err(|e| Error::io("read", &path, e))?;
        let shown = inside.display();
        if meta.is_symlink() {
            let target = path.read_link().map_err(|e| Error::io("read the link", &path, e))?;
            lines.push(format!(
                "link {} /{shown}",
                hex::encode(Sha256::digest(target.as_os_str().as_encoded_bytes()))
            ));
        } else if meta.is_dir() {
            lines.push(format!("folder /{shown}"));
            walk(root, &inside, lines)?;
        } else {
            let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            let run = if meta.permissions().mode() & 0o100 == 0 { "file" } else { "program" };
            lines.push(format!("{run} {} /{shown}", hex::encode(Sha256::digest(&bytes))));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(value: &str) -> Recipe {
        let mut recipe = Recipe::default();
        recipe.add("source", value);
        recipe
    }

    fn fill(folder: &Path) -> Result<(), Error> {
        fs::create_dir(folder.join("bin")).unwrap();
        fs::write(folder.join("bin/program"), "bytes").unwrap();
        std::os::unix::fs::symlink("program", folder.join("bin/link")).unwrap();
        Ok(())
    }

    #[test]
    fn a_piece_is_found_again_by_its_recipe_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.find("tool", &recipe("1")).unwrap(), None);
        let files = store.make("tool", &recipe("1"), fill).unwrap();
        assert_eq!(store.find("tool", &recipe("1")).unwrap(), Some(files));
        assert_eq!(store.find("tool", &recipe("2")).unwrap(), None);
        assert_eq!(store.find("other", &recipe("1")).unwrap(), None);
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let failed = store.make("tool", &recipe("1"), |folder| {
            fill(folder)?;
            Err(Error::plain("no", "help"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_an_interruption_left_is_removed_and_never_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let files = store.make("tool", &recipe("1"), fill).unwrap();
        let whole = files.parent().unwrap();
        let left = dir.path().join(".tmp-tool-x");
        fs::rename(whole, &left).unwrap();
        assert_eq!(store.find("tool", &recipe("1")).unwrap(), None);
        drop(store.lock(|| ()).unwrap());
        assert!(!left.exists());
    }

    #[test]
    fn every_kind_of_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let damages: [&dyn Fn(&Path); 8] = [
            &|p| fs::write(p.join("files/bin/program"), "bytez").unwrap(),
            &|p| fs::remove_file(p.join("files/bin/program")).unwrap(),
            &|p| fs::remove_file(p.join("files/bin/link")).unwrap(),
            &|p| fs::write(p.join("files/bin/more"), "").unwrap(),
            &|p| fs::remove_file(p.join("sums")).unwrap(),
            &|p| fs::write(p.join("sums"), "").unwrap(),
            &|p| fs::remove_file(p.join("recipe")).unwrap(),
            &|p| {
                use std::os::unix::fs::PermissionsExt;
                fs::set_permissions(p.join("files/bin/program"), fs::Permissions::from_mode(0o755)).unwrap();
            },
        ];
        for damage in damages {
            let files = store.make("tool", &recipe("1"), fill).unwrap();
            damage(files.parent().unwrap());
            assert_eq!(store.find("tool", &recipe("1")).unwrap(), None);
            assert!(!files.exists());
        }
    }

    #[test]
    fn the_key_depends_on_every_line_and_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "1").unwrap();
        let key = || {
            let mut recipe = recipe("x");
            recipe.add_folder("folder", dir.path(), |path| path.ends_with(".md")).unwrap();
            recipe.key()
        };
        let first = key();
        assert_eq!(first, key());
        fs::write(dir.path().join("a"), "2").unwrap();
        let second = key();
        assert_ne!(first, second);
        fs::write(dir.path().join("README.md"), "skipped").unwrap();
        assert_eq!(second, key());
        fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert_ne!(second, key());
        let (mut one, mut two) = (Recipe::default(), Recipe::default());
        one.add("a", "b\nc: d");
        two.add("a", "b");
        two.add("c", "d");
        assert_ne!(one.key(), two.key());
    }
}

//! The cache outside the tree: entries by content or by the hash of what made them, each with checksums.
//!
//! An entry is a folder that appears by one rename, so it is never half there. Its file `sha256sums` is checked
//! whenever the entry is used; an entry that fails is thrown away, and said to be.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::error::Error;
use super::tree::sha256;

/// Files of an entry, by name.
pub type Files = BTreeMap<String, Vec<u8>>;

const SUMS: &str = "sha256sums";
/// What unfinished folders' names begin with.
const UNFINISHED: &str = ".new-";
/// Unfinished folders that are older than this are nobody's any more.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// The cache's folder.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// $XDG_CACHE_HOME/linux-on-gpu, else ~/.cache/linux-on-gpu.
    pub fn open() -> Result<Self, Error> {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        let root = Self::choose(variable("XDG_CACHE_HOME"), variable("HOME"))?;
        Ok(Self { root })
    }

    /// A cache in a folder of the test's.
    #[cfg(test)]
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    fn choose(xdg: Option<OsString>, home: Option<OsString>) -> Result<PathBuf, Error> {
        // The XDG specification says that a relative path is to be ignored.
        let xdg = xdg.map(PathBuf::from).filter(|p| p.is_absolute());
        let base = xdg.or_else(|| home.map(|h| PathBuf::from(h).join(".cache")));
        base.map(|b| b.join("linux-on-gpu")).ok_or_else(|| {
            Error::plain(
                "there is no place for the cache: neither XDG_CACHE_HOME nor HOME is set",
                "Set XDG_CACHE_HOME to a folder.",
            )
        })
    }

    /// Where it lies.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of an entry, whether it is there or not.
    pub fn path(&self, kind: &str, key: &str) -> PathBuf {
        self.root.join(kind).join(key)
    }

    /// An entry's files, checked. A corrupted entry is removed, reported, and `None`.
    pub fn get(&self, kind: &str, key: &str) -> Result<Option<Files>, Error> {
        let folder = self.path(kind, key);
        if !folder.is_dir() {
            return Ok(None);
        }
        match read_checked(&folder) {
            Ok(files) => Ok(Some(files)),
            Err(what) => {
                eprintln!(
                    "warning: the cache entry {} is corrupted ({what}); making it again",
                    folder.display()
                );
                std::fs::remove_dir_all(&folder).map_err(|e| Error::io("remove", &folder, e))?;
                Ok(None)
            }
        }
    }

    /// Stores an entry and gives back its folder. What is there already is replaced.
    pub fn put(&self, kind: &str, key: &str, files: &Files) -> Result<PathBuf, Error> {
        let folder = self.path(kind, key);
        let parent = self.root.join(kind);
        std::fs::create_dir_all(&parent).map_err(|e| Error::io("make the folder", &parent, e))?;
        let temp = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(&parent)
            .map_err(|e| Error::io("make a folder in", &parent, e))?;
        let need: u64 = files.values().map(|bytes| bytes.len() as u64).sum();
        let mut sums = String::new();
        for (name, bytes) in files {
            let path = temp.path().join(name);
            std::fs::write(&path, bytes).map_err(|e| Error::write(&path, need, e))?;
            sums.push_str(&format!("{}  {name}\n", sha256(bytes)));
        }
        let path = temp.path().join(SUMS);
        std::fs::write(&path, sums).map_err(|e| Error::write(&path, need, e))?;
        open_to_all(temp.path()).map_err(|e| Error::io("set the mode of", temp.path(), e))?;
        if folder.exists() {
            std::fs::remove_dir_all(&folder).map_err(|e| Error::io("remove", &folder, e))?;
        }
        match std::fs::rename(temp.path(), &folder) {
            Ok(()) => {
                // The folder has moved: there is nothing left for the guard to remove.
                let _moved = temp.keep();
                Ok(folder)
            }
            // Somebody else made the same entry at the same moment.
            Err(_) if read_checked(&folder).is_ok_and(|there| there == *files) => Ok(folder),
            Err(e) => Err(Error::io("put in place", &folder, e)),
        }
    }

    /// Removes all but the newest entries of a kind, and what interrupted runs left. Failure to do so harms nobody.
    pub fn prune(&self, kind: &str, keep: usize) {
        let entries = std::fs::read_dir(self.root.join(kind)).into_iter().flatten().flatten();
        let now = SystemTime::now();
        let mut entries: Vec<(Duration, PathBuf)> = entries
            .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
            .map(|(time, path)| (now.duration_since(time).unwrap_or_default(), path))
            .collect();
        entries.sort();
        let unfinished =
            |p: &Path| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(UNFINISHED));
        let (left, finished): (Vec<_>, Vec<_>) = entries.into_iter().partition(|(_, path)| unfinished(path));
        let stale = left.into_iter().filter(|(age, _)| *age > STALE);
        for (_, path) in stale.chain(finished.into_iter().skip(keep)) {
            drop(std::fs::remove_dir_all(path));
        }
    }
}

#[cfg(unix)]
fn open_to_all(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn open_to_all(_: &Path) -> std::io::Result<()> {
    Ok(())
}

/// Reads an entry's files and compares them with their sums.
fn read_checked(folder: &Path) -> Result<Files, String> {
    let sums = std::fs::read_to_string(folder.join(SUMS)).map_err(|e| format!("{SUMS}: {e}"))?;
    let mut files = Files::new();
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ").ok_or_else(|| format!("{SUMS} is damaged"))?;
        if name.contains('/') || name.starts_with('.') {
            return Err(format!("{SUMS} is damaged"));
        }
        let bytes = std::fs::read(folder.join(name)).map_err(|e| format!("{name}: {e}"))?;
        if sha256(&bytes) != sum {
            return Err(format!("{name} has another checksum"));
        }
        files.insert(name.to_owned(), bytes);
    }
    if files.is_empty() {
        return Err(format!("{SUMS} is empty"));
    }
    Ok(files)
}

/// Writes a file so that a reader finds the old or the new one, never a part. Left alone where nothing changed.
pub fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<bool, Error> {
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| Error::io("make the folder", folder, e))?;
    let need = bytes.len() as u64;
    let mut temp = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempfile_in(folder)
        .map_err(|e| Error::write(path, need, e))?;
    temp.write_all(bytes).map_err(|e| Error::write(path, need, e))?;
    readable(temp.as_file()).map_err(|e| Error::io("set the mode of", path, e))?;
    temp.persist(path).map_err(|e| Error::io("put in place", path, e.error))?;
    Ok(true)
}

#[cfg(unix)]
fn readable(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn readable(_: &std::fs::File) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Files {
        Files::from([("a".to_owned(), b"one".to_vec()), ("b".to_owned(), vec![0; 70_000])])
    }

    #[test]
    fn an_entry_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        assert_eq!(cache.get("k", "1").unwrap(), None);
        cache.put("k", "1", &files()).unwrap();
        assert_eq!(cache.get("k", "1").unwrap(), Some(files()));
        cache.put("k", "1", &files()).unwrap();
        assert_eq!(cache.get("k", "1").unwrap(), Some(files()));
        assert_eq!(std::fs::read_dir(dir.path().join("k")).unwrap().count(), 1, "leftovers");
    }

    #[test]
    fn every_kind_of_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let damages: [&dyn Fn(&Path); 5] = [
            &|e| std::fs::write(e.join("a"), b"onf").unwrap(),
            &|e| std::fs::write(e.join("b"), vec![0; 69_999]).unwrap(),
            &|e| std::fs::remove_file(e.join("a")).unwrap(),
            &|e| std::fs::remove_file(e.join(SUMS)).unwrap(),
            &|e| std::fs::write(e.join(SUMS), b"").unwrap(),
        ];
        for damage in damages {
            let entry = cache.put("k", "1", &files()).unwrap();
            damage(&entry);
            assert_eq!(cache.get("k", "1").unwrap(), None);
            assert!(!entry.exists());
        }
    }

    #[test]
    fn only_the_newest_entries_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let age = |path: &Path, hours: u64| {
            let time = SystemTime::now() - Duration::from_secs(hours * 3600);
            std::fs::File::open(path).unwrap().set_modified(time).unwrap();
        };
        for n in 1..=5 {
            age(&cache.put("k", &n.to_string(), &files()).unwrap(), n);
        }
        for (name, hours) in [(".new-at-work", 1), (".new-left", 48)] {
            let path = dir.path().join("k").join(name);
            std::fs::create_dir(&path).unwrap();
            age(&path, hours);
        }
        cache.prune("k", 2);
        let mut left: Vec<_> =
            std::fs::read_dir(dir.path().join("k")).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".new-at-work", "1", "2"]);
    }

    #[test]
    fn the_folder_follows_xdg() {
        let choose = |xdg: Option<&str>, home: Option<&str>| {
            Cache::choose(xdg.map(Into::into), home.map(Into::into)).map(|p| p.display().to_string()).ok()
        };
        assert_eq!(choose(Some("/x"), Some("/h")).as_deref(), Some("/x/linux-on-gpu"));
        assert_eq!(choose(Some("x"), Some("/h")).as_deref(), Some("/h/.cache/linux-on-gpu"));
        assert_eq!(choose(None, Some("/h")).as_deref(), Some("/h/.cache/linux-on-gpu"));
        assert_eq!(choose(None, None), None);
    }

    #[test]
    fn a_file_is_replaced_whole_or_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/file");
        assert!(write_if_changed(&path, b"one").unwrap());
        assert!(!write_if_changed(&path, b"one").unwrap());
        assert!(write_if_changed(&path, b"two").unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
    }
}

//! Where Buildroot comes from: a folder that is given, or the pinned release, downloaded once and verified.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::super::direct::host;
use super::super::error::Error;
use super::super::request::Request;
use super::super::step::Progress;

/// The pin's file in the repository.
pub const PIN: &str = "buildroot-external/buildroot/release.yaml";
/// The variable that names a tree.
pub const VARIABLE: &str = "BUILDROOT_DIR";
/// How long a site may take to answer.
const ANSWER: Duration = Duration::from_secs(4);

/// The content of release.yaml.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// As Buildroot calls it.
    pub version: String,
    /// The archive.
    pub url: String,
    /// The archive's checksum.
    pub sha256: String,
    /// What the profiles were built with.
    pub tested: Vec<String>,
}

/// A Buildroot tree.
#[derive(Clone, Debug)]
pub struct Tree {
    /// Its folder.
    pub folder: PathBuf,
    /// What its Makefile says.
    pub version: String,
}

/// What tells one tree from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeId {
    /// What its Makefile says.
    pub version: String,
    /// Over all of its files.
    pub hash: String,
}

impl TreeId {
    /// The tree that was built with last.
    pub fn recall(file: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }

    /// Records the tree that was built with.
    pub fn remember(&self, file: &Path) -> Result<(), Error> {
        let text = serde_json::to_string(self)
            .map_err(|e| Error::plain(format!("cannot record the tree: {e}"), "This is a bug."))?;
        super::super::cache::write_if_changed(file, text.as_bytes()).map(drop)
    }
}

/// Where a tree could come from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// It was named, by this option or variable.
    Given(Tree, &'static str),
    /// The release in the cache.
    Cached(Tree),
    /// The release, to be downloaded.
    Download,
}

impl Pin {
    /// Reads the pin.
    pub fn read(repo: &Path) -> Result<Self, Error> {
        let path = repo.join(PIN);
        let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        let wrong = |what: &dyn std::fmt::Display| {
            Error::plain(format!("{PIN}: {what}"), "It has the keys version, url, sha256 and tested.")
        };
        let pin: Self = serde_saphyr::from_str(&text).map_err(|e| wrong(&e))?;
        if pin.sha256.len() != 64 || !pin.sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong(&"sha256 is not 64 hexadecimal digits"));
        }
        Ok(pin)
    }

    /// What is said of a version that the profiles were not built with.
    pub fn warning(&self, tree: &Tree) -> Option<String> {
        let known = tree.version == self.version || self.tested.contains(&tree.version);
        (!known).then(|| {
            format!(
                "warning: {} is Buildroot {}; the profiles were built with {}, and {} is what would be downloaded",
                tree.folder.display(),
                tree.version,
                self.tested.join(", "),
                self.version
            )
        })
    }

    fn archive(&self) -> &str {
        self.url.rsplit('/').next().unwrap_or(&self.url)
    }

    fn cached(&self, folder: &Path) -> PathBuf {
        folder.join(format!("release-{}", self.version))
    }
}

/// The tree that the option or the variable names, and which of them.
pub fn given(option: Option<&Path>) -> Result<Option<(Tree, &'static str)>, Error> {
    let variable = std::env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
    let (dir, how) = match (option, variable) {
        (Some(dir), _) => (dir.to_owned(), "--buildroot"),
        (None, Some(dir)) => (dir, VARIABLE),
        (None, None) => return Ok(None),
    };
    Ok(Some((Tree::open(&dir, how)?, how)))
}

/// Looks for a tree without asking the network.
pub fn look(request: &Request, folder: &Path, pin: &Pin) -> Result<Origin, Error> {
    if let Some((tree, how)) = given(request.options.dir.as_deref())? {
        return Ok(Origin::Given(tree, how));
    }
    let cached = pin.cached(folder);
    match cached.is_dir() {
        true => Ok(Origin::Cached(Tree::open(&cached, "the cache")?)),
        false => Ok(Origin::Download),
    }
}

/// Whether the release's archive can be had within seconds.
pub fn answers(request: &Request, pin: &Pin) -> bool {
    if let Some(mirror) = &request.options.mirror
        && let Some(dir) = local(mirror)
        && dir.join(pin.archive()).is_file()
    {
        return true;
    }
    !request.options.offline && sites(request, pin).iter().any(|site| size_of(site).is_ok())
}

/// The addresses of the release, the mirror's first.
fn sites(request: &Request, pin: &Pin) -> Vec<String> {
    let mirror = request.options.mirror.as_ref().filter(|m| local(m).is_none());
    let mut sites: Vec<String> =
        mirror.map(|m| format!("{}/{}", m.trim_end_matches('/'), pin.archive())).into_iter().collect();
    sites.push(pin.url.clone());
    sites
}

/// The folder that a mirror is, if it is one.
pub fn local(mirror: &str) -> Option<PathBuf> {
    match mirror.strip_prefix("file://") {
        Some(path) => Some(path.into()),
        None => (!mirror.contains("://")).then(|| mirror.into()),
    }
}

/// Asks for a file's size. An error is what the site, or the way there, said.
pub fn size_of(url: &str) -> Result<Option<u64>, String> {
    let seconds = ANSWER.as_secs().to_string();
    let output = if let Some(wget) = host::find("wget") {
        duct::cmd!(wget, "--spider", "--server-response", "-T", &seconds, "-t", "1", "-nv", url)
    } else if let Some(curl) = host::find("curl") {
        duct::cmd!(curl, "-sSfIL", "--max-time", &seconds, url)
    } else {
        return Err("neither wget nor curl is installed".to_owned());
    };
    let output = output
        .env("LC_ALL", "C")
        .stdin_null()
        .stderr_to_stdout()
        .stdout_capture()
        .unchecked()
        .run()
        .map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let last = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no answer");
        return Err(last.trim().to_owned());
    }
    Ok(text.lines().filter_map(length).next_back())
}

/// The number in a Content-Length header.
fn length(line: &str) -> Option<u64> {
    let (name, value) = line.trim().split_once(':')?;
    name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok()).flatten()
}

/// Downloads and unpacks the release.
pub fn download(request: &Request, folder: &Path, pin: &Pin, progress: &mut Progress) -> Result<Tree, Error> {
    let logs = folder.join("logs");
    fs::create_dir_all(folder).map_err(|e| Error::io("make the folder", folder, e))?;
    let temp = tempfile::Builder::new()
        .prefix(".tmp-release-")
        .tempdir_in(folder)
        .map_err(|e| Error::io("make a folder in", folder, e))?;
    let archive = temp.path().join("archive");
    let title = format!("fetch Buildroot {}", pin.version);
    progress.step(&title, Duration::from_secs(20), &logs.join("release.log"), |step| {
        let local = request.options.mirror.as_deref().and_then(local).map(|d| d.join(pin.archive()));
        match local.filter(|f| f.is_file()) {
            Some(file) => drop(fs::copy(&file, &archive).map_err(|e| Error::io("copy", &file, e))?),
            None if request.options.offline => return Err(missing(pin, "--offline was given", &[])),
            None => {
                let mut said = Vec::new();
                for site in sites(request, pin) {
                    let wget = ["wget", "-q", "-T", "20", "-t", "2", "-O"].map(std::ffi::OsString::from);
                    let mut words = wget.to_vec();
                    words.extend([archive.clone().into_os_string(), site.clone().into()]);
                    let (program, rest) = words.split_at(1);
                    match step.run("download the release", duct::cmd(&program[0], rest)) {
                        Ok(()) => break,
                        Err(_) => said.push(site),
                    }
                }
                if !archive.metadata().is_ok_and(|m| m.len() > 0) {
                    return Err(missing(pin, "no site answered", &said));
                }
            }
        }
        let bytes = fs::read(&archive).map_err(|e| Error::io("read", &archive, e))?;
        let sum = hex::encode(Sha256::digest(&bytes));
        if sum != pin.sha256 {
            return Err(Error::plain(
                format!(
                    "{} has another checksum than {PIN} says:\n  is        {sum}\n  should be {}",
                    pin.archive(),
                    pin.sha256
                ),
                "The mirror or a proxy on the way may have given something else. Nothing was unpacked.",
            ));
        }
        let tree = temp.path().join("tree");
        fs::create_dir(&tree).map_err(|e| Error::io("make the folder", &tree, e))?;
        let words = ["--extract", "--strip-components=1", "--no-same-owner", "--file"];
        let mut words: Vec<std::ffi::OsString> = words.map(Into::into).to_vec();
        words.extend([archive.clone().into(), "-C".into(), tree.clone().into()]);
        step.run("unpack the release", duct::cmd("tar", words).env("LC_ALL", "C"))?;
        let place = pin.cached(folder);
        fs::rename(&tree, &place).map_err(|e| Error::io("put in place", &place, e))?;
        Tree::open(&place, "the cache")
    })
}

fn missing(pin: &Pin, why: &str, sites: &[String]) -> Error {
    let tried: String = sites.iter().map(|s| format!("\n  {s}")).collect();
    Error::plain(
        format!("Buildroot {} is not on this machine, and cannot be fetched: {why}{tried}", pin.version),
        format!(
            "Unpack a release anywhere and name its folder with --buildroot or {VARIABLE}; or name a site or folder \
             that has {} with --mirror; or use `--builder direct`, which makes the same guest of the distribution's \
             packages.",
            pin.archive()
        ),
    )
}

impl Tree {
    /// Looks into a folder; `how` it was named is for messages.
    pub fn open(folder: &Path, how: &str) -> Result<Self, Error> {
        let wrong = |what: &str| {
            Error::plain(
                format!("{} ({how}) is not a Buildroot tree: {what}", folder.display()),
                "Name the folder that holds Buildroot's Makefile, package/ and support/.",
            )
        };
        let folder = folder.canonicalize().map_err(|e| wrong(&e.to_string()))?;
        let makefile =
            fs::read_to_string(folder.join("Makefile")).map_err(|e| wrong(&format!("Makefile: {e}")))?;
        let version = makefile
            .lines()
            .find_map(|l| l.strip_prefix("export BR2_VERSION := "))
            .ok_or_else(|| wrong("its Makefile tells no BR2_VERSION"))?
            .trim()
            .to_owned();
        for part in ["package", "support", "linux", "fs", "toolchain"] {
            if !folder.join(part).is_dir() {
                return Err(wrong(&format!("{part}/ is missing")));
            }
        }
        Ok(Self { folder, version })
    }

    /// What tells it from others; `folder` is the builder's.
    pub fn id(&self, folder: &Path) -> Result<TreeId, Error> {
        Ok(TreeId { version: self.version.clone(), hash: self.hash(&folder.join("trees"))? })
    }

    /// A hash over all of its files. `memory` remembers it as long as no file's size or time changes.
    fn hash(&self, memory: &Path) -> Result<String, Error> {
        let mut files = Vec::new();
        walk(&self.folder, Path::new(""), &mut files)?;
        files.sort();
        let mut stamp = Sha256::new();
        for (path, meta) in &files {
            stamp.update(format!("{} {meta}\n", path.display()));
        }
        let stamp = hex::encode(stamp.finalize());
        let known = fs::read_to_string(memory).unwrap_or_default();
        if let Some(sum) = known.lines().find_map(|l| l.strip_prefix(&format!("{stamp} "))) {
            return Ok(sum.to_owned());
        }
        let mut hash = Sha256::new();
        for (path, _) in &files {
            let whole = self.folder.join(path);
            let bytes = match whole.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
                true => whole.read_link().map(|t| t.into_os_string().into_encoded_bytes()),
                false => fs::read(&whole),
            };
            let bytes = bytes.map_err(|e| Error::io("read", &whole, e))?;
            hash.update(format!("{} {}\n", path.display(), hex::encode(Sha256::digest(&bytes))));
        }
        let sum = hex::encode(hash.finalize());
        let kept: Vec<&str> = known.lines().rev().take(20).collect();
        let mut text = format!("{stamp} {sum}\n");
        text.extend(kept.iter().rev().map(|l| format!("{l}\n")));
        super::super::cache::write_if_changed(memory, text.as_bytes())?;
        Ok(sum)
    }
}

/// What a build leaves in a tree, or a version control keeps there.
const NOT_SOURCE: &[&str] = &[".git", "output", "dl", ".config", ".config.old", "__pycache__"];

fn walk(root: &Path, inside: &Path, files: &mut Vec<(PathBuf, String)>) -> Result<(), Error> {
    use std::os::unix::fs::MetadataExt;
    let folder = root.join(inside);
    let failed = |e| Error::io("read the folder", &folder, e);
    for entry in fs::read_dir(&folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if NOT_SOURCE.iter().any(|n| name == *n) || name.to_string_lossy().ends_with(".pyc") {
            continue;
        }
        let meta = entry.metadata().map_err(failed)?;
        let path = inside.join(name);
        match meta.is_dir() {
            true => walk(root, &path, files)?,
            false => files.push((path, format!("{} {} {}", meta.len(), meta.mtime(), meta.mtime_nsec()))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_is_sound_and_names_its_archive() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let pin = Pin::read(&repo).unwrap();
        assert!(pin.archive().starts_with("buildroot-") && pin.archive().contains(&pin.version), "{pin:?}");
        assert!(!pin.tested.is_empty());
    }

    #[test]
    fn mirrors_are_folders_or_addresses() {
        assert_eq!(local("/srv/mirror"), Some("/srv/mirror".into()));
        assert_eq!(local("file:///srv/mirror"), Some("/srv/mirror".into()));
        assert_eq!(local("http://mirror.example/br"), None);
    }

    #[test]
    fn sizes_are_read_from_headers() {
        assert_eq!(length("  Content-Length: 5912345"), Some(5_912_345));
        assert_eq!(length("content-length:7"), Some(7));
        assert_eq!(length("  Content-Type: text/html"), None);
    }

    #[test]
    fn a_tree_is_known_by_its_files_and_says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let error = |dir: &Path| Tree::open(dir, "--buildroot").unwrap_err().to_string();
        assert!(error(&dir.path().join("none")).contains("--buildroot"));
        assert!(error(dir.path()).contains("Makefile"));
        fs::write(dir.path().join("Makefile"), "export BR2_VERSION := 2026.08\n").unwrap();
        assert!(error(dir.path()).contains("package/ is missing"));
        for part in ["package", "support", "linux", "fs", "toolchain"] {
            fs::create_dir(dir.path().join(part)).unwrap();
        }
        let tree = Tree::open(dir.path(), "--buildroot").unwrap();
        assert_eq!(tree.version, "2026.08");
        let memory = tempfile::tempdir().unwrap();
        let memory = memory.path().join("trees");
        let first = tree.hash(&memory).unwrap();
        assert_eq!(tree.hash(&memory).unwrap(), first);
        fs::create_dir(dir.path().join("output")).unwrap();
        fs::write(dir.path().join("output/x"), "").unwrap();
        assert_eq!(tree.hash(&memory).unwrap(), first);
        fs::write(dir.path().join("linux/linux.mk"), "x").unwrap();
        assert_ne!(tree.hash(&memory).unwrap(), first);
        let pin =
            Pin { version: "1".into(), url: "x".into(), sha256: String::new(), tested: vec!["2".into()] };
        assert!(pin.warning(&tree).is_some_and(|w| w.contains("2026.08")));
    }
}

//! Overlays: folders of files that are laid over the guest's programs, each with an overlay.yaml.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::error::Error;
use super::profile::names_in;
use super::text::{Located, Source, did_you_mean, list};
use super::tree::{self, Kind, Node, Tree};

/// A folder of overlays/, read and checked.
#[derive(Debug)]
pub struct Overlay {
    /// The folder's name.
    pub name: String,
    /// One line.
    pub description: String,
    /// Its files.
    pub tree: Tree,
    /// Paths of earlier layers that it may put something else in place of.
    pub replaces: Vec<String>,
    /// Its overlay.yaml.
    pub source: Arc<Source>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    description: Option<Spanned<String>>,
    replaces: Option<Vec<Spanned<String>>>,
    paths: Option<BTreeMap<String, Spanned<RawPath>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPath {
    mode: Option<Spanned<String>>,
    owner: Option<Spanned<String>>,
    symlink: Option<Spanned<String>>,
    device: Option<Spanned<String>>,
    directory: Option<Spanned<bool>>,
}

/// Names of the overlays that there are.
pub fn names(root: &Path) -> Vec<String> {
    names_in(&root.join("overlays"), |p| {
        p.is_dir().then(|| p.file_name().map(|n| n.to_string_lossy().into_owned())).flatten()
    })
}

impl Overlay {
    /// Reads the overlay that a profile names.
    pub fn load(root: &Path, name: &Located<String>) -> Result<Self, Error> {
        let folder = root.join("overlays").join(&name.value);
        if !folder.is_dir() {
            let known = names(root);
            return Err(name.error(
                format!("there is no overlay `{}`", name.value),
                format!(
                    "{}The overlays are: {}. A new one is a folder overlays/{}/ with an overlay.yaml and files/.",
                    did_you_mean(&name.value, &known),
                    list(&known),
                    name.value
                ),
            ));
        }
        Self::read(root, &folder, &name.value)
    }

    /// Reads an overlay's folder.
    pub fn read(root: &Path, folder: &Path, name: &str) -> Result<Self, Error> {
        let yaml = folder.join("overlay.yaml");
        if !yaml.is_file() {
            return Err(Error::plain(
                format!("overlay `{name}`: {} is missing", yaml.display()),
                "Write one with at least a line `description: what it adds`.",
            ));
        }
        let source = Source::read(&yaml, root)?;
        let raw: Raw = source.yaml()?;
        stray_files(folder, name)?;

        let no_description = || {
            source.error_at_line(
                1,
                "the key `description` is missing",
                "Add a line `description: what this overlay adds`.".to_owned(),
            )
        };
        let description = source.locate(raw.description.ok_or_else(no_description)?);
        if description.value.trim().is_empty() || description.value.trim().contains('\n') {
            return Err(description.error("description: it should be one line", "Shorten it.".to_owned()));
        }

        let files = folder.join("files");
        let mut tree = if files.is_dir() {
            tree::read_folder(&files, &|path, target| check_host_link(&files, path, target))?
        } else {
            Tree::new()
        };
        for (path, entry) in raw.paths.into_iter().flatten() {
            let entry = source.locate(entry);
            let clean = clean_path(&path)
                .map_err(|what| entry.error(format!("paths: `{path}` {what}"), PATH_HELP.to_owned()))?;
            declare(&mut tree, &clean, &source, entry)?;
        }
        for path in tree.keys().cloned().collect::<Vec<_>>() {
            tree::add_parents(&mut tree, &path);
        }
        check_parents(&tree, name)?;
        if tree.contains_key("init") {
            return Err(Error::plain(
                format!(
                    "overlay `{name}`: /init is generated from the profile and cannot come from an overlay"
                ),
                "Say what is to be started under `init` in the profile.",
            ));
        }
        let mut replaces = Vec::new();
        for path in raw.replaces.into_iter().flatten() {
            let path = source.locate(path);
            let clean = clean_path(&path.value).map_err(|what| {
                path.error(format!("replaces: `{}` {what}", path.value), PATH_HELP.to_owned())
            })?;
            if !tree.contains_key(&clean) {
                return Err(path.error(
                    format!("replaces: this overlay has no `{}`", path.value),
                    "List only paths that are in this overlay's files/ or `paths`.".to_owned(),
                ));
            }
            replaces.push(clean);
        }
        Ok(Self {
            name: name.to_owned(),
            description: description.value.trim().to_owned(),
            tree,
            replaces,
            source,
        })
    }
}

const PATH_HELP: &str = "Paths are those of the guest: `etc/motd` is its /etc/motd.";

/// A guest path as overlay.yaml gives it: relative to the root, a leading slash is fine, `..` is not.
fn clean_path(path: &str) -> Result<String, &'static str> {
    if path.split('/').any(|part| part == "..") {
        return Err("leaves the overlay: `..` is not allowed");
    }
    match tree::normalize(path) {
        Some(clean) if clean.is_empty() => Err("is the root itself"),
        Some(clean) if clean.contains('\0') => Err("holds a NUL"),
        Some(clean) => Ok(clean),
        None => Err("leaves the overlay"),
    }
}

/// Refuses links of files/ that lead out of it on this machine.
fn check_host_link(files: &Path, path: &str, target: &str) -> Result<(), Error> {
    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    let inside = !target.starts_with('/') && tree::normalize(&format!("{parent}/{target}")).is_some();
    if inside {
        return Ok(());
    }
    Err(Error::plain(
        format!("{}: this link leads out of the overlay, to {target}", files.join(path).display()),
        format!(
            "Copy the file itself into the overlay. If the guest should have a link to its own {target}, say so in \
             overlay.yaml: `paths: {{{path}: {{symlink: {target}}}}}`."
        ),
    ))
}

/// Files beside overlay.yaml and files/ would be silently left out: say so.
fn stray_files(folder: &Path, name: &str) -> Result<(), Error> {
    let stray = names_in(folder, |p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
    let known = ["overlay.yaml", "files"];
    match stray
        .iter()
        .find(|n| !known.contains(&n.as_str()) && !n.starts_with('.') && !n.starts_with("README"))
    {
        None => Ok(()),
        Some(stray) => Err(Error::plain(
            format!("overlay `{name}`: {} is not part of an overlay", folder.join(stray).display()),
            format!("What goes to the guest lies in {}.", folder.join("files").display()),
        )),
    }
}

/// What lies below a path that is no folder cannot be there.
fn check_parents(tree: &Tree, name: &str) -> Result<(), Error> {
    for path in tree.keys() {
        let above = path.match_indices('/').map(|(end, _)| &path[..end]);
        for parent in above {
            if let Some(node) = tree.get(parent).filter(|n| !n.is_folder()) {
                return Err(Error::plain(
                    format!("overlay `{name}`: /{path} cannot be, for /{parent} is {}", node.describe()),
                    "Name the real folder instead.",
                ));
            }
        }
    }
    Ok(())
}

/// Takes one entry of `paths`: a new node, or mode and owner of one from files/.
fn declare(tree: &mut Tree, path: &str, source: &Arc<Source>, entry: Located<RawPath>) -> Result<(), Error> {
    let error = |what: String, help: &str| entry.error(format!("paths: `{path}`: {what}"), help.to_owned());
    let raw = &entry.value;
    let mode = raw.mode.clone().map(|m| parse_mode(&source.locate(m))).transpose()?;
    let (uid, gid) = raw.owner.clone().map(|o| parse_owner(&source.locate(o))).transpose()?.unwrap_or((0, 0));
    let directory = raw.directory.as_ref().is_some_and(|d| d.value);
    let (kind, usual_mode) = match (&raw.symlink, &raw.device, directory) {
        (Some(target), None, false) => {
            if mode.is_some() {
                return Err(error("a link has no mode of its own".to_owned(), "Take `mode` out."));
            }
            (Kind::Link(link_target(path, &source.locate(target.clone()))?), 0o777)
        }
        (None, Some(device), false) => (parse_device(&source.locate(device.clone()))?, 0o600),
        (None, None, true) => (Kind::Folder { asked: true }, 0o755),
        (None, None, false) => {
            let Some(node) = tree.get_mut(path) else {
                return Err(error(
                    "there is no such file in files/".to_owned(),
                    "Put it there, or say what it is: `symlink: target`, `device: char 1 3` or `directory: true`.",
                ));
            };
            if let Kind::Folder { asked } = &mut node.kind {
                *asked = true;
            }
            (node.mode, node.uid, node.gid) = (mode.unwrap_or(node.mode), uid, gid);
            return Ok(());
        }
        _ => {
            return Err(error(
                "it is said to be more than one thing".to_owned(),
                "Keep one of `symlink`, `device` and `directory`.",
            ));
        }
    };
    let folder_twice = directory && tree.get(path).is_some_and(Node::is_folder);
    if tree.contains_key(path) && !folder_twice {
        return Err(error("files/ has something of this name too".to_owned(), "Remove one of the two."));
    }
    tree.insert(path.to_owned(), Node { kind, mode: mode.unwrap_or(usual_mode), uid, gid });
    Ok(())
}

fn parse_mode(mode: &Located<String>) -> Result<u32, Error> {
    let digits = mode.value.strip_prefix("0o").unwrap_or(&mode.value);
    let octal = (3..=5).contains(&digits.len()).then(|| u32::from_str_radix(digits, 8).ok()).flatten();
    octal.filter(|m| *m <= 0o7777).ok_or_else(|| {
        mode.error(
            format!("mode: `{}` is not an octal mode", mode.value),
            "Write it as in `mode: \"0755\"`.".to_owned(),
        )
    })
}

fn parse_owner(owner: &Located<String>) -> Result<(u32, u32), Error> {
    let numbers = owner.value.split_once(':').and_then(|(u, g)| Some((u.parse().ok()?, g.parse().ok()?)));
    numbers.ok_or_else(|| {
        owner.error(
            format!("owner: `{}` is not a pair of numbers", owner.value),
            "Write user and group as numbers: `owner: \"100:101\"`.".to_owned(),
        )
    })
}

fn parse_device(device: &Located<String>) -> Result<Kind, Error> {
    let words: Vec<&str> = device.value.split_whitespace().collect();
    let parsed = match words.as_slice() {
        [kind @ ("char" | "block"), major, minor] => {
            let number = |n: &str, most: u32| n.parse::<u32>().ok().filter(|n| *n <= most);
            let numbers = number(major, 0xfff).zip(number(minor, 0xf_ffff));
            numbers.map(|(major, minor)| Kind::Device { block: *kind == "block", major, minor })
        }
        _ => None,
    };
    parsed.ok_or_else(|| {
        device.error(
            format!("device: `{}` is not a device", device.value),
            "Write kind, major and minor number: `device: char 5 1`.".to_owned(),
        )
    })
}

/// The target of a declared link: absolute ones are the guest's, relative ones must stay in its root.
fn link_target(path: &str, target: &Located<String>) -> Result<String, Error> {
    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    let full = match target.value.strip_prefix('/') {
        Some(absolute) => absolute.to_owned(),
        None => format!("{parent}/{}", target.value),
    };
    if target.value.is_empty() || tree::normalize(&full).is_none() {
        return Err(target.error(
            format!("symlink: `{}` leads out of the guest's root", target.value),
            "Count the `..`, or write the path with a leading slash.".to_owned(),
        ));
    }
    Ok(target.value.clone())
}

/// The layers of an image, merged while they are added.
#[derive(Default)]
pub struct Layers {
    merged: BTreeMap<String, (Node, String)>,
}

impl Layers {
    /// Adds a layer and gives back what of it is new: the segment to append. `at` is where the profile names it.
    pub fn add(
        &mut self,
        name: &str,
        tree: &Tree,
        replaces: &[String],
        at: Option<&Located<String>>,
    ) -> Result<Tree, Error> {
        let mut segment = Tree::new();
        for (path, node) in tree {
            if let Some((old, layer)) = self.merged.get(path) {
                let merge = merge(old, node, replaces.contains(path));
                match merge {
                    Merge::Keep => continue,
                    Merge::Take => {}
                    Merge::Clash(help) => {
                        let what = format!(
                            "{name} clashes with {layer} at /{path}: there it is {}, here {}{}",
                            old.describe(),
                            node.describe(),
                            same_length(old, node)
                        );
                        return Err(match at {
                            Some(at) => at.error(what, help),
                            None => Error::plain(what, help),
                        });
                    }
                }
            }
            self.merged.insert(path.clone(), (node.clone(), name.to_owned()));
            segment.insert(path.clone(), node.clone());
        }
        Ok(segment)
    }
}

enum Merge {
    Keep,
    Take,
    Clash(String),
}

fn merge(old: &Node, new: &Node, may_replace: bool) -> Merge {
    match (&old.kind, &new.kind) {
        (Kind::Folder { .. }, Kind::Folder { asked: false }) => Merge::Keep,
        (Kind::Folder { asked: false }, Kind::Folder { asked: true }) => Merge::Take,
        _ if old == new => Merge::Keep,
        _ if old.is_folder() != new.is_folder() => {
            Merge::Clash("A folder and something else cannot share a path: rename one of them.".to_owned())
        }
        _ if may_replace => Merge::Take,
        _ => Merge::Clash(
            "If the later one is meant to win, list the path under `replaces` in its overlay.yaml; else rename or \
             remove one of the two."
                .to_owned(),
        ),
    }
}

/// Two files of one length differ all the same: say so.
fn same_length(old: &Node, new: &Node) -> &'static str {
    match (&old.kind, &new.kind) {
        (Kind::File(a), Kind::File(b)) if a.len() == b.len() && a != b => " with other bytes",
        _ => "",
    }
}

/// Where overlays lie.
pub fn folder(root: &Path, name: &str) -> PathBuf {
    root.join("overlays").join(name)
}

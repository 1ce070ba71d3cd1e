//! Profiles: what an image holds and how a fleet of it runs by default. Keys are documented in docs/guest.md.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_saphyr::Spanned;

use super::buildroot::Toolchain;
use super::error::Error;
use super::init;
use super::text::{Located, Source, did_you_mean, list};

/// Most VMs that the guest LAN has addresses for: 10.77.0.0/16 less network, host side and broadcast.
pub const MOST_VMS: u32 = 65_533;
/// Most RAM that a 32-bit kernel maps.
const MOST_RAM: u64 = 1 << 30;
/// RAM is given to the guest in pages.
const PAGE: u64 = 4096;

/// A profile, with what it extends merged in and every value checked.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Its name, from the file's name.
    pub name: String,
    /// One line.
    pub description: String,
    /// Which builder makes kernel and programs, where it says so.
    pub builder: Option<BuilderName>,
    /// Where Buildroot's compiler comes from, where it says so.
    pub toolchain: Option<Toolchain>,
    /// Programs of the guest.
    pub packages: Vec<Located<String>>,
    /// Fragments of the kernel's configuration, by name.
    pub kernel_fragments: Vec<Located<String>>,
    /// Fragments of busybox' configuration, by name.
    pub busybox_fragments: Vec<Located<String>>,
    /// Overlays, in the order in which they are laid.
    pub overlays: Vec<Located<String>>,
    /// RAM of each VM.
    pub ram: Located<Ram>,
    /// VMs of a fleet where the command line says nothing.
    pub vms: u32,
    /// How guest time runs.
    pub time: Time,
    /// The network back end.
    pub net: Net,
    /// VMs don't reach one another.
    pub isolate: bool,
    /// Services of the host that VMs may use, HOST:GUEST.
    pub services: Vec<String>,
    /// The kernel's command line.
    pub bootargs: String,
    /// What /init starts, in lg-init's words.
    pub init: Vec<Located<String>>,
    /// The port that must be served before the VM says READY; 0: none.
    pub ready_port: u16,
    /// The files it was read from, the profile itself last.
    pub sources: Vec<Arc<Source>>,
}

/// How kernel and programs are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BuilderName {
    /// From the distribution's source packages.
    Direct,
    /// By Buildroot.
    Buildroot,
}

/// How guest time runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Time {
    /// Follows the wall clock.
    Real,
    /// Advances with retired instructions.
    Virtual,
}

/// The network back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Net {
    /// Host sockets, no privileges.
    User,
    /// A network device, with privileges.
    Tun,
    /// No network outside the fleet.
    Off,
}

/// An amount of RAM in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ram(pub u64);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    description: Option<Spanned<String>>,
    extends: Option<Spanned<String>>,
    builder: Option<Spanned<String>>,
    toolchain: Option<Spanned<String>>,
    packages: Option<Vec<Spanned<String>>>,
    kernel_fragments: Option<Vec<Spanned<String>>>,
    busybox_fragments: Option<Vec<Spanned<String>>>,
    overlays: Option<Vec<Spanned<String>>>,
    ram: Option<Spanned<String>>,
    vms: Option<Spanned<String>>,
    time: Option<Spanned<String>>,
    net: Option<Spanned<String>>,
    isolate: Option<Spanned<String>>,
    services: Option<Vec<Spanned<String>>>,
    bootargs: Option<Spanned<String>>,
    init: Option<Vec<Spanned<String>>>,
    ready_port: Option<Spanned<String>>,
}

/// A profile whose scalars may still be missing.
#[derive(Default)]
struct Merged {
    description: Option<Located<String>>,
    builder: Option<Located<String>>,
    toolchain: Option<Located<String>>,
    packages: Vec<Located<String>>,
    kernel_fragments: Vec<Located<String>>,
    busybox_fragments: Vec<Located<String>>,
    overlays: Vec<Located<String>>,
    ram: Option<Located<String>>,
    vms: Option<Located<String>>,
    time: Option<Located<String>>,
    net: Option<Located<String>>,
    isolate: Option<Located<String>>,
    services: Vec<Located<String>>,
    bootargs: Option<Located<String>>,
    init: Vec<Located<String>>,
    ready_port: Option<Located<String>>,
    sources: Vec<Arc<Source>>,
}

impl Profile {
    /// Reads `profiles/<name>.yaml`, or the file itself where `name` is a path.
    pub fn load(root: &Path, name: &str) -> Result<Self, Error> {
        let path = find(root, name, None)?;
        let mut merged = Merged::default();
        merged.read(root, &path, None, &mut Vec::new())?;
        merged.check(&path)
    }

    /// What the profile's files say about it, for a list: name and description.
    pub fn names(root: &Path) -> Vec<String> {
        names_in(&root.join("profiles"), |p| {
            let yaml = p.extension().is_some_and(|e| e == "yaml");
            yaml.then(|| p.file_stem().map(|s| s.to_string_lossy().into_owned())).flatten()
        })
    }
}

impl Merged {
    /// Reads one file over what it extends.
    fn read(
        &mut self,
        root: &Path,
        path: &Path,
        from: Option<&Located<String>>,
        chain: &mut Vec<PathBuf>,
    ) -> Result<(), Error> {
        if chain.iter().any(|p| p == path) {
            let what = format!("`extends` goes in a circle: {} extends itself in the end", path.display());
            return Err(match from {
                Some(from) => from.error(what, Some("Take one `extends` out.".to_owned())),
                None => Error::plain(what, "Take one `extends` out."),
            });
        }
        chain.push(path.to_owned());
        let source = Source::read(path, root)?;
        let raw: Raw = source.yaml()?;
        if let Some(parent) = raw.extends {
            let parent = source.locate(parent);
            let parent_path = find(root, &parent.value, Some(&parent))?;
            self.read(root, &parent_path, Some(&parent), chain)?;
        }
        let scalar = |slot: &mut Option<Located<String>>, value: Option<Spanned<String>>| {
            if let Some(value) = value {
                *slot = Some(source.locate(value));
            }
        };
        scalar(&mut self.description, raw.description);
        scalar(&mut self.builder, raw.builder);
        scalar(&mut self.toolchain, raw.toolchain);
        scalar(&mut self.ram, raw.ram);
        scalar(&mut self.vms, raw.vms);
        scalar(&mut self.time, raw.time);
        scalar(&mut self.net, raw.net);
        scalar(&mut self.isolate, raw.isolate);
        scalar(&mut self.bootargs, raw.bootargs);
        scalar(&mut self.ready_port, raw.ready_port);
        // Lists are appended. A name that is there already stays where it is; init lines may well repeat.
        let names = |list: &mut Vec<Located<String>>, more: Option<Vec<Spanned<String>>>| {
            for item in more.into_iter().flatten() {
                if !list.iter().any(|l| l.value == item.value) {
                    list.push(source.locate(item));
                }
            }
        };
        names(&mut self.packages, raw.packages);
        names(&mut self.kernel_fragments, raw.kernel_fragments);
        names(&mut self.busybox_fragments, raw.busybox_fragments);
        names(&mut self.overlays, raw.overlays);
        names(&mut self.services, raw.services);
        self.init.extend(raw.init.into_iter().flatten().map(|item| source.locate(item)));
        self.sources.push(source);
        Ok(())
    }

    /// Checks every value.
    fn check(self, path: &Path) -> Result<Profile, Error> {
        let Some(source) = self.sources.last().cloned() else {
            return Err(Error::plain(format!("{}: the profile is empty", path.display()), "Fill it."));
        };
        let missing = |key: &str| {
            source.error_at_line(
                1,
                format!("the key `{key}` is missing"),
                Some(format!("Add a line `{key}: ...`, or `extends: lean`.")),
            )
        };
        let description = self.description.ok_or_else(|| missing("description"))?;
        for (key, list) in [("packages", &self.packages), ("kernel_fragments", &self.kernel_fragments)] {
            if list.is_empty() {
                return Err(missing(key));
            }
        }
        if let Some(bad) = self.overlays.iter().find(|o| !is_name(&o.value)) {
            return Err(bad.error(
                format!("`{}` is not the name of an overlay", bad.value),
                Some("Overlays are named by their folder in overlays/, without a slash.".to_owned()),
            ));
        }
        for line in &self.init {
            init::check_line(line)?;
        }
        if let Some(args) = self.bootargs.as_ref().filter(|a| a.value.contains(['"', '\\', '\n', '\0'])) {
            return Err(args.error(
                "bootargs: quotes, backslashes and line ends cannot stand in the kernel's command line",
                Some("Write plain words with blanks between them.".to_owned()),
            ));
        }
        let vms = self.vms.as_ref().map(|v| whole("vms", v, 1, MOST_VMS)).transpose()?;
        let ready_port = self.ready_port.as_ref().map(|p| whole("ready_port", p, 0, 65_535)).transpose()?;
        let ram = self.ram.ok_or_else(|| missing("ram"))?;
        let parsed =
            ram.value.parse::<Ram>().map_err(|e| ram.error(format!("ram: {e}"), RAM_HELP.to_owned()))?;
        let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        if !is_name(&name) {
            return Err(Error::plain(
                format!(
                    "{}: the profile's file name gives the image its name, and `{name}` will not do",
                    source.name
                ),
                "Name it with letters, digits, `-` and `_`, and .yaml at the end.",
            ));
        }
        Ok(Profile {
            name,
            description: description.value,
            builder: word("builder", self.builder.as_ref(), BUILDERS)?,
            toolchain: word("toolchain", self.toolchain.as_ref(), TOOLCHAINS)?,
            packages: self.packages,
            kernel_fragments: self.kernel_fragments,
            busybox_fragments: self.busybox_fragments,
            overlays: self.overlays,
            ram: ram.map(|_| parsed),
            vms: vms.unwrap_or(1),
            time: word("time", self.time.as_ref(), TIMES)?.unwrap_or(Time::Real),
            net: word("net", self.net.as_ref(), NETS)?.unwrap_or(Net::User),
            isolate: word("isolate", self.isolate.as_ref(), SWITCH)?.unwrap_or(false),
            services: self.services.iter().map(service).collect::<Result<_, _>>()?,
            bootargs: self.bootargs.map_or_else(|| "console=ttyS0".to_owned(), |b| b.value),
            init: self.init,
            ready_port: ready_port.and_then(|p| u16::try_from(p).ok()).unwrap_or(0),
            sources: self.sources,
        })
    }
}

const BUILDERS: &[(&str, BuilderName)] =
    &[("direct", BuilderName::Direct), ("buildroot", BuilderName::Buildroot)];
const TOOLCHAINS: &[(&str, Toolchain)] =
    &[("external", Toolchain::External), ("internal", Toolchain::Internal)];
const TIMES: &[(&str, Time)] = &[("real", Time::Real), ("virtual", Time::Virtual)];
const NETS: &[(&str, Net)] = &[("user", Net::User), ("tun", Net::Tun), ("off", Net::Off)];
const SWITCH: &[(&str, bool)] = &[("true", true), ("false", false)];
const RAM_HELP: &str = "Write a number and a unit, as in `ram: 8 MiB`. Units: KiB, MiB, GiB.";

/// One of a few words.
fn word<T: Copy>(
    key: &str,
    value: Option<&Located<String>>,
    known: &[(&str, T)],
) -> Result<Option<T>, Error> {
    let Some(value) = value else { return Ok(None) };
    if let Some((_, found)) = known.iter().find(|(name, _)| *name == value.value) {
        return Ok(Some(*found));
    }
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
    Err(value.error(
        format!("{key}: `{}` is not one of {}", value.value, list(&names)),
        format!("{}Write one of: {}.", did_you_mean(&value.value, &names), list(&names)),
    ))
}

/// A host port and the guest port it is seen at.
fn service(value: &Located<String>) -> Result<String, Error> {
    let ports: Vec<&str> = value.value.split(':').collect();
    if ports.len() == 2 && ports.iter().all(|port| port.parse::<u16>().is_ok_and(|port| port > 0)) {
        return Ok(value.value.clone());
    }
    Err(value.error(
        format!("services: `{}` is not of the form HOST:GUEST", value.value),
        "Write two ports from 1 to 65535: the host's, and the one that guests connect to, as in \"5432:15432\".".to_owned(),
    ))
}

/// A whole number between two bounds.
fn whole(key: &str, value: &Located<String>, least: u32, most: u32) -> Result<u32, Error> {
    let help = Some(format!("Write a whole number from {least} to {most}."));
    match value.value.parse::<i64>() {
        Err(_) => Err(value.error(format!("{key}: expected a whole number, not `{}`", value.value), help)),
        Ok(n) => u32::try_from(n)
            .ok()
            .filter(|n| (least..=most).contains(n))
            .ok_or_else(|| value.error(format!("{key}: {n} is out of range"), help)),
    }
}

/// The file of a profile.
fn find(root: &Path, name: &str, from: Option<&Located<String>>) -> Result<PathBuf, Error> {
    let is_path = name.contains('/') || name.ends_with(".yaml");
    // A path in `extends` is relative to the file that says so.
    let base = from.and_then(|f| f.source.path.parent()).unwrap_or(Path::new(""));
    let path = if is_path { base.join(name) } else { root.join("profiles").join(format!("{name}.yaml")) };
    if path.is_file() {
        return path.canonicalize().map_err(|e| Error::io("read", &path, e));
    }
    let known = Profile::names(root);
    let (what, help) = if is_path {
        (format!("there is no profile {}", path.display()), "Give the path of a .yaml file.".to_owned())
    } else {
        let help = format!("{}The profiles are: {}.", did_you_mean(name, &known), list(&known));
        (format!("there is no profile `{name}` in profiles/"), help)
    };
    Err(match from {
        Some(from) => from.error(format!("extends: {what}"), help),
        None => Error::plain(what, help),
    })
}

/// Sorted names of a folder's entries.
pub fn names_in(folder: &Path, name: impl Fn(&Path) -> Option<String>) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| name(&e.path())).collect();
    names.sort();
    names
}

/// Whether a name can be that of a file or folder of ours.
pub fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_+.".contains(c))
        && !name.starts_with('.')
}

impl FromStr for Ram {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim();
        let shown = if number.is_empty() { "8" } else { number };
        let number: u64 = number.parse().map_err(|_| format!("`{text}` is not a number with a unit"))?;
        let shift = match unit {
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "" => return Err(format!("`{text}` has no unit; `{shown} MiB`?")),
            "K" | "k" | "KB" | "kB" | "M" | "MB" | "m" | "mb" | "G" | "GB" | "g" | "gb" | "kib" | "mib"
            | "gib" => {
                let right = unit.chars().next().map(|c| c.to_ascii_uppercase()).unwrap_or('M');
                return Err(format!("the unit `{unit}` is not known here; `{shown} {right}iB`?"));
            }
            _ => return Err(format!("the unit `{unit}` is not known")),
        };
        let bytes = number.checked_mul(1 << shift).filter(|&b| b <= MOST_RAM);
        match bytes {
            None => Err(format!("{text} is more than the 1 GiB that a 32-bit kernel maps")),
            Some(0) => Err("0 is no RAM at all".to_owned()),
            Some(b) if b % PAGE != 0 => Err(format!("{text} is not a multiple of 4 KiB")),
            Some(b) => Ok(Self(b)),
        }
    }
}

impl fmt::Display for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            b if b % (1 << 30) == 0 => write!(f, "{} GiB", b >> 30),
            b if b % (1 << 20) == 0 => write!(f, "{} MiB", b >> 20),
            b => write!(f, "{} KiB", b.div_ceil(1 << 10)),
        }
    }
}

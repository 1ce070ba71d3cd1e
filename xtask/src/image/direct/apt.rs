//! Source packages through a private apt state: its own lists and archives in the cache, the machine's own sources
//! with deb-src turned on. Nothing of the system's is changed.
//!
//! What was taken once is written down, and later builds take the same without asking anybody.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use duct::{Expression, cmd};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::super::error::Error;
use super::super::step::{Progress, Step};
use super::sources::{Sources, field, stanzas};
use super::store::{Recipe, Store};
use super::version;

/// The Zig distribution on the Python package index whose copy of musl is complete, and its SHA-256. Later ones
/// replace more and more of musl's files. The same wheel is taken on every machine: only its sources are used.
const WHEEL: (&str, &str, &str) =
    ("ziglang", "0.13.0.post1", "5ff0f2cb0d583b4f94820909612043f62e4d1d9a8bed77ceec088a01fc2ef015");
/// musl knows rv32 since then.
const MUSL: &str = "1.2.5";

/// What a build may want.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Want {
    /// The kernel's source.
    Linux,
    /// The C library's source.
    Musl,
    /// A source package.
    Source(String),
}

/// What was taken: a version of a package, and its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taken {
    /// The package's name in the archive.
    pub package: String,
    /// Its version.
    pub version: String,
    /// How it is got.
    kind: Kind,
    /// Names with SHA-256.
    pub files: BTreeMap<String, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Source,
    Binary,
    Wheel,
}

impl Want {
    /// In file names and messages.
    pub fn name(&self) -> &str {
        match self {
            Self::Linux => "linux",
            Self::Musl => "musl",
            Self::Source(name) => name,
        }
    }

    fn seconds(&self) -> u64 {
        match self {
            Self::Linux => 25,
            Self::Musl => 20,
            Self::Source(_) => 4,
        }
    }
}

impl Taken {
    fn recipe(&self) -> Recipe {
        let mut recipe = Recipe::default();
        recipe.add("package", &self.package);
        recipe.add("version", &self.version);
        for (name, sum) in &self.files {
            recipe.add(name, sum);
        }
        recipe
    }

    /// One line for the recipe of what is made from it.
    pub fn summary(&self) -> String {
        format!("{} {} {}", self.package, self.version, self.recipe().key())
    }

    /// The kernel's series, as 6.1.
    pub fn series(&self) -> &str {
        self.package.strip_prefix("linux-source-").unwrap_or(&self.version)
    }

    /// Whether it is a Zig distribution, with its own layout.
    pub fn is_wheel(&self) -> bool {
        self.kind == Kind::Wheel
    }
}

/// The distribution's archive as this machine reaches it, and what was taken from it.
#[derive(Debug)]
pub struct Archive {
    store: Store,
    folder: PathBuf,
    record: PathBuf,
    codename: String,
    taken: BTreeMap<String, Taken>,
    /// Whether the lists were read by this process.
    fresh: bool,
}

impl Archive {
    /// Opens the record of a release; a damaged one is forgotten, which is said.
    pub fn open(store: &Store, codename: &str) -> Self {
        let record = store.root().join(format!("sources-{codename}.json"));
        let taken = match fs::read(&record) {
            Err(_) => BTreeMap::new(),
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|e| {
                eprintln!("warning: {} is damaged ({e}); asking apt again", record.display());
                BTreeMap::new()
            }),
        };
        let folder = store.root().join("apt");
        Self { store: store.clone(), folder, record, codename: codename.to_owned(), taken, fresh: false }
    }

    /// What was taken for a want.
    pub fn taken(&self, want: &Want) -> Option<&Taken> {
        self.taken.get(want.name())
    }

    /// All that was taken, for comparison.
    pub fn record(&self) -> BTreeMap<String, Taken> {
        self.taken.clone()
    }

    /// Whether getting a want may need pip.
    pub fn may_need_pip(&self, want: &Want) -> bool {
        // Debian 12's musl is too old; who cannot know yet prepares for the worse.
        *want == Want::Musl && self.taken(want).map_or(self.codename == "bookworm", Taken::is_wheel)
    }

    /// The files of what was taken, if they are there already.
    pub fn find(&self, want: &Want) -> Result<Option<PathBuf>, Error> {
        match self.taken(want) {
            None => Ok(None),
            Some(taken) => self.store.find(&piece(want), &taken.recipe()),
        }
    }

    /// Gets the files of a want: the version that was taken before where it can still be had, else the newest.
    pub fn get(&mut self, progress: &mut Progress, logs: &Path, want: &Want) -> Result<PathBuf, Error> {
        if let Some(files) = self.find(want)? {
            return Ok(files);
        }
        if !self.fresh && self.taken(want).is_none_or(|t| t.kind != Kind::Wheel) {
            self.update(progress, logs)?;
        }
        let log = logs.join(format!("fetch-{}.log", want.name()));
        let title = format!("fetch {}", want.name());
        let notes = &mut Vec::new();
        let result = progress.step(&title, Duration::from_secs(want.seconds()), &log, |step| {
            let mut candidates: Vec<Taken> = self.taken(want).cloned().into_iter().collect();
            for candidate in self.candidates(step, want)? {
                if !candidates.contains(&candidate) {
                    candidates.push(candidate);
                }
            }
            let mut first = None;
            for candidate in candidates {
                match self.fetch(step, want, &candidate) {
                    Ok(files) => return Ok((files, candidate)),
                    Err(e) => {
                        notes
                            .push(format!("  {} {} cannot be fetched", candidate.package, candidate.version));
                        first = first.or(Some(e));
                    }
                }
            }
            Err(first.unwrap_or_else(|| self.unknown(want)))
        });
        let (files, taken) = result.map_err(|e| unreachable(want, e))?;
        if !notes.is_empty() {
            progress.say(&format!("{}; taking {}", notes.join("\n"), taken.version));
        }
        self.taken.insert(want.name().to_owned(), taken);
        let text = serde_json::to_string_pretty(&self.taken)
            .map_err(|e| Error::plain(format!("cannot record what was taken: {e}"), "This is a bug."))?;
        super::super::cache::write_if_changed(&self.record, text.as_bytes())?;
        Ok(files)
    }

    fn unknown(&self, want: &Want) -> Error {
        Error::plain(
            format!(
                "this machine's apt sources for {} do not offer the source of {}",
                self.codename,
                want.name()
            ),
            "Check /etc/apt/sources.list and /etc/apt/sources.list.d: the distribution's own archive, with the \
             component main, must be among them.",
        )
    }

    /// Reads the package lists into the private state.
    fn update(&mut self, progress: &mut Progress, logs: &Path) -> Result<(), Error> {
        let sources = machine_sources(&self.codename)?;
        if sources.is_empty() {
            return Err(Error::plain(
                format!("no apt source of this machine is one of the distribution's ({})", self.codename),
                "Add its archive to /etc/apt/sources.list or /etc/apt/sources.list.d.",
            ));
        }
        let log = logs.join("package-lists.log");
        progress
            .step("read the package lists", Duration::from_secs(10), &log, |step| {
                let dump =
                    step.read("read apt's configuration", cmd!("apt-config", "dump").env("LC_ALL", "C"))?;
                self.write_state(&sources, &dump)?;
                step.run("read the package lists", self.apt("apt-get", &["-q", "update"]))?;
                // apt-get is content with having reached nothing at all.
                match self.has_lists() {
                    true => Ok(()),
                    false => Err(step.failed("read any package list", "no archive could be reached")),
                }
            })
            .map_err(unreachable_lists)?;
        self.fresh = true;
        Ok(())
    }

    /// Whether there are lists of any archive, from now or from before.
    fn has_lists(&self) -> bool {
        let entries = fs::read_dir(self.folder.join("lists"));
        entries.is_ok_and(|d| d.flatten().any(|e| e.file_name().to_string_lossy().ends_with("Release")))
    }

    fn write_state(&self, sources: &Sources, dump: &str) -> Result<(), Error> {
        let write = |path: PathBuf, text: &str| -> Result<(), Error> {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).map_err(|e| Error::io("make the folder", folder, e))?;
            }
            fs::write(&path, text).map_err(|e| Error::write(&path, text.len() as u64, e))
        };
        for folder in ["parts", "lists/partial", "archives/partial"] {
            let folder = self.folder.join(folder);
            fs::create_dir_all(&folder).map_err(|e| Error::io("make the folder", &folder, e))?;
        }
        write(self.folder.join("sources/machine.list"), &sources.list())?;
        write(self.folder.join("sources/machine.sources"), &sources.stanzas())?;
        write(self.folder.join("apt.conf"), &private_config(&self.folder, dump))
    }

    fn apt(&self, program: &str, words: &[&str]) -> Expression {
        duct::cmd(program, words).env("APT_CONFIG", self.folder.join("apt.conf")).env("LC_ALL", "C")
    }

    /// What the archive offers for a want, the newest first.
    fn candidates(&self, step: &Step, want: &Want) -> Result<Vec<Taken>, Error> {
        let all = match want {
            Want::Linux => {
                let text =
                    step.read("look up linux-source", self.apt("apt-cache", &["show", "linux-source"]))?;
                let Some(package) = kernel_package(&text) else { return Ok(Vec::new()) };
                binaries(
                    &step.read("look up the kernel", self.apt("apt-cache", &["show", &package]))?,
                    &package,
                )
            }
            // The wheel's version is fixed: there is nothing to ask.
            Want::Musl if self.taken(want).is_some_and(Taken::is_wheel) => Vec::new(),
            _ => {
                let words = ["showsrc", "--only-source", want.name()];
                packages(&step.read("look up the source", self.apt("apt-cache", &words))?, want.name())
            }
        };
        match want {
            Want::Musl => {
                let new = |t: &Taken| version::compare(&t.version, MUSL).is_ge();
                let mut all: Vec<Taken> = all.into_iter().filter(new).collect();
                let (package, version, sum) = WHEEL;
                all.push(Taken {
                    package: package.to_owned(),
                    version: version.to_owned(),
                    kind: Kind::Wheel,
                    files: BTreeMap::from([("musl.whl".to_owned(), sum.to_owned())]),
                });
                Ok(all)
            }
            _ => Ok(all),
        }
    }

    /// Downloads one version and compares its checksums.
    fn fetch(&self, step: &Step, want: &Want, taken: &Taken) -> Result<PathBuf, Error> {
        self.store.make(&piece(want), &taken.recipe(), |folder| {
            let exact = format!("{}={}", taken.package, taken.version);
            match taken.kind {
                Kind::Source => {
                    let words = ["-q", "source", "--download-only", "--only-source", &exact];
                    step.run("download the source", self.apt("apt-get", &words).dir(folder))?;
                }
                Kind::Binary => {
                    let words = ["-q", "download", &exact];
                    step.run("download the package", self.apt("apt-get", &words).dir(folder))?;
                    rename_only(folder, taken)?;
                }
                Kind::Wheel => {
                    let exact = format!("{}=={}", taken.package, taken.version);
                    let pip = cmd!(
                        "python3",
                        "-m",
                        "pip",
                        "download",
                        "-q",
                        "--disable-pip-version-check",
                        "--no-deps",
                        "--only-binary=:all:",
                        "--platform",
                        "manylinux2010_x86_64",
                        "-d",
                        folder,
                        exact
                    );
                    step.run("download musl's source from the Python package index", pip)?;
                    rename_only(folder, taken)?;
                }
            }
            check_sums(folder, taken)
        })
    }
}

/// The name of a want's files in the store.
fn piece(want: &Want) -> String {
    format!("source-{}", want.name())
}

/// The entries of all of this machine's files that are the distribution's.
fn machine_sources(codename: &str) -> Result<Sources, Error> {
    let mut sources = Sources::default();
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let parts = Path::new("/etc/apt/sources.list.d");
    let mut more: Vec<PathBuf> =
        fs::read_dir(parts).map_or(Vec::new(), |d| d.flatten().map(|e| e.path()).collect());
    more.sort();
    files.extend(more);
    for path in files.iter().filter(|p| p.is_file()) {
        let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        match path.extension().and_then(|e| e.to_str()) {
            Some("list") => sources.add_list(&text, codename),
            Some("sources") => sources.add_deb822(&text, codename),
            _ => {}
        }
    }
    Ok(sources)
}

/// A configuration with folders of its own. How the machine reaches its archives (proxies, certificates) stays as it
/// is; its hooks and further lists do not come along.
fn private_config(folder: &Path, dump: &str) -> String {
    let mut text = String::new();
    let left_out =
        ["acquire::indextargets", "acquire::languages", "acquire::compressiontypes", "acquire::changelogs"];
    for line in dump.lines() {
        let key = line.to_ascii_lowercase();
        if key.starts_with("acquire::") && !left_out.iter().any(|l| key.starts_with(l)) {
            text.push_str(line);
            text.push('\n');
        }
    }
    let folder = folder.display();
    text.push_str(&format!(
        "Dir::Etc::main \"/dev/null\";\nDir::Etc::parts \"{folder}/parts\";\nDir::Etc::sourcelist \"/dev/null\";\n\
         Dir::Etc::sourceparts \"{folder}/sources\";\nDir::State::lists \"{folder}/lists\";\n\
         Dir::Cache \"{folder}\";\nDir::Cache::archives \"{folder}/archives\";\nAcquire::Languages \"none\";\n\
         Acquire::Retries \"2\";\nAPT::Sandbox::User \"root\";\n"
    ));
    text
}

/// `linux-source-6.1`, from what linux-source depends on.
fn kernel_package(show: &str) -> Option<String> {
    let mut all: Vec<(String, String)> = stanzas(show)
        .iter()
        .filter_map(|s| {
            let depends = field(s, "Depends")?;
            let name = depends.split([',', ' ', '|']).find(|w| w.starts_with("linux-source-"))?;
            Some((field(s, "Version")?.to_owned(), name.to_owned()))
        })
        .collect();
    all.sort_by(|a, b| version::compare(&a.0, &b.0));
    all.pop().map(|(_, name)| name)
}

/// The versions of a binary package in `apt-cache show`.
fn binaries(show: &str, package: &str) -> Vec<Taken> {
    newest_first(stanzas(show).iter().filter(|s| field(s, "Package") == Some(package)).filter_map(|s| {
        let files = BTreeMap::from([(format!("{package}.deb"), field(s, "SHA256")?.to_owned())]);
        let version = field(s, "Version")?.to_owned();
        Some(Taken { package: package.to_owned(), version, kind: Kind::Binary, files })
    }))
}

/// The versions of a source package in `apt-cache showsrc`.
fn packages(showsrc: &str, package: &str) -> Vec<Taken> {
    newest_first(stanzas(showsrc).iter().filter(|s| field(s, "Package") == Some(package)).filter_map(|s| {
        let mut files = BTreeMap::new();
        for line in field(s, "Checksums-Sha256")?.lines() {
            let mut words = line.split_whitespace();
            if let (Some(sum), Some(_), Some(name)) = (words.next(), words.next(), words.next()) {
                files.insert(name.to_owned(), sum.to_owned());
            }
        }
        let version = field(s, "Version")?.to_owned();
        Some(Taken { package: package.to_owned(), version, kind: Kind::Source, files })
    }))
}

fn newest_first(all: impl Iterator<Item = Taken>) -> Vec<Taken> {
    let mut all: Vec<Taken> = all.collect();
    all.sort_by(|a, b| version::compare(&b.version, &a.version));
    all.dedup();
    all
}

/// Gives the one file of a download the name by which it is recorded: the real one holds escapes and tags.
fn rename_only(folder: &Path, taken: &Taken) -> Result<(), Error> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("read the folder", folder, e))?;
    let files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    if let ([from], Some(name)) = (files.as_slice(), taken.files.keys().next()) {
        fs::rename(from, folder.join(name)).map_err(|e| Error::io("rename", from, e))?;
    }
    Ok(())
}

fn check_sums(folder: &Path, taken: &Taken) -> Result<(), Error> {
    for (name, sum) in &taken.files {
        let path = folder.join(name);
        let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        if hex::encode(Sha256::digest(&bytes)) != *sum {
            return Err(Error::plain(
                format!(
                    "{name} of {} {} has another checksum than the archive says",
                    taken.package, taken.version
                ),
                "A proxy or mirror may hold a damaged copy. Try again, or use another mirror.",
            ));
        }
    }
    Ok(())
}

/// What to do about a download that failed.
const NETWORK: &str = "Check this machine's network, apt's sources and its proxy settings. What was fetched once is \
                       kept: later builds of the same need no network.";

fn unreachable(want: &Want, error: Error) -> Error {
    network(format!("the source of {} could not be fetched", want.name()), error)
}

fn unreachable_lists(error: Error) -> Error {
    network("the distribution's package lists could not be fetched".to_owned(), error)
}

/// Puts a failed download into words. Errors that are not about a child's words (a full disk) pass.
fn network(what: String, error: Error) -> Error {
    match error {
        Error::Plain { what: said, help } if said.contains("it said last") => {
            let help = help.map_or_else(String::new, |h| format!("\n{h}"));
            Error::plain(format!("{what}\n{said}"), format!("{NETWORK}{help}"))
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_stanzas_give_files_newest_first() {
        let text = "Package: nginx\nVersion: 1.22.1-9+deb12u9\nChecksums-Sha256:\n aa 10 nginx_1.dsc\n bb 20 \
                    nginx_1.tar.gz\nFiles:\n cc 10 nginx_1.dsc\n\nPackage: nginx\nVersion: 1.22.1-9+deb12u11\n\
                    Checksums-Sha256:\n dd 10 nginx_2.dsc\n\nPackage: other\nVersion: 9\nChecksums-Sha256:\n";
        let all = packages(text, "nginx");
        assert_eq!(
            all.iter().map(|t| t.version.as_str()).collect::<Vec<_>>(),
            ["1.22.1-9+deb12u11", "1.22.1-9+deb12u9"]
        );
        assert_eq!(all[1].files.get("nginx_1.tar.gz").map(String::as_str), Some("bb"));
        assert_eq!(all[1].files.len(), 2);
    }

    #[test]
    fn the_kernel_is_what_linux_source_depends_on() {
        let text = "Package: linux-source\nVersion: 6.1.99-1\nDepends: linux-source-6.1 (= 6.1.99-1)\n\n\
                    Package: linux-source\nVersion: 6.12.5-1\nDepends: linux-source-6.12 (= 6.12.5-1)\n";
        assert_eq!(kernel_package(text).as_deref(), Some("linux-source-6.12"));
        assert_eq!(kernel_package("Package: linux-source\nVersion: 1\n"), None);
    }

    #[test]
    fn the_private_configuration_keeps_the_proxy_and_no_hook() {
        let dump = "APT::Update::Post-Invoke:: \"rm -f /x\";\nAcquire::http::Proxy \"http://p.example:3128\";\n\
                    Acquire::Languages:: \"de\";\nDir::Cache \"var/cache/apt\";\n";
        let text = private_config(Path::new("/c/apt"), dump);
        assert!(text.contains("Acquire::http::Proxy \"http://p.example:3128\";\n"));
        assert!(!text.contains("Invoke") && !text.contains("\"de\"") && !text.contains("var/cache"));
        assert!(text.contains("Dir::State::lists \"/c/apt/lists\";\n"));
    }

    #[test]
    fn only_words_of_a_failed_download_are_called_network_trouble() {
        let child = Error::plain("fetch x: could not y (exit status: 100); it said last:\n  | E: no", "log");
        let text = unreachable(&Want::Linux, child).to_string();
        assert!(text.starts_with("the source of linux could not be fetched\n"), "{text}");
        let disk = Error::plain("no space left", "free some");
        assert_eq!(unreachable(&Want::Linux, disk).to_string(), "no space left");
    }
}

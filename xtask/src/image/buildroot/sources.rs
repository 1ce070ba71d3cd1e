//! What a build wants to download, where it is, and what to do where it cannot be had.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::super::error::Error;
use super::config::Toolchain;
use super::release::{self, VARIABLE};

/// Sites asked at the same time.
const AT_ONCE: usize = 16;

/// Where sources come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sources {
    /// Their own sites where these can be reached, else the distribution.
    #[default]
    Auto,
    /// Their own sites, or a mirror, in the versions that Buildroot names.
    Release,
    /// The distribution's source packages, in its versions.
    Distribution,
}

/// A package in the output of `make show-info`.
#[derive(Clone, Debug, Deserialize)]
pub struct Info {
    /// Its folder among the downloads.
    #[serde(default)]
    pub dl_dir: Option<String>,
    /// Its files.
    #[serde(default)]
    pub downloads: Vec<Download>,
}

/// A file that a package wants.
#[derive(Clone, Debug, Deserialize)]
pub struct Download {
    /// Its name.
    pub source: String,
    /// Sites that have it, with their methods before a plus.
    #[serde(default)]
    pub uris: Vec<String>,
}

/// A file that is not on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The package.
    pub package: String,
    /// The file.
    pub file: String,
    /// Addresses, the best first.
    pub sites: Vec<String>,
}

/// What became of asking for a missing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The file.
    pub missing: Missing,
    /// Its size, where a site told it; or what each site said.
    pub answer: Result<Option<u64>, Vec<String>>,
}

/// Reads the output of `make show-info`.
pub fn parse(json: &str) -> Result<BTreeMap<String, Info>, Error> {
    let start = json.find('{').unwrap_or(0);
    serde_json::from_str(&json[start..]).map_err(|e| {
        Error::plain(
            format!("what `make show-info` printed cannot be read: {e}"),
            "Is this a tree of a release near the tested one?",
        )
    })
}

/// Files that are neither among the downloads nor in a mirror folder. `replaced` packages want none.
pub fn missing(
    all: &BTreeMap<String, Info>,
    replaced: impl Fn(&str) -> bool,
    downloads: &Path,
    mirror: Option<&str>,
) -> Vec<Missing> {
    let folder = mirror.and_then(release::local);
    let address = mirror.filter(|m| release::local(m).is_none()).map(|m| m.trim_end_matches('/'));
    let mut list = Vec::new();
    for (name, info) in all.iter().filter(|(name, _)| !replaced(name)) {
        let dl_dir = info.dl_dir.as_deref().unwrap_or(name);
        for download in &info.downloads {
            let file = &download.source;
            let there = downloads.join(dl_dir).join(file).is_file()
                || folder
                    .as_ref()
                    .is_some_and(|f| f.join(dl_dir).join(file).is_file() || f.join(file).is_file());
            // A file: address is of a file that we made.
            let local = download.uris.iter().any(|u| plain(u).starts_with("file://"));
            if there || local {
                continue;
            }
            let mut sites: Vec<String> = address
                .iter()
                .flat_map(|m| [format!("{m}/{dl_dir}/{file}"), format!("{m}/{file}")])
                .collect();
            sites.extend(download.uris.iter().map(|u| format!("{}/{file}", plain(u))));
            // gcc's archive, for one, is wanted by three packages.
            if !list.iter().any(|m: &Missing| m.file == *file && m.sites == sites) {
                list.push(Missing { package: name.clone(), file: file.clone(), sites });
            }
        }
    }
    list
}

/// An address without Buildroot's method before it.
fn plain(uri: &str) -> &str {
    match uri.split_once('+') {
        Some((method, rest)) if !method.contains(':') => rest,
        _ => uri,
    }
}

/// Asks for all missing files at once.
pub fn ask(missing: Vec<Missing>, offline: bool) -> Vec<Asked> {
    let one = |missing: Missing| {
        if offline {
            return Asked { missing, answer: Err(vec!["--offline was given".to_owned()]) };
        }
        let mut said = Vec::new();
        for site in &missing.sites {
            match release::size_of(site) {
                Ok(size) => return Asked { missing, answer: Ok(size) },
                Err(why) => said.push(format!("{site}: {why}")),
            }
        }
        Asked { missing, answer: Err(said) }
    };
    let mut all = Vec::new();
    for some in missing.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = some.iter().cloned().map(|m| scope.spawn(move || one(m))).collect();
            all.extend(threads.into_iter().filter_map(|t| t.join().ok()));
        });
    }
    all
}

/// Whether everything can be had.
pub fn complete(asked: &[Asked]) -> bool {
    asked.iter().all(|a| a.answer.is_ok())
}

/// What is to be downloaded, in one list.
pub fn list(asked: &[Asked]) -> String {
    let mut text = String::new();
    let mut sum = 0;
    for one in asked {
        let site = one.missing.sites.first().map_or("", String::as_str);
        match &one.answer {
            Ok(Some(bytes)) => {
                sum += bytes;
                let _ =
                    writeln!(text, "  {:<20} {:>7.1} MB  {site}", one.missing.package, *bytes as f64 / 1e6);
            }
            Ok(None) => drop(writeln!(text, "  {:<20}        ?     {site}", one.missing.package)),
            Err(_) => drop(writeln!(text, "  {:<20}  missing     {site}", one.missing.package)),
        }
    }
    if sum > 0 {
        let _ = writeln!(text, "  {:.1} MB in all", sum as f64 / 1e6);
    }
    text
}

/// The error for files that cannot be had: all of them, and every remedy.
pub fn unreachable(asked: &[Asked], downloads: &Path, toolchain: Toolchain) -> Error {
    let mut text = String::new();
    let lost: Vec<&Asked> = asked.iter().filter(|a| a.answer.is_err()).collect();
    for one in &lost {
        let _ = write!(text, "\n  {}: {}", one.missing.package, one.missing.file);
        if let Err(said) = &one.answer {
            for line in said {
                let _ = write!(text, "\n      {line}");
            }
        }
    }
    let external = match toolchain {
        Toolchain::External => "",
        Toolchain::Internal => {
            "- `--toolchain external`: the distribution's compiler instead of one that is built first;\n"
        }
    };
    Error::plain(
        format!("{} of the files that this build needs cannot be had:{text}", lost.len()),
        format!(
            "Any of these will do:\n\
             - put the files into {} (each in its package's folder);\n\
             - `--mirror URL` or `--mirror DIR`: a site or folder that has them as PACKAGE/FILE or FILE;\n\
             {external}- `--sources distribution`: the distribution's source packages in their place;\n\
             - {VARIABLE} or `--buildroot DIR`: a tree of another version, for which you have the files;\n\
             - `--builder direct`: the same guest without Buildroot.",
            downloads.display()
        ),
    )
}

/// Where a build finds the distribution's sources.
#[derive(Clone, Debug, Default)]
pub struct Replaced {
    /// Unpacked trees, by package.
    pub trees: BTreeMap<String, PathBuf>,
}

impl Replaced {
    /// The makefile that names them.
    pub fn makefile(&self) -> String {
        let mut text = String::new();
        for (package, folder) in &self.trees {
            let name = package.to_uppercase().replace('-', "_");
            if package == HEADERS {
                // It has no archive of its own, only further files.
                let _ = writeln!(text, "{name}_SITE = {}\n{name}_SITE_METHOD = local", folder.display());
                let _ = writeln!(text, "override {name}_EXTRA_DOWNLOADS =");
            } else {
                let _ = writeln!(text, "{name}_OVERRIDE_SRCDIR = {}", folder.display());
            }
        }
        text
    }
}

/// Two headers that musl has not. The machine's C library brings one, Buildroot's tree the other.
pub const HEADERS: &str = "musl-compat-headers";

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = r#"noise before
        {"nginx": {"type": "target", "version": "1.30.3", "dl_dir": "nginx", "downloads": [{"source": "nginx-1.30.3.tar.gz",
        "uris": ["https+https://nginx.example/download", "https|urlencode+https://backup.example/nginx"]}]},
        "lg-init": {"type": "target", "downloads": []},
        "linux": {"dl_dir": "linux", "downloads": [{"source": "linux.tar.xz", "uris": ["file+file:///c"]}]},
        "host-tar": {"dl_dir": "tar", "downloads": [{"source": "tar-1.35.cpio.gz", "uris": ["https+https://gnu.example"]}]},
        "host-tar-again": {"dl_dir": "tar", "downloads": [{"source": "tar-1.35.cpio.gz", "uris": ["https+https://gnu.example"]}]},
        "skeleton": {"virtual": true}}"#;

    #[test]
    fn missing_files_have_all_their_addresses() {
        let all = parse(INFO).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let found = missing(&all, |p| p.starts_with("host-tar"), dir.path(), Some("http://mirror.example/"));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            found[0].sites,
            [
                "http://mirror.example/nginx/nginx-1.30.3.tar.gz",
                "http://mirror.example/nginx-1.30.3.tar.gz",
                "https://nginx.example/download/nginx-1.30.3.tar.gz",
                "https://backup.example/nginx/nginx-1.30.3.tar.gz",
            ]
        );
        let mirror = tempfile::tempdir().unwrap();
        std::fs::write(mirror.path().join("nginx-1.30.3.tar.gz"), "").unwrap();
        let folder = mirror.path().to_str().unwrap();
        assert_eq!(missing(&all, |p| p.starts_with("host-tar"), dir.path(), Some(folder)), []);
        std::fs::create_dir(dir.path().join("tar")).unwrap();
        std::fs::write(dir.path().join("tar/tar-1.35.cpio.gz"), "").unwrap();
        assert_eq!(missing(&all, |p| p == "nginx", dir.path(), None), []);
    }

    #[test]
    fn all_that_cannot_be_had_is_in_one_error_with_the_remedies() {
        let all = parse(INFO).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let asked = ask(missing(&all, |_| false, dir.path(), None), true);
        assert!(!complete(&asked));
        let error = unreachable(&asked, dir.path(), Toolchain::External);
        let text = error.to_string();
        assert!(text.contains("2 of the files"), "{text}");
        assert!(text.contains("nginx-1.30.3.tar.gz") && text.contains("tar-1.35.cpio.gz"), "{text}");
        let help = miette::Diagnostic::help(&error).map(|h| h.to_string()).unwrap_or_default();
        for remedy in ["--mirror", "--sources distribution", "BUILDROOT_DIR", "--builder direct"] {
            assert!(help.contains(remedy), "{remedy} is missing in {help}");
        }
        assert!(!help.contains("--toolchain"), "{help}");
        let error = unreachable(&asked, dir.path(), Toolchain::Internal);
        let help = miette::Diagnostic::help(&error).map(|h| h.to_string()).unwrap_or_default();
        assert!(help.contains("--toolchain external"), "{help}");
        assert!(list(&asked).contains("missing"));
    }

    #[test]
    fn replaced_sources_are_named_to_buildroot() {
        let trees = [("nginx", "/s/nginx"), (HEADERS, "/s/h")];
        let replaced = Replaced { trees: trees.map(|(a, b)| (a.to_owned(), b.into())).into() };
        let text = replaced.makefile();
        assert!(text.contains("NGINX_OVERRIDE_SRCDIR = /s/nginx\n"), "{text}");
        assert!(text.contains("MUSL_COMPAT_HEADERS_SITE = /s/h\n"), "{text}");
    }

    #[test]
    fn what_is_no_json_is_said_to_be() {
        assert!(parse("make: *** No rule").unwrap_err().to_string().contains("show-info"));
    }
}

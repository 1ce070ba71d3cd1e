//! The building machine: what Buildroot stumbles over there, and programs of it that need not be built first.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use super::super::direct::host;
use super::super::error::Error;

/// The table's place in the repository.
const TABLE: &str = "buildroot-external/buildroot/machine.yaml";
/// What Buildroot itself wants, each with the package that has it.
const NEEDS: &[(&str, &str)] = &[
    ("/usr/bin/file", "file"),
    ("bash", "bash"),
    ("bc", "bc"),
    ("bzip2", "bzip2"),
    ("cmp", "diffutils"),
    ("cpio", "cpio"),
    ("find", "findutils"),
    ("flock", "util-linux"),
    ("g++", "g++"),
    ("gcc", "gcc"),
    ("gzip", "gzip"),
    ("make", "make"),
    ("patch", "patch"),
    ("perl", "perl"),
    ("python3", "python3"),
    ("rsync", "rsync"),
    ("tar", "tar"),
    ("unzip", "unzip"),
    ("wget", "wget"),
    ("which", "debianutils"),
    ("xz", "xz-utils"),
];

/// A machine's programs in place of a host package.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Programs {
    /// PROGRAM or PROGRAM:NAME.
    pub programs: Vec<String>,
    /// The distribution's package that has them.
    pub package: String,
}

/// Host packages and the machine's programs, by Buildroot's names.
pub type Table = BTreeMap<String, Programs>;

/// Reads the table.
pub fn table(repo: &Path) -> Result<Table, Error> {
    let path = repo.join(TABLE);
    let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
    serde_saphyr::from_str(&text).map_err(|e| {
        Error::plain(
            format!("{TABLE}: {e}"),
            "A line is `host-NAME: { programs: [PROGRAM], package: PACKAGE }`.",
        )
    })
}

/// Programs that a build needs, with the packages that have them.
pub fn needs(table: &Table) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> =
        NEEDS.iter().map(|(program, package)| ((*program).to_owned(), (*package).to_owned())).collect();
    for programs in table.values() {
        for program in &programs.programs {
            let (program, _) = program.split_once(':').unwrap_or((program, ""));
            all.push((program.to_owned(), programs.package.clone()));
        }
    }
    all
}

/// The makefile that puts the machine's programs in the packages' place.
pub fn makefile(table: &Table, external: &Path, empty: &Path) -> Result<String, Error> {
    let mut text = format!(
        "# Written by xtask.\nLG_EMPTY = {}\ninclude {}/buildroot/machine.mk\n",
        empty.display(),
        external.display()
    );
    for (name, programs) in table {
        let package = name.strip_prefix("host-").unwrap_or(name).to_uppercase().replace('-', "_");
        let mut words = Vec::new();
        for program in &programs.programs {
            let (program, name) = program.split_once(':').unwrap_or((program, program));
            let path = host::find(program).ok_or_else(|| {
                Error::plain(
                    format!("the program {program} is not installed"),
                    format!("Run: sudo apt-get install {}", programs.package),
                )
            })?;
            words.push(format!("{}:{name}", path.display()));
        }
        let _ = writeln!(text, "$(eval $(call lg-machine-programs,{package},{}))", words.join(" "));
    }
    Ok(text)
}

/// The environment of every `make`: nothing of the user's can change what comes out. `MAKEFLAGS` is not among it, for
/// with a `-j` there Buildroot would build each package with one process; neither is the user's PATH, in which it
/// bears no blanks and no current folder.
pub fn environment(home: &Path) -> Vec<(OsString, OsString)> {
    let mut all: Vec<(OsString, OsString)> = vec![
        ("PATH".into(), host::PATH.into()),
        ("HOME".into(), home.into()),
        ("LC_ALL".into(), "C".into()),
        ("TZ".into(), "UTC".into()),
        ("TERM".into(), "dumb".into()),
    ];
    if rustix::process::geteuid().is_root() {
        // Some configure scripts refuse to run as root otherwise.
        all.push(("FORCE_UNSAFE_CONFIGURE".into(), "1".into()));
    }
    let network = ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"];
    let names = network.iter().flat_map(|n| [(*n).to_owned(), n.to_uppercase()]).chain(["TMPDIR".to_owned()]);
    for name in names {
        if let Some(value) = std::env::var_os(&name) {
            all.push((name.into(), value));
        }
    }
    all
}

/// What no environment can mend: where the output would lie.
pub fn check_folder(folder: &Path) -> Result<(), Error> {
    super::super::direct::check_folder(folder)?;
    fs::create_dir_all(folder).map_err(|e| Error::io("make the folder", folder, e))?;
    let probe = tempfile::Builder::new()
        .prefix(".tmp-Case-")
        .tempdir_in(folder)
        .map_err(|e| Error::io("make a folder in", folder, e))?;
    let name = probe.path().file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    match folder.join(name).exists() {
        false => Ok(()),
        true => Err(Error::plain(
            format!("{} takes Case and case for the same name; Buildroot and Linux do not", folder.display()),
            "Set XDG_CACHE_HOME to a folder on another file system. In WSL that is one below /home, not below /mnt.",
        )),
    }
}

/// Checks that an output folder has room.
pub fn check_space(folder: &Path) -> Result<(), Error> {
    super::super::direct::check_space_of(folder, SPACE)
}

/// What an output folder takes at most: the kernel's whole source, and what is made of it.
const SPACE: u64 = 5 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_gives_packages_and_a_makefile() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let all = table(&repo).unwrap();
        let needs = needs(&all);
        assert!(needs.contains(&("kmod".to_owned(), "kmod".to_owned())), "{needs:?}");
        assert!(needs.contains(&("true".to_owned(), "coreutils".to_owned())));
        let few: Table = [("host-patchelf".to_owned(), all["host-patchelf"].clone())].into();
        let text = makefile(&few, Path::new("/x"), Path::new("/e")).unwrap();
        assert!(text.contains("include /x/buildroot/machine.mk"), "{text}");
        assert!(
            text.contains("lg-machine-programs,PATCHELF,/usr/bin/true:patchelf")
                || text.contains("/bin/true:patchelf")
        );
        let strange: Table = [(
            "host-x".to_owned(),
            Programs { programs: vec!["lg-no-such-program".to_owned()], package: "lg-package".to_owned() },
        )]
        .into();
        let error = makefile(&strange, Path::new("/x"), Path::new("/e")).unwrap_err();
        assert!(error.to_string().contains("lg-no-such-program"));
    }

    #[test]
    fn the_user_s_path_and_make_flags_do_not_reach_make() {
        let all = environment(Path::new("/h"));
        let value = |name: &str| all.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
        assert_eq!(value("PATH"), Some(host::PATH.into()));
        assert_eq!(value("MAKEFLAGS"), None);
        assert_eq!(value("HOME"), Some("/h".into()));
    }

    #[test]
    fn folders_that_break_builds_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check_folder(&dir.path().join("fine")).is_ok());
        let error = check_folder(&dir.path().join("not fine")).unwrap_err().to_string();
        assert!(error.contains("not fine"), "{error}");
    }
}

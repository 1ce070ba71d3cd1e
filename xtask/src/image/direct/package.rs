//! Packages of the guest: folders in buildroot-external/package with a package.yaml and a script direct.sh.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::super::error::Error;

/// Where the packages lie in the repository.
const FOLDER: &str = "buildroot-external/package";

/// A package.
#[derive(Clone, Debug)]
pub struct Package {
    /// The folder's name.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// What package.yaml says.
    pub info: Info,
}

/// The content of a package.yaml.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Info {
    /// One line.
    pub description: String,
    /// The distribution's source package; none for a program of our own.
    pub source: Option<String>,
    /// Packages whose files the build uses.
    #[serde(default)]
    pub needs: Vec<String>,
    /// Programs of the building machine, with the packages that bring them.
    #[serde(default)]
    pub host: BTreeMap<String, String>,
    /// Configured by Kconfig, from the request's fragments.
    #[serde(default)]
    pub kconfig: bool,
    /// Whether its files belong into the image. A library's do not.
    #[serde(default = "yes")]
    pub image: bool,
    /// Whether Buildroot's way of building bears the distribution's patches.
    #[serde(default = "yes")]
    pub patched: bool,
    /// How long it takes on two cores.
    pub seconds: u64,
}

fn yes() -> bool {
    true
}

impl Package {
    /// Reads a package.
    pub fn read(repo: &Path, name: &str) -> Result<Self, Error> {
        let folder = repo.join(FOLDER).join(name);
        let path = folder.join("package.yaml");
        if name.contains('/') || !path.is_file() {
            return Err(Error::plain(
                format!("there is no package `{name}`"),
                format!("The packages are: {}. Each is a folder in {FOLDER}.", names(repo).join(", ")),
            ));
        }
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        let wrong = |what: &dyn std::fmt::Display| {
            let shown = path.strip_prefix(repo).unwrap_or(&path);
            Error::plain(
                format!("{}: {what}", shown.display()),
                "See the other packages' package.yaml for the keys.",
            )
        };
        let info: Info = serde_saphyr::from_str(&text).map_err(|e| wrong(&e))?;
        if info.description.trim().is_empty() {
            return Err(wrong(&"the description is empty"));
        }
        Ok(Self { name: name.to_owned(), folder, info })
    }
}

/// The names of all packages that can be in an image, sorted.
pub fn names(repo: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(repo.join(FOLDER));
    let mut names: Vec<String> = entries
        .map_or(Vec::new(), |d| d.flatten().filter_map(|e| e.file_name().into_string().ok()).collect());
    names.retain(|n| repo.join(FOLDER).join(n).join("package.yaml").is_file());
    names.sort();
    names
}

/// The packages and all that they need, each after what it needs.
pub fn closure(repo: &Path, wanted: &[String]) -> Result<Vec<Package>, Error> {
    let mut done = Vec::new();
    for name in wanted {
        visit(repo, name, &mut Vec::new(), &mut done)?;
    }
    Ok(done)
}

fn visit(repo: &Path, name: &str, path: &mut Vec<String>, done: &mut Vec<Package>) -> Result<(), Error> {
    if done.iter().any(|p| p.name == name) {
        return Ok(());
    }
    if path.iter().any(|p| p == name) {
        return Err(Error::plain(
            format!("packages need each other in a circle: {} -> {name}", path.join(" -> ")),
            format!("Look at `needs` in their package.yaml, in {FOLDER}."),
        ));
    }
    let package = Package::read(repo, name)?;
    path.push(name.to_owned());
    for need in &package.info.needs {
        visit(repo, need, path, done)?;
    }
    path.pop();
    done.push(package);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(packages: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in packages {
            let folder = dir.path().join(FOLDER).join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("package.yaml"), format!("description: x\nseconds: 1\n{text}"))
                .unwrap();
        }
        dir
    }

    fn order(dir: &tempfile::TempDir, wanted: &[&str]) -> Result<Vec<String>, String> {
        let wanted: Vec<String> = wanted.iter().map(|w| (*w).to_owned()).collect();
        let all = closure(dir.path(), &wanted).map_err(|e| e.to_string())?;
        Ok(all.into_iter().map(|p| p.name).collect())
    }

    #[test]
    fn needs_come_first_and_once() {
        let dir = repo(&[("a", "needs: [c]"), ("b", "needs: [c]"), ("c", "")]);
        assert_eq!(order(&dir, &["b", "a", "b"]).unwrap(), ["c", "b", "a"]);
    }

    #[test]
    fn circles_strangers_and_unknown_keys_are_named() {
        let dir = repo(&[("a", "needs: [b]"), ("b", "needs: [a]"), ("c", "sauce: d\n")]);
        assert!(order(&dir, &["a"]).unwrap_err().contains("a -> b -> a"));
        assert!(order(&dir, &["../a"]).unwrap_err().contains("no package `../a`"));
        let unknown = order(&dir, &["c"]).unwrap_err();
        assert!(
            unknown.contains("buildroot-external/package/c/package.yaml") && unknown.contains("sauce"),
            "{unknown}"
        );
    }

    #[test]
    fn the_repository_s_packages_are_sound() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let names = names(&repo);
        assert!(names.contains(&"nginx".to_owned()) && names.contains(&"lg-init".to_owned()), "{names:?}");
        for package in closure(&repo, &names).unwrap() {
            assert!(package.folder.join("direct.sh").is_file(), "{}", package.name);
        }
    }
}

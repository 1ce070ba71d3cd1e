//! What a change of the inputs means for an output folder: Buildroot itself notices few of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::super::error::Error;

/// The file in an output folder that says what it was begun with.
const FILE: &str = "lg-inputs.json";

/// What an output folder is, or was, made of: hashes of the inputs of each part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// What all of it depends on: release, architecture, library, toolchain.
    pub base: String,
    /// The base in words, for messages.
    pub base_text: String,
    /// Whether the sources are the distribution's.
    pub distribution: bool,
    /// The whole defconfig.
    pub defconfig: String,
    /// Each package's source and own settings.
    pub packages: BTreeMap<String, String>,
    /// Each package's Kconfig fragments, where it has such.
    pub fragments: BTreeMap<String, String>,
}

/// What is to be done before `make`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Begin anew; why, if there was something.
    Fresh(Option<String>),
    /// Go on.
    Go {
        /// Packages to be built from their source again.
        rebuild: BTreeSet<String>,
        /// Packages to be configured again.
        reconfigure: BTreeSet<String>,
        /// Whether the defconfig is another one.
        defconfig: bool,
    },
}

impl Inputs {
    /// What an output folder was begun with. `None` where it has no record that can be read.
    pub fn read(output: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(output.join(FILE)).ok()?).ok()
    }

    /// Records what an output folder is begun with.
    pub fn write(&self, output: &Path) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::plain(format!("cannot record the inputs: {e}"), "This is a bug."))?;
        super::super::cache::write_if_changed(&output.join(FILE), text.as_bytes()).map(drop)
    }

    /// The way from an output folder's inputs, if it has any, to these.
    pub fn route(&self, old: Option<&Self>, output_exists: bool) -> Route {
        let Some(old) = old else {
            let why = output_exists.then(|| "what is there does not say what it was made of".to_owned());
            return Route::Fresh(why);
        };
        if old.base != self.base {
            return Route::Fresh(Some(format!(
                "it was made with {}, now it is {}",
                old.base_text, self.base_text
            )));
        }
        let gone: Vec<&str> =
            old.packages.keys().filter(|p| !self.packages.contains_key(*p)).map(String::as_str).collect();
        if !gone.is_empty() {
            // Buildroot never uninstalls.
            return Route::Fresh(Some(format!("no longer wanted: {}", gone.join(", "))));
        }
        let differs = |new: &BTreeMap<String, String>, old: &BTreeMap<String, String>| -> BTreeSet<String> {
            new.iter().filter(|(k, v)| old.get(*k).is_some_and(|o| o != *v)).map(|(k, _)| k.clone()).collect()
        };
        let rebuild = differs(&self.packages, &old.packages);
        let mut reconfigure = differs(&self.fragments, &old.fragments);
        reconfigure.retain(|p| !rebuild.contains(p));
        Route::Go { rebuild, reconfigure, defconfig: old.defconfig != self.defconfig }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> Inputs {
        let map =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        Inputs {
            base: "b1".into(),
            base_text: "Buildroot 1".into(),
            distribution: false,
            defconfig: "d1".into(),
            packages: map(&[("linux", "l1"), ("busybox", "x1"), ("nginx", "n1")]),
            fragments: map(&[("linux", "f1"), ("busybox", "g1")]),
        }
    }

    fn go(rebuild: &[&str], reconfigure: &[&str], defconfig: bool) -> Route {
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Route::Go { rebuild: set(rebuild), reconfigure: set(reconfigure), defconfig }
    }

    #[test]
    fn each_change_has_its_way() {
        let old = inputs();
        let changed = |change: &dyn Fn(&mut Inputs)| {
            let mut new = inputs();
            change(&mut new);
            new.route(Some(&old), true)
        };
        assert_eq!(changed(&|_| {}), go(&[], &[], false));
        assert_eq!(
            changed(&|i| drop(i.fragments.insert("linux".into(), "f2".into()))),
            go(&[], &["linux"], false)
        );
        assert_eq!(
            changed(&|i| drop(i.packages.insert("nginx".into(), "n2".into()))),
            go(&["nginx"], &[], false)
        );
        assert_eq!(changed(&|i| i.defconfig = "d2".into()), go(&[], &[], true));
        let both = changed(&|i| {
            i.packages.insert("linux".into(), "l2".into());
            i.fragments.insert("linux".into(), "f2".into());
        });
        assert_eq!(both, go(&["linux"], &[], false));
        assert_eq!(changed(&|i| drop(i.packages.insert("new".into(), "1".into()))), go(&[], &[], false));
    }

    #[test]
    fn another_base_or_a_package_less_begins_anew_and_says_why() {
        let mut new = inputs();
        new.base = "b2".into();
        new.base_text = "Buildroot 2".into();
        let Route::Fresh(Some(why)) = new.route(Some(&inputs()), true) else { panic!("not fresh") };
        assert!(why.contains("Buildroot 1") && why.contains("Buildroot 2"), "{why}");
        let mut new = inputs();
        new.packages.remove("nginx");
        let Route::Fresh(Some(why)) = new.route(Some(&inputs()), true) else { panic!("not fresh") };
        assert!(why.contains("nginx"), "{why}");
        assert_eq!(inputs().route(None, false), Route::Fresh(None));
        assert!(matches!(inputs().route(None, true), Route::Fresh(Some(_))));
    }

    #[test]
    fn the_record_survives_and_damage_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Inputs::read(dir.path()), None);
        inputs().write(dir.path()).unwrap();
        assert_eq!(Inputs::read(dir.path()), Some(inputs()));
        fs::write(dir.path().join(FILE), "{\"base\":").unwrap();
        assert_eq!(Inputs::read(dir.path()), None);
    }
}

//! Running Buildroot's `make`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::super::direct::kconfig;
use super::super::error::Error;
use super::super::step::Step;
use super::config::Defconfig;
use super::machine;
use super::release::Tree;
use super::timing::Timing;

/// An output folder, and how to call `make` for it.
#[derive(Debug)]
pub struct Make {
    /// Buildroot.
    pub tree: Tree,
    /// The folder.
    pub output: PathBuf,
    /// Our tree.
    pub external: PathBuf,
    environment: Vec<(OsString, OsString)>,
}

impl Make {
    /// Makes the folder if need be.
    pub fn new(tree: &Tree, output: &Path, external: &Path) -> Result<Self, Error> {
        let home = output.join("lg/home");
        fs::create_dir_all(&home).map_err(|e| Error::io("make the folder", &home, e))?;
        Ok(Self {
            tree: tree.clone(),
            output: output.to_owned(),
            external: external.to_owned(),
            environment: machine::environment(&home),
        })
    }

    /// `make` with these words. Files get the mode that Buildroot insists on. It holds the folder's lock as long as it
    /// lives, also if xtask does not.
    pub fn expression(&self, words: &[&str]) -> duct::Expression {
        self.in_environment(words, &self.environment)
    }

    fn in_environment(&self, words: &[&str], environment: &[(OsString, OsString)]) -> duct::Expression {
        let mut all: Vec<OsString> = vec![lock(&self.output).into()];
        all.extend(["sh", "-c", "umask 022; exec make \"$@\"", "make", "-C"].map(OsString::from));
        all.push(self.tree.folder.clone().into());
        for (name, path) in [("O", &self.output), ("BR2_EXTERNAL", &self.external)] {
            let mut word = OsString::from(format!("{name}="));
            word.push(path);
            all.push(word);
        }
        all.extend(words.iter().map(OsString::from));
        duct::cmd("flock", all).full_env(environment.iter().cloned())
    }

    /// The environment of a program that draws on this terminal.
    fn drawing(&self) -> Vec<(OsString, OsString)> {
        let mut all = self.environment.clone();
        all.retain(|(name, _)| name != "TERM");
        all.push(("TERM".into(), std::env::var_os("TERM").unwrap_or_else(|| "xterm".into())));
        all
    }

    /// Writes the configuration, and checks that all of it survived.
    pub fn configure(&self, step: &Step, defconfig: &Defconfig) -> Result<(), Error> {
        let path = self.output.join("lg/defconfig");
        let text = defconfig.text();
        super::super::cache::write_if_changed(&path, text.as_bytes())?;
        let named = format!("BR2_DEFCONFIG={}", path.display());
        step.run("configure", self.expression(&[&named, "defconfig"]))?;
        let config = self.output.join(".config");
        let text = fs::read_to_string(&config).map_err(|e| Error::io("read", &config, e))?;
        kconfig::check(&format!("Buildroot {}", self.tree.version), &defconfig.settings()?, &text)
    }

    /// What the configuration would build, and of which files.
    pub fn show_info(&self, step: &Step) -> Result<String, Error> {
        step.read("list the packages", self.expression(&["-s", "--no-print-directory", "show-info"]))
    }

    /// `make` on this terminal.
    pub fn terminal(&self, words: &[&str]) -> Result<(), Error> {
        finish(self.in_environment(words, &self.drawing()), "the editor")
    }

    /// `make`, whose words are of no interest.
    pub fn quietly(&self, words: &[&str]) -> Result<(), Error> {
        finish(self.expression(words).stdin_null().stdout_null(), "make")
    }

    /// `make` in a package's source, on this terminal or unheard.
    pub fn editor(&self, source: &Path, words: &[String], terminal: bool) -> Result<(), Error> {
        let make = |environment| duct::cmd("make", words).dir(source).full_env(environment);
        match terminal {
            true => finish(make(self.drawing()), "the editor"),
            false => finish(make(self.environment.clone()).stdin_null().stdout_null(), "make"),
        }
    }

    /// Builds; a failure names package and step.
    pub fn build(&self, step: &Step, words: &[&str], timing: &Timing) -> Result<(), Error> {
        let result = step.watch("build", self.expression(words), &|| timing.tell());
        result.map_err(|error| self.failure(error, step, timing))
    }

    fn failure(&self, error: Error, step: &Step, timing: &Timing) -> Error {
        let Error::Plain { what, help } = error else { return error };
        let text = fs::read(step.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let place = match timing.state().current {
            Some((package, step)) => format!("package {package}, step {step}: "),
            None => String::new(),
        };
        // What went wrong is often far above the last line.
        let first = first_error(&text).map(|l| format!("\n  first error: {l}")).unwrap_or_default();
        Error::Plain { what: format!("{place}{what}{first}"), help }
    }
}

/// The lock of an output folder. It lies beside it: the folder may be removed.
fn lock(output: &Path) -> PathBuf {
    output.with_extension("lock")
}

/// Waits until no `make` works in an output folder: one may have outlived the command that started it.
pub fn wait(output: &Path, waiting: impl FnOnce()) -> Result<(), Error> {
    use rustix::fs::{FlockOperation, flock};
    let path = lock(output);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|e| Error::io("make the folder", folder, e))?;
    }
    let file = fs::File::create(&path).map_err(|e| Error::io("make", &path, e))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        waiting();
        flock(&file, FlockOperation::LockExclusive).map_err(|e| Error::io("lock", &path, e.into()))?;
    }
    Ok(())
}

fn finish(child: duct::Expression, what: &str) -> Result<(), Error> {
    let said = |how: String| {
        Error::plain(format!("{what} did not end well: {how}"), "Its words are above. Nothing was written.")
    };
    let output = child.unchecked().run().map_err(|e| said(e.to_string()))?;
    if output.status.success() { Ok(()) } else { Err(said(output.status.to_string())) }
}

/// The first line of a log that a compiler, a linker or one of our checks calls an error.
fn first_error(log: &str) -> Option<&str> {
    let marks =
        [": error: ", ": fatal error: ", "undefined reference to", "ERROR: ", "did not survive", "has wrong"];
    log.lines().find(|l| marks.iter().any(|m| l.contains(m))).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_make_that_was_left_behind_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out/test");
        wait(&output, || panic!("nobody is there")).unwrap();
        let left = duct::cmd!("flock", lock(&output), "sh", "-c", "echo; sleep 0.5")
            .stdout_capture()
            .start()
            .unwrap();
        let mut waited = false;
        while !waited {
            assert!(left.try_wait().unwrap().is_none(), "it was not waited for");
            wait(&output, || waited = true).unwrap();
        }
        assert!(left.wait().is_ok());
    }

    #[test]
    fn editors_draw_on_the_terminal_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree { folder: dir.path().to_owned(), version: "0".to_owned() };
        fs::write(dir.path().join("Makefile"), "all:\n\t@echo $$TERM >> term\n").unwrap();
        let make = Make::new(&tree, &dir.path().join("out"), dir.path()).unwrap();
        make.terminal(&[]).unwrap();
        make.editor(dir.path(), &[], true).unwrap();
        make.quietly(&[]).unwrap();
        let here = std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned());
        let said = fs::read_to_string(dir.path().join("term")).unwrap();
        assert_eq!(said, format!("{here}\n{here}\ndumb\n"));
    }

    #[test]
    fn the_first_error_is_found_above_the_last_lines() {
        let log = "CC a.o\na.c:3:1: error: expected x\nmake[2]: *** [a.o] Error 1\nb.c:1: error: y\n";
        assert_eq!(first_error(log), Some("a.c:3:1: error: expected x"));
        assert_eq!(first_error("fine\n"), None);
    }
}

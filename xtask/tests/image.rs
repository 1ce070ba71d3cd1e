//! `cargo xtask image` from outside: exit status, what is said, and that a refusal leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs xtask in a folder, with a cache of its own.
fn xtask(folder: &Path, cache: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .current_dir(folder)
        .env("XDG_CACHE_HOME", cache)
        .env("NO_COLOR", "1")
        .output()
        .unwrap()
}

/// What a refused command says; its status is 1, it says nothing on standard output and makes no cache.
#[track_caller]
fn refused(folder: &Path, args: &[&str]) -> String {
    let cache = tempfile::tempdir().unwrap();
    let output = xtask(folder, cache.path(), args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty());
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0, "something was left in the cache");
    said
}

#[test]
fn a_misspelt_key_is_shown_with_file_line_and_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.yaml");
    std::fs::write(&path, "description: mine\nextends: lean\noverlay: [base]\n").unwrap();
    let said = refused(&repository(), &["image", "--profile", path.to_str().unwrap()]);
    assert!(said.contains("mine.yaml:3:1: unknown key `overlay`"), "{said}");
    assert!(said.contains("Did you mean `overlays`?"), "{said}");
    assert!(said.contains("overlay: [base]"), "{said}");
}

#[test]
fn a_missing_profile_lists_those_that_exist() {
    let said = refused(&repository(), &["image", "--profile", "leen"]);
    assert!(said.contains("no profile `leen`") && said.contains("Did you mean `lean`?"), "{said}");
    assert!(said.contains("debug, lean"), "{said}");
}

#[test]
fn outside_the_repository_nothing_works() {
    let dir = tempfile::tempdir().unwrap();
    let said = refused(dir.path(), &["image"]);
    assert!(said.contains("not inside the repository"), "{said}");
}

#[test]
fn ram_wants_a_unit_on_the_command_line_too() {
    let cache = tempfile::tempdir().unwrap();
    let output = xtask(&repository(), cache.path(), &["image", "--ram", "8"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("has no unit") && said.contains("8 MiB"), "{said}");
}

#[test]
fn the_list_names_profiles_and_overlays() {
    let cache = tempfile::tempdir().unwrap();
    let output = xtask(&repository(), cache.path(), &["image", "--list"]);
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    for name in ["lean", "debug", "base"] {
        assert!(said.lines().any(|l| l.trim_start().starts_with(name)), "{name} is missing in:\n{said}");
    }
}

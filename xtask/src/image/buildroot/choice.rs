//! Which builder makes an image, where neither the command line nor the profile says it.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::super::error::Error;
use super::super::profile::BuilderName;
use super::super::request::Request;
use super::release::{self, Origin, Pin};

/// How long it is remembered that the release's site did not answer.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

/// A builder, and why, in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Which.
    pub builder: BuilderName,
    /// The line.
    pub line: String,
    /// Its release is still to be downloaded.
    pub downloads: bool,
}

/// Buildroot where it is at hand, else the direct builder.
pub fn choose(request: &Request) -> Result<Choice, Error> {
    let folder = request.buildroot();
    let pin = Pin::read(request.repo)?;
    let buildroot = |what: String| Choice {
        builder: BuilderName::Buildroot,
        line: format!(
            "builder: buildroot, for {what}; `--builder direct` takes the distribution's packages instead"
        ),
        downloads: false,
    };
    Ok(match release::look(request, &folder, &pin)? {
        Origin::Given(tree, how) => buildroot(format!("{how} names Buildroot {}", tree.version)),
        Origin::Cached(tree) => buildroot(format!("Buildroot {} is in the cache", tree.version)),
        Origin::Download if answers(request, &pin, &folder.join("no-answer")) => {
            Choice { downloads: true, ..buildroot(format!("Buildroot {} can be downloaded", pin.version)) }
        }
        Origin::Download => Choice {
            builder: BuilderName::Direct,
            line: format!(
                "builder: direct, for no Buildroot is at hand ({} is not set, and the download did not answer); \
                 `--builder buildroot --buildroot DIR` uses one",
                release::VARIABLE
            ),
            downloads: false,
        },
    })
}

/// Asks the release's site, or remembers that it did not answer: without a network, that takes seconds.
fn answers(request: &Request, pin: &Pin, memory: &Path) -> bool {
    let asked = format!("{}\n", pin.url);
    let fresh = fs::metadata(memory)
        .and_then(|m| m.modified())
        .is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|age| age < REMEMBERED));
    if request.options.mirror.is_none() && fresh && fs::read_to_string(memory).is_ok_and(|t| t == asked) {
        return false;
    }
    let answers = release::answers(request, pin);
    // A memory that cannot be kept costs seconds, nothing else.
    if answers {
        drop(fs::remove_file(memory));
    } else if !request.options.offline && request.options.mirror.is_none() {
        let folder = memory.parent().unwrap_or(Path::new("."));
        drop(fs::create_dir_all(folder).and_then(|()| fs::write(memory, asked)));
    }
    answers
}

#[cfg(test)]
mod tests {
    use super::super::super::buildroot::Options;
    use super::*;

    fn request<'a>(repo: &'a Path, cache: &'a Path, options: &'a Options) -> Request<'a> {
        Request {
            name: "test",
            packages: &[],
            kernel_fragments: &[],
            busybox_fragments: &[],
            repo,
            cache,
            quiet: true,
            options,
        }
    }

    #[test]
    fn a_tree_at_hand_is_used_and_the_line_says_how_to_choose() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let cache = tempfile::tempdir().unwrap();
        let tree = cache.path().join("tree");
        for part in ["package", "support", "linux", "fs", "toolchain"] {
            fs::create_dir_all(tree.join(part)).unwrap();
        }
        fs::write(tree.join("Makefile"), "export BR2_VERSION := 2026.08\n").unwrap();
        let options = Options { dir: Some(tree), offline: true, ..Options::default() };
        let choice = choose(&request(repo, cache.path(), &options)).unwrap();
        assert_eq!(choice.builder, BuilderName::Buildroot);
        assert!(choice.line.contains("--buildroot names Buildroot 2026.08"), "{}", choice.line);
        assert!(choice.line.contains("--builder direct"), "{}", choice.line);
    }

    #[test]
    fn without_one_it_is_the_direct_builder_unless_a_mirror_has_the_release() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let cache = tempfile::tempdir().unwrap();
        let mut options = Options { offline: true, ..Options::default() };
        if std::env::var_os(release::VARIABLE).is_none() {
            let choice = choose(&request(repo, cache.path(), &options)).unwrap();
            assert_eq!(choice.builder, BuilderName::Direct);
            assert!(choice.line.contains("--builder buildroot"), "{}", choice.line);
            let pin = Pin::read(repo).unwrap();
            let name = pin.url.rsplit('/').next().unwrap();
            fs::write(cache.path().join(name), "").unwrap();
            options.mirror = Some(cache.path().display().to_string());
            let choice = choose(&request(repo, cache.path(), &options)).unwrap();
            assert_eq!(choice.builder, BuilderName::Buildroot);
        }
    }

    #[test]
    fn no_answer_is_remembered() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let cache = tempfile::tempdir().unwrap();
        let options = Options::default();
        let request = request(repo, cache.path(), &options);
        let pin = Pin {
            version: "1".into(),
            // Nobody listens there.
            url: "http://127.0.0.1:9/buildroot-1.tar.xz".into(),
            sha256: String::new(),
            tested: Vec::new(),
        };
        let memory = cache.path().join("no-answer");
        assert!(!answers(&request, &pin, &memory));
        assert!(memory.is_file());
        let start = std::time::Instant::now();
        assert!(!answers(&request, &pin, &memory));
        assert!(start.elapsed() < Duration::from_millis(100));
    }
}

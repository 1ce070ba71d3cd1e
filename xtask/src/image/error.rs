//! What can go wrong while an image is made: what, where, and how to fix it.

use std::io;
use std::path::{Path, PathBuf};

use miette::{Diagnostic, NamedSource, SourceSpan};

/// An error in a text file: what, where, how to fix.
#[derive(Debug, thiserror::Error, Diagnostic)]
#[error("{file}:{line}:{column}: {what}")]
pub struct TextError {
    pub(super) file: String,
    pub(super) line: u64,
    pub(super) column: u64,
    pub(super) what: String,
    #[source_code]
    pub(super) text: NamedSource<String>,
    #[label("here")]
    pub(super) span: Option<SourceSpan>,
    #[help]
    pub(super) help: Option<String>,
}

/// An error of `cargo xtask image`.
#[derive(Debug, thiserror::Error, Diagnostic)]
pub enum Error {
    /// A mistake in a text file.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Text(Box<TextError>),

    /// A mistake that has no line.
    #[error("{what}")]
    Plain {
        /// What and where.
        what: String,
        /// How to fix it.
        #[help]
        help: Option<String>,
    },

    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// How to fix it.
        #[help]
        help: Option<String>,
    },
}

impl Error {
    /// What and where, and how to fix it.
    pub fn plain(what: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Plain { what: what.into(), help: Some(help.into()) }
    }

    /// The system's refusal, with the remedy where there is an obvious one.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let help = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(format!(
                "The disk that holds {} is full. Free some space there. The cache can be on another disk: set \
                 XDG_CACHE_HOME. Nothing half-written is kept.",
                path.display()
            )),
            io::ErrorKind::PermissionDenied => Some("Check who owns that path.".to_owned()),
            io::ErrorKind::ReadOnlyFilesystem => {
                Some("Set XDG_CACHE_HOME to a folder that can be written.".to_owned())
            }
            _ => None,
        };
        Self::Io { action, path: path.to_owned(), source, help }
    }

    /// As [`Error::io`], for a write of `need` bytes.
    pub fn write(path: &Path, need: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::plain(
                format!(
                    "no space left on the disk of {}: {need} bytes are to be written there",
                    path.display()
                ),
                "Free some space there. The cache can be on another disk: set XDG_CACHE_HOME. Nothing half-written is \
                 kept.",
            ),
            _ => Self::io("write", path, source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_named_with_path_and_need() {
        let path = Path::new("/cache/images/x/Image");
        let error = Error::write(path, 12_345, io::Error::from(io::ErrorKind::StorageFull));
        let text = error.to_string();
        assert!(text.contains("no space left") && text.contains("/cache/images/x/Image"), "{text}");
        assert!(text.contains("12345 bytes"), "{text}");
        let help = error.help().map(|h| h.to_string()).unwrap_or_default();
        assert!(help.contains("XDG_CACHE_HOME"), "{help}");
        let other = Error::write(path, 1, io::Error::from(io::ErrorKind::PermissionDenied)).to_string();
        assert!(other.starts_with("cannot write /cache/images/x/Image"), "{other}");
    }
}

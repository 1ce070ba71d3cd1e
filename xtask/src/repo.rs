//! Where the repository is.

use std::path::PathBuf;

/// The repository that the current folder lies in.
pub fn root() -> Result<PathBuf, NotInRepository> {
    let here = std::env::current_dir().map_err(|_| NotInRepository)?;
    let mut above = here.ancestors();
    above
        .find(|f| f.join("xtask").is_dir() && f.join("profiles").is_dir())
        .map(Into::into)
        .ok_or(NotInRepository)
}

/// The command was given outside the repository.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
#[error("this folder is not inside the repository")]
#[diagnostic(help("Change to the folder that holds xtask/ and profiles/, and try again."))]
pub struct NotInRepository;

//! Text files that people write (profiles, overlay.yaml, templates) and errors that point into them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use miette::{NamedSource, SourceSpan};
use serde::de::DeserializeOwned;
use serde_saphyr::{Location, Spanned};

use super::error::{Error, TextError};

/// A text file as it was read.
#[derive(Debug)]
pub struct Source {
    /// Where it lies.
    pub path: PathBuf,
    /// How messages call it: relative to the repository where it lies inside.
    pub name: String,
    /// What it says.
    pub text: String,
}

/// A value together with the place that it was read from.
#[derive(Clone, Debug)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// The file that gave it.
    pub source: Arc<Source>,
    /// Where in the file.
    pub place: Place,
}

/// A place in a text: line and column count from 1, the span is in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Line, from 1; 0 where it is not known.
    pub line: u64,
    /// Column, from 1.
    pub column: u64,
    /// First byte.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

impl Source {
    /// Reads a file; `root` is what its name is relative to.
    pub fn read(path: &Path, root: &Path) -> Result<Arc<Self>, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        Ok(Self::new(path, root, text))
    }

    /// Takes a text that was read already.
    pub fn new(path: &Path, root: &Path, text: String) -> Arc<Self> {
        let name = path.strip_prefix(root).unwrap_or(path).display().to_string();
        Arc::new(Self { path: path.to_owned(), name, text })
    }

    /// An error at a place of this text.
    pub fn error(&self, place: Place, what: impl Into<String>, help: impl Into<Option<String>>) -> Error {
        let inside = place.offset.saturating_add(place.len) <= self.text.len();
        Error::Text(Box::new(TextError {
            file: self.name.clone(),
            line: place.line,
            column: place.column,
            what: what.into(),
            text: NamedSource::new(&self.name, self.text.clone()),
            span: (inside && place.line > 0).then(|| SourceSpan::from((place.offset, place.len))),
            help: help.into(),
        }))
    }

    /// An error at the first place where `word` stands, else at the top of the file.
    pub fn error_at_line(
        &self,
        line: usize,
        what: impl Into<String>,
        help: impl Into<Option<String>>,
    ) -> Error {
        let before: usize = self.text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
        let text = self.text.lines().nth(line.saturating_sub(1)).unwrap_or("");
        let indent = text.len() - text.trim_start().len();
        let place = Place {
            line: line as u64,
            column: indent as u64 + 1,
            offset: before + indent,
            len: text.trim().len(),
        };
        self.error(place, what, help)
    }

    /// Reads the text as YAML. An unknown key is an error that names the nearest one.
    pub fn yaml<T: DeserializeOwned>(&self) -> Result<T, Error> {
        serde_saphyr::from_str(&self.text).map_err(|e| self.yaml_error(e.without_snippet()))
    }

    fn yaml_error(&self, e: &serde_saphyr::Error) -> Error {
        use serde_saphyr::Error as Yaml;
        let place = e.location().map(|l| self.place(l)).unwrap_or_default();
        let (what, help) = match e {
            Yaml::SerdeUnknownField { field, expected, .. } => (
                format!("unknown key `{field}`"),
                Some(format!("{}The keys are: {}.", did_you_mean(field, expected), list(expected))),
            ),
            Yaml::DuplicateMappingKey { key, .. } => (
                format!("the key `{}` stands here for the second time", key.as_deref().unwrap_or("?")),
                Some("Keep one of them.".to_owned()),
            ),
            Yaml::SerdeMissingField { field, .. } => (
                format!("the key `{field}` is missing"),
                Some(format!("Add a line `{field}: ...` to this file.")),
            ),
            Yaml::Unexpected { expected, .. } => {
                let key = self.key_of(place);
                match *expected {
                    "sequence start" => (
                        format!("{key}expected a list, not a single value"),
                        Some("Write a list: [a, b], or one item a line, each after `- `.".to_owned()),
                    ),
                    "mapping start" => (
                        format!("{key}expected keys and their values"),
                        Some("Write one `key: value` a line.".to_owned()),
                    ),
                    "string scalar" => (
                        format!("{key}expected a single value, not a list or a group of keys"),
                        Some("Where the text has a `: ` or begins with [ or {, put it in quotes.".to_owned()),
                    ),
                    other => (format!("{key}expected {other}"), None),
                }
            }
            other => {
                let text = other.render();
                let text = text.split(" at line ").next().unwrap_or(&text);
                (format!("this is not valid YAML: {text}"), None)
            }
        };
        self.error(place, what, help)
    }

    /// The key of the line that a place is in, as a prefix of a message.
    fn key_of(&self, place: Place) -> String {
        let line = self.text.lines().nth((place.line as usize).saturating_sub(1)).unwrap_or("");
        match line.trim_start_matches(['-', ' ']).split_once(':') {
            Some((key, _)) if key.chars().all(|c| c.is_alphanumeric() || "_-./".contains(c)) => {
                format!("`{key}`: ")
            }
            _ => String::new(),
        }
    }

    /// A location of the YAML reader as a place.
    pub fn place(&self, l: Location) -> Place {
        let span = l.span();
        let known =
            |n: Option<u64>| n.and_then(|n| usize::try_from(n).ok()).filter(|&n| n <= self.text.len());
        let by_line = || {
            let lines = self.text.split_inclusive('\n').take((l.line() as usize).saturating_sub(1));
            lines.map(str::len).sum::<usize>() + (l.column() as usize).saturating_sub(1)
        };
        let offset = known(span.byte_offset()).unwrap_or_else(by_line);
        Place { line: l.line(), column: l.column(), offset, len: known(span.byte_len()).unwrap_or(1) }
    }

    /// A value as the YAML reader gave it, tied to this file.
    pub fn locate<T>(self: &Arc<Self>, value: Spanned<T>) -> Located<T> {
        let place = self.place(value.referenced);
        Located { value: value.value, source: Arc::clone(self), place }
    }
}

impl<T> Located<T> {
    /// An error at this value.
    pub fn error(&self, what: impl Into<String>, help: impl Into<Option<String>>) -> Error {
        self.source.error(self.place, what, help)
    }

    /// Another value at the same place.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Located<U> {
        Located { value: f(self.value), source: self.source, place: self.place }
    }
}

/// "Did you mean `x`? " or nothing.
pub fn did_you_mean<S: AsRef<str>>(word: &str, known: &[S]) -> String {
    match nearest(word, known) {
        Some(best) => format!("Did you mean `{best}`? "),
        None => String::new(),
    }
}

/// `a`, `b` and `c` as a list for a message.
pub fn list<S: AsRef<str>>(words: &[S]) -> String {
    match words {
        [] => "none".to_owned(),
        _ => words.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(", "),
    }
}

/// The known word that a misspelt one most probably stands for.
pub fn nearest<'a, S: AsRef<str>>(word: &str, known: &'a [S]) -> Option<&'a str> {
    let word = word.to_lowercase();
    known
        .iter()
        .map(|k| (distance(&word, &k.as_ref().to_lowercase()), k.as_ref()))
        .filter(|(d, k)| *d <= 1 + word.chars().count().min(k.chars().count()) / 3)
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k)
}

/// Edits (insert, delete, replace, swap neighbours) from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_finds_misspellings_and_refuses_strangers() {
        let keys = ["packages", "overlays", "ram", "vms", "time"];
        assert_eq!(nearest("pakages", &keys), Some("packages"));
        assert_eq!(nearest("overlay", &keys), Some("overlays"));
        assert_eq!(nearest("rma", &keys), Some("ram"));
        assert_eq!(nearest("RAM", &keys), Some("ram"));
        assert_eq!(nearest("bootloader", &keys), None);
    }

    #[test]
    fn distance_counts_a_swap_as_one() {
        assert_eq!(distance("ram", "rma"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}

//! Fragments of Kconfig configurations: reading them, laying them over a configuration, and checking what survived.

use std::path::{Path, PathBuf};

use super::super::error::Error;

/// One line of a fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// With its CONFIG_.
    pub symbol: String,
    /// As in the file, with quotes; `None` is "is not set".
    pub value: Option<String>,
    /// The file, as messages name it.
    pub file: PathBuf,
    /// From 1.
    pub line: usize,
}

/// A fragment as read: its place and its text.
#[derive(Clone, Debug)]
pub struct Fragment {
    /// As messages name it.
    pub name: PathBuf,
    /// Its bytes.
    pub text: String,
}

impl Fragment {
    /// Reads a fragment; messages name it relative to `repo`.
    pub fn read(repo: &Path, path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        Ok(Self { name: path.strip_prefix(repo).unwrap_or(path).to_owned(), text })
    }
}

/// All settings of some fragments; of a symbol that is set more than once the last one counts.
pub fn settings(fragments: &[Fragment]) -> Result<Vec<Setting>, Error> {
    let mut all: Vec<Setting> = Vec::new();
    for fragment in fragments {
        for (index, text) in fragment.text.lines().enumerate() {
            let Some((symbol, value)) = parse(text).map_err(|()| {
                Error::plain(
                    format!("{}:{}: not a setting: {}", fragment.name.display(), index + 1, text.trim()),
                    "Write CONFIG_NAME=value or `# CONFIG_NAME is not set`; other lines begin with #.",
                )
            })?
            else {
                continue;
            };
            all.retain(|s| s.symbol != symbol);
            let file = fragment.name.clone();
            all.push(Setting {
                symbol: symbol.to_owned(),
                value: value.map(str::to_owned),
                file,
                line: index + 1,
            });
        }
    }
    Ok(all)
}

/// A line's symbol and value; `None` for a comment. Buildroot's own symbols begin with BR2_.
pub fn parse(line: &str) -> Result<Option<(&str, Option<&str>)>, ()> {
    let line = line.trim();
    let named = |symbol: &str| {
        let name = symbol.strip_prefix("CONFIG_").or_else(|| symbol.strip_prefix("BR2_"));
        name.is_some_and(|name| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        })
    };
    if let Some(comment) = line.strip_prefix('#') {
        let symbol = comment.trim().strip_suffix(" is not set").map(str::trim);
        return Ok(symbol.filter(|s| named(s)).map(|s| (s, None)));
    }
    if line.is_empty() {
        return Ok(None);
    }
    match line.split_once('=') {
        Some((symbol, "n")) if named(symbol) => Ok(Some((symbol, None))),
        Some((symbol, value)) if named(symbol) && !value.is_empty() => Ok(Some((symbol, Some(value)))),
        _ => Err(()),
    }
}

/// A setting as a line of .config.
fn line(symbol: &str, value: Option<&str>) -> String {
    match value {
        Some(value) => format!("{symbol}={value}\n"),
        None => format!("# {symbol} is not set\n"),
    }
}

/// The settings as one fragment, sorted: their order has no meaning.
pub fn text(settings: &[Setting]) -> String {
    let mut lines: Vec<(&str, String)> =
        settings.iter().map(|s| (s.symbol.as_str(), line(&s.symbol, s.value.as_deref()))).collect();
    lines.sort();
    lines.into_iter().map(|(_, line)| line).collect()
}

/// Lays settings over a whole .config (busybox reads no fragments).
pub fn merge(config: &str, settings: &[Setting]) -> String {
    let mut merged = String::new();
    for old in config.lines() {
        let symbol = parse(old).ok().flatten().map(|(symbol, _)| symbol);
        if !symbol.is_some_and(|symbol| settings.iter().any(|s| s.symbol == symbol)) {
            merged.push_str(old);
            merged.push('\n');
        }
    }
    merged.push_str(&text(settings));
    merged
}

/// Every setting must be in the .config that came out. `what` is whose configuration it is.
pub fn check(what: &str, settings: &[Setting], config: &str) -> Result<(), Error> {
    let mut lost = Vec::new();
    for setting in settings {
        let found = config
            .lines()
            .filter_map(|l| parse(l).ok().flatten())
            .find(|(symbol, _)| *symbol == setting.symbol)
            .map(|(_, value)| value);
        let survived = match (&setting.value, found) {
            (None, None | Some(None)) => true,
            (Some(wanted), Some(Some(is))) => wanted == is,
            _ => false,
        };
        if !survived {
            let is = match found {
                None => "is not in .config".to_owned(),
                Some(None) => "is off in .config".to_owned(),
                Some(Some(is)) => format!("is `{is}` in .config"),
            };
            lost.push(format!(
                "\n  {}:{}: `{}` {is}",
                setting.file.display(),
                setting.line,
                line(&setting.symbol, setting.value.as_deref()).trim_end(),
            ));
        }
    }
    match lost.len() {
        0 => Ok(()),
        n => Err(Error::plain(
            format!(
                "{what}: {n} {} did not survive configuration:{}",
                if n == 1 { "setting" } else { "settings" },
                lost.concat()
            ),
            "The symbol may be misspelt, unknown to this version, or depend on another that is off (or, where it \
             should be off, be selected by another). Correct the fragment.",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragments(texts: &[&str]) -> Vec<Fragment> {
        let name = |i| PathBuf::from(format!("kernel/{i}.config"));
        texts.iter().enumerate().map(|(i, t)| Fragment { name: name(i), text: (*t).to_owned() }).collect()
    }

    #[test]
    fn later_fragments_win() {
        let read = settings(&fragments(&[
            "# A comment is not set\nCONFIG_A=y\nCONFIG_B=\"x\"\n\n",
            "# CONFIG_A is not set\nCONFIG_C=n\n",
        ]))
        .unwrap();
        assert_eq!(text(&read), "# CONFIG_A is not set\nCONFIG_B=\"x\"\n# CONFIG_C is not set\n");
        assert_eq!(read[1].line, 1);
        assert_eq!(read[1].file, Path::new("kernel/1.config"));
    }

    #[test]
    fn a_broken_line_is_named() {
        for broken in ["CONFIG_A", "CONFIG_=y", "FOO=y", "CONFIG_A-B=y", "CONFIG_A="] {
            let error = settings(&fragments(&[&format!("# fine\n{broken}\n")])).unwrap_err().to_string();
            assert!(error.contains("kernel/0.config:2"), "{error}");
        }
    }

    #[test]
    fn what_was_lost_is_named_with_its_place() {
        let read =
            settings(&fragments(&["CONFIG_A=y\nCONFIG_B=12\n# CONFIG_C is not set\nCONFIG_D=y\n"])).unwrap();
        check("kernel", &read, "CONFIG_A=y\nCONFIG_B=12\nCONFIG_D=y\n").unwrap();
        check("kernel", &read, "CONFIG_A=y\nCONFIG_B=12\n# CONFIG_C is not set\nCONFIG_D=y\n").unwrap();
        let error = check("kernel", &read, "CONFIG_B=13\nCONFIG_C=y\n# CONFIG_D is not set\n")
            .unwrap_err()
            .to_string();
        for part in [
            "4 settings",
            "kernel/0.config:1: `CONFIG_A=y` is not in .config",
            "kernel/0.config:2: `CONFIG_B=12` is `13` in .config",
            "kernel/0.config:3: `# CONFIG_C is not set` is `y` in .config",
            "kernel/0.config:4: `CONFIG_D=y` is off in .config",
        ] {
            assert!(error.contains(part), "{part} is missing in {error}");
        }
    }

    #[test]
    fn a_symbol_is_not_taken_for_its_prefix() {
        let read = settings(&fragments(&["CONFIG_NET=y\n"])).unwrap();
        assert!(check("kernel", &read, "CONFIG_NETDEVICES=y\n").is_err());
    }

    #[test]
    fn merging_replaces_in_a_whole_configuration() {
        let read = settings(&fragments(&["CONFIG_A=y\nCONFIG_B=\"/x\"\n"])).unwrap();
        let merged = merge("# CONFIG_A is not set\nCONFIG_B=\"\"\n# Section\nCONFIG_Z=y\n", &read);
        assert_eq!(merged, "# Section\nCONFIG_Z=y\nCONFIG_A=y\nCONFIG_B=\"/x\"\n");
    }
}

//! The machine's own apt sources, read for a private apt state: the distribution's entries alone, each with source
//! packages turned on. Keys, options and addresses are taken over as they are.

use std::collections::BTreeSet;

/// Entries for a private state, in both of apt's formats.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// One-line entries, for a `.list` file.
    lines: Vec<String>,
    /// Stanzas, for a `.sources` file.
    stanzas: Vec<String>,
    seen: BTreeSet<String>,
}

impl Sources {
    /// Whether no entry of the distribution was found.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.stanzas.is_empty()
    }

    /// The text of a `.list` file.
    pub fn list(&self) -> String {
        self.lines.iter().map(|line| format!("{line}\n")).collect()
    }

    /// The text of a `.sources` file.
    pub fn stanzas(&self) -> String {
        self.stanzas.join("\n")
    }

    /// Adds the entries of a one-line file (`sources.list`, `*.list`).
    pub fn add_list(&mut self, text: &str, codename: &str) {
        for line in text.lines() {
            if let Some(rest) = one_line(line, codename)
                && self.seen.insert(rest.clone())
            {
                self.lines.push(format!("deb {rest}"));
                self.lines.push(format!("deb-src {rest}"));
            }
        }
    }

    /// Adds the entries of a deb822 file (`*.sources`).
    pub fn add_deb822(&mut self, text: &str, codename: &str) {
        for stanza in stanzas(text) {
            if let Some(entry) = deb822(&stanza, codename)
                && self.seen.insert(entry.clone())
            {
                self.stanzas.push(entry);
            }
        }
    }
}

/// `[options] address suite main`, where the line is one of the distribution's.
fn one_line(line: &str, codename: &str) -> Option<String> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let (kind, rest) = line.split_once(char::is_whitespace)?;
    if kind != "deb" && kind != "deb-src" {
        return None;
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => {
            let (options, rest) = inner.split_once(']')?;
            (format!("[{}] ", options.trim()), rest)
        }
        None => (String::new(), rest),
    };
    let mut words = rest.split_whitespace();
    let (address, suite) = (words.next()?, words.next()?);
    let wanted = !address.starts_with("cdrom:") && belongs(suite, codename) && words.any(|c| c == "main");
    wanted.then(|| format!("{options}{address} {suite} main"))
}

/// Fields of a stanza: the name, and the value with its continuation lines.
type Stanza = Vec<(String, String)>;

/// Splits deb822 text into stanzas. Also what `apt-cache show` and `showsrc` print.
pub fn stanzas(text: &str) -> Vec<Stanza> {
    let mut all = Vec::new();
    let mut stanza = Stanza::new();
    for line in text.lines() {
        if line.trim().is_empty() {
            if !stanza.is_empty() {
                all.push(std::mem::take(&mut stanza));
            }
        } else if line.starts_with('#') {
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            stanza.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    if !stanza.is_empty() {
        all.push(stanza);
    }
    all
}

/// A field's value; names are compared without case.
pub fn field<'a>(stanza: &'a [(String, String)], name: &str) -> Option<&'a str> {
    stanza.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
}

fn deb822(stanza: &Stanza, codename: &str) -> Option<String> {
    let words = |name| field(stanza, name).unwrap_or_default().split_whitespace();
    let off = |value: &str| ["no", "false", "0", "off", "without", "disable"].contains(&value);
    if field(stanza, "Enabled").is_some_and(|v| off(&v.trim().to_ascii_lowercase())) {
        return None;
    }
    if !words("Types").any(|t| t == "deb" || t == "deb-src") || !words("Components").any(|c| c == "main") {
        return None;
    }
    let suites: Vec<&str> = words("Suites").filter(|s| belongs(s, codename)).collect();
    if suites.is_empty() {
        return None;
    }
    let mut text = format!("Types: deb deb-src\nSuites: {}\nComponents: main\n", suites.join(" "));
    for (name, value) in stanza {
        let replaced = ["Types", "Suites", "Components", "Enabled"];
        if !replaced.iter().any(|r| r.eq_ignore_ascii_case(name)) {
            text.push_str(&format!("{name}: {value}\n"));
        }
    }
    Some(text)
}

/// Whether a suite is one of the running release's. Backports and other people's archives are not.
fn belongs(suite: &str, codename: &str) -> bool {
    let suite = suite.trim_end_matches('/');
    let release = suite
        .strip_suffix("-updates")
        .or_else(|| suite.strip_suffix("-security"))
        .or_else(|| suite.strip_suffix("/updates"))
        .unwrap_or(suite);
    [codename, "stable", "oldstable"].contains(&release)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> String {
        let mut sources = Sources::default();
        sources.add_list(text, "bookworm");
        sources.list()
    }

    fn deb(text: &str) -> String {
        let mut sources = Sources::default();
        sources.add_deb822(text, "bookworm");
        sources.stanzas()
    }

    #[test]
    fn one_line_entries_get_their_sources() {
        assert_eq!(
            list("deb http://mirror.example/debian bookworm main contrib # ours\n"),
            "deb http://mirror.example/debian bookworm main\ndeb-src http://mirror.example/debian bookworm main\n"
        );
    }

    #[test]
    fn one_line_options_stay_with_their_blanks() {
        assert_eq!(
            list("deb  [ arch=amd64 signed-by=/a/b.gpg ]  https://m.example/d  bookworm-security  main"),
            "deb [arch=amd64 signed-by=/a/b.gpg] https://m.example/d bookworm-security main\n\
             deb-src [arch=amd64 signed-by=/a/b.gpg] https://m.example/d bookworm-security main\n"
        );
    }

    #[test]
    fn a_source_line_beside_its_binary_line_is_no_duplicate() {
        let both = "deb http://m.example/d bookworm main\ndeb-src http://m.example/d bookworm main\n";
        assert_eq!(list(both), both);
    }

    #[test]
    fn strangers_and_discs_are_left_out() {
        for line in [
            "deb https://other.example/apt cloud-sdk-bookworm main",
            "deb https://other.example/docker bookworm stable",
            "deb http://m.example/d bookworm-backports main",
            "deb cdrom:[Debian]/ bookworm main",
            "# deb http://m.example/d bookworm main",
            "deb [arch=amd64 http://m.example/d bookworm main",
            "deb http://m.example/d ./",
            "deb",
        ] {
            assert_eq!(list(line), "", "{line}");
        }
    }

    #[test]
    fn stanzas_keep_their_keys_and_lose_other_suites() {
        let text = "# a comment\nTypes: deb\n# inside\nURIs: http://m.example/d\nSuites: bookworm bookworm-updates \
                    bookworm-backports\nComponents: main contrib\nSigned-By:\n -----BEGIN\n .\n AbC\n -----END\n";
        assert_eq!(
            deb(text),
            "Types: deb deb-src\nSuites: bookworm bookworm-updates\nComponents: main\n\
             URIs: http://m.example/d\nSigned-By: \n -----BEGIN\n .\n AbC\n -----END\n"
        );
    }

    #[test]
    fn disabled_and_foreign_stanzas_are_left_out() {
        assert_eq!(
            deb("Enabled: no\nTypes: deb\nURIs: http://m/d\nSuites: bookworm\nComponents: main\n"),
            ""
        );
        assert_eq!(deb("Types: deb\nURIs: http://m/d\nSuites: nodistro\nComponents: main\n"), "");
        assert_eq!(deb("Types: deb\nURIs: http://m/d\nSuites: bookworm\nComponents: nginx\n"), "");
        assert_eq!(deb(""), "");
    }

    #[test]
    fn several_stanzas_are_separated() {
        let one = "types: deb\nuris: http://m/d\nsuites: bookworm\ncomponents: main\n";
        let two = one.replace("m/d", "m/s").replace("bookworm", "bookworm-security");
        let text = deb(&format!("{one}\n\n{two}"));
        assert_eq!(text.split("\n\n").count(), 2, "{text}");
        assert_eq!(stanzas(&text).len(), 2);
    }
}

//! The generated /init and /etc/identity, in lg-init's language (buildroot-external/package/lg-init/README.md).

use super::error::Error;
use super::fault::InitFault;
use super::profile::Profile;
use super::text::{Located, did_you_mean, list};
use super::tree::{Node, Tree, add_parents};

/// The MAC in the virtio-net config space: where a VM reads its number.
const IDENTITY: u32 = 0xf410_0100;
/// The goldfish real-time clock.
const CLOCK: u32 = 0xf500_0000;
/// The same on QEMU's `virt`.
const QEMU_IDENTITY: u32 = 0x1000_1100;
const QEMU_CLOCK: u32 = 0x0010_1000;
/// The script of a fault that was asked for.
const FAULT: &str = "etc/fault";
/// The date where there is no clock: 2026-01-01. nginx does not start well in 1970.
const EPOCH: u32 = 1_767_225_600;

/// What a profile's `init` may say, with the least number of words that follow.
const DIRECTIVES: &[(&str, usize)] =
    &[("link", 2), ("mkdir", 1), ("mount", 3), ("run", 1), ("start", 1), ("wait", 2), ("write", 2)];
/// What /init says by itself, in its fixed order.
const RESERVED: &[&str] = &["clock", "console", "entropy", "hostname", "identity", "net", "ready", "shell"];
/// lg-init's limits.
const MOST_CHARS: usize = 1023;
const MOST_WORDS: usize = 31;
const MOST_BYTES: usize = 16 * 1024;

/// Checks one line of a profile's `init`.
pub fn check_line(line: &Located<String>) -> Result<(), Error> {
    let names: Vec<&str> = DIRECTIVES.iter().map(|(name, _)| *name).collect();
    let text = line.value.trim();
    if text.contains(['\n', '\0']) {
        return Err(line.error("init: one line holds one directive", "Split it in two.".to_owned()));
    }
    let words = words(text).map_err(|what| {
        line.error(
            format!("init: {what}"),
            "Close the quotes; inside them, write \\\" for a quote.".to_owned(),
        )
    })?;
    let Some(first) = words.first() else {
        return Err(line.error("init: an empty line", "Remove it.".to_owned()));
    };
    if RESERVED.contains(&first.as_str()) {
        return Err(line.error(
            format!("init: `{first}` is written into /init by itself, in its place"),
            format!("Say here only what is to be started. Directives: {}.", list(&names)),
        ));
    }
    let Some((_, least)) = DIRECTIVES.iter().find(|(name, _)| name == first) else {
        return Err(line.error(
            format!("init: `{first}` is not a directive"),
            format!(
                "{}The directives are: {}; a program is started by `start {first}`.",
                did_you_mean(first, &names),
                list(&names)
            ),
        ));
    };
    let given = words.len() - 1;
    if given < *least {
        return Err(line.error(
            format!("init: `{first}` wants at least {least} more words, and has {given}"),
            "See buildroot-external/package/lg-init/README.md.".to_owned(),
        ));
    }
    if text.len() > MOST_CHARS || words.len() > MOST_WORDS {
        return Err(line.error(
            format!("init: a line has at most {MOST_CHARS} characters and {MOST_WORDS} words"),
            "Put the commands into a script in an overlay and `run` that.".to_owned(),
        ));
    }
    Ok(())
}

/// Splits a line as lg-init does: blanks, `"..."`, comments.
fn words(line: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut chars = line.chars().peekable();
    loop {
        while chars.next_if(|c| matches!(c, ' ' | '\t')).is_some() {}
        match chars.peek() {
            None | Some('#') => return Ok(words),
            Some(_) => {}
        }
        let (mut word, mut quoted) = (String::new(), false);
        while let Some(c) = chars.peek().copied() {
            match c {
                ' ' | '\t' if !quoted => break,
                '"' => quoted = !quoted,
                '\\' if quoted => {
                    chars.next();
                    word.extend(chars.peek().copied());
                }
                c => word.push(c),
            }
            chars.next();
        }
        if quoted {
            return Err("the quotes are not closed");
        }
        words.push(word);
    }
}

/// The machine that a guest finds itself on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// Ours.
    Ours,
    /// semu: neither a number, a clock nor randomness.
    Semu,
    /// QEMU's `virt`, with one virtio-net device in its first place.
    Qemu,
}

/// What a VM does to become itself, at boot and after a fork.
fn identity(machine: Machine) -> String {
    let own = match machine {
        Machine::Ours => format!("entropy\nidentity {IDENTITY:#x}\nclock {CLOCK:#x} {EPOCH}\n"),
        Machine::Semu => format!("run date -s @{EPOCH}\n"),
        Machine::Qemu => format!("identity {QEMU_IDENTITY:#x}\nclock {QEMU_CLOCK:#x} {EPOCH}\n"),
    };
    format!("{own}net eth0 10.77.0.0/16 first=2 host=10.77.0.1 hostmac=02:4c:47:ff:ff:ff\nhostname vm%n\n")
}

/// The text of /init.
fn init_text(profile: &Profile, machine: Machine, fault: Option<InitFault>) -> String {
    let mut text = format!(
        "#!/bin/lg-init\n# Generated by `cargo xtask image` from the profile {}; to be changed there.\n\
         console /dev/ttyS0\nmount proc /proc proc\n{}",
        profile.name,
        identity(machine)
    );
    if fault.is_some() {
        text.push_str(&format!("run /{FAULT}\n"));
    }
    for line in &profile.init {
        text.push_str(line.value.trim());
        text.push('\n');
    }
    text.push_str(&format!("ready {}\nshell\n", profile.ready_port));
    text
}

/// The generated files: the last layer of the image.
pub fn layer(profile: &Profile, fault: Option<InitFault>) -> Result<Tree, Error> {
    layer_for(profile, Machine::Ours, fault)
}

/// The generated files for another machine.
pub fn layer_for(profile: &Profile, machine: Machine, fault: Option<InitFault>) -> Result<Tree, Error> {
    let init = init_text(profile, machine, fault);
    if init.len() > MOST_BYTES {
        return Err(Error::plain(
            format!("/init would have {} bytes, and lg-init reads {MOST_BYTES} at most", init.len()),
            "Put the commands into a script in an overlay and `run` that.",
        ));
    }
    let again = format!(
        "#!/bin/lg-init\n# Who this VM is. Run it again after a fork; every value is read from the machine afresh.\n{}",
        identity(machine)
    );
    let mut tree = Tree::new();
    tree.insert("init".to_owned(), Node::file(init, 0o755));
    tree.insert("etc/identity".to_owned(), Node::file(again, 0o755));
    if let Some(fault) = fault {
        tree.insert(FAULT.to_owned(), Node::file(fault.script(), 0o755));
    }
    add_parents(&mut tree, "etc/identity");
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_split_as_lg_init_splits() {
        assert_eq!(words("start nginx -c  /x # why").unwrap(), ["start", "nginx", "-c", "/x"]);
        assert_eq!(words(r#"write /a "b c" d"#).unwrap(), ["write", "/a", "b c", "d"]);
        assert_eq!(words(r#"run x "a \"q\" b""#).unwrap(), ["run", "x", "a \"q\" b"]);
        assert_eq!(words("run a#b").unwrap(), ["run", "a#b"]);
        assert!(words("run \"x").is_err());
        assert!(words("  ").unwrap().is_empty());
    }
}

//! Tests of buildroot-external/package/lg-init, built for this machine: its language, not the guest's hardware.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Builds lg-init once for all tests.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = PROGRAM.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../buildroot-external/package/lg-init/src");
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("lg-init");
        let files = ["main.c", "machine.c", "net.c", "process.c"].map(|f| source.join(f));
        let options = ["-Wall", "-Wextra", "-Werror", "-O1", "-o"];
        let built = Command::new("cc").args(options).arg(&program).args(files).status();
        assert!(built.unwrap().success());
        (dir, program)
    });
    program
}

/// Interprets a text in which `DIR` is a fresh folder. Status, messages, and the folder.
fn interpret(text: &str) -> (i32, String, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text");
    std::fs::write(&file, text.replace("DIR", dir.path().to_str().unwrap())).unwrap();
    let output = Command::new(program()).arg(&file).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap().replace(file.to_str().unwrap(), "FILE");
    (output.status.code().unwrap(), said, dir)
}

fn content(dir: &tempfile::TempDir, name: &str) -> String {
    std::fs::read_to_string(dir.path().join(name)).unwrap()
}

#[test]
fn words_quotes_and_replacements() {
    let text = "#!/bin/lg-init\n\n  write DIR/a one   \"two  three\" # not this\nwrite DIR/b %n %% 5% \"a\\tb\\\"\\\\\" x#y %a\n";
    let (status, said, dir) = interpret(text);
    assert_eq!((status, said.as_str()), (0, ""));
    assert_eq!(content(&dir, "a"), "one two  three\n");
    assert_eq!(content(&dir, "b"), "0 % 5% a\tb\"\\ x#y 0.0.0.0\n");
}

#[test]
fn a_bad_line_is_named_and_the_next_one_done() {
    let cases = [
        ("jump high", "unknown directive: jump"),
        ("mkdir", "too few words after: mkdir"),
        ("hostname a b", "too many words after: hostname"),
        ("write DIR/x \"open", "the closing quote is missing"),
        ("run sh -c \"exit 3\"", "sh ended with status 3"),
        ("run sh -c \"kill -9 $$\"", "sh was killed by signal 9"),
        ("identity here", "not an address: here"),
        (
            "net lg-none 10.77.0.0 first=2 host=10.77.0.1 hostmac=02:4c:47:ff:ff:ff",
            "not of the form ADDRESS/BITS: 10.77.0.0",
        ),
        (
            "net lg-none 10.77.0.300/16 first=2 host=10.77.0.1 hostmac=02:4c:47:ff:ff:ff",
            "not a network: 10.77.0.300",
        ),
        (
            "net lg-none 10.77.0.0/16 last=2 host=10.77.0.1 hostmac=02:4c:47:ff:ff:ff",
            "not first=NUMBER: last=2",
        ),
        (
            "net lg-none 10.77.0.0/16 first=2 host=10.77.0.1 hostmac=02:4c:47:ff:ff",
            "not hostmac=MAC: hostmac=02:4c:47:ff:ff",
        ),
        ("wait udp 80", "can only wait for tcp, not: udp"),
        ("wait tcp 65536", "not a port: 65536"),
        ("shell", "only process 1 gives the console to a shell"),
        ("console DIR/none", "cannot open DIR/none: No such file or directory"),
    ];
    for (line, wanted) in cases {
        let (status, said, dir) = interpret(&format!("# first\n{line}\nwrite DIR/after done\n"));
        let wanted = wanted.replace("DIR", dir.path().to_str().unwrap());
        assert_eq!(said, format!("lg-init: FILE:2: {wanted}\n"), "{line}");
        assert_eq!(status, 1, "{line}");
        assert_eq!(content(&dir, "after"), "done\n", "{line}");
    }
}

#[test]
fn nothing_of_this_machine_is_touched() {
    // Right as they are: were they carried out here, the machine that runs the tests would lose its network.
    let lines = "net lg-none 10.77.0.0/16 first=2 host=10.77.0.1 hostmac=02:4c:47:ff:ff:ff\nhostname lg-test\n\
                 clock 0xf5000000\nidentity 0xf4100100\nentropy\nmount none DIR/x tmpfs\n";
    let (status, said, dir) = interpret(lines);
    let refused = (1..=6).map(|n| format!("lg-init: FILE:{n}: this is not the guest\n")).collect::<String>();
    assert_eq!((status, said), (1, refused));
    assert!(!dir.path().join("x").exists());
}

#[test]
fn limits_are_told_and_not_overrun() {
    let long = "x".repeat(1100);
    assert_eq!(interpret(&format!("write DIR/a {long}\n")).1, "lg-init: FILE:1: the line is too long\n");
    let words = "a ".repeat(32);
    assert_eq!(interpret(&format!("run {words}\n")).1, "lg-init: FILE:1: more than 31 words\n");
    let file = "# comment\n".repeat(1700);
    assert_eq!(interpret(&file).1, "lg-init: FILE:0: the file is longer than 16 KB\n");
    // Short as written, too long once replaced.
    let address = "%a".repeat(500);
    let (status, said, _dir) = interpret(&format!("write DIR/a {address}\n"));
    assert_eq!((status, said.as_str()), (1, "lg-init: FILE:1: the line is too long\n"));
}

#[test]
fn files_folders_and_links_are_made_and_replaced() {
    let text = "mkdir DIR/a/b DIR/a/b\nlink b DIR/a/l\nlink c DIR/a/l\nwrite DIR/f old\nwrite DIR/f new\nmkdir DIR/f\n";
    let (status, said, dir) = interpret(text);
    assert_eq!(std::fs::read_link(dir.path().join("a/l")).unwrap(), Path::new("c"));
    assert_eq!(content(&dir, "f"), "new\n");
    assert!(!dir.path().join("f~").exists());
    assert_eq!(interpret("write /dev/null x\n").0, 0);
    use std::os::unix::fs::FileTypeExt;
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    let place = dir.path().join("f");
    assert_eq!(said, format!("lg-init: FILE:6: cannot make the folder {}: File exists\n", place.display()));
    assert_eq!(status, 1);
}

#[test]
fn programs_get_the_number_and_are_waited_for_or_not() {
    // What is started lets go of the pipes that the test reads to their end.
    let text = "run sh -c \"echo $LG_VM $PATH > DIR/env\"\n\
                start sh -c \"exec > DIR/late 2>&1; sleep 3; echo late\"\n";
    let (status, said, dir) = interpret(text);
    assert_eq!((status, said.as_str()), (0, ""));
    assert_eq!(content(&dir, "env"), "0 /bin:/sbin:/usr/bin:/usr/sbin\n");
    assert_ne!(content(&dir, "late"), "late\n", "it was waited for");
    let start = std::time::Instant::now();
    while content(&dir, "late") != "late\n" {
        assert!(start.elapsed().as_secs() < 60, "it has not come to its end");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn waiting_sees_a_listener_and_ends_without_one() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    assert_eq!(interpret(&format!("wait tcp {port} 5\n")).0, 0);
    drop(listener);
    let (status, said, _dir) = interpret(&format!("wait tcp {port} 0\n"));
    assert_eq!((status, said.as_str()), (1, "lg-init: FILE:1: nothing listens on the port\n"));
}

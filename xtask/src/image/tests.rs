//! Images from a made-up builder's parts, and every error that does not need a build.

use super::*;
use crate::image::tree::{Node, add_parents};

/// A copy of the repository's profiles, overlays and templates in a folder of its own.
struct Repo(tempfile::TempDir);

impl Repo {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let real = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for folder in ["profiles", "overlays", "dts", "buildroot-external"] {
            copy(&real.join(folder), &dir.path().join(folder));
        }
        std::fs::create_dir(dir.path().join("xtask")).unwrap();
        Self(dir)
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// A profile that extends lean by some lines.
    fn profile(&self, lines: &str) {
        self.write("profiles/test.yaml", &format!("description: for a test\nextends: lean\n{lines}"));
    }

    fn plan(&self) -> Result<Plan, Error> {
        self.plan_with(&Options::default())
    }

    fn plan_with(&self, options: &Options) -> Result<Plan, Error> {
        Plan::new(self.root(), Profile::load(self.root(), "test")?, options)
    }

    /// What the plan of the profile `test` is refused with, as a person sees it.
    fn refusal(&self) -> String {
        match self.plan() {
            Ok(_) => panic!("the profile passed"),
            Err(e) => shown(e),
        }
    }

    fn assemble(&self) -> Result<Assembled, Error> {
        self.plan()?.assemble(&parts(), BuilderName::Direct)
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// A builder's parts: a small Image and two programs.
fn parts() -> Parts {
    let mut tree = Tree::new();
    tree.insert("bin/busybox".to_owned(), Node::file(vec![0x7f; 3000], 0o755));
    tree.insert("bin/sh".to_owned(), Node::link("busybox"));
    tree.insert("usr/sbin/nginx".to_owned(), Node::file(vec![0x7e; 5000], 0o755));
    for path in tree.keys().cloned().collect::<Vec<_>>() {
        add_parents(&mut tree, &path);
    }
    let inputs =
        vec![Input { name: "linux".to_owned(), version: Some("6.1".to_owned()), sha256: sha256(b"linux") }];
    Parts {
        image: kernel_image::tests::image(1 << 20, 1 << 16),
        image_path: "kernel/Image".into(),
        tree,
        inputs,
    }
}

/// An error as a person sees it: message, snippet and help.
fn shown(error: Error) -> String {
    let options = miette::MietteHandlerOpts::new().width(4096).unicode(false).color(false).build();
    struct Shown<'a>(&'a miette::MietteHandler, &'a Error);
    impl std::fmt::Debug for Shown<'_> {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            miette::ReportHandler::debug(self.0, self.1, f)
        }
    }
    format!("{:?}", Shown(&options, &error))
}

#[track_caller]
fn says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "not said: {part}\nin: {said}");
    }
}

/// Names and bytes of an initrd's entries, in order; of several archives, one after the other.
fn entries(mut initrd: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let mut entries = Vec::new();
    while !initrd.is_empty() {
        if initrd[0] == 0 {
            initrd = &initrd[1..];
            continue;
        }
        let mut reader = ::cpio::newc::Reader::new(initrd).unwrap();
        let entry = reader.entry().clone();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut bytes).unwrap();
        initrd = reader.finish().unwrap();
        if !entry.is_trailer() {
            entries.push((entry.name().to_owned(), entry.ino(), bytes));
        }
    }
    entries
}

// What an image holds.

#[test]
fn an_image_holds_programs_overlays_and_init() {
    let repo = Repo::new();
    repo.profile("");
    let image = repo.assemble().unwrap();
    let entries = entries(&image.files["initrd.cpio"]);
    let names: Vec<&str> = entries.iter().map(|e| e.0.as_str()).collect();
    for name in [
        "bin/busybox",
        "bin/lg-page",
        "etc/nginx/nginx.conf",
        "dev/console",
        "var/www",
        "init",
        "etc/identity",
    ] {
        assert!(names.contains(&name), "{name} is missing in {names:?}");
    }
    for (at, name) in names.iter().enumerate() {
        if let Some((parent, _)) = name.rsplit_once('/') {
            assert!(names[..at].contains(&parent), "{parent} does not come before {name}");
        }
        assert!(!names[..at].contains(name), "{name} is there twice");
    }
    let mut inodes: Vec<u32> = entries.iter().map(|e| e.1).collect();
    inodes.sort_unstable();
    inodes.dedup();
    assert_eq!(inodes.len(), entries.len(), "an inode is there twice");
    assert_eq!(image.files["initrd.cpio"].len() % 512, 0);
}

#[test]
fn init_does_things_in_order() {
    let repo = Repo::new();
    repo.profile("init:\n  - start hello \"big world\"\n");
    let image = repo.assemble().unwrap();
    let entries = entries(&image.files["initrd.cpio"]);
    let init = &entries.iter().find(|e| e.0 == "init").unwrap().2;
    let init = String::from_utf8(init.clone()).unwrap();
    assert!(init.starts_with("#!/bin/lg-init\n"));
    let mut rest = init.as_str();
    for line in [
        "console /dev/ttyS0",
        "mount proc /proc proc",
        "entropy",
        "identity 0xf4100100",
        "clock 0xf5000000",
        "net eth0 10.77.0.0/16 first=2 host=10.77.0.1",
        "hostname vm%n",
        "run lg-page",
        "start nginx",
        "start crond",
        "start hello \"big world\"",
        "ready 80",
        "shell",
    ] {
        let at = rest
            .find(&format!("\n{line}"))
            .unwrap_or_else(|| panic!("`{line}` is not after the others:\n{init}"));
        rest = &rest[at + 1..];
    }
}

#[test]
fn same_inputs_same_bytes() {
    let (one, two) = (Repo::new(), Repo::new());
    one.profile("");
    two.profile("");
    let (a, b) = (one.assemble().unwrap(), two.assemble().unwrap());
    assert!(a.files == b.files, "two checkouts give different images");
    assert_eq!(a.manifest.hash, b.manifest.hash);
}

#[test]
fn the_hash_sees_every_input() {
    let repo = Repo::new();
    repo.profile("");
    let mut seen = vec![repo.assemble().unwrap().manifest.hash];
    repo.write("overlays/base/files/etc/motd", "hello\n");
    seen.push(repo.assemble().unwrap().manifest.hash);
    repo.write("overlays/base/files/etc/motd", "jello\n");
    seen.push(repo.assemble().unwrap().manifest.hash);
    repo.profile("vms: 3\n");
    seen.push(repo.assemble().unwrap().manifest.hash);
    repo.profile("vms: 3\ninit: [start hello]\n");
    seen.push(repo.assemble().unwrap().manifest.hash);
    let ram = Options { ram: Some(Ram(16 << 20)), ..Options::default() };
    let plan = repo.plan_with(&ram).unwrap();
    assert_eq!(plan.out, "test-16MiB");
    seen.push(plan.assemble(&parts(), BuilderName::Direct).unwrap().manifest.hash);
    let mut other = parts();
    other.image[100] ^= 1;
    seen.push(repo.plan().unwrap().assemble(&other, BuilderName::Direct).unwrap().manifest.hash);
    let count = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), count);
}

#[test]
fn the_manifest_names_every_input_and_the_layout_holds() {
    let repo = Repo::new();
    repo.profile("");
    let image = repo.assemble().unwrap();
    let manifest = &image.manifest;
    let read: Manifest = serde_json::from_slice(&image.files["manifest.json"]).unwrap();
    assert_eq!(&read, manifest);
    let names: Vec<&str> = manifest.inputs.iter().map(|i| i.name.as_str()).collect();
    for name in [
        "linux",
        "profiles/lean.yaml",
        "profiles/test.yaml",
        "dts/vm.dts.j2",
        "overlays/base/overlay.yaml",
        "overlays/base/files/bin/lg-page",
        "generated /init",
    ] {
        assert!(names.contains(&name), "{name} is missing in {names:?}");
    }
    let layout = &manifest.layout;
    assert_eq!(layout.ram_bytes, 8 << 20);
    assert_eq!(layout.initrd_address % 4096, 0);
    assert_eq!(layout.dtb_address, (8 << 20) - 65536);
    assert!(layout.initrd_address + layout.initrd_bytes <= layout.dtb_address);
    assert_eq!(layout.kernel_memory_bytes, (1 << 20) + (1 << 16));
    for (name, sum) in &manifest.files {
        assert_eq!(sum, &FileSum::of(&image.files[name]));
    }
}

#[test]
fn storing_twice_changes_nothing_and_repairs_damage() {
    let repo = Repo::new();
    repo.profile("");
    let cache = Cache::at(&repo.root().join("cache"));
    let first = repo.assemble().unwrap().store(repo.root(), &cache).unwrap();
    assert!(first.changed);
    assert!(!repo.assemble().unwrap().store(repo.root(), &cache).unwrap().changed);
    let good = std::fs::read(first.dir.join("Image")).unwrap();
    for damaged in [first.dir.join("Image"), first.out.join("Image"), first.out.join("manifest.json")] {
        std::fs::write(&damaged, b"damaged").unwrap();
        let again = repo.assemble().unwrap().store(repo.root(), &cache).unwrap();
        assert!(again.changed, "{} was not repaired", damaged.display());
        assert_eq!(std::fs::read(first.dir.join("Image")).unwrap(), good);
        assert_eq!(std::fs::read(first.out.join("Image")).unwrap(), good);
    }
}

// Profiles that are refused.

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest() {
    let repo = Repo::new();
    repo.profile("vms: 2\npakages: [nginx]\n");
    says(
        &repo.refusal(),
        &["profiles/test.yaml:4:1", "unknown key `pakages`", "Did you mean `packages`?", "pakages: [nginx]"],
    );
}

#[test]
fn wrong_types_and_units_are_named() {
    for (line, parts) in [
        ("ram: 8\n", &["test.yaml:3:6", "ram: `8` has no unit", "8 MiB"][..]),
        ("ram: 8 MB\n", &["the unit `MB` is not known", "8 MiB", "Units: KiB, MiB, GiB"]),
        ("ram: lots\n", &["ram: `lots` is not a number"]),
        ("ram: 2 GiB\n", &["more than the 1 GiB"]),
        ("ram: 9001 B\n", &["the unit `B` is not known"]),
        ("ram: 99999999999999999999 MiB\n", &["is not a number with a unit"]),
        ("ram: [8]\n", &["test.yaml:3:6", "`ram`: expected a single value"]),
        ("vms: many\n", &["test.yaml:3:6", "vms: expected a whole number, not `many`"]),
        ("vms: 0\n", &["vms: 0 is out of range", "from 1 to 65533"]),
        ("vms: 70000\n", &["vms: 70000 is out of range"]),
        ("vms: -1\n", &["vms: -1 is out of range"]),
        ("time: fast\n", &["time: `fast` is not one of real, virtual"]),
        ("time: virtul\n", &["Did you mean `virtual`?"]),
        ("net: tan\n", &["net: `tan` is not one of user, tun, off"]),
        ("isolate: yes\n", &["isolate: `yes` is not one of true, false"]),
        ("services: [\"80\"]\n", &["services: `80` is not of the form HOST:GUEST", "5432:15432"]),
        ("ready_port: 70000\n", &["ready_port: 70000 is out of range"]),
        ("packages: nginx\n", &["`packages`: expected a list"]),
        ("init:\n  - {start: x}\n", &["expected a single value"]),
        ("vms: 1\nvms: 2\n", &["test.yaml:4:1", "`vms` stands here for the second time"]),
        ("overlays: [base\n", &["not valid YAML"]),
        ("bootargs: 'a\"b'\n", &["bootargs: quotes"]),
    ] {
        let repo = Repo::new();
        repo.profile(line);
        says(&repo.refusal(), parts);
    }
}

#[test]
fn missing_keys_and_profiles_are_named() {
    let repo = Repo::new();
    repo.write("profiles/test.yaml", "description: x\npackages: [busybox]\nkernel_fragments: [lean]\n");
    says(&repo.refusal(), &["profiles/test.yaml:1:1", "the key `ram` is missing"]);
    repo.write("profiles/test.yaml", "");
    says(&repo.refusal(), &["the key `description` is missing"]);
    let missing = Profile::load(repo.root(), "laen").unwrap_err();
    says(&shown(missing), &["no profile `laen`", "Did you mean `lean`?", "debug, lean, test"]);
    let missing = Profile::load(repo.root(), "no/such.yaml").unwrap_err();
    says(&shown(missing), &["no/such.yaml"]);
}

#[test]
fn extends_must_lead_somewhere_else() {
    let repo = Repo::new();
    repo.write("profiles/test.yaml", "description: x\nextends: other\n");
    says(&repo.refusal(), &["profiles/test.yaml:2:10", "extends: there is no profile `other`"]);
    repo.write("profiles/other.yaml", "extends: test\n");
    says(&repo.refusal(), &["profiles/other.yaml:1:10", "in a circle"]);
}

#[test]
fn lists_are_appended_and_values_replaced() {
    let repo = Repo::new();
    repo.profile("packages: [nginx, ethtool]\nram: 16 MiB\ninit: [start a]\n");
    let profile = Profile::load(repo.root(), "test").unwrap();
    let packages: Vec<&str> = profile.packages.iter().map(|p| p.value.as_str()).collect();
    assert_eq!(packages, ["busybox", "nginx", "ethtool"]);
    assert_eq!(profile.ram.value, Ram(16 << 20));
    assert_eq!(profile.init.last().unwrap().value, "start a");
    assert_eq!(profile.init.len(), 4);
}

#[test]
fn a_profile_outside_the_repository_works() {
    let repo = Repo::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("mine.yaml");
    std::fs::write(&path, "description: mine\nextends: lean\nvms: 7\n").unwrap();
    let profile = Profile::load(repo.root(), path.to_str().unwrap()).unwrap();
    assert_eq!((profile.name.as_str(), profile.vms), ("mine", 7));
}

#[test]
fn init_lines_are_checked() {
    for (line, parts) in [
        ("strat nginx", &["test.yaml:4:5", "init: `strat` is not a directive", "Did you mean `start`?"][..]),
        ("nginx", &["`nginx` is not a directive", "`start nginx`"]),
        ("start", &["`start` wants at least 1 more words"]),
        ("shell", &["`shell` is written into /init by itself"]),
        ("'run x \"y'", &["the quotes are not closed"]),
    ] {
        let repo = Repo::new();
        repo.profile(&format!("init:\n  - {line}\n"));
        says(&repo.refusal(), parts);
    }
}

#[test]
fn the_builder_is_the_command_line_s_else_the_profile_s_else_that_of_what_is_there() {
    let repo = Repo::new();
    let cache = tempfile::tempdir().unwrap();
    let cache = Cache::at(cache.path());
    let offline = buildroot::Options { offline: true, ..buildroot::Options::default() };
    let builder = |options: Options| {
        let options = Options { quiet: true, buildroot: offline.clone(), ..options };
        let (builder, or_direct) =
            repo.plan_with(&options).unwrap().builder(repo.root(), &cache, &options).unwrap();
        assert!(!or_direct, "nothing can be downloaded");
        builder
    };
    repo.profile("builder: buildroot\n");
    assert_eq!(builder(Options::default()), BuilderName::Buildroot);
    let direct = Options { builder: Some(BuilderName::Direct), ..Options::default() };
    assert_eq!(builder(direct), BuilderName::Direct);

    repo.profile("");
    let mut made = repo.plan().unwrap().assemble(&parts(), BuilderName::Buildroot).unwrap();
    made.out = "test".to_owned();
    made.store(repo.root(), &cache).unwrap();
    let keep = Options { keep: true, ..Options::default() };
    assert_eq!(builder(keep), BuilderName::Buildroot);
    if std::env::var_os(buildroot::release::VARIABLE).is_none() {
        assert_eq!(builder(Options::default()), BuilderName::Direct);
    }
}

// Overlays that are refused.

/// A repository with an overlay `new` in the profile.
fn with_overlay(yaml: &str) -> Repo {
    let repo = Repo::new();
    repo.profile("overlays: [new]\n");
    repo.write("overlays/new/overlay.yaml", yaml);
    repo
}

#[test]
fn a_missing_overlay_lists_those_that_exist() {
    let repo = Repo::new();
    repo.profile("overlays: [debgu]\n");
    says(
        &repo.refusal(),
        &["profiles/test.yaml:3:12", "there is no overlay `debgu`", "Did you mean `debug`?", "base, debug"],
    );
    repo.profile("overlays: [../base]\n");
    says(&repo.refusal(), &["`../base` is not the name of an overlay"]);
}

#[test]
fn overlay_yaml_is_checked() {
    for (yaml, parts) in [
        ("", &["overlays/new/overlay.yaml:1:1", "`description` is missing"][..]),
        ("descripton: x\n", &["overlay.yaml:1:1", "unknown key `descripton`", "Did you mean `description`?"]),
        ("description: x\npaths: {etc/x: {mod: \"0644\"}}\n", &["unknown key `mod`", "Did you mean `mode`?"]),
        ("description: x\npaths: {etc/x: {mode: \"0644\"}}\n", &["no such file in files/"]),
        ("description: x\npaths: {a: {directory: true, mode: \"9\"}}\n", &["`9` is not an octal mode"]),
        (
            "description: x\npaths: {a: {directory: true, owner: root}}\n",
            &["`root` is not a pair of numbers"],
        ),
        ("description: x\npaths: {a: {device: tty 1 2}}\n", &["`tty 1 2` is not a device"]),
        ("description: x\npaths: {a: {device: char 1 2, symlink: b}}\n", &["more than one thing"]),
        ("description: x\npaths: {../a: {device: char 1 2}}\n", &["`../a`", "leaves the overlay"]),
        ("description: x\npaths: {a/b: {symlink: ../../c}}\n", &["leads out of the guest's root"]),
        ("description: x\npaths: {init: {symlink: bin/sh}}\n", &["/init is generated"]),
        ("description: x\nreplaces: [etc/none]\n", &["this overlay has no `etc/none`"]),
    ] {
        says(&with_overlay(yaml).refusal(), parts);
    }
    let repo = Repo::new();
    repo.profile("overlays: [new]\n");
    repo.write("overlays/new/files/etc/x", "x");
    says(&repo.refusal(), &["overlays/new/overlay.yaml is missing"]);
    let repo = with_overlay("description: x\n");
    repo.write("overlays/new/etc/x", "x");
    says(&repo.refusal(), &["overlays/new/etc is not part of an overlay", "overlays/new/files"]);
}

#[cfg(unix)]
#[test]
fn links_and_pipes_on_the_host_are_refused() {
    for target in ["/etc/passwd", "../../../secret", "../../../../../../../etc/passwd"] {
        let repo = with_overlay("description: x\n");
        repo.write("overlays/new/files/etc/ok", "x");
        std::os::unix::fs::symlink(target, repo.root().join("overlays/new/files/etc/out")).unwrap();
        says(&repo.refusal(), &["files/etc/out", "leads out of the overlay", target]);
    }
    let repo = with_overlay("description: x\n");
    repo.write("overlays/new/files/etc/a/ok", "x");
    std::os::unix::fs::symlink("../ok", repo.root().join("overlays/new/files/etc/a/in")).unwrap();
    repo.plan().unwrap();
    let repo = with_overlay("description: x\n");
    repo.write("overlays/new/files/ok", "x");
    let _socket = std::os::unix::net::UnixListener::bind(repo.root().join("overlays/new/files/s")).unwrap();
    says(&repo.refusal(), &["files/s", "neither a file, a folder nor a link"]);
}

#[test]
fn overlays_that_clash_are_named_with_the_path() {
    let repo = with_overlay("description: x\n");
    repo.write("overlays/new/files/etc/passwd", "evil\n");
    says(
        &repo.refusal(),
        &["profiles/test.yaml:3:12", "overlay `new` clashes with overlay `base` at /etc/passwd", "replaces"],
    );
    repo.write("overlays/new/overlay.yaml", "description: x\nreplaces: [etc/passwd]\n");
    let image = repo.assemble().unwrap();
    let last = entries(&image.files["initrd.cpio"]).into_iter().rfind(|e| e.0 == "etc/passwd").unwrap();
    assert_eq!(last.2, b"evil\n");
}

#[test]
fn same_content_is_no_clash() {
    let repo = with_overlay("description: x\n");
    let passwd = std::fs::read_to_string(repo.root().join("overlays/base/files/etc/passwd")).unwrap();
    repo.write("overlays/new/files/etc/passwd", &passwd);
    repo.assemble().unwrap();
}

#[test]
fn a_folder_and_a_file_cannot_share_a_path() {
    let repo = with_overlay("description: x\nreplaces: [etc]\n");
    repo.write("overlays/new/files/etc", "a file");
    says(&repo.refusal(), &["clashes with overlay `base` at /etc", "a folder", "cannot share a path"]);
    let repo = with_overlay("description: x\n");
    repo.write("overlays/new/files/etc/passwd/x", "below a file");
    says(&repo.refusal(), &["clashes with overlay `base` at /etc/passwd"]);
}

#[test]
fn an_overlay_over_a_program_is_a_clash_too() {
    let repo = with_overlay("description: x\n");
    repo.write("overlays/new/files/usr/sbin/nginx", "mine");
    let said = shown(repo.assemble().err().unwrap());
    says(&said, &["overlay `new` clashes with the programs at /usr/sbin/nginx"]);
}

// Templates, kernels and sizes that are refused.

#[test]
fn a_broken_template_is_named_with_its_line() {
    let repo = Repo::new();
    repo.profile("");
    let good = std::fs::read_to_string(repo.root().join("dts/vm.dts.j2")).unwrap();
    let line_of = |text: &str, what: &str| 1 + text.lines().position(|l| l.contains(what)).unwrap();
    let text = good.replace("{{ ram_bytes }}", "{{ ram_bites }}");
    repo.write("dts/vm.dts.j2", &text);
    let at = format!("dts/vm.dts.j2:{}:", line_of(&text, "ram_bites"));
    says(&repo.refusal(), &[&at, "not set", "ram_bites", "Variables: bootargs"]);

    let text = good.replace("{{ bootargs }}", "{{ bootargs");
    repo.write("dts/vm.dts.j2", &text);
    says(&repo.refusal(), &["dts/vm.dts.j2:", "the template is broken"]);

    let text = good.replace("riscv,ndev = <31>;", "riscv,ndev = <31>");
    repo.write("dts/vm.dts.j2", &text);
    says(&repo.refusal(), &["dts/vm.dts.j2:", "does not compile", "syntax error"]);
}

#[test]
fn what_the_loader_relies_on_is_checked() {
    let repo = Repo::new();
    repo.profile("");
    let good = std::fs::read_to_string(repo.root().join("dts/vm.dts.j2")).unwrap();
    for (from, to, said) in [
        ("reg = <0xf4100000 0x200>", "reg = <0xf4200000 0x200>", "virtio,mmio is 0xf4200000, not 0xf4100000"),
        ("interrupts = <1>", "interrupts = <7>", "the interrupt of ns16550 is 0x7, not 0x1"),
        ("sifive,plic-1.0.0", "sifive,plic", "no node is compatible with sifive,plic-1.0.0"),
        ("<0x0 {{ ram_bytes }}>", "<0x1000 {{ ram_bytes }}>", "the start of memory is 0x1000"),
        ("linux,initrd-end", "linux,initrd-and", "/chosen has no cell linux,initrd-end"),
        ("memory@0 {", "memory@1 {", "the node /memory@0 is missing"),
    ] {
        assert!(good.contains(from), "{from}");
        repo.write("dts/vm.dts.j2", &good.replace(from, to));
        says(&repo.refusal(), &["dts/vm.dts.j2", said]);
    }
}

#[test]
fn ram_too_small_says_the_least() {
    let repo = Repo::new();
    let least = repo_least(&repo);
    repo.profile(&format!("ram: {} KiB\n", least / 1024));
    repo.assemble().unwrap();
    repo.profile(&format!("ram: {} KiB\n", least / 1024 - 4));
    let said = shown(repo.assemble().err().unwrap());
    says(&said, &["too small for this image", &format!("The least is {}", Ram(least))]);
}

fn repo_least(repo: &Repo) -> u64 {
    repo.profile("");
    repo.assemble().unwrap().manifest.layout.least_ram_bytes
}

#[test]
fn an_initrd_that_is_too_large_is_refused_with_the_figures() {
    let repo = with_overlay("description: x\n");
    repo.write("overlays/new/files/big", &"x".repeat(7 << 20));
    let said = shown(repo.assemble().err().unwrap());
    says(&said, &["the initrd is too large for 8 MiB of RAM", "the kernel takes 1114112", "The least is"]);
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let repo = Repo::new();
    repo.profile("");
    for (image, word) in
        [(b"\x1f\x8b\x08\x00junk".to_vec(), "gzip"), (parts().image[..2000].to_vec(), "truncated")]
    {
        let parts = Parts { image, ..parts() };
        let said = shown(repo.plan().unwrap().assemble(&parts, BuilderName::Direct).err().unwrap());
        says(&said, &["kernel/Image: the kernel cannot be used", word]);
    }
}

// Images from elsewhere.

#[test]
fn an_image_from_elsewhere_is_checked() {
    let repo = Repo::new();
    repo.profile("");
    let cache = tempfile::tempdir().unwrap();
    let made = repo.assemble().unwrap().store(repo.root(), &Cache::at(cache.path())).unwrap();
    let (dir, manifest) = given(&made.out).unwrap();
    assert_eq!((dir, manifest.hash), (made.out.canonicalize().unwrap(), made.manifest.hash));
    std::fs::write(made.out.join("vm.dtb"), "other").unwrap();
    says(&shown(given(&made.out).unwrap_err()), &["vm.dtb is not the file", "cargo xtask image"]);
    std::fs::remove_file(made.out.join("initrd.cpio")).unwrap();
    says(&shown(given(&made.out).unwrap_err()), &["initrd.cpio"]);
    says(&shown(given(repo.root()).unwrap_err()), &["holds no image", "manifest.json"]);
}

//! The whole way of a build with a tree that is none: its Makefile answers as Buildroot's would, in no time.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::kernel_image;
use super::*;

/// What a defconfig of ours ends up as, what is listed, and what is built.
const MAKEFILE: &str = r#"export BR2_VERSION := 2026.08
all:
	echo "$$(umask) $$PATH $(filter -j%,$(MAKEFLAGS))" > $(O)/seen
	@test ! -e $(CURDIR)/broken || { mkdir -p $(O)/build; \
		echo "1.0:start:build               : nginx" >> $(O)/build/build-time.log; \
		echo "nginx.c:7:1: error: expected ;"; for i in 1 2 3 4 5 6 7 8 9; do echo more $$i; done; exit 2; }
	mkdir -p $(O)/images $(O)/target/bin $(O)/target/usr/lib
	for p in linux-6.12.104 busybox-1.38.0; do mkdir -p $(O)/build/$$p; echo CONFIG_X=y > $(O)/build/$$p/.config; \
		touch $(O)/build/$$p/.stamp_built $(O)/build/$$p/.stamp_target_installed; done
	echo "1.0:start:build               : linux" >> $(O)/build/build-time.log
	echo "3.5:end  :build               : linux" >> $(O)/build/build-time.log
	cp $(CURDIR)/Image $(O)/images/Image
	cp $(CURDIR)/program $(O)/target/bin/busybox
	ln -sf busybox $(O)/target/bin/sh
	echo built >> $(O)/log
defconfig:
	mkdir -p $(O)
	sed '/LOST/d' $(BR2_DEFCONFIG) > $(O)/.config
	echo defconfig >> $(O)/log
show-info:
	@cat $(CURDIR)/info.json
%-dirclean %-clean-for-reconfigure:
	echo $@ >> $(O)/log
"#;

struct Lab {
    dir: tempfile::TempDir,
    options: Options,
    packages: Vec<String>,
    kernel: Vec<PathBuf>,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        for part in ["package", "support", "linux", "fs", "toolchain"] {
            fs::create_dir_all(tree.join(part)).unwrap();
        }
        fs::write(tree.join("Makefile"), MAKEFILE).unwrap();
        fs::write(tree.join("Image"), kernel_image::tests::image(1 << 20, 1 << 16)).unwrap();
        fs::write(tree.join("program"), elf::tests::elf(0, "rv32i2p1_m2p0_a2p1")).unwrap();
        fs::write(tree.join("info.json"), "{\"lg-init\": {\"downloads\": []}}").unwrap();
        let kernel = dir.path().join("mine.config");
        fs::write(&kernel, "CONFIG_X=y\n").unwrap();
        let options = Options {
            toolchain: Some(Toolchain::Internal),
            sources: Sources::Release,
            offline: true,
            ..Options::default()
        };
        let packages = ["lg-init", "busybox", "nginx"].map(str::to_owned).to_vec();
        Self { dir, options, packages, kernel: vec![kernel] }
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn build(&self) -> Result<Built, Error> {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let request = Request {
            name: "test",
            packages: &self.packages,
            kernel_fragments: &self.kernel,
            busybox_fragments: &[],
            repo,
            cache: self.dir.path(),
            quiet: true,
            options: &self.options,
        };
        let tree = Tree::open(&self.tree(), "a test")?;
        let store = Store::open(&request.buildroot())?;
        let mut progress = Progress::new(true);
        let logs = request.buildroot().join("logs");
        let table = machine::Table::new();
        let plan = prepare::settle(&request, &tree, None, &store, &table, &mut progress)?;
        match plan.find(&store)? {
            Some(built) => Ok(built),
            None => run(&request, &tree, &plan, &store, &mut progress, &logs),
        }
    }

    fn output(&self) -> PathBuf {
        self.dir.path().join("buildroot/out/test-internal")
    }

    /// What the tree was asked to do since the last look.
    fn log(&self) -> Vec<String> {
        let path = self.output().join("log");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(path);
        text.lines().map(str::to_owned).collect()
    }
}

#[test]
fn a_build_is_collected_and_kept() {
    let lab = Lab::new();
    let built = lab.build().unwrap();
    assert!(built.kernel.is_file());
    assert_eq!(fs::read_link(built.roots[0].join("bin/sh")).unwrap(), Path::new("busybox"));
    assert!(built.inputs.iter().any(|i| i.name == "buildroot" && i.version.as_deref() == Some("2026.08")));
    assert_eq!(lab.log(), ["defconfig", "built"]);
    let seen = fs::read_to_string(lab.output().join("seen")).unwrap();
    assert_eq!(seen.trim(), "0022 /usr/sbin:/usr/bin:/sbin:/bin");
    assert_eq!(lab.build().unwrap().kernel, built.kernel);
    assert_eq!(lab.log(), [""; 0]);
}

#[test]
fn each_change_goes_its_way() {
    let lab = Lab::new();
    lab.build().unwrap();
    lab.log();
    fs::write(&lab.kernel[0], "# CONFIG_X is not set\n").unwrap();
    lab.build().unwrap();
    assert_eq!(lab.log(), ["defconfig", "linux-clean-for-reconfigure", "built"]);
    assert!(lab.output().join("target/bin/sh").exists());
    // Another tree: nothing of the old output is trusted.
    fs::write(lab.output().join("left-over"), "").unwrap();
    fs::write(lab.tree().join("linux/linux.mk"), "# new").unwrap();
    lab.build().unwrap();
    assert_eq!(lab.log(), ["defconfig", "built"]);
    assert!(!lab.output().join("left-over").exists());
}

#[test]
fn an_interrupted_build_goes_on_and_a_folder_without_record_does_not() {
    let lab = Lab::new();
    fs::write(lab.tree().join("broken"), "").unwrap();
    lab.build().unwrap_err();
    fs::write(lab.output().join("half-done"), "").unwrap();
    lab.log();
    // The same inputs (the tree itself counts as one, so it stays broken): it goes on in the same folder.
    lab.build().unwrap_err();
    assert!(lab.output().join("half-done").exists());
    fs::remove_file(lab.output().join("lg-inputs.json")).unwrap();
    lab.build().unwrap_err();
    assert!(!lab.output().join("half-done").exists());
}

#[test]
fn a_failure_names_package_step_and_first_error() {
    let lab = Lab::new();
    fs::write(lab.tree().join("broken"), "").unwrap();
    let error = lab.build().unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("package nginx, step build: "), "{text}");
    assert!(text.contains("first error: nginx.c:7:1: error: expected ;"), "{text}");
    assert!(text.contains("| more 9"), "{text}");
    let help = miette::Diagnostic::help(&error).map(|h| h.to_string()).unwrap_or_default();
    assert!(help.contains("build-test.log"), "{help}");
}

#[test]
fn programs_for_another_machine_are_refused() {
    let lab = Lab::new();
    fs::write(lab.tree().join("program"), elf::tests::elf(1, "rv32i2p1_c2p0")).unwrap();
    let text = lab.build().unwrap_err().to_string();
    assert!(text.contains("/bin/busybox") && text.contains("compressed"), "{text}");
}

#[test]
fn lost_symbols_are_errors_with_their_place() {
    let lab = Lab::new();
    let makefile = MAKEFILE.replace("/LOST/d", "s/^BR2_RISCV_ISA_RVM=y/# BR2_RISCV_ISA_RVM is not set/");
    fs::write(lab.tree().join("Makefile"), makefile).unwrap();
    let text = lab.build().unwrap_err().to_string();
    assert!(text.contains("buildroot-external/buildroot/base.config:"), "{text}");
    assert!(text.contains("BR2_RISCV_ISA_RVM=y"), "{text}");
}

#[test]
fn missing_files_are_named_all_at_once_before_anything_is_built() {
    let lab = Lab::new();
    let info = r#"{"nginx": {"dl_dir": "nginx", "downloads": [{"source": "nginx-1.tar.gz", "uris": ["https+https://n.example"]}]},
        "busybox": {"dl_dir": "busybox", "downloads": [{"source": "busybox-1.tar.bz2", "uris": ["https+https://b.example"]}]}}"#;
    fs::write(lab.tree().join("info.json"), info).unwrap();
    let error = lab.build().unwrap_err();
    let text = error.to_string();
    assert!(text.contains("2 of the files"), "{text}");
    assert!(text.contains("nginx-1.tar.gz") && text.contains("busybox-1.tar.bz2"), "{text}");
    assert_eq!(lab.log(), ["defconfig"]);
}

#[test]
fn a_package_that_buildroot_cannot_build_is_named() {
    let mut lab = Lab::new();
    lab.packages.push("hello".to_owned());
    let text = lab.build().unwrap_err().to_string();
    assert!(text.contains("no package `hello`"), "{text}");
}

#[test]
fn the_profile_chooses_the_compiler_and_the_command_line_goes_before() {
    let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.yaml");
    let profile = |line: &str| {
        fs::write(&path, format!("description: mine\nextends: lean\n{line}")).unwrap();
        Profile::load(repo, path.to_str().unwrap())
    };
    let internal = profile("toolchain: internal\n").unwrap();
    assert_eq!(Options::NONE.or(&internal).toolchain(), Toolchain::Internal);
    let said = Options { toolchain: Some(Toolchain::External), ..Options::NONE };
    assert_eq!(said.or(&internal).toolchain(), Toolchain::External);
    assert_eq!(Options::NONE.or(&profile("").unwrap()).toolchain, None);
    let error = profile("toolchain: intern\n").unwrap_err().to_string();
    assert!(error.contains("mine.yaml:3") && error.contains("toolchain"), "{error}");
}

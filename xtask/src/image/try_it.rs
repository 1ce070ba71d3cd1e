//! `cargo xtask image --try`: the same image on another machine, so that a problem of the guest and one of our emulator
//! can be told apart. semu has our memory map; QEMU's `virt` has another, and another firmware.

use std::ffi::OsString;
use std::fs;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;

use super::direct::host;
use super::error::Error;
use super::init::{self, Machine};
use super::manifest::{Layout, Manifest};
use super::profile::Profile;
use super::{cpio, dts};

/// Machines that an image can be tried on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Other {
    /// A small emulator with the same memory map.
    Semu,
    /// qemu-system-riscv32 -M virt.
    Qemu,
}

/// How long an unattended try may take to say READY.
const PATIENCE: Duration = Duration::from_secs(180);
/// Where the guest's web server is reached on QEMU.
const PORT: u16 = 4080;
/// semu's RAM, and how far below its end it puts device tree and initrd.
const SEMU_RAM: u64 = 512 << 20;
const SEMU_DTB: u64 = 1 << 20;
const SEMU_INITRD: u64 = 8 << 20;

/// Another emulator with a guest of ours, ready to be started.
#[derive(Debug)]
pub struct Prepared {
    /// The emulator.
    pub program: PathBuf,
    /// Its arguments; files are named relative to the folder.
    pub args: Vec<OsString>,
    /// RAM of the machine.
    pub ram_bytes: u64,
}

/// Runs an image elsewhere: on this terminal, or without one until it says READY.
pub fn run(
    root: &Path,
    image: &Path,
    profile: &Profile,
    manifest: &Manifest,
    other: Other,
) -> Result<(), Error> {
    let dir = tempfile::tempdir().map_err(|e| Error::io("make a folder in", &std::env::temp_dir(), e))?;
    let guest = Guest { root, image, profile, manifest };
    let prepared = match other {
        Other::Qemu => {
            let prepared = guest.qemu(None, Some(PORT), dir.path())?;
            eprintln!("QEMU: http://127.0.0.1:{PORT}/ when it says READY; Ctrl-A X ends it");
            prepared
        }
        Other::Semu => {
            let prepared = guest.semu(None, dir.path())?;
            eprintln!("semu: Ctrl-A X ends it");
            prepared
        }
    };
    let mut command = Command::new(prepared.program);
    command.args(prepared.args).current_dir(dir.path());
    match std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        true => attended(command),
        false => unattended(command),
    }
}

/// An image, for other machines.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// The repository.
    pub root: &'a Path,
    /// The image's folder.
    pub image: &'a Path,
    /// What it was made from.
    pub profile: &'a Profile,
    /// What its manifest says.
    pub manifest: &'a Manifest,
}

fn missing(program: &str, help: &str) -> Error {
    Error::plain(format!("{program} is not on this machine"), help)
}

impl Guest<'_> {
    /// Puts kernel and initrd into `dir`; returns the initrd's bytes.
    fn files(&self, machine: Machine, dir: &Path) -> Result<u64, Error> {
        let kernel = self.image.join("Image");
        fs::copy(&kernel, dir.join("Image")).map_err(|e| Error::io("copy", &kernel, e))?;
        // Another machine's addresses: a later /init replaces the one before.
        let path = self.image.join("initrd.cpio");
        let mut initrd = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        initrd.extend(cpio::archive(&init::layer_for(self.profile, machine, None)?, 1 << 20)?);
        let own = dir.join("initrd.cpio");
        fs::write(&own, &initrd).map_err(|e| Error::write(&own, initrd.len() as u64, e))?;
        Ok(initrd.len() as u64)
    }

    /// For QEMU, whose guest's web server is reached at `port`, if one is given.
    pub fn qemu(&self, program: Option<PathBuf>, port: Option<u16>, dir: &Path) -> Result<Prepared, Error> {
        let program = program
            .or_else(|| host::find("qemu-system-riscv32"))
            .ok_or_else(|| missing("qemu-system-riscv32", "Run: sudo apt-get install qemu-system-misc"))?;
        self.files(Machine::Qemu, dir)?;
        firmware(self.root, dir)?;
        // There the kernel lies 4 MiB above the start of RAM, which it cannot use, and the host's share is counted too.
        let ram = (self.manifest.layout.ram_bytes >> 20).max(8) + 8;
        let words = "-M virt -cpu rv32,c=off,f=off,d=off,sstc=off -nographic -no-reboot -bios firmware.bin \
                     -kernel Image -initrd initrd.cpio";
        let mut args: Vec<OsString> = words.split_whitespace().map(Into::into).collect();
        let forward =
            port.map(|port| format!(",hostfwd=tcp:127.0.0.1:{port}-10.77.0.2:80")).unwrap_or_default();
        let net = format!("user,id=n,net=10.77.0.0/16,host=10.77.0.1{forward}");
        let device = "virtio-net-device,netdev=n,mac=02:4c:47:00:00:00,bus=virtio-mmio-bus.0";
        args.extend(["-m", &ram.to_string(), "-append", &self.manifest.bootargs].map(Into::into));
        args.extend(["-netdev", &net, "-device", device].map(Into::into));
        Ok(Prepared { program, args, ram_bytes: ram << 20 })
    }

    /// For semu.
    pub fn semu(&self, program: Option<PathBuf>, dir: &Path) -> Result<Prepared, Error> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = || std::env::split_paths(&path).map(|folder| folder.join("semu")).find(|p| p.is_file());
        let program = program.or_else(found).ok_or_else(|| {
            missing(
                "semu",
                "Build it from its source (a small RISC-V emulator), and put the program's folder into PATH.",
            )
        })?;
        let bytes = self.files(Machine::Semu, dir)?;
        if bytes > SEMU_INITRD {
            return Err(Error::plain(
                format!("the initrd has {bytes} bytes, and semu takes {SEMU_INITRD} at most"),
                "Try it with QEMU.",
            ));
        }
        let dtb_address = SEMU_RAM - SEMU_DTB;
        let layout = Layout {
            ram_bytes: SEMU_RAM,
            initrd_address: dtb_address - SEMU_INITRD,
            initrd_bytes: bytes,
            dtb_address,
            ..self.manifest.layout.clone()
        };
        let template = dts::template(self.root)?;
        let text = dts::render(&template, &layout, &self.manifest.bootargs)?;
        let dtb = dir.join("semu.dtb");
        let binary = dts::compile(&template, &text)?;
        fs::write(&dtb, &binary).map_err(|e| Error::write(&dtb, binary.len() as u64, e))?;
        let args = ["-k", "Image", "-b", "semu.dtb", "-i", "initrd.cpio"].map(Into::into).to_vec();
        Ok(Prepared { program, args, ram_bytes: SEMU_RAM })
    }
}

/// Builds the firmware for QEMU.
fn firmware(root: &Path, dir: &Path) -> Result<(), Error> {
    let source = root.join("buildroot-external/qemu/firmware.S");
    let (elf, bin) = (dir.join("firmware.elf"), dir.join("firmware.bin"));
    let words = "-march=rv32ima_zicsr -mabi=ilp32 -nostdlib -static -Wl,-melf32lriscv,-Ttext=0x80000000,--build-id=none -o";
    let mut all: Vec<OsString> = words.split(' ').map(Into::into).collect();
    all.extend([elf.clone().into(), source.clone().into()]);
    let steps = [
        ("riscv64-linux-gnu-gcc", all),
        ("riscv64-linux-gnu-objcopy", {
            let words = ["-O", "binary"].map(OsString::from);
            words.into_iter().chain([elf.into(), bin.into()]).collect()
        }),
    ];
    for (program, words) in steps {
        let failed = |what: String| {
            Error::plain(
                format!("{program} could not build {}: {what}", source.display()),
                "Run: sudo apt-get install gcc-riscv64-linux-gnu binutils-riscv64-linux-gnu",
            )
        };
        let output = duct::cmd(program, words)
            .stderr_to_stdout()
            .stdout_capture()
            .unchecked()
            .run()
            .map_err(|e| failed(e.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stdout).trim().to_owned()));
        }
    }
    Ok(())
}

fn attended(mut command: Command) -> Result<(), Error> {
    let status = command.status().map_err(|e| not_started(&command, &e))?;
    match status.success() {
        true => Ok(()),
        false => Err(Error::plain(format!("it ended with {status}"), "Look at its last lines above.")),
    }
}

/// Until READY, or until patience ends.
fn unattended(mut command: Command) -> Result<(), Error> {
    // Open, and silent: an input at its end looks ready for ever to some.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let start = Instant::now();
    let mut child = command.spawn().map_err(|e| not_started(&command, &e))?;
    let (send, receive) = std::sync::mpsc::channel();
    if let Some(mut output) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut buffer) {
                if send.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
    }
    let mut console = Vec::new();
    let ready = loop {
        let left = PATIENCE.saturating_sub(start.elapsed());
        match receive.recv_timeout(left) {
            Ok(bytes) => console.extend(bytes),
            Err(_) => break false,
        }
        if String::from_utf8_lossy(&console).lines().any(|l| l.trim() == "READY 0") {
            break true;
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    let text = String::from_utf8_lossy(&console).into_owned();
    match ready {
        true => {
            super::say(&format!("READY after {:.1} s", start.elapsed().as_secs_f64()));
            Ok(())
        }
        false => {
            let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
            let last: String =
                lines.iter().skip(lines.len().saturating_sub(15)).map(|l| format!("\n  | {l}")).collect();
            Err(Error::plain(
                format!("it did not say READY within {} s; it said last:{last}", start.elapsed().as_secs()),
                "Run it on a terminal to look around.",
            ))
        }
    }
}

fn not_started(command: &Command, error: &std::io::Error) -> Error {
    Error::plain(
        format!("{} cannot be started: {error}", command.get_program().to_string_lossy()),
        "Look whether it runs by itself.",
    )
}

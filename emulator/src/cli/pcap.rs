//! `--pcap FILE[:N]`: the links' packets in a file.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::thread::JoinHandle;
use std::time::Duration;

use emulator::net::tap::{PcapStream, Tap};
use miette::{IntoDiagnostic, Result, WrapErr, miette};

/// How long a packet may wait to be written.
const PAUSE: Duration = Duration::from_millis(200);

/// Where to write what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The file.
    pub path: PathBuf,
    /// One VM only.
    pub vm: Option<u32>,
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, vm) = match text.rsplit_once(':') {
            Some((path, vm)) if vm.bytes().all(|byte| byte.is_ascii_digit()) && !vm.is_empty() => {
                (path, Some(vm.parse().map_err(|_| format!("`{vm}` is no VM number"))?))
            }
            _ => (text, None),
        };
        if path.is_empty() {
            return Err("expected a file's name, and perhaps a VM, as in vm3.pcapng:3".into());
        }
        Ok(Self { path: path.into(), vm })
    }
}

/// A file that is being written.
pub struct Pcap {
    path: PathBuf,
    writer: JoinHandle<io::Result<()>>,
}

impl Pcap {
    /// Begins the file, or says why it can't be written.
    pub fn start(wanted: &Wanted, vms: u32, tap: &Tap) -> Result<Self> {
        if let Some(vm) = wanted.vm.filter(|vm| *vm >= vms) {
            return Err(miette!(
                "--pcap: there is no VM {vm}: the fleet has {vms}, numbered from 0 to {}",
                vms - 1
            ));
        }
        let path = wanted.path.clone();
        let fail = || format!("--pcap: {} can't be written", path.display());
        let file = File::create(&path).into_diagnostic().wrap_err_with(fail)?;
        let stream = tap.stream(wanted.vm);
        let writer = std::thread::Builder::new()
            .name("pcap".into())
            .spawn(move || write(stream, file))
            .into_diagnostic()?;
        Ok(Self { path, writer })
    }

    /// Waits until everything is written. The bridge has ended by then.
    pub fn finish(self) {
        match self.writer.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!("{} ends too early: {error}", self.path.display());
            }
            // The panic was printed.
            Err(_) => {}
        }
    }
}

fn write(mut stream: PcapStream, mut file: File) -> io::Result<()> {
    while let Some(bytes) = stream.read(PAUSE) {
        file.write_all(&bytes)?;
    }
    file.write_all(&stream.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_vms_are_told_apart() {
        let wanted = |text: &str| text.parse::<Wanted>();
        assert_eq!(wanted("a.pcapng"), Ok(Wanted { path: "a.pcapng".into(), vm: None }));
        assert_eq!(wanted("a.pcapng:12"), Ok(Wanted { path: "a.pcapng".into(), vm: Some(12) }));
        assert_eq!(wanted("C:\\x"), Ok(Wanted { path: "C:\\x".into(), vm: None }));
        assert_eq!(wanted("a:"), Ok(Wanted { path: "a:".into(), vm: None }));
        assert!(wanted(":3").is_err() && wanted("").is_err() && wanted("a:99999999999").is_err());
    }
}

//! A guest image as the machine takes it: kernel, initrd and device tree, read from a folder and checked.
//!
//! The device tree is the authority for addresses; the manifest adds hashes and where the tree itself goes. How an
//! image was built is nobody's business here.

mod dtb;
mod kernel;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::abi::FRAME_BYTES;
use crate::fleet::capacity::size;
use crate::memory::{BootMemory, Piece};

pub use dtb::DtbError;
pub use kernel::NotAKernel;

/// RAM that a guest needs at the least besides kernel, device tree, initrd and its unpacked copy.
const WORKING_BYTES: u64 = 512 * 1024;
/// The machine's device windows begin here; RAM ends below.
const RAM_END: u64 = 0xF000_0000;

/// An image, ready to be laid into guest RAM. The kernel goes to address 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestImage {
    /// The kernel's Image file.
    pub kernel: Vec<u8>,
    /// The initial root file system, a cpio archive.
    pub initrd: Vec<u8>,
    /// The flattened device tree.
    pub dtb: Vec<u8>,
    /// RAM of each VM; it starts at address 0.
    pub ram_bytes: u32,
    /// Physical address of the initrd.
    pub initrd_addr: u32,
    /// Physical address of the device tree: the second argument of the kernel.
    pub dtb_addr: u32,
    /// The manifest's hash over the whole image.
    pub manifest_hash: String,
}

/// Why a folder is not an image that the machine can boot.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A file is not there or can't be read.
    #[error("{}: {source}; build the image with `cargo xtask image`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is larger than guest RAM could be.
    #[error("{}: larger than {}, which no VM could hold", path.display(), size(*limit))]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// The manifest is no manifest.
    #[error("{}: line {}: {source}; build the image again with `cargo xtask image`", path.display(), source.line())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A file is not the one that the manifest lists.
    #[error("{}: {what}; the image is damaged, build it again with `cargo xtask image`", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it differs.
        what: String,
    },
    /// The kernel is something else.
    #[error("{}: {source}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What it is.
        source: NotAKernel,
    },
    /// The device tree does not describe this machine.
    #[error("{}: {source}", path.display())]
    Dtb {
        /// The file.
        path: PathBuf,
        /// Why.
        source: DtbError,
    },
    /// The guest would not fit.
    #[error("RAM of {} is too small for this image: it needs at least {}; give more --ram", size(*ram), size(*least))]
    RamTooSmall {
        /// RAM asked for.
        ram: u64,
        /// The least.
        least: u64,
    },
    /// RAM would reach into the devices.
    #[error("RAM of {} is too large: RAM ends below the devices, at most at {}; give less --ram", size(*ram), size(RAM_END))]
    RamTooLarge {
        /// RAM asked for.
        ram: u64,
    },
    /// RAM is made of pages.
    #[error("RAM of {0} bytes is not a multiple of {FRAME_BYTES} bytes")]
    RamNotPages(u64),
    /// Two parts share addresses, or one lies outside RAM.
    #[error(
        "the image is laid out for other RAM: {what}; build it with `cargo xtask image --ram {}`, or give RAM of {} or more",
        size(*ram).replace(' ', ""), size(*laid_out)
    )]
    Layout {
        /// What collides.
        what: String,
        /// RAM asked for.
        ram: u64,
        /// RAM that the image was made for.
        laid_out: u64,
    },
}

/// What the loader reads of manifest.json.
#[derive(Deserialize)]
struct Manifest {
    hash: String,
    #[serde(default)]
    files: BTreeMap<String, FileSum>,
    #[serde(default)]
    layout: Layout,
}

#[derive(Deserialize)]
struct FileSum {
    bytes: u64,
    sha256: String,
}

#[derive(Default, Deserialize)]
struct Layout {
    dtb_address: Option<u64>,
    least_ram_bytes: Option<u64>,
}

impl GuestImage {
    /// Loads the image in `folder`. `ram` overrides the RAM that the device tree tells the guest.
    pub fn load(folder: &Path, ram: Option<u64>) -> Result<Self, GuestError> {
        let path = folder.join("manifest.json");
        let bytes = read(&path)?;
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|source| GuestError::Manifest { path, source })?;
        let part = |name: &str| -> Result<(PathBuf, Vec<u8>), GuestError> {
            let path = folder.join(name);
            let bytes = read(&path)?;
            if let Some(sum) = manifest.files.get(name) {
                sum.check(&path, &bytes)?;
            }
            Ok((path, bytes))
        };
        let (kernel_path, kernel) = part("Image")?;
        let (initrd_path, initrd) = part("initrd.cpio")?;
        let (dtb_path, mut dtb) = part("vm.dtb")?;
        let kernel_memory =
            kernel::check(&kernel).map_err(|source| GuestError::Kernel { path: kernel_path, source })?;
        let dtb_error = |source| GuestError::Dtb { path: dtb_path.clone(), source };
        let tree = dtb::read(&dtb).map_err(dtb_error)?;
        let laid_out = tree.ram_bytes;
        let ram = ram.unwrap_or(laid_out);
        dtb.truncate(tree.total_bytes);

        if !ram.is_multiple_of(u64::from(FRAME_BYTES)) {
            return Err(GuestError::RamNotPages(ram));
        }
        if ram > RAM_END {
            return Err(GuestError::RamTooLarge { ram });
        }
        let pages = |bytes: u64| bytes.next_multiple_of(u64::from(FRAME_BYTES));
        let (initrd_bytes, dtb_bytes) = (initrd.len() as u64, dtb.len() as u64);
        let least = manifest.layout.least_ram_bytes.unwrap_or_else(|| {
            (pages(kernel_memory) + 2 * pages(initrd_bytes) + pages(dtb_bytes) + WORKING_BYTES)
                .next_multiple_of(64 * 1024)
        });
        if ram < least {
            return Err(GuestError::RamTooSmall { ram, least });
        }
        let (start, end) = tree.initrd;
        if end.checked_sub(start) != Some(initrd_bytes) {
            return Err(GuestError::Damaged {
                path: initrd_path,
                what: format!(
                    "it has {initrd_bytes} bytes, but the device tree places an initrd from {start:#x} to {end:#x}"
                ),
            });
        }
        let layout_error = |what| GuestError::Layout { what, ram, laid_out };
        let dtb_addr = match manifest.layout.dtb_address {
            Some(addr) => addr,
            None => place_dtb(ram, kernel_memory, (start, end), dtb_bytes)
                .ok_or_else(|| layout_error("there is no place for the device tree".into()))?,
        };
        let parts = [
            ("the kernel", 0, kernel_memory),
            ("the initrd", start, end),
            ("the device tree", dtb_addr, dtb_addr.saturating_add(dtb_bytes)),
        ];
        for (n, (name, from, to)) in parts.iter().enumerate() {
            if *to > ram {
                return Err(layout_error(format!(
                    "{name} lies from {from:#x} to {to:#x}, RAM ends at {ram:#x}"
                )));
            }
            if let Some((other, a, b)) = parts[..n].iter().find(|(_, a, b)| from < b && a < to) {
                return Err(layout_error(format!(
                    "{name} ({from:#x} to {to:#x}) overlaps {other} ({a:#x} to {b:#x})"
                )));
            }
        }
        if ram != laid_out {
            tree.set_ram(&mut dtb, ram).map_err(dtb_error)?;
        }
        // All of them lie below RAM_END.
        Ok(Self {
            kernel,
            initrd,
            dtb,
            ram_bytes: ram as u32,
            initrd_addr: start as u32,
            dtb_addr: dtb_addr as u32,
            manifest_hash: manifest.hash,
        })
    }
}

/// RAM at the first instruction.
impl From<GuestImage> for BootMemory {
    fn from(image: GuestImage) -> Self {
        Self {
            ram_bytes: image.ram_bytes.into(),
            entry: 0,
            dtb_address: image.dtb_addr,
            pieces: vec![
                Piece { name: "the kernel", address: 0, bytes: image.kernel },
                Piece { name: "the initrd", address: image.initrd_addr, bytes: image.initrd },
                Piece { name: "the device tree", address: image.dtb_addr, bytes: image.dtb },
            ],
        }
    }
}

impl FileSum {
    fn check(&self, path: &Path, bytes: &[u8]) -> Result<(), GuestError> {
        let damaged = |what| Err(GuestError::Damaged { path: path.to_owned(), what });
        if self.bytes != bytes.len() as u64 {
            return damaged(format!("it has {} bytes, the manifest says {}", bytes.len(), self.bytes));
        }
        if !hex::encode(Sha256::digest(bytes)).eq_ignore_ascii_case(&self.sha256) {
            return damaged("its hash is not the manifest's".into());
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>, GuestError> {
    let error = |source| GuestError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(RAM_END + 1).read_to_end(&mut bytes)).map_err(error)?;
    if bytes.len() as u64 > RAM_END {
        return Err(GuestError::TooLarge { path: path.to_owned(), limit: RAM_END });
    }
    Ok(bytes)
}

/// The highest page-aligned place for the device tree: at the top of RAM, else just below the initrd.
fn place_dtb(ram: u64, kernel: u64, initrd: (u64, u64), bytes: u64) -> Option<u64> {
    let page = u64::from(FRAME_BYTES);
    [ram, initrd.0].into_iter().find_map(|top| {
        let at = top.checked_sub(bytes)? / page * page;
        let free = at >= kernel && (at >= initrd.1 || at + bytes <= initrd.0);
        free.then_some(at)
    })
}

#[cfg(test)]
pub(crate) mod tests;

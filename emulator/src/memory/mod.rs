//! Guest RAM on the host's side: what a VM's RAM holds at its first instruction, as frames that all VMs share.

pub mod map;

use crate::abi::FRAME_BYTES;

/// Bytes to be found at a guest-physical address when a VM starts.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Name for messages: kernel, initrd, device tree.
    pub name: &'static str,
    /// Guest-physical address.
    pub address: u32,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// RAM at the first instruction, and where the hart starts.
#[derive(Clone, Debug)]
pub struct BootMemory {
    /// Size of RAM in bytes; a multiple of the frame size, from address 0 up.
    pub ram_bytes: u64,
    /// First instruction.
    pub entry: u32,
    /// Device tree: `a1` at the first instruction.
    pub dtb_address: u32,
    /// What RAM holds; the rest is zero.
    pub pieces: Vec<Piece>,
}

/// Why the contents don't make a RAM.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Size not a multiple of the frame size, zero, or beyond the devices at 0xF0000000.
    #[error(
        "RAM of {0} bytes: it must be a multiple of {FRAME_BYTES} bytes, more than 0 and at most 3840 MiB"
    )]
    Size(u64),
    /// A piece lies beyond the end of RAM.
    #[error("{name} ends at byte {end}, beyond the {ram} bytes of RAM; give each VM more RAM (--ram)")]
    Beyond {
        /// Which piece.
        name: &'static str,
        /// One past its last byte.
        end: u64,
        /// Size of RAM.
        ram: u64,
    },
    /// Two pieces share bytes.
    #[error("{first} and {second} overlap in guest RAM; give each VM more RAM (--ram)")]
    Overlap {
        /// The lower piece.
        first: &'static str,
        /// The upper piece.
        second: &'static str,
    },
}

/// The frames that all VMs share, and the frame table that every VM starts with.
#[derive(Debug)]
pub struct SharedFrames {
    /// Frame number of each guest page; frame 0 is all zeroes.
    pub table: Vec<u32>,
    /// Number of shared frames, the one of zeroes included.
    pub count: u32,
}

impl SharedFrames {
    /// Plans the frames: pages of zeroes share frame 0, all others get one each.
    pub fn new(boot: &BootMemory) -> Result<Self, Error> {
        let frame = u64::from(FRAME_BYTES);
        if boot.ram_bytes == 0 || !boot.ram_bytes.is_multiple_of(frame) || boot.ram_bytes > 0xF000_0000 {
            return Err(Error::Size(boot.ram_bytes));
        }
        let mut pieces: Vec<&Piece> = boot.pieces.iter().filter(|piece| !piece.bytes.is_empty()).collect();
        pieces.sort_by_key(|piece| piece.address);
        let end = |piece: &Piece| u64::from(piece.address) + piece.bytes.len() as u64;
        for pair in pieces.windows(2) {
            if end(pair[0]) > u64::from(pair[1].address) {
                return Err(Error::Overlap { first: pair[0].name, second: pair[1].name });
            }
        }
        if let Some(piece) = pieces.iter().find(|piece| end(piece) > boot.ram_bytes) {
            return Err(Error::Beyond { name: piece.name, end: end(piece), ram: boot.ram_bytes });
        }
        let mut shared = Self { table: vec![0; (boot.ram_bytes / frame) as usize], count: 1 };
        for (page, _, bytes) in boot.pieces.iter().flat_map(parts) {
            if shared.table[page] == 0 && bytes.iter().any(|byte| *byte != 0) {
                shared.table[page] = shared.count;
                shared.count += 1;
            }
        }
        Ok(shared)
    }

    /// Writes the frames' contents to `frames`, which is zeroed and holds `count` of them.
    pub fn fill(&self, boot: &BootMemory, frames: &mut [u8]) {
        for (page, within, bytes) in boot.pieces.iter().flat_map(parts) {
            if self.table[page] != 0 {
                let at = self.table[page] as usize * FRAME_BYTES as usize + within;
                frames[at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
    }
}

/// A piece, page by page: guest page, offset within it, bytes.
fn parts(piece: &Piece) -> impl Iterator<Item = (usize, usize, &[u8])> {
    let frame = FRAME_BYTES as usize;
    let mut address = piece.address as usize;
    let mut rest = piece.bytes.as_slice();
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (page, within) = (address / frame, address % frame);
        let (bytes, after) = rest.split_at(rest.len().min(frame - within));
        rest = after;
        address += bytes.len();
        Some((page, within, bytes))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(ram_bytes: u64, pieces: Vec<Piece>) -> BootMemory {
        BootMemory { ram_bytes, entry: 0, dtb_address: 0, pieces }
    }

    #[test]
    fn pieces_become_frames_and_zeroes_are_shared() {
        let mut bytes = vec![0; 3 * 4096];
        bytes[5] = 7;
        bytes[2 * 4096 + 1] = 9;
        let kernel = boot(8 * 4096, vec![Piece { name: "kernel", address: 4096 + 16, bytes }]);
        let shared = SharedFrames::new(&kernel).unwrap();
        // pages 1 (byte 21) and 3 (byte 17) hold data
        assert_eq!(shared.table, [0, 1, 0, 2, 0, 0, 0, 0]);
        assert_eq!(shared.count, 3);
        let mut frames = vec![0; 3 * 4096];
        shared.fill(&kernel, &mut frames);
        assert_eq!(frames[4096 + 21], 7);
        assert_eq!(frames[2 * 4096 + 17], 9);
    }

    #[test]
    fn pieces_may_share_a_page_but_no_byte() {
        let piece = |name, address, len| Piece { name, address, bytes: vec![1; len] };
        let both = boot(4096, vec![piece("a", 0, 10), piece("b", 10, 10)]);
        let shared = SharedFrames::new(&both).unwrap();
        assert_eq!(shared.count, 2);
        let mut frames = vec![0; 2 * 4096];
        shared.fill(&both, &mut frames);
        assert_eq!(frames[4096..4096 + 21].iter().filter(|byte| **byte == 1).count(), 20);
        let error = SharedFrames::new(&boot(4096, vec![piece("b", 9, 10), piece("a", 0, 10)])).unwrap_err();
        assert_eq!(error, Error::Overlap { first: "a", second: "b" });
    }

    #[test]
    fn sizes_are_checked() {
        let piece = Piece { name: "initrd", address: 4000, bytes: vec![1; 97] };
        assert_eq!(
            SharedFrames::new(&boot(4096, vec![piece])).unwrap_err(),
            Error::Beyond { name: "initrd", end: 4097, ram: 4096 }
        );
        assert_eq!(SharedFrames::new(&boot(4097, vec![])).unwrap_err(), Error::Size(4097));
        assert_eq!(SharedFrames::new(&boot(0, vec![])).unwrap_err(), Error::Size(0));
        assert_eq!(SharedFrames::new(&boot(0xF000_1000, vec![])).unwrap_err(), Error::Size(0xF000_1000));
    }
}

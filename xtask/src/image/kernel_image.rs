//! The header of a RISC-V kernel Image: 64 bytes that say what it is and how much memory it takes.

/// What an Image's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelImage {
    /// Where it would like to lie from the start of RAM. A kernel for 32 bit runs from 0 as well.
    pub text_offset: u64,
    /// What it takes in memory, .bss included.
    pub memory_bytes: u64,
}

const HEADER: usize = 64;
/// `text_offset` of kernels for 64 bit: 2 MiB. For 32 bit it is 4 MiB.
const OFFSET_64_BIT: u64 = 0x20_0000;

/// Why a file is not an Image that a VM can run.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAnImage {
    /// Shorter than the header.
    #[error("it has {0} bytes, which is less than the header of a kernel Image")]
    Short(usize),
    /// Something else.
    #[error("it is {0}, not an uncompressed RISC-V kernel Image")]
    Foreign(&'static str),
    /// For another kind of RISC-V.
    #[error("it is a RISC-V kernel Image, but {0}")]
    OtherRiscv(&'static str),
    /// A part is missing.
    #[error("it is truncated: its header says {memory} bytes in memory, and the file has only {file}")]
    Truncated {
        /// Bytes that the header promises.
        memory: u64,
        /// Bytes that are there.
        file: usize,
    },
    /// The header contradicts itself.
    #[error("its header is wrong: {0}")]
    Inconsistent(&'static str),
}

/// Reads the header of an Image.
pub fn check(image: &[u8]) -> Result<KernelImage, NotAnImage> {
    let field = |at: usize| image.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let magic = |at: usize, bytes: &[u8]| image.get(at..at + bytes.len()) == Some(bytes);
    if !(magic(48, b"RISCV") && magic(56, b"RSC\x05")) {
        if let Some(what) = foreign(image) {
            return Err(NotAnImage::Foreign(what));
        }
        if image.len() < HEADER {
            return Err(NotAnImage::Short(image.len()));
        }
        return Err(NotAnImage::Foreign("something without the RISC-V magic in its header"));
    }
    let (Some(text_offset), Some(memory_bytes), Some(flags)) = (field(8), field(16), field(24)) else {
        return Err(NotAnImage::Short(image.len()));
    };
    if flags & 1 != 0 {
        return Err(NotAnImage::OtherRiscv("for a big-endian machine"));
    }
    if text_offset == OFFSET_64_BIT {
        return Err(NotAnImage::OtherRiscv("for 64 bit; the VMs are RV32"));
    }
    if memory_bytes < image.len() as u64 {
        return Err(NotAnImage::Inconsistent("it takes less memory than the file is long"));
    }
    // .bss is not in the file, but never as large as all the rest.
    if memory_bytes / 2 > image.len() as u64 {
        return Err(NotAnImage::Truncated { memory: memory_bytes, file: image.len() });
    }
    Ok(KernelImage { text_offset, memory_bytes })
}

/// What a file that is no RISC-V Image is, by its magic.
fn foreign(image: &[u8]) -> Option<&'static str> {
    const KNOWN: &[(usize, &[u8], &str)] = &[
        (56, b"ARM\x64", "a kernel Image for arm64"),
        (0x202, b"HdrS", "a bzImage for x86"),
        (0, b"\x1f\x8b", "compressed with gzip"),
        (0, b"\x7fELF", "an ELF file (vmlinux?)"),
        (0, b"\xfd7zXZ", "compressed with xz"),
        (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
        (0, b"\x02\x21\x4c\x18", "compressed with lz4"),
        (0, b"BZh", "compressed with bzip2"),
        (0, b"\x27\x05\x19\x56", "a U-Boot image"),
        (0, b"070701", "a cpio archive (the initrd?)"),
        (0, b"\xd0\x0d\xfe\xed", "a device tree"),
        (0, b"MZ", "an EFI program"),
    ];
    KNOWN.iter().find(|(at, magic, _)| image.get(*at..at + magic.len()) == Some(magic)).map(|k| k.2)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An Image of so many bytes for rv32, with `bss` bytes more in memory.
    pub(crate) fn image(len: usize, bss: u64) -> Vec<u8> {
        let mut image = vec![0x13; len];
        image[8..16].copy_from_slice(&0x40_0000u64.to_le_bytes());
        image[16..24].copy_from_slice(&(len as u64 + bss).to_le_bytes());
        image[24..32].copy_from_slice(&0u64.to_le_bytes());
        image[48..56].copy_from_slice(b"RISCV\0\0\0");
        image[56..60].copy_from_slice(b"RSC\x05");
        image
    }

    #[test]
    fn a_good_image_tells_its_size() {
        let got = check(&image(4096, 512)).unwrap();
        assert_eq!(got, KernelImage { text_offset: 0x40_0000, memory_bytes: 4608 });
    }

    #[test]
    fn truncated_at_every_length() {
        let whole = image(4096, 512);
        for len in 0..64 {
            assert!(check(&whole[..len]).is_err(), "{len} bytes passed");
        }
        assert_eq!(check(&whole[..1000]), Err(NotAnImage::Truncated { memory: 4608, file: 1000 }));
    }

    #[test]
    fn foreign_files_are_named() {
        let mut arm = vec![0; 4096];
        arm[56..60].copy_from_slice(b"ARM\x64");
        for (bytes, word) in [
            (b"\x1f\x8b\x08\x00".to_vec(), "gzip"),
            (b"\x7fELF\x01\x01\x01".to_vec(), "ELF"),
            (arm, "arm64"),
            (vec![0; 4096], "RISC-V magic"),
        ] {
            let said = check(&bytes).unwrap_err().to_string();
            assert!(said.contains(word), "{said}");
        }
    }

    #[test]
    fn other_riscv_kernels_are_refused() {
        let mut wide = image(4096, 0);
        wide[8..16].copy_from_slice(&0x20_0000u64.to_le_bytes());
        assert!(check(&wide).unwrap_err().to_string().contains("64 bit"));
        let mut big = image(4096, 0);
        big[24] = 1;
        assert!(check(&big).unwrap_err().to_string().contains("big-endian"));
        let mut small = image(4096, 0);
        small[16..24].copy_from_slice(&64u64.to_le_bytes());
        assert!(matches!(check(&small), Err(NotAnImage::Inconsistent(_))));
    }
}

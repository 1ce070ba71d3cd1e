//! The 64-byte header of a RISC-V kernel Image.

/// Bytes of the header.
const HEADER: usize = 64;
/// `text_offset` of 64-bit kernels; 32-bit ones ask for 4 MiB. The header has no other sign of the width.
const TEXT_OFFSET_64: u64 = 0x20_0000;

/// Why a file is not a kernel for the machine.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAKernel {
    /// Too short for a header.
    #[error("{0} bytes are too few for the header of a kernel Image: the file is truncated")]
    Short(usize),
    /// Another kind of file.
    #[error(
        "it is {0}; the machine boots an uncompressed Image of a 32-bit RISC-V kernel (arch/riscv/boot/Image)"
    )]
    Foreign(&'static str),
    /// The header promises less memory than the file has.
    #[error("its header says {memory} bytes, and the file has {file}: the header is damaged")]
    Inconsistent {
        /// Bytes in memory, by the header.
        memory: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// The file is much shorter than the header says.
    #[error("its header says {memory} bytes in memory, and the file has only {file}: the file is truncated")]
    Truncated {
        /// Bytes in memory, by the header.
        memory: u64,
        /// Bytes of the file.
        file: u64,
    },
}

/// Checks a kernel; returns the bytes that it takes in memory, .bss included.
pub fn check(file: &[u8]) -> Result<u64, NotAKernel> {
    if let Some(what) = foreign(file) {
        return Err(NotAKernel::Foreign(what));
    }
    let Some(header) = file.first_chunk::<HEADER>() else { return Err(NotAKernel::Short(file.len())) };
    let field = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if &header[48..53] != b"RISCV" || &header[56..60] != b"RSC\x05" {
        return Err(NotAKernel::Foreign("not a RISC-V kernel Image (its header lacks the magic numbers)"));
    }
    let (text_offset, memory, flags, bytes) = (field(8), field(16), field(24), file.len() as u64);
    if flags & 1 != 0 {
        return Err(NotAKernel::Foreign("an Image of a big-endian kernel"));
    }
    if text_offset == TEXT_OFFSET_64 {
        return Err(NotAKernel::Foreign("an Image of a 64-bit RISC-V kernel"));
    }
    if memory < bytes {
        return Err(NotAKernel::Inconsistent { memory, file: bytes });
    }
    // .bss is not in the file, but it is never as large as all the rest.
    if bytes < memory / 2 {
        return Err(NotAKernel::Truncated { memory, file: bytes });
    }
    Ok(memory)
}

/// What a file of another kind is.
fn foreign(file: &[u8]) -> Option<&'static str> {
    let kinds: [(usize, &[u8], &str); 10] = [
        (0, b"\x7fELF", "an ELF file (vmlinux, or a program)"),
        (0, b"\x1f\x8b", "gzip data (Image.gz?)"),
        (0, b"\x28\xb5\x2f\xfd", "zstd data"),
        (0, b"\xfd7zXZ", "xz data"),
        (0, b"\x02\x21\x4c\x18", "lz4 data"),
        (0, b"BZh", "bzip2 data"),
        (0, b"070701", "a cpio archive (an initrd?)"),
        (0, b"\xd0\x0d\xfe\xed", "a device tree"),
        (56, b"ARM\x64", "an Image of a 64-bit ARM kernel"),
        (0x202, b"HdrS", "a bzImage of an x86 kernel"),
    ];
    kinds.into_iter().find_map(|(at, magic, what)| file.get(at..)?.starts_with(magic).then_some(what))
}

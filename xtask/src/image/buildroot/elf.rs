//! Every program of the image must run on RV32IMA: what an ELF file says about the machine it wants.

/// The file's machine number of RISC-V.
const RISCV: u16 = 243;
/// Section type of RISC-V's attributes.
const ATTRIBUTES: u32 = 0x7000_0003;
/// Flags of the header: compressed instructions, floats in registers, the small register file.
const FLAG_C: u32 = 1;
const FLAGS_FLOAT: u32 = 6;
const FLAG_E: u32 = 8;
/// The attribute that holds the architecture's name.
const TAG_ARCH: u64 = 5;

/// Whether the bytes are an ELF file at all.
pub fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// Checks an ELF file; the error tells what is wrong with it.
pub fn check(bytes: &[u8]) -> Result<(), String> {
    if bytes.get(4) != Some(&1) || bytes.get(5) != Some(&1) {
        return Err("it is not for a 32-bit little-endian machine".to_owned());
    }
    let short = || "it is cut short".to_owned();
    let machine = half(bytes, 18).ok_or_else(short)?;
    if machine != RISCV {
        return Err(format!("it is for machine {machine}, not RISC-V"));
    }
    let flags = word(bytes, 36).ok_or_else(short)?;
    if flags & FLAG_C != 0 {
        return Err("it has compressed instructions (C)".to_owned());
    }
    if flags & FLAGS_FLOAT != 0 {
        return Err("it passes floats in registers (F or D)".to_owned());
    }
    if flags & FLAG_E != 0 {
        return Err("it is for the small register file (E)".to_owned());
    }
    match architecture(bytes) {
        Some(name) => check_name(&name),
        // Stripped of its attributes; the flags said enough.
        None => Ok(()),
    }
}

/// How many sections a file has.
pub fn sections(bytes: &[u8]) -> usize {
    half(bytes, 48).map_or(0, usize::from)
}

/// The name in the attributes section, as rv32i2p1_m2p0_a2p1.
pub fn architecture(bytes: &[u8]) -> Option<String> {
    let table = word(bytes, 32)? as usize;
    let size = usize::from(half(bytes, 46)?);
    let count = usize::from(half(bytes, 48)?);
    let header = (0..count).map(|i| table + i * size).find(|at| word(bytes, at + 4) == Some(ATTRIBUTES))?;
    let (start, length) = (word(bytes, header + 16)? as usize, word(bytes, header + 20)? as usize);
    let mut section = bytes.get(start..start.checked_add(length)?)?;
    // Format `A`; then a block: length, vendor's name, and inside it tag, length and attributes.
    section = section.strip_prefix(b"A")?.get(4..)?;
    let name = section.iter().position(|b| *b == 0)?;
    section = section.get(name + 1..)?.get(5..)?;
    while !section.is_empty() {
        let tag = number(&mut section)?;
        // Odd tags are strings, even ones numbers.
        if tag % 2 == 1 {
            let end = section.iter().position(|b| *b == 0)?;
            if tag == TAG_ARCH {
                return Some(String::from_utf8_lossy(&section[..end]).into_owned());
            }
            section = &section[end + 1..];
        } else {
            number(&mut section)?;
        }
    }
    None
}

/// Extensions that the machine has, apart from the base.
const KNOWN: &[&str] = &["m", "a", "zicsr", "zifencei", "zmmul", "zaamo", "zalrsc"];

fn check_name(name: &str) -> Result<(), String> {
    let mut parts = name.split('_');
    let base = parts.next().unwrap_or_default();
    if !base.starts_with("rv32i") {
        return Err(format!("it is for {name}, not RV32I"));
    }
    for part in parts {
        // The version, as in m2p0, does not matter.
        let versioned = part.trim_end_matches(|c: char| c.is_ascii_digit());
        let extension = match versioned.strip_suffix('p') {
            Some(rest) if versioned.len() < part.len() => rest.trim_end_matches(|c: char| c.is_ascii_digit()),
            _ => part,
        };
        if !KNOWN.contains(&extension) {
            return Err(format!("it uses the extension {extension} ({name}), which the machine has not"));
        }
    }
    Ok(())
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

/// An unsigned number in LEB128.
fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..63).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// An ELF file that has nothing but a header and attributes.
    pub fn elf(flags: u32, arch: &str) -> Vec<u8> {
        let mut attributes = b"A".to_vec();
        let mut inner = vec![4u8, 16, 5];
        inner.extend(arch.as_bytes());
        inner.push(0);
        let file = 1 + 4 + inner.len();
        let vendor = b"riscv\0";
        attributes.extend(u32::try_from(4 + vendor.len() + file).unwrap().to_le_bytes());
        attributes.extend(vendor);
        attributes.push(1);
        attributes.extend(u32::try_from(file).unwrap().to_le_bytes());
        attributes.extend(inner);
        let mut elf = vec![0u8; 52];
        elf[..6].copy_from_slice(b"\x7fELF\x01\x01");
        elf[18..20].copy_from_slice(&RISCV.to_le_bytes());
        elf[32..36].copy_from_slice(&52u32.to_le_bytes());
        elf[36..40].copy_from_slice(&flags.to_le_bytes());
        elf[46..48].copy_from_slice(&40u16.to_le_bytes());
        elf[48..50].copy_from_slice(&1u16.to_le_bytes());
        let mut section = [0u8; 40];
        section[4..8].copy_from_slice(&ATTRIBUTES.to_le_bytes());
        section[16..20].copy_from_slice(&92u32.to_le_bytes());
        section[20..24].copy_from_slice(&u32::try_from(attributes.len()).unwrap().to_le_bytes());
        elf.extend(section);
        elf.extend(attributes);
        elf
    }

    #[test]
    fn rv32ima_passes() {
        for name in ["rv32i2p1_m2p0_a2p1_zicsr2p0_zifencei2p0_zmmul1p0", "rv32i2p0_m2p0_a2p0", "rv32ima"] {
            let bytes = elf(0, name);
            assert_eq!(architecture(&bytes).as_deref(), Some(name));
            assert_eq!(check(&bytes), Ok(()), "{name}");
            assert_eq!(sections(&bytes), 1);
        }
    }

    #[test]
    fn everything_else_is_named() {
        let refused = |flags, name: &str| check(&elf(flags, name)).unwrap_err();
        assert!(refused(1, "rv32i2p1_m2p0").contains("compressed"));
        assert!(refused(4, "rv32i2p1_m2p0").contains("floats"));
        assert!(refused(8, "rv32e1p9").contains('E'));
        assert!(refused(0, "rv64i2p1").contains("rv64i2p1"));
        assert!(refused(0, "rv32i2p1_m2p0_f2p2").contains("extension f "));
        assert!(refused(0, "rv32i2p1_c2p0").contains("extension c "));
        assert!(refused(0, "rv32i2p1_zba1p0").contains("zba"));
        let mut other = elf(0, "rv32i2p1");
        other[18] = 62;
        assert!(check(&other).unwrap_err().contains("machine 62"));
        let mut wide = elf(0, "rv32i2p1");
        wide[4] = 2;
        assert!(check(&wide).unwrap_err().contains("32-bit"));
        for end in 0..other.len() {
            // Whatever is cut off: no panic.
            let _ = check(&elf(0, "rv32i2p1_m2p0")[..end]);
        }
    }
}

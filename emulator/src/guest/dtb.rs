//! Reads a flattened device tree and checks that it describes this machine.

use fdt::Fdt;
use fdt::node::FdtNode;

use crate::abi;

/// Why a device tree does not fit the machine.
#[derive(Debug, thiserror::Error)]
pub enum DtbError {
    /// No device tree at all.
    #[error("not a device tree, or truncated: {0}")]
    Broken(String),
    /// A node or property is missing.
    #[error("the device tree has no {0}")]
    Missing(&'static str),
    /// Something is where the machine has something else.
    #[error("the device tree says {what} is {found}; the machine has {expected}")]
    Differs {
        /// What.
        what: String,
        /// By the tree.
        found: String,
        /// By the machine.
        expected: String,
    },
}

/// What the loader takes from a device tree.
#[derive(Debug)]
pub struct Tree {
    /// Bytes of the blob.
    pub total_bytes: usize,
    /// RAM of the guest.
    pub ram_bytes: u64,
    /// Physical start and end of the initrd.
    pub initrd: (u64, u64),
    /// Where in the blob the size of RAM stands, and its length: 4 or 8.
    ram_size_at: (usize, usize),
}

/// A device of the machine.
struct Device {
    name: &'static str,
    compatible: &'static [&'static str],
    base: u32,
    bytes: u32,
    irq: Option<u32>,
    required: bool,
}

const DEVICES: [Device; 4] = [
    Device {
        name: "the interrupt controller",
        compatible: &["sifive,plic-1.0.0", "riscv,plic0"],
        base: abi::PLIC_BASE,
        bytes: abi::PLIC_BYTES,
        irq: None,
        required: true,
    },
    Device {
        name: "the serial port",
        compatible: &["ns16550a", "ns16550"],
        base: abi::UART_BASE,
        bytes: abi::UART_BYTES,
        irq: Some(abi::UART_IRQ),
        required: true,
    },
    Device {
        name: "the network device",
        compatible: &["virtio,mmio"],
        base: abi::NET_BASE,
        bytes: abi::NET_BYTES,
        irq: Some(abi::NET_IRQ),
        required: false,
    },
    Device {
        name: "the clock",
        compatible: &["google,goldfish-rtc"],
        base: abi::RTC_BASE,
        bytes: abi::RTC_BYTES,
        irq: Some(abi::RTC_IRQ),
        required: false,
    },
];

/// Reads and checks a device tree.
pub fn read(blob: &[u8]) -> Result<Tree, DtbError> {
    check_structure(blob)?;
    let fdt = Fdt::new(blob).map_err(|error| DtbError::Broken(error.to_string()))?;
    let memory = fdt
        .all_nodes()
        .find(|node| node.property("device_type").and_then(|property| property.as_str()) == Some("memory"));
    let memory = memory.ok_or(DtbError::Missing("memory node"))?;
    let (ram_bytes, ram_size_at) = ram(blob, memory)?;
    let chosen = fdt.find_node("/chosen").ok_or(DtbError::Missing("/chosen node"))?;
    let address = |name, missing| {
        let value = chosen.property(name).ok_or(DtbError::Missing(missing))?.value;
        cells(value).ok_or(DtbError::Missing(missing))
    };
    let start = address("linux,initrd-start", "linux,initrd-start in /chosen")?;
    let end = address("linux,initrd-end", "linux,initrd-end in /chosen")?;
    for device in &DEVICES {
        check_device(&fdt, device)?;
    }
    let timebase = fdt.find_node("/cpus").and_then(|cpus| cells(cpus.property("timebase-frequency")?.value));
    let timebase = timebase.ok_or(DtbError::Missing("timebase-frequency in /cpus"))?;
    same("the timer frequency in Hz", timebase, u64::from(abi::TIMEBASE_HZ), |n| n.to_string())?;
    Ok(Tree { total_bytes: fdt.total_size(), ram_bytes, initrd: (start, end), ram_size_at })
}

impl Tree {
    /// Writes another size of RAM into the blob.
    pub fn set_ram(&self, blob: &mut [u8], ram_bytes: u64) -> Result<(), DtbError> {
        let (at, len) = self.ram_size_at;
        let value = ram_bytes.to_be_bytes();
        let place = blob.get_mut(at..at + len).ok_or(DtbError::Missing("size of RAM"))?;
        place.copy_from_slice(&value[8 - len..]);
        Ok(())
    }
}

/// The parser trusts the file; a damaged one must not get that far. Walks all nodes and properties.
fn check_structure(blob: &[u8]) -> Result<(), DtbError> {
    let word = |at: usize| -> Option<usize> {
        Some(u32::from_be_bytes(blob.get(at..at.checked_add(4)?)?.try_into().ok()?) as usize)
    };
    let broken = |what: &str| DtbError::Broken(what.to_owned());
    if word(0) != Some(0xd00d_feed) {
        return Err(broken("the magic number is missing"));
    }
    let total = word(4).filter(|total| *total <= blob.len());
    let total = total.ok_or_else(|| broken("the file is shorter than its header says"))?;
    let block = |offset: usize, length: usize| {
        let (from, len) = (word(offset)?, word(length)?);
        blob[..total].get(from..from.checked_add(len)?)
    };
    let outside = || broken("a block lies outside the file");
    let nodes = block(8, 36).ok_or_else(outside)?;
    let strings = block(12, 32).ok_or_else(outside)?;
    walk(nodes, strings).ok_or_else(|| broken("its nodes are damaged"))?;
    // Reserved ranges: pairs of 64-bit numbers up to a pair of zeroes.
    let reserved = word(16).and_then(|at| blob[..total].get(at..)).ok_or_else(outside)?;
    let ends = reserved.chunks_exact(16).any(|pair| pair.iter().all(|byte| *byte == 0));
    if ends { Ok(()) } else { Err(outside()) }
}

/// Walks a structure block; none if it is malformed (Devicetree Specification 0.4, 5.4).
fn walk(nodes: &[u8], strings: &[u8]) -> Option<()> {
    let word = |at: usize| Some(u32::from_be_bytes(nodes.get(at..at + 4)?.try_into().ok()?));
    let text = |bytes: &[u8]| {
        let len = bytes.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(&bytes[..len]).ok().map(str::len)
    };
    let (mut at, mut depth) = (0usize, 0u32);
    loop {
        let token = word(at)?;
        at += 4;
        match token {
            // A node begins. There is one root.
            1 if depth > 0 || at == 4 => {
                at += text(nodes.get(at..)?)? + 1;
                depth += 1;
            }
            // A node ends.
            2 => depth = depth.checked_sub(1)?,
            // A property: length, offset of its name, value.
            3 if depth > 0 => {
                let (len, name) = (word(at)? as usize, word(at + 4)? as usize);
                let name = strings.get(name..)?;
                let name = &name[..text(name)?];
                at += 8;
                nodes.get(at..at.checked_add(len)?)?;
                let counts = [&b"#address-cells"[..], b"#size-cells", b"phandle", b"interrupt-parent"];
                if counts.contains(&name) && len != 4 {
                    return None;
                }
                at += len;
            }
            // Nothing.
            4 => {}
            // The end.
            9 if depth == 0 && at > 4 => return Some(()),
            _ => return None,
        }
        at = at.next_multiple_of(4);
    }
}

fn ram(blob: &[u8], memory: FdtNode<'_, '_>) -> Result<(u64, (usize, usize)), DtbError> {
    let missing = || DtbError::Missing("reg in its memory node");
    let reg = memory.raw_reg().and_then(|mut regs| regs.next()).ok_or_else(missing)?;
    let start = cells(reg.address).ok_or_else(missing)?;
    let bytes = cells(reg.size).ok_or_else(missing)?;
    same("the start of RAM", start, 0, |n| format!("{n:#x}"))?;
    let at = (reg.size.as_ptr() as usize).checked_sub(blob.as_ptr() as usize).ok_or_else(missing)?;
    Ok((bytes, (at, reg.size.len())))
}

fn check_device(fdt: &Fdt<'_>, device: &Device) -> Result<(), DtbError> {
    let Some(node) = fdt.find_compatible(device.compatible) else {
        return if device.required { Err(DtbError::Missing(device.compatible[0])) } else { Ok(()) };
    };
    let missing = || DtbError::Missing("usable reg in one of its devices");
    let reg = node.raw_reg().and_then(|mut regs| regs.next()).ok_or_else(missing)?;
    let bus_address = cells(reg.address).ok_or_else(missing)?;
    let bytes = cells(reg.size).ok_or_else(missing)?;
    let base = through_buses(fdt, node, bus_address).ok_or_else(missing)?;
    same(&format!("the address of {}", device.name), base, u64::from(device.base), |n| format!("{n:#x}"))?;
    if bytes > u64::from(device.bytes) {
        return Err(DtbError::Differs {
            what: format!("the window of {}", device.name),
            found: format!("{bytes:#x} bytes"),
            expected: format!("{:#x}", device.bytes),
        });
    }
    if let Some(irq) = device.irq {
        let found = node.property("interrupts").and_then(|property| cells(property.value));
        let found = found.ok_or(DtbError::Missing("interrupts in one of its devices"))?;
        same(&format!("the interrupt of {}", device.name), found, u64::from(irq), |n| n.to_string())?;
    }
    Ok(())
}

/// A device's address as the processor sees it: through the `ranges` of the bus that it is on.
fn through_buses(fdt: &Fdt<'_>, device: FdtNode<'_, '_>, address: u64) -> Option<u64> {
    let bus = fdt.all_nodes().find(|node| {
        node.property("ranges").is_some() && node.children().any(|child| child.name == device.name)
    });
    let Some(bus) = bus else { return Some(address) };
    let ranges = bus.property("ranges")?.value;
    if ranges.is_empty() {
        return Some(address);
    }
    // Cells of the child's address and size are the bus's own; the parent's are the root's.
    let (own, parent) = (bus.cell_sizes(), fdt.find_node("/")?.cell_sizes());
    let (a, b, c) = (own.address_cells * 4, parent.address_cells * 4, own.size_cells * 4);
    if a + b + c == 0 {
        return None;
    }
    ranges.chunks_exact(a + b + c).find_map(|range| {
        let (child, base, len) = (cells(&range[..a])?, cells(&range[a..a + b])?, cells(&range[a + b..])?);
        let inside = address.checked_sub(child).filter(|offset| *offset < len)?;
        base.checked_add(inside)
    })
}

/// One or two big-endian cells.
fn cells(bytes: &[u8]) -> Option<u64> {
    match bytes.len() {
        4 => Some(u64::from(u32::from_be_bytes(bytes.try_into().ok()?))),
        8 => Some(u64::from_be_bytes(bytes.try_into().ok()?)),
        _ => None,
    }
}

fn same(what: &str, found: u64, expected: u64, show: impl Fn(u64) -> String) -> Result<(), DtbError> {
    if found == expected {
        return Ok(());
    }
    Err(DtbError::Differs { what: what.to_owned(), found: show(found), expected: show(expected) })
}

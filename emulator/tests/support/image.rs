//! Small guest images, made byte by byte.
#![allow(dead_code, missing_docs, reason = "each test file uses a part of it")]

/// Writes flattened device trees.
#[derive(Default)]
pub struct Blob {
    body: Vec<u8>,
    strings: Vec<u8>,
}

impl Blob {
    fn word(&mut self, word: u32) {
        self.body.extend(word.to_be_bytes());
    }

    fn padded(&mut self, bytes: &[u8]) {
        self.body.extend(bytes);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
    }

    fn node(&mut self, name: &str, inside: impl FnOnce(&mut Self)) {
        self.word(1);
        self.padded(format!("{name}\0").as_bytes());
        inside(self);
        self.word(2);
    }

    fn property(&mut self, name: &str, value: &[u8]) {
        let at = self.strings.len() as u32;
        self.strings.extend(format!("{name}\0").as_bytes());
        self.word(3);
        self.word(value.len() as u32);
        self.word(at);
        self.padded(value);
    }

    fn cells(&mut self, name: &str, cells: &[u32]) {
        let bytes: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
        self.property(name, &bytes);
    }

    fn device(&mut self, name: &str, compatible: &str, reg: [u32; 2], irq: Option<u32>) {
        self.node(name, |blob| {
            blob.property("compatible", format!("{compatible}\0").as_bytes());
            blob.cells("reg", &reg);
            if let Some(irq) = irq {
                blob.cells("interrupts", &[irq]);
            }
        });
    }

    fn finish(mut self) -> Vec<u8> {
        self.word(9);
        let (body, strings) = (self.body.len() as u32, self.strings.len() as u32);
        let total = 40 + 16 + body + strings;
        let header = [0xd00d_feed, total, 56, 56 + body, 40, 17, 16, 0, strings, body];
        let mut blob: Vec<u8> = header.iter().flat_map(|word: &u32| word.to_be_bytes()).collect();
        blob.extend([0; 16]);
        blob.extend(self.body);
        blob.extend(self.strings);
        blob
    }
}

/// What differs between trees under test.
pub struct Tree {
    pub ram: u32,
    pub initrd: [u32; 2],
    pub uart: u32,
    pub uart_irq: u32,
    pub soc: bool,
}

/// A tree as the machine wants it.
pub const TREE: Tree =
    Tree { ram: 8 << 20, initrd: [0x60_0000, 0x60_0000 + 5000], uart: 0xF400_0000, uart_irq: 1, soc: true };

/// A device tree blob.
pub fn tree(tree: &Tree) -> Vec<u8> {
    let mut blob = Blob::default();
    blob.node("", |blob| {
        blob.cells("#address-cells", &[1]);
        blob.cells("#size-cells", &[1]);
        blob.node("chosen", |blob| {
            blob.cells("linux,initrd-start", &[tree.initrd[0]]);
            blob.cells("linux,initrd-end", &[tree.initrd[1]]);
        });
        blob.node("memory@0", |blob| {
            blob.property("device_type", b"memory\0");
            blob.cells("reg", &[0, tree.ram]);
        });
        blob.node("cpus", |blob| {
            blob.cells("#address-cells", &[1]);
            blob.cells("#size-cells", &[0]);
            blob.cells("timebase-frequency", &[65_000_000]);
        });
        let bus = if tree.soc { 0xF000_0000 } else { 0 };
        let devices = |blob: &mut Blob| {
            blob.device("plic", "sifive,plic-1.0.0", [0xF000_0000 - bus, 0x20_2000], None);
            blob.device("uart", "ns16550", [tree.uart - bus, 0x100], Some(tree.uart_irq));
            blob.device("net", "virtio,mmio", [0xF410_0000 - bus, 0x200], Some(2));
        };
        if tree.soc {
            blob.node("soc", |blob| {
                blob.cells("#address-cells", &[1]);
                blob.cells("#size-cells", &[1]);
                blob.property("compatible", b"simple-bus\0");
                blob.cells("ranges", &[0, 0xF000_0000, 0x1000_0000]);
                devices(blob);
            });
        } else {
            devices(blob);
        }
    });
    blob.finish()
}

/// A kernel Image's header and zeroes.
pub fn kernel(len: usize, memory: u64) -> Vec<u8> {
    let mut image = vec![0; len];
    image[8..16].copy_from_slice(&0x40_0000u64.to_le_bytes());
    image[16..24].copy_from_slice(&memory.to_le_bytes());
    image[48..56].copy_from_slice(b"RISCV\0\0\0");
    image[56..60].copy_from_slice(b"RSC\x05");
    image
}

//! A guest without an operating system: it says READY with its number, echoes what is typed, and does as it is told.

use super::asm::*;
use super::image::{TREE, Tree, kernel, tree};
use std::path::Path;

const T0: Reg = 5;
const T1: Reg = 6;
const T2: Reg = 7;
const S0: Reg = 8;
const S1: Reg = 9;
const A0: Reg = 10;
const A1: Reg = 11;
const A6: Reg = 16;
const A7: Reg = 17;
const RA: Reg = 1;
const SP: Reg = 2;

/// Where the program's texts lie, from the start of RAM.
const TEXTS: u32 = 0x1000;
/// Typed, it makes the guest shut down.
pub const SHUT_DOWN: u8 = 0x11;
/// Typed, it makes the guest reboot.
pub const REBOOT: u8 = 0x12;
/// Typed, it makes the guest print a kernel's last words.
pub const PANIC: u8 = 0x10;

/// How a guest behaves.
#[derive(Clone, Copy, Default)]
pub struct Behaviour {
    /// Added to the number that it says.
    pub wrong_by: i32,
    /// It panics instead of saying READY.
    pub panics: bool,
    /// It says nothing at all.
    pub silent: bool,
}

#[derive(Default)]
struct Program {
    words: Vec<u32>,
    texts: Vec<u8>,
    print: usize,
    put: usize,
}

impl Program {
    fn here(&self) -> usize {
        self.words.len()
    }

    fn add(&mut self, words: &[u32]) {
        self.words.extend(words);
    }

    /// Bytes from here to the word `to`.
    fn to(&self, to: usize) -> i32 {
        4 * (to as i32 - self.here() as i32)
    }

    fn call(&mut self, to: usize) {
        self.add(&[jal(RA, self.to(to))]);
    }

    fn print(&mut self, text: &str) {
        let at = TEXTS + self.texts.len() as u32;
        self.texts.extend(text.as_bytes());
        self.texts.push(0);
        self.add(&li(A0, at));
        self.call(self.print);
    }

    /// Runs `inside` if A0 is `byte`.
    fn if_byte(&mut self, byte: u8, inside: impl FnOnce(&mut Self)) {
        self.add(&[addi(T0, 0, i32::from(byte))]);
        let skip = self.here();
        self.add(&[0]);
        inside(self);
        self.words[skip] = bne(A0, T0, 4 * (self.here() - skip) as i32);
    }

    fn reset(&mut self, kind: i32) {
        self.add(&li(A7, 0x5352_5354));
        self.add(&[addi(A6, 0, 0), addi(A0, 0, kind), addi(A1, 0, 0), ECALL]);
    }
}

fn program(how: Behaviour) -> Program {
    let mut p = Program::default();
    p.add(&li(SP, 0x8000));
    p.add(&li(S0, 0xF400_0000));
    let over = p.here();
    p.add(&[0]);
    // put: A0 to the serial port, once it has room.
    p.put = p.here();
    p.add(&[lbu(T0, S0, 5), andi(T0, T0, 0x20), beq(T0, 0, -8), sb(A0, S0, 0), jalr(0, RA, 0)]);
    // print: the text at A0.
    p.print = p.here();
    p.add(&[addi(SP, SP, -16), sw(RA, SP, 0), sw(S1, SP, 4), addi(S1, A0, 0)]);
    let next = p.here();
    p.add(&[lbu(A0, S1, 0), beq(A0, 0, 16), addi(S1, S1, 1)]);
    p.call(p.put);
    p.add(&[jal(0, p.to(next)), lw(RA, SP, 0), lw(S1, SP, 4), addi(SP, SP, 16), jalr(0, RA, 0)]);
    p.words[over] = jal(0, 4 * (p.here() - over) as i32);

    p.print("a guest of few words\n");
    if how.panics {
        p.print("[    0.000000] Kernel panic - not syncing: on purpose\n");
    } else if !how.silent {
        p.print("READY ");
        // The number is in the last three bytes of the MAC address.
        p.add(&li(T1, 0xF410_0100));
        p.add(&[lbu(S1, T1, 3), slli(S1, S1, 8), lbu(T2, T1, 4), add(S1, S1, T2), slli(S1, S1, 8)]);
        p.add(&[lbu(T2, T1, 5), add(S1, S1, T2), addi(S1, S1, how.wrong_by)]);
        for power in [1000, 100, 10, 1] {
            p.add(&[addi(T1, 0, power), divu(A0, S1, T1), addi(T2, 0, 10), remu(A0, A0, T2)]);
            p.add(&[addi(A0, A0, i32::from(b'0'))]);
            p.call(p.put);
        }
        p.print("\n");
    }
    // The serial port's interrupt ends WFI.
    p.add(&li(T1, 0xF000_0000));
    p.add(&[addi(T0, 0, 1), sw(T0, T1, 4), sb(T0, S0, 1)]);
    p.add(&li(T1, 0xF000_2000));
    p.add(&[addi(T0, 0, 2), sw(T0, T1, 0)]);
    p.add(&li(T0, 1 << 9));
    p.add(&[csrw(SIE, T0)]);
    let wait = p.here();
    p.add(&[WFI]);
    p.add(&li(T1, 0xF020_0004));
    p.add(&[lw(S1, T1, 0)]);
    let typed = p.here();
    p.add(&[lbu(T0, S0, 5), andi(T0, T0, 1)]);
    let none = p.here();
    p.add(&[0, lbu(A0, S0, 0)]);
    p.if_byte(SHUT_DOWN, |p| p.reset(0));
    p.if_byte(REBOOT, |p| p.reset(1));
    p.if_byte(PANIC, |p| p.print("Kernel panic - not syncing: as you wish\n"));
    p.call(p.put);
    p.add(&[jal(0, p.to(typed))]);
    p.words[none] = beq(T0, 0, 4 * (p.here() - none) as i32);
    p.add(&li(T1, 0xF020_0004));
    p.add(&[sw(S1, T1, 0), jal(0, 0)]);
    let last = p.here() - 1;
    p.words[last] = jal(0, 4 * (wait as i32 - last as i32));
    p
}

/// Writes an image folder with the guest.
pub fn write_image(folder: &Path, how: Behaviour) {
    let program = program(how);
    let mut image = kernel(0x2000, 0x2000);
    let code: Vec<u8> = program.words.iter().flat_map(|word| word.to_le_bytes()).collect();
    image[..4].copy_from_slice(&jal(0, 64).to_le_bytes());
    image[64..64 + code.len()].copy_from_slice(&code);
    let texts = TEXTS as usize;
    image[texts..texts + program.texts.len()].copy_from_slice(&program.texts);
    let initrd = [0; 16];
    let dtb = tree(&Tree { ram: 1 << 20, initrd: [0x2_0000, 0x2_0010], ..TREE });
    for (name, bytes) in [("Image", &image[..]), ("initrd.cpio", &initrd[..]), ("vm.dtb", &dtb[..])] {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    std::fs::write(folder.join("manifest.json"), r#"{ "schema": 1, "hash": "0123456789abcdef0123" }"#)
        .unwrap();
}

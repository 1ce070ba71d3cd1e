//! What differs between two sides, where it began, and what to look at: a folder with both states, the way there, and the
//! command that leads there again.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Error, Pair, Side};
use crate::abi::{FRAME_BYTES, Vm};
use crate::backend::EngineError;

/// Each look at a stretch with a difference in it cuts it into so many parts.
const PARTS: u64 = 16;
/// Steps of the trace before the difference, and behind it.
const BEFORE: u64 = 96;
const BEHIND: u64 = 8;
const PAGE: usize = FRAME_BYTES as usize;

/// What both sides say of a VM.
pub struct Difference {
    /// Which VM.
    pub vm: u32,
    /// The states: the reference, and the other side.
    pub states: [String; 2],
    /// All RAM of both.
    pub ram: [Vec<u8>; 2],
    /// What both have printed.
    pub console: [Vec<u8>; 2],
    /// Names of the sides.
    pub names: [&'static str; 2],
    /// The frames that it has sent are not the same.
    pub frames: bool,
}

/// All of a VM that both sides must agree on, a line each.
pub fn state(vm: &Vm) -> String {
    let h = &vm.hart;
    let mut out = String::new();
    // Writing to a string can't fail.
    let _ = writeln!(out, "pc {:#010x}", h.pc);
    for (i, x) in h.x[..32].iter().enumerate() {
        let _ = writeln!(out, "x{i} {x:#010x}");
    }
    let mut hart = *h;
    (hart.x, hart.pc) = ([0; 33], 0);
    let _ = writeln!(out, "{hart:#x?}\n{:#x?}\n{:#x?}\n{:#x?}\n{:#x?}", vm.plic, vm.uart, vm.net, vm.rtc);
    out
}

/// Compares VM `vm` on both sides: hart, devices, all RAM, what it printed and sent.
pub fn compare(pair: &Pair, vm: u32) -> Result<Option<Difference>, EngineError> {
    let Some(other) = &pair.other else { return Ok(None) };
    let sides = [&pair.reference, other];
    let states = [state(&sides[0].machines.state(vm)?), state(&sides[1].machines.state(vm)?)];
    let ram = [sides[0].machines.ram(vm)?, sides[1].machines.ram(vm)?];
    let index = vm as usize;
    let frames = pair.frames_differ() == Some(vm);
    let same = states[0] == states[1]
        && ram[0] == ram[1]
        && sides[0].console[index] == sides[1].console[index]
        && !frames;
    Ok((!same).then(|| Difference {
        vm,
        states,
        ram,
        console: sides.map(|side| side.console[index].clone()),
        names: sides.map(|side| side.name),
        frames,
    }))
}

/// The first VM that differs.
pub fn find(pair: &Pair) -> Result<Option<Difference>, EngineError> {
    for vm in 0..pair.reference.machines.vms() {
        if let Some(difference) = compare(pair, vm)? {
            return Ok(Some(difference));
        }
    }
    Ok(None)
}

impl Difference {
    /// The first line of the states that differs, or where else a difference is; for people.
    pub fn what(&self) -> String {
        let [a, b] = self.names;
        let line = self.states[0].lines().zip(self.states[1].lines()).find(|(a, b)| a != b);
        let pages: Vec<usize> = (0..self.ram[0].len() / PAGE)
            .filter(|p| self.ram[0][p * PAGE..][..PAGE] != self.ram[1][p * PAGE..][..PAGE])
            .collect();
        let mut text = match line {
            Some((x, y)) => format!("{a}: {}, {b}: {}", x.trim(), y.trim()),
            None => "hart and devices agree".into(),
        };
        // Writing to a string can't fail.
        if !pages.is_empty() {
            let _ =
                write!(text, "; {} pages of RAM differ: {:x?}", pages.len(), &pages[..pages.len().min(8)]);
        }
        if self.console[0] != self.console[1] {
            text += "; they have printed different things";
        }
        if self.frames {
            text += "; they have sent different frames";
        }
        text
    }

    /// Writes both states into the folder.
    pub fn write(&self, folder: &Path) -> Result<(), WriteError> {
        for (i, name) in self.names.iter().enumerate() {
            let name = name.to_ascii_lowercase();
            write_file(folder, &format!("{name}.txt"), self.states[i].as_bytes())?;
            write_file(folder, &format!("{name}.ram"), &self.ram[i])?;
            write_file(folder, &format!("{name}.console"), &self.console[i])?;
        }
        Ok(())
    }
}

/// A file of the folder can't be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot be written: {cause}", path.display())]
pub struct WriteError {
    path: PathBuf,
    cause: std::io::Error,
}

/// Writes one file of the folder, which is made if need be.
pub fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
    let path = folder.join(name);
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&path, bytes))
        .map_err(|cause| WriteError { path, cause })
}

/// Finds the first step after which the sides differ, between `good` and `bad`, by running them again and again, looking
/// ever closer. If closer looks find nothing (where slices end matters, then) the stretch stays as it was.
pub fn narrow(
    mut fresh: impl FnMut() -> Result<Pair, Error>,
    (mut good, mut bad): (u64, u64),
) -> Result<(u64, u64, Option<Difference>), Error> {
    let mut last = None;
    while bad - good > 1 {
        let mut pair = fresh()?;
        pair.advance(good)?;
        let part = (bad - good).div_ceil(PARTS);
        let mut found = None;
        while pair.at < bad {
            let before = pair.at;
            pair.advance(bad.min(before + part))?;
            if let Some(difference) = find(&pair)? {
                found = Some((before, pair.at, difference));
                break;
            }
            if pair.at == before {
                break;
            }
        }
        let Some((from, to, difference)) = found else { break };
        (good, bad, last) = (from, to, Some(difference));
    }
    Ok((good, bad, last))
}

/// What the reference does around step `at`, instruction by instruction: step, mode, pc, instruction, and the registers
/// that it changes.
pub fn trace(mut pair: Pair, vm: u32, at: u64) -> Result<String, Error> {
    pair.other = None;
    pair.advance(at.saturating_sub(BEFORE))?;
    let mut out = String::from("step  mode  pc  instruction  what it changes\n");
    let mut before = pair.reference.machines.state(vm)?;
    for _ in 0..BEFORE + BEHIND {
        let insn = fetch(&pair.reference, &before)?;
        pair.advance(pair.at + 1)?;
        let after = pair.reference.machines.state(vm)?;
        let (a, b) = (&before.hart, &after.hart);
        let mode = if a.mode == 0 { 'U' } else { 'S' };
        let insn = insn.map_or_else(|| "--------".into(), |insn| format!("{insn:08x}"));
        let mark = if pair.at == at { " <- differs behind this one" } else { "" };
        // Writing to a string can't fail.
        let _ = write!(out, "{:>10} {mode} {:08x} {insn}", pair.at, a.pc);
        for i in (1..32).filter(|i| a.x[*i] != b.x[*i]) {
            let _ = write!(out, " x{i}={:08x}", b.x[i]);
        }
        if a.trapped != b.trapped || a.mode != b.mode {
            let _ = write!(out, " trap {:08x} at {:08x}", b.scause, b.sepc);
        }
        let _ = writeln!(out, "{mark}");
        before = after;
    }
    Ok(out)
}

/// The instruction at a VM's pc, through Sv32; none where nothing can be fetched.
fn fetch(side: &Side, vm: &Vm) -> Result<Option<u32>, EngineError> {
    let ram = side.machines.ram(vm.number)?;
    let word = |at: u64| {
        let at = usize::try_from(at).ok()?;
        Some(u32::from_le_bytes(ram.get(at..at + 4)?.try_into().ok()?))
    };
    let pc = vm.hart.pc;
    if vm.hart.satp >> 31 == 0 {
        return Ok(word(pc.into()));
    }
    let table = u64::from(vm.hart.satp & 0x3f_ffff) << 12;
    let walk = || {
        let first = word(table + u64::from(pc >> 22) * 4)?;
        if first & 1 == 0 {
            return None;
        }
        let base = u64::from(first >> 10) << 12;
        if first & 0xe != 0 {
            return word(base & !0x3f_ffff | u64::from(pc & 0x3f_ffff));
        }
        let second = word(base + u64::from(pc >> 12 & 0x3ff) * 4)?;
        (second & 1 != 0).then(|| word((u64::from(second >> 10) << 12) | u64::from(pc & 0xfff)))?
    };
    Ok(walk())
}

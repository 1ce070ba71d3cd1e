//! Decoded code that is kept from start to start: texts, their traces and where the texts' table has them, in a file for
//! each image and format. What it says depends on the guests' code alone, so any device of the architecture can have it.
//!
//! A file is a check sum, a header and three arrays, as on the device. What is read is not trusted: a damaged file, one
//! of another format, or one with a number that leads nowhere is no use, and made anew.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use sha2::{Digest, Sha256};

use super::choice::EngineKind;
use super::cubin;
use crate::abi::{FRAME_BYTES, TEXT_BYTES, TEXTS_MOST};
use crate::memory::BootMemory;

const MAGIC: [u8; 8] = *b"LoGcode2";
/// Bytes of the check sum at the start.
const SUM_BYTES: usize = 8;
/// Magic, then sizes of a text and a trace, entries of the table, texts and traces, a word each, and the steps in two.
const HEAD_BYTES: usize = 8 + 5 * 4 + 8;
/// Of a device's traces so many bytes are kept: those that were seen to be executed (which is looked at now and then, so
/// that it says that they are executed often), then others, those that were made first before those that came later.
/// Wherever an interrupt or a slice ends a trace another begins, so that there is no end to them; most of those are never
/// needed again.
pub(super) const TRACE_BYTES_MOST: u32 = 32 << 20;
/// Larger files are not written.
const MOST_BYTES: u64 = 64 << 20;
/// Files that are left in the folder, the latest used ones.
const FILES: usize = 8;
/// In the table or an index: a warp is making it (`kernels/trace.cuh`).
const BUSY: u32 = u32::MAX;
/// A text that the table does not have.
const NO_SLOT: u32 = u32::MAX;
/// Words of a text, and of them those that say where traces start, behind the page's own.
const TEXT_WORDS: usize = TEXT_BYTES as usize / 4;
const INDEX: std::ops::Range<usize> = FRAME_BYTES as usize / 4..FRAME_BYTES as usize / 2;
/// Behind them a byte for each word of the page, whose uppermost bit says that a warp is making a trace anew.
const HINTS: std::ops::Range<usize> = INDEX.end..INDEX.end + FRAME_BYTES as usize / 16;
const NOT_CLAIMED: u32 = 0x7f7f_7f7f;
/// Bytes of a trace's lane.
const LANE_BYTES: usize = 16;
/// Where a lane names a text, if it does: which word, its lowest bit, and how many there are. As in `TraceLane`.
pub(super) const LANE_TEXT: Option<(usize, u32, u32)> = Some((3, 10, TEXTS_MOST));
/// Where a trace's first lane says that the trace was seen to be executed: which byte, and which bit of it.
pub(super) const TRACE_USED: Option<(usize, u8)> = Some((12, 2));

/// Sizes that a file must agree on with the device, and what there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// Bytes of a trace.
    pub trace_bytes: u32,
    /// Entries of the texts' table.
    pub slots: u32,
    /// Texts there is room for.
    pub texts: u32,
    /// Traces that there is room for, or that are kept at most.
    pub traces: u32,
    /// Traces that there is room for on the device.
    pub room: u32,
    /// See [`LANE_TEXT`].
    pub lane_text: Option<(usize, u32, u32)>,
    /// See [`TRACE_USED`].
    pub trace_used: Option<(usize, u8)>,
}

impl Format {
    /// Whether the trace was seen to be executed since it was last kept.
    fn is_used(&self, trace: &[u8]) -> bool {
        self.trace_used.is_some_and(|(byte, bit)| trace.get(byte).is_some_and(|byte| byte & bit != 0))
    }

    /// Whether all texts that a trace names are in the table.
    fn names_known_texts(&self, trace: &[u8], slot_of: &[u32]) -> bool {
        let Some((word, shift, texts)) = self.lane_text else { return true };
        let known = |text: u32| slot_of.get(text as usize).is_some_and(|slot| *slot != NO_SLOT);
        trace.as_chunks::<LANE_BYTES>().0.iter().all(|lane| {
            let word = lane.as_chunks().0.get(word).map_or(0, |word| u32::from_le_bytes(*word));
            known(word >> shift & (texts - 1))
        })
    }
}

/// Trace `entry` - 1.
fn trace_of(traces: &[u8], trace_bytes: u32, entry: u32) -> Option<&[u8]> {
    let at = (entry.checked_sub(1)? as usize).checked_mul(trace_bytes as usize)?;
    traces.get(at..at.checked_add(trace_bytes as usize)?)
}

/// Decoded code, whole and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    trace_bytes: u32,
    slots: u32,
    /// Steps that guests have executed with it, and it was learned from.
    pub steps: u64,
    /// Where in the table each text is; [`NO_SLOT`] if it is not.
    slot_of: Vec<u32>,
    /// The texts.
    pub words: Vec<u32>,
    /// The traces are its end.
    bytes: Vec<u8>,
    traces_at: usize,
}

impl Decoded {
    /// What a device has, which may be making more at this time. `texts` reads the first so many texts, `traces` the first
    /// so many traces. Each is read after what leads to it, so that all that is found is finished. Traces that have been
    /// replaced since are left out, and the others numbered anew, those before that were seen to be executed.
    pub fn gather<E>(
        format: Format,
        table: &[u32],
        texts: impl FnOnce(usize) -> Result<Vec<u32>, E>,
        traces: impl FnOnce(usize) -> Result<Vec<u8>, E>,
    ) -> Result<Self, E> {
        let mut slot_of = Vec::new();
        for (slot, &entry) in table.iter().enumerate() {
            if entry == 0 || entry == BUSY || entry > format.texts {
                continue;
            }
            let text = entry as usize - 1;
            if slot_of.len() <= text {
                slot_of.resize(text + 1, NO_SLOT);
            }
            slot_of[text] = slot as u32;
        }
        let mut words = texts(slot_of.len())?;
        let mut count = 0;
        for (text, slot) in words.chunks_exact_mut(TEXT_WORDS).zip(&slot_of) {
            for entry in &mut text[INDEX] {
                if *slot == NO_SLOT || *entry == BUSY || *entry > format.room {
                    *entry = 0;
                }
                count = count.max(*entry);
            }
            text[HINTS].iter_mut().for_each(|hints| *hints &= NOT_CLAIMED);
        }
        let traces = traces(count as usize)?;
        let mut entries: Vec<&mut u32> = words
            .chunks_exact_mut(TEXT_WORDS)
            .flat_map(|text| &mut text[INDEX])
            .filter(|entry| **entry != 0)
            .collect();
        let used =
            |entry| trace_of(&traces, format.trace_bytes, entry).is_some_and(|trace| format.is_used(trace));
        entries.sort_by_cached_key(|entry| (!used(**entry), **entry));
        let mut bytes = Vec::new();
        let (mut last, mut number) = (0, 0);
        for entry in entries {
            if *entry != last {
                // A trace may have been made since, of a text that came since.
                let trace = trace_of(&traces, format.trace_bytes, *entry)
                    .filter(|trace| number < format.traces && format.names_known_texts(trace, &slot_of));
                let Some(trace) = trace else {
                    *entry = 0;
                    continue;
                };
                let start = bytes.len();
                bytes.extend_from_slice(trace);
                if let Some((byte, bit)) = format.trace_used
                    && let Some(byte) = bytes.get_mut(start + byte)
                {
                    *byte &= !bit;
                }
                (last, number) = (*entry, number + 1);
            }
            *entry = number;
        }
        let (trace_bytes, slots) = (format.trace_bytes, format.slots);
        Ok(Self { trace_bytes, slots, steps: 0, slot_of, words, bytes, traces_at: 0 })
    }

    /// The traces.
    pub fn traces(&self) -> &[u8] {
        &self.bytes[self.traces_at..]
    }

    /// Texts.
    pub fn texts(&self) -> u32 {
        self.slot_of.len() as u32
    }

    /// Traces.
    pub fn trace_count(&self) -> u32 {
        (self.traces().len() / self.trace_bytes.max(1) as usize) as u32
    }

    /// The table of texts.
    pub fn table(&self) -> Vec<u32> {
        let mut table = vec![0; self.slots as usize];
        for (&slot, text) in self.slot_of.iter().zip(1..) {
            if let Some(entry) = table.get_mut(slot as usize) {
                *entry = text;
            }
        }
        table
    }

    /// Bytes of its file.
    fn file_bytes(&self) -> u64 {
        (SUM_BYTES + HEAD_BYTES + (self.slot_of.len() + self.words.len()) * 4 + self.traces().len()) as u64
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.file_bytes() as usize);
        bytes.resize(SUM_BYTES, 0);
        bytes.extend(MAGIC);
        for word in [TEXT_BYTES, self.trace_bytes, self.slots, self.texts(), self.trace_count()] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.steps.to_le_bytes());
        for word in self.slot_of.iter().chain(&self.words) {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.traces());
        let sum = check_sum(&bytes[SUM_BYTES..]);
        bytes[..SUM_BYTES].copy_from_slice(&sum);
        bytes
    }

    fn decode(bytes: Vec<u8>, format: Format) -> Result<Self, Bad> {
        let (sum, rest) = bytes.split_at_checked(SUM_BYTES).ok_or(Bad::Damaged)?;
        if check_sum(rest) != sum {
            return Err(Bad::Damaged);
        }
        let (head, rest) = rest.split_at_checked(HEAD_BYTES).ok_or(Bad::Damaged)?;
        let (magic, head) = head.split_at(MAGIC.len());
        let head = words(head);
        if magic != MAGIC || head[..3] != [TEXT_BYTES, format.trace_bytes, format.slots] {
            return Err(Bad::Foreign);
        }
        let (texts, traces) = (head[3], head[4]);
        if texts > format.texts || traces > format.traces {
            return Err(Bad::Foreign);
        }
        let (slots, text_bytes) = (texts as usize * 4, texts as usize * TEXT_BYTES as usize);
        let trace_bytes = traces as usize * format.trace_bytes as usize;
        if rest.len() != slots + text_bytes + trace_bytes {
            return Err(Bad::Damaged);
        }
        let decoded = Self {
            trace_bytes: format.trace_bytes,
            slots: format.slots,
            steps: u64::from(head[5]) | u64::from(head[6]) << 32,
            slot_of: words(&rest[..slots]),
            words: words(&rest[slots..slots + text_bytes]),
            traces_at: bytes.len() - trace_bytes,
            bytes,
        };
        let mut taken = vec![false; format.slots as usize];
        for &slot in decoded.slot_of.iter().filter(|slot| **slot != NO_SLOT) {
            let taken = taken.get_mut(slot as usize).ok_or(Bad::Number)?;
            if std::mem::replace(taken, true) {
                return Err(Bad::Number);
            }
        }
        let mut entries = decoded.words.chunks_exact(TEXT_WORDS).flat_map(|text| &text[INDEX]);
        let leads = |entry: &u32| {
            *entry == 0
                || trace_of(decoded.traces(), format.trace_bytes, *entry)
                    .is_some_and(|trace| format.names_known_texts(trace, &decoded.slot_of))
        };
        if !entries.all(leads) {
            return Err(Bad::Number);
        }
        Ok(decoded)
    }
}

/// Finds accidents, in a fraction of the time of a hash that withstands malice: whoever can write to the folder can write
/// kernels, too.
fn check_sum(bytes: &[u8]) -> [u8; SUM_BYTES] {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    // Each lane is a chain of invertible steps: a change in one word is never lost.
    let step = |lane: u64, word: u64| (lane ^ word).wrapping_mul(ODD).rotate_left(29);
    let mut lanes = [1u64, 2, 3, 4];
    let (blocks, rest) = bytes.as_chunks::<32>();
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks().0) {
            *lane = step(*lane, u64::from_le_bytes(*word));
        }
    }
    let rest = rest.iter().fold(bytes.len() as u64, |sum, byte| step(sum, u64::from(*byte)));
    lanes.into_iter().fold(rest, step).to_le_bytes()
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// Why a file is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Bad {
    #[error("it is damaged")]
    Damaged,
    #[error("it has another format")]
    Foreign,
    #[error("it has a number that leads nowhere")]
    Number,
}

/// What became of the file at the start.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    /// What it had.
    pub decoded: Option<Decoded>,
    /// Time to read it.
    pub took: Duration,
    /// Why it is of no use, if it is there and is not.
    pub trouble: Option<String>,
}

/// What of it is told.
#[derive(Clone, Debug, Default)]
pub(super) struct Loaded {
    /// Texts and traces; none if there was no file that could be used.
    pub counts: Option<(u32, u32)>,
    /// Steps that guests had executed with it.
    pub steps: u64,
    /// Time to read it.
    pub took: Duration,
    /// Why the file is of no use.
    pub trouble: Option<String>,
}

impl From<&Found> for Loaded {
    fn from(found: &Found) -> Self {
        let counts = found.decoded.as_ref().map(|decoded| (decoded.texts(), decoded.trace_count()));
        let steps = found.decoded.as_ref().map_or(0, |decoded| decoded.steps);
        Self { counts, steps, took: found.took, trouble: found.trouble.clone() }
    }
}

/// What is in the file with decoded code.
#[derive(Debug, Default)]
pub(super) struct InFile {
    pub texts: u64,
    /// Steps that it was learned from.
    pub steps: u64,
}

/// When decoded code was last cleared, and what it has been learned from: steps of earlier starts, and those here but for
/// the first so many.
#[derive(Debug, Default)]
pub(super) struct Cleared {
    pub at: Option<Instant>,
    pub earlier_steps: u64,
    pub but_for: u64,
}

/// `$XDG_CACHE_HOME/linux-on-gpu/decoded`, else `~/.cache/linux-on-gpu/decoded`; none if neither variable is set.
pub(super) fn folder() -> Option<PathBuf> {
    Some(cubin::cache_folder()?.with_file_name("decoded"))
}

/// The hash of an image's contents.
pub(super) fn image_hash(boot: &BootMemory) -> String {
    let mut hash = Sha256::new();
    for piece in &boot.pieces {
        hash.update(piece.address.to_le_bytes());
        hash.update((piece.bytes.len() as u64).to_le_bytes());
        hash.update(&piece.bytes);
    }
    hex::encode(hash.finalize())
}

/// The file for an image, an engine, and an architecture.
pub(super) fn file(folder: &Path, image: &str, arch: &str, kind: EngineKind) -> PathBuf {
    folder.join(cubin::format_key(arch, kind, image))
}

/// Reads a file.
pub(super) fn read(file: &Path, format: Format) -> Found {
    let began = Instant::now();
    let trouble = |why: &dyn std::fmt::Display| Found {
        trouble: Some(format!("{}: decoded code can't be used: {why}; it is made anew", file.display())),
        ..Found::default()
    };
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Found::default(),
        Err(error) => return trouble(&error),
    };
    match Decoded::decode(bytes, format) {
        Ok(decoded) => {
            // The latest used ones are kept. A file that can't be marked goes a little earlier.
            let _ = std::fs::File::options()
                .append(true)
                .open(file)
                .and_then(|file| file.set_modified(SystemTime::now()));
            Found { decoded: Some(decoded), took: began.elapsed(), trouble: None }
        }
        Err(why) => trouble(&why),
    }
}

/// Writes a file, unless it would be too large; false then. Readers see the old one or the new one.
pub(super) fn write(file: &Path, decoded: &Decoded) -> std::io::Result<bool> {
    if decoded.file_bytes() > MOST_BYTES {
        return Ok(false);
    }
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    new.write_all(&decoded.encode())?;
    new.persist(file)?;
    prune(folder)?;
    Ok(true)
}

/// Removes all but the latest files. Others may do the same at this time.
fn prune(folder: &Path) -> std::io::Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = std::fs::read_dir(folder)?
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort_unstable();
    let old = files.len().saturating_sub(FILES);
    for (_, path) in files.into_iter().take(old) {
        // Somebody else may have been faster.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

#[cfg(test)]
#[path = "kept/tests.rs"]
mod tests;

//! Reads a VM's console as it comes: READY and panic lines, and the last lines for reports.
//!
//! Guests are hostile: memory is bounded whatever they print, and what is shown on the host is made printable.

use std::collections::VecDeque;

/// Bytes of a line that are looked at; the rest of a longer one is ignored.
const LINE_BYTES: usize = 256;
/// Bytes of console output kept for reports and for whoever attaches.
const TAIL_BYTES: usize = 4096;
/// Lines of it that are shown.
pub const TAIL_LINES: usize = 20;

const PANIC: &[u8] = b"Kernel panic - not syncing";

/// What a console line tells the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mark {
    /// `READY <n>`: /init has started everything in VM n.
    Ready(u32),
    /// The kernel's panic line, printable.
    Panic(String),
}

/// Watches one console.
#[derive(Default)]
pub struct Scanner {
    line: Vec<u8>,
    tail: VecDeque<u8>,
}

impl Scanner {
    /// Takes the next output and appends what its complete lines tell.
    pub fn feed(&mut self, bytes: &[u8], marks: &mut Vec<Mark>) {
        self.keep(bytes);
        for piece in bytes.split_inclusive(|&b| b == b'\n') {
            let (text, complete) = match piece {
                [text @ .., b'\n'] => (text, true),
                text => (text, false),
            };
            let room = LINE_BYTES - self.line.len();
            self.line.extend_from_slice(&text[..text.len().min(room)]);
            if complete {
                marks.extend(mark(&self.line));
                self.line.clear();
            }
        }
    }

    /// The guest starts over: what it has begun to print is over.
    pub fn reset(&mut self) {
        self.line.clear();
    }

    /// The last lines, raw; an unfinished one is the last.
    pub fn tail(&self) -> Vec<u8> {
        let tail: Vec<u8> = self.tail.iter().copied().collect();
        // The first line may have lost its beginning.
        let begin = match tail.len() {
            TAIL_BYTES => tail.iter().position(|&b| b == b'\n').map_or(0, |at| at + 1),
            _ => 0,
        };
        let ended = usize::from(tail.ends_with(b"\n"));
        let mut ends = tail.iter().enumerate().rev().filter(|(_, b)| **b == b'\n').map(|(at, _)| at + 1);
        let begin = ends.nth(TAIL_LINES - 1 + ended).map_or(begin, |at| at.max(begin));
        tail[begin..].to_vec()
    }

    /// The last lines, printable.
    pub fn last_lines(&self) -> Vec<String> {
        let tail = self.tail();
        let tail = tail.strip_suffix(b"\n").unwrap_or(&tail);
        if tail.is_empty() {
            return Vec::new();
        }
        tail.split(|&b| b == b'\n').map(|line| printable(&line[..line.len().min(LINE_BYTES)])).collect()
    }

    fn keep(&mut self, bytes: &[u8]) {
        let new = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let excess = (self.tail.len() + new.len()).saturating_sub(TAIL_BYTES);
        self.tail.drain(..excess);
        self.tail.extend(new);
    }
}

fn mark(line: &[u8]) -> Option<Mark> {
    let line = line.trim_ascii_end();
    if let Some(number) = line.strip_prefix(b"READY ") {
        let number = std::str::from_utf8(number).ok()?;
        let digits = number.bytes().all(|b| b.is_ascii_digit());
        return digits.then(|| number.parse().ok()).flatten().map(Mark::Ready);
    }
    let at = line.windows(PANIC.len()).position(|window| window == PANIC)?;
    Some(Mark::Panic(printable(&line[at..])))
}

/// Text that is safe on the host's terminal: control characters and direction overrides are escaped.
pub fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
    for c in String::from_utf8_lossy(bytes).chars() {
        match c {
            '\t' => text.push(' '),
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => {
                text.extend(c.escape_unicode());
            }
            c if c.is_control() => text.extend(c.escape_default()),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(chunks: &[&[u8]]) -> Vec<Mark> {
        let mut scanner = Scanner::default();
        let mut marks = Vec::new();
        for chunk in chunks {
            scanner.feed(chunk, &mut marks);
        }
        marks
    }

    #[test]
    fn ready_is_found_wherever_the_chunks_end() {
        let text = b"Run /init\r\nREADY 12\r\n/ # ";
        for cut in 0..text.len() {
            let (a, b) = text.split_at(cut);
            assert_eq!(marks(&[a, b]), [Mark::Ready(12)], "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(marks(&bytes), [Mark::Ready(12)]);
    }

    #[test]
    fn only_whole_ready_lines_count() {
        assert_eq!(marks(&[b"READY 1"]), []);
        assert_eq!(marks(&[b"already READY 1\n"]), []);
        assert_eq!(marks(&[b"READY +1\nREADY\nREADY x\nREADY 99999999999\nREADY \n"]), []);
        assert_eq!(marks(&[b"READY 7\n"]), [Mark::Ready(7)]);
    }

    #[test]
    fn a_panic_is_found_wherever_the_chunks_end() {
        let text = b"[    0.1] Kernel panic - not syncing: VFS: \x1b[31mno root\r\n[    0.1] ---[ end\r\n";
        for cut in 0..text.len() {
            let (a, b) = text.split_at(cut);
            let found = marks(&[a, b]);
            assert_eq!(found, [Mark::Panic("Kernel panic - not syncing: VFS: \\u{1b}[31mno root".into())]);
        }
    }

    #[test]
    fn endless_lines_cost_no_memory() {
        let mut scanner = Scanner::default();
        let mut marks = Vec::new();
        for _ in 0..1000 {
            scanner.feed(&[b'x'; 4099], &mut marks);
        }
        assert!(scanner.line.capacity() <= 2 * LINE_BYTES && scanner.tail.len() == TAIL_BYTES);
        scanner.feed(b"\nREADY 0\n", &mut marks);
        assert_eq!(marks, [Mark::Ready(0)]);
    }

    #[test]
    fn last_lines_are_few_and_printable() {
        let mut scanner = Scanner::default();
        for i in 0..100 {
            scanner.feed(format!("line {i}\t\x1b]0;title\x07\u{202e}\r\n").as_bytes(), &mut Vec::new());
        }
        let lines = scanner.last_lines();
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines[TAIL_LINES - 1], "line 99 \\u{1b}]0;title\\u{7}\\u{202e}");
        assert_eq!(lines[0], "line 80 \\u{1b}]0;title\\u{7}\\u{202e}");
        let mut scanner = Scanner::default();
        scanner.feed(b"a\nb", &mut Vec::new());
        assert_eq!(scanner.last_lines(), ["a", "b"]);
        assert!(Scanner::default().last_lines().is_empty());
    }
}

use super::*;

const FORMAT: Format =
    Format { trace_bytes: 64, slots: 32, texts: 8, traces: 40, room: 50, lane_text: None, trace_used: None };

/// A text whose index has these entries, at words of the page that depend on it.
fn text(fill: u32, entries: &[u32]) -> Vec<u32> {
    let mut words = vec![fill; INDEX.start];
    words.resize(TEXT_WORDS, 0);
    for (n, &entry) in entries.iter().enumerate() {
        words[INDEX.start + n * 7] = entry;
    }
    words
}

fn trace_bytes(count: usize) -> Vec<u8> {
    (0..count * FORMAT.trace_bytes as usize).map(|i| (i / 64 + i) as u8).collect()
}

/// Gathers from a device that has these texts and this table.
fn gather(table: &[(usize, u32)], device: &[Vec<u32>]) -> Decoded {
    let mut slots = vec![0; FORMAT.slots as usize];
    for &(slot, entry) in table {
        slots[slot] = entry;
    }
    let texts = |count: usize| Ok::<_, ()>(device[..count].concat());
    Decoded::gather(FORMAT, &slots, texts, |count| Ok(trace_bytes(count))).unwrap()
}

fn sample() -> Decoded {
    gather(&[(3, 1), (31, 2), (0, 3)], &[text(7, &[1, 2]), text(8, &[]), text(9, &[5, 3])])
}

#[test]
fn what_is_written_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a/b");
    assert!(read(&file, FORMAT).decoded.is_none() && read(&file, FORMAT).trouble.is_none());
    let mut decoded = sample();
    decoded.steps = 0x1234_5678_9abc;
    assert_eq!((decoded.texts(), decoded.trace_count()), (3, 4));
    assert!(write(&file, &decoded).unwrap());
    assert_eq!(std::fs::metadata(&file).unwrap().len(), decoded.file_bytes());
    let found = read(&file, FORMAT);
    assert_eq!((found.decoded.map(in_memory), found.trouble), (Some(decoded), None));
    // A larger device of the same table takes it, too.
    let larger = Format { texts: 100, traces: 1000, ..FORMAT };
    assert_eq!(read(&file, larger).decoded.unwrap().texts(), 3);
    // No leftovers of temporary files.
    assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn what_is_unfinished_is_left_out() {
    // Text 1 is being made: the table does not lead to it yet. Text 2 has a trace that is being made.
    let mut device = [text(7, &[4, BUSY]), text(8, &[6, 7]), text(9, &[BUSY, 2, 99])];
    // Of text 3 a trace is being made anew; nobody would make it again if that stayed so.
    device[2][HINTS.start..HINTS.start + 2].copy_from_slice(&[0x0580_8106, 0x2a]);
    let decoded = gather(&[(1, 1), (2, BUSY), (3, 3), (4, 9), (5, u32::MAX - 1)], &device);
    assert_eq!((decoded.texts(), decoded.trace_count()), (3, 2));
    assert_eq!(decoded.slot_of, [1, NO_SLOT, 3]);
    let index = |n: usize| {
        decoded.words[n * TEXT_WORDS..][INDEX].iter().copied().filter(|entry| *entry != 0).collect::<Vec<_>>()
    };
    assert_eq!((index(0), index(1), index(2)), (vec![2], vec![], vec![1]));
    assert_eq!(decoded.words[2 * TEXT_WORDS..][HINTS][..3], [0x0500_0106, 0x2a, 0]);
    let table = decoded.table();
    assert_eq!((table[1], table[3], table.iter().filter(|entry| **entry != 0).count()), (1, 3, 2));
    assert_eq!(Decoded::decode(decoded.encode(), FORMAT).map(in_memory), Ok(decoded));
}

#[test]
fn traces_lead_to_texts_of_the_table_only() {
    let format = Format { lane_text: Some((3, 10, 4096)), ..FORMAT };
    // Trace n names text n / 2 in its last lane, and text 0 in the others.
    let traces = |count: usize| {
        let mut bytes = vec![0; count * 64];
        for n in 0..count {
            bytes[n * 64 + 61] = (n as u8 / 2) << 2;
            (bytes[n * 64 + 60], bytes[n * 64 + 63]) = (0xff, 0xff); // bits that are no number
        }
        Ok::<_, ()>(bytes)
    };
    let device = [text(7, &[1, 2, 3, 5]), text(8, &[]), text(9, &[4, 6, 7, 9])].concat();
    let mut table = vec![0; 32];
    (table[4], table[6]) = (1, 3); // text 1 is not in it
    let decoded = Decoded::gather(format, &table, |_| Ok(device), traces).unwrap();
    let entries: Vec<u32> = decoded.words.iter().copied().filter(|word| (1..7).contains(word)).collect();
    // Traces 2 and 3 name text 1, traces 6 and 8 texts 3 and 4, which came later.
    assert_eq!(entries, [1, 2, 3, 4]);
    let bytes = decoded.encode();
    assert_eq!(Decoded::decode(bytes.clone(), format).map(in_memory), Ok(decoded.clone()));
    let first = bytes.len() - decoded.traces().len() + 12;
    let others: u32 = 0xffc0_03ff; // bits that are no number
    for (text, good) in [(0, true), (2, true), (1, false), (3, false), (0xfff, false)] {
        let mut bytes = bytes.clone();
        put(&mut bytes, first, text << 10 | others);
        let sum = check_sum(&bytes[SUM_BYTES..]);
        bytes[..SUM_BYTES].copy_from_slice(&sum);
        assert_eq!(Decoded::decode(bytes, format).is_ok(), good, "{text:#x}");
    }
}

/// Of 50 traces those in use are kept, the first 40 of them, each where it was found.
#[test]
fn traces_in_use_are_kept_and_numbered_anew() {
    let used: Vec<u32> = (1..=50).filter(|entry| entry % 8 != 3).rev().collect();
    let (first, second) = used.split_at(20);
    let device = [text(60, first), text(70, &[]), text(80, second)];
    let decoded = gather(&[(3, 1), (31, 2), (0, 3)], &device);
    let all = trace_bytes(50);
    let mut kept = Vec::new();
    for (old, new) in device.concat().iter().zip(&decoded.words).filter(|(old, _)| used.contains(old)) {
        let bytes = |traces, entry| trace_of(traces, FORMAT.trace_bytes, entry);
        if *new != 0 {
            assert_eq!(bytes(decoded.traces(), *new), bytes(&all, *old), "{old} is now {new}");
            kept.push((*old, *new));
        }
    }
    kept.sort_unstable();
    let expected: Vec<u32> = used.iter().rev().copied().take(40).collect();
    assert_eq!(kept, expected.into_iter().zip(1..).collect::<Vec<_>>());
    assert_eq!(decoded.trace_count(), 40);
    assert_eq!(Decoded::decode(decoded.encode(), FORMAT).map(in_memory), Ok(decoded));
}

/// Where there is no room for all, those that were seen to be executed stay; to stay again they have to be seen again.
#[test]
fn traces_that_are_executed_are_kept_before_others() {
    let format = Format { trace_used: Some((12, 2)), traces: 2, ..FORMAT };
    // Traces 2 and 4 of four were seen.
    let traces = |count: usize| {
        let mut bytes = trace_bytes(count);
        for (n, trace) in bytes.chunks_mut(64).enumerate() {
            trace[12] = if n % 2 == 1 { 0x83 } else { 0x81 };
        }
        Ok::<_, ()>(bytes)
    };
    let mut table = vec![0; 32];
    table[4] = 1;
    let decoded = Decoded::gather(format, &table, |_| Ok(text(7, &[1, 2, 3, 4])), traces).unwrap();
    let index: Vec<u32> = (0..4).map(|n| decoded.words[INDEX.start + n * 7]).collect();
    assert_eq!((index, decoded.trace_count()), (vec![0, 1, 0, 2], 2));
    assert_eq!([decoded.traces()[12], decoded.traces()[64 + 12]], [0x81; 2]);
    assert_eq!(decoded.traces()[64 + 13], trace_bytes(4)[3 * 64 + 13]);
    // With room for more, others follow.
    let decoded =
        Decoded::gather(Format { traces: 3, ..format }, &table, |_| Ok(text(7, &[1, 2, 3, 4])), traces)
            .unwrap();
    let index: Vec<u32> = (0..4).map(|n| decoded.words[INDEX.start + n * 7]).collect();
    assert_eq!(index, [3, 1, 0, 2]);
}

#[test]
fn an_empty_device_gives_an_empty_file() {
    let decoded = gather(&[], &[]);
    assert_eq!((decoded.texts(), decoded.trace_count()), (0, 0));
    assert_eq!(Decoded::decode(decoded.encode(), FORMAT).map(in_memory), Ok(decoded));
}

/// As it was gathered.
fn in_memory(decoded: Decoded) -> Decoded {
    Decoded { bytes: decoded.traces().to_vec(), traces_at: 0, ..decoded }
}

/// The file with a change, and a check sum that agrees.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = sample().encode();
    change(&mut bytes);
    let sum = check_sum(&bytes[SUM_BYTES..]);
    bytes[..SUM_BYTES].copy_from_slice(&sum);
    bytes
}

fn at(bytes: &[u8], at: usize) -> [u8; 8] {
    bytes[at..at + 8].try_into().unwrap()
}

fn put(bytes: &mut [u8], at: usize, word: u32) {
    bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

#[test]
fn damage_anywhere_is_found() {
    let bytes = sample().encode();
    for at in (0..bytes.len()).step_by(97).chain(0..SUM_BYTES + HEAD_BYTES) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x20;
        assert_eq!(Decoded::decode(bytes, FORMAT), Err(Bad::Damaged), "byte {at}");
    }
    for len in [0, 1, SUM_BYTES, SUM_BYTES + HEAD_BYTES - 1, bytes.len() - 1] {
        assert_eq!(Decoded::decode(bytes[..len].to_vec(), FORMAT), Err(Bad::Damaged), "{len} bytes");
    }
    // Words that change places, within a lane and between lanes.
    for (a, b) in [(100, 132), (100, 108), (1000, 4072)] {
        let mut other = bytes.clone();
        let (x, y) = (at(&bytes, a), at(&bytes, b));
        other[a..a + 8].copy_from_slice(&y);
        other[b..b + 8].copy_from_slice(&x);
        assert_eq!(Decoded::decode(other, FORMAT).is_err(), x != y, "{a} and {b}");
    }
    let longer = changed(|bytes| bytes.push(0));
    assert_eq!(Decoded::decode(longer, FORMAT), Err(Bad::Damaged));
    let empty = changed(|bytes| bytes.truncate(SUM_BYTES));
    assert_eq!(Decoded::decode(empty, FORMAT), Err(Bad::Damaged));
}

#[test]
fn numbers_that_lead_nowhere_are_refused_though_the_sum_is_right() {
    let (head, slots) = (SUM_BYTES + MAGIC.len(), SUM_BYTES + HEAD_BYTES);
    let texts = slots + 3 * 4;
    let index = texts + INDEX.start * 4;
    for (at, word, why) in [
        (SUM_BYTES, 0, Bad::Foreign),
        (head, TEXT_BYTES / 2, Bad::Foreign),
        (head + 4, 512, Bad::Foreign),
        (head + 8, 64, Bad::Foreign),
        (head + 12, 9, Bad::Foreign),
        (head + 16, 41, Bad::Foreign),
        (head + 12, u32::MAX, Bad::Foreign),
        (head + 16, 3, Bad::Damaged),
        (slots, 32, Bad::Number),
        (slots + 4, 3, Bad::Number),
        (index, 5, Bad::Number),
        (index + 4 * 1023, BUSY, Bad::Number),
        (index + TEXT_BYTES as usize * 2, 1 << 20, Bad::Number),
    ] {
        let bytes = changed(|bytes| put(bytes, at, word));
        assert_eq!(Decoded::decode(bytes, FORMAT), Err(why), "{word:#x} at {at}");
    }
    // What stands where a page's words are is data.
    let bytes = changed(|bytes| put(bytes, texts, u32::MAX));
    assert!(Decoded::decode(bytes, FORMAT).is_ok());
}

#[test]
fn a_bad_file_is_told_and_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("b");
    std::fs::write(&file, "nonsense").unwrap();
    let found = read(&file, FORMAT);
    assert!(found.decoded.is_none());
    let told = found.trouble.unwrap();
    assert!(told.contains("damaged") && told.contains(&file.display().to_string()), "{told}");
    assert!(write(&file, &sample()).unwrap());
    assert!(read(&file, FORMAT).decoded.is_some());
    // Nowhere to write to.
    assert!(write(&file.join("c"), &sample()).is_err());
}

#[test]
fn only_the_latest_files_stay_and_none_is_too_large() {
    let folder = tempfile::tempdir().unwrap();
    for n in 0..FILES + 3 {
        let file = folder.path().join(format!("{n}"));
        assert!(write(&file, &sample()).unwrap());
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + n as u64);
        std::fs::File::options().append(true).open(file).unwrap().set_modified(at).unwrap();
    }
    // The last one was written when two were beyond the limit; using one makes it young again.
    assert!(read(&folder.path().join("4"), FORMAT).decoded.is_some());
    assert!(write(&folder.path().join("new"), &sample()).unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), FILES);
    assert!(folder.path().join("4").exists() && !folder.path().join("3").exists());

    let file = folder.path().join("large");
    let large = Decoded { bytes: vec![0; MOST_BYTES as usize], traces_at: 0, ..sample() };
    assert!(!write(&file, &large).unwrap() && !file.exists());
}

#[test]
fn a_file_belongs_to_an_image_an_engine_and_an_architecture() {
    let boot = |bytes: &[u8]| {
        let piece = crate::memory::Piece { name: "the kernel", address: 0, bytes: bytes.to_vec() };
        image_hash(&BootMemory { ram_bytes: 1 << 20, entry: 0, dtb_address: 0, pieces: vec![piece] })
    };
    let (a, b) = (boot(b"a"), boot(b"b"));
    let folder = Path::new("x");
    let name = file(folder, &a, "sm_90", EngineKind::W);
    assert_eq!(name, file(folder, &a, "sm_90", EngineKind::W));
    assert_ne!(name, file(folder, &b, "sm_90", EngineKind::W));
    assert_ne!(name, file(folder, &a, "sm_80", EngineKind::W));
    assert_ne!(name, file(folder, &a, "sm_90", EngineKind::L8));
}

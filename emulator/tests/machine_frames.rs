//! Guest RAM as frames: sharing, copy-on-write, and a pool that runs dry.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use common::asm::*;
use common::net::*;
use common::*;
use emulator::abi::*;
use emulator::backend::Machines as _;

const RAM: u32 = 0x4_0000;

/// A program that writes one word into each of `count` pages from `from` up, and counts them in x10.
fn dirty(from: u32, count: u32) -> Vec<u32> {
    let mut words = li(5, from).to_vec();
    words.extend(li(6, count));
    words.extend([
        lui(7, 0x1000),
        sw(6, 5, 8),
        addi(10, 10, 1),
        add(5, 5, 7),
        addi(6, 6, -1),
        bne(6, 0, -16),
        SELF,
    ]);
    words
}

#[test]
fn only_written_pages_are_private() {
    let image: Vec<u8> = (0..0x8000u32).map(|i| (i / 7) as u8 | 1).collect();
    let pieces = vec![(CODE, bytes(&dirty(0x1_0000, 5))), (0x1_0000, image.clone())];
    let mut b = Bench::with(3, None, RAM, pieces, CODE);
    for vm in 0..3 {
        assert_eq!(b.slice_of(vm, 10).private_frames, 1);
        assert_eq!(b.slice_of(vm, 1000).private_frames, 5);
    }
    // reading and running code of the image costs nothing
    assert_eq!(b.machines.memory().private_bytes, 3 * 5 * 4096);
    for vm in 0..3 {
        let mut page = vec![0; 0x8000];
        b.machines.read_ram(vm, 0x1_0000, &mut page);
        for (i, byte) in page.iter().enumerate() {
            let written = i < 5 * 4096 && (8..12).contains(&(i % 4096));
            if !written {
                assert_eq!(*byte, image[i], "VM {vm}, byte {i:#x}");
            }
        }
    }
    // a VM's own writes are its own
    b.write_of(0, 0x1_0100, b"zero");
    let mut other = [0; 4];
    b.machines.read_ram(1, 0x1_0100, &mut other);
    assert_eq!(other, image[0x100..0x104]);
    // a reset takes them back
    b.reset_of(0);
    assert_eq!(b.read(0x1_0000, 0x8000), image);
    assert_eq!(b.slice_of(0, 1000).private_frames, 5);
}

#[test]
fn an_empty_pool_stops_the_vm_that_asks() {
    // 12 frames for 3 VMs that want 6 each
    let pieces = vec![(CODE, bytes(&dirty(0x1_0000, 6)))];
    let mut b = Bench::with(3, Some(12), RAM, pieces, CODE);
    assert_eq!(b.slice_of(0, 1000).exit, EXIT_BUDGET);
    assert_eq!(b.slice_of(1, 1000).exit, EXIT_BUDGET);
    let before = b.slice_of(2, 5);
    assert_eq!(before.exit, EXIT_BUDGET);
    let result = b.slice_of(2, 1000);
    assert_eq!((result.exit, result.private_frames, result.steps), (EXIT_NO_FRAME, 0, 0));
    let state = b.state(2);
    assert_eq!(b.slice_of(2, 1000).exit, EXIT_NO_FRAME, "still none");
    assert_eq!(b.state(2), state, "and nothing has happened");
    // the others go on
    assert_eq!(b.slice_of(0, 1000).exit, EXIT_BUDGET);
    // frames come back: the store happens as if nothing had been
    b.reset_of(1);
    let result = b.slice_of(2, 1000);
    assert_eq!((result.exit, result.private_frames), (EXIT_BUDGET, 6));
    assert_eq!(b.vm_of(2).hart.x[10], 6);
    assert_eq!(b.vm_of(2).hart.trapped, 0);
    for page in 0..6 {
        let mut word = [0; 4];
        b.machines.read_ram(2, 0x1_0008 + 4096 * page, &mut word);
        assert_eq!(u32::from_le_bytes(word), 6 - page);
    }
    // and the reset VM runs dry in its turn
    assert_eq!(b.slice_of(1, 1000).exit, EXIT_NO_FRAME);
}

/// A VM that was reset has nothing left of the translations that it had: its frames are another VM's now.
#[test]
fn a_reset_forgets_translations() {
    let pieces = vec![
        (CODE, bytes(&[sw(6, 5, 0), lw(7, 5, 0), jal(0, -8)])),
        (0x1_0000, 0x1111_1111u32.to_le_bytes().into()),
    ];
    let mut b = Bench::with(2, Some(1), RAM, pieces, CODE);
    for (vm, value) in [(0, 0x2222), (1, 0x3333), (0, 0x4444), (1, 0x5555)] {
        let h = &mut b.vm_of(vm).hart;
        (h.x[5], h.x[6]) = (0x1_0000, value);
        for _ in 0..6 {
            assert_eq!(b.slice_of(vm, 1).exit, EXIT_BUDGET);
        }
        assert_eq!(b.vm_of(vm).hart.x[7], value);
        b.reset_of(vm);
        // nothing but the load, before and after the frame is another's
        let h = &mut b.vm_of(vm).hart;
        (h.x[5], h.pc) = (0x1_0000, CODE + 4);
        b.slice_of(vm, 1);
        assert_eq!(b.vm_of(vm).hart.x[7], 0x1111_1111, "VM {vm}");
        b.write_of(1 - vm, 0x1_0000, &[9; 4]);
        b.vm_of(vm).hart.pc = CODE + 4;
        b.slice_of(vm, 1);
        assert_eq!(b.vm_of(vm).hart.x[7], 0x1111_1111, "VM {vm}");
        b.reset_of(0);
        b.reset_of(1);
    }
}

/// Every kind of write that may need a frame: the instruction has not happened, and happens once there is one.
#[test]
fn every_write_waits_for_a_frame() {
    let root = 0x8000;
    let cases: Vec<(&str, Vec<u32>, bool)> = vec![
        ("sw", vec![sw(6, 5, 0)], false),
        ("sb", vec![sb(6, 5, 3)], false),
        ("misaligned", vec![sw(6, 5, 1)], false),
        ("over two pages", vec![sw(6, 8, -2)], false),
        ("amo", vec![amoadd(7, 5, 6)], false),
        ("lr and sc", vec![lr(7, 5), sc(7, 5, 6)], false),
        ("accessed bit by a load", vec![lw(7, 5, 0)], true),
        ("dirty bit by a store", vec![sw(6, 5, 0)], true),
        ("accessed bit by a fetch", vec![NOP], true),
        ("debug console", vec![ECALL], false),
    ];
    for (what, code, paged) in cases {
        let table: Vec<u8> = bytes(&(0..1024).map(|i| i << 20 | 0xf).collect::<Vec<_>>()); // 4 MiB pages, A and D clear
        let mut program = code.clone();
        program.push(SELF);
        let pieces = vec![(CODE, bytes(&program)), (root, table)];
        let setup = |private| {
            let b = Bench::with(2, Some(private), RAM, pieces.clone(), CODE);
            let h = b.hart();
            (h.x[5], h.x[6], h.x[8]) = (0x1_0000, 0x0102_0304, 0x1_1000);
            if what == "debug console" {
                (h.x[10], h.x[11], h.x[12], h.x[16], h.x[17]) = (4, 0x1_0000, 0, 1, 0x4442_434e);
            }
            h.satp = if paged { 1 << 31 | root >> 12 } else { 0 };
            b
        };
        let run = |b: &mut Bench, what: &str| {
            for _ in 0..20 {
                b.mail().send_console(
                    &[9; 4][..if what == "debug console" && b.hart().steps == 0 { 4 } else { 0 }],
                );
                b.slice(1);
            }
        };
        let mut plenty = setup(20);
        plenty.slice(code.len() as u64 + 1);
        // as many frames as it takes, less one, and the last one later
        let needs = plenty.vm().ram.private_frames;
        if what == "debug console" {
            // a read with no frame gets nothing, and may be tried again
            let mut b = setup(0);
            run(&mut b, what);
            assert_eq!((b.x(10), b.x(11)), (0, 0));
            continue;
        }
        assert!(needs > 0, "{what}");
        for have in 0..needs {
            let mut b = setup(needs + have);
            // VM 1 holds all but `have`
            for page in 0..needs {
                b.write_of(1, 0x2_0000 + 4096 * page, &[1]);
            }
            let result = b.slice(code.len() as u64 + 1);
            assert_eq!(result.exit, EXIT_NO_FRAME, "{what} with {have} of {needs}");
            assert_eq!((b.hart().trapped, b.hart().scause), (0, 0), "{what}: no trap");
            let steps = b.hart().steps;
            assert!(steps < code.len() as u64 + 1);
            b.reset_of(1);
            b.slice(code.len() as u64 + 1 - steps);
            assert_eq!(b.state(0), plenty.state(0), "{what} with {have} of {needs}");
            assert_eq!(b.ram_hash(0), plenty.ram_hash(0), "{what}");
        }
    }
}

/// A device that needs a frame: nothing is lost, nothing breaks, and it goes on when there is one.
#[test]
fn devices_wait_for_a_frame() {
    for spare in 0..4 {
        // rings and buffers of the boot image, so that they are shared at first
        let mut image = vec![1u8; 0x6000];
        image[0x400..0x408].copy_from_slice(&[0, 0, 1, 0, 0, 0, 0, 0]);
        let pieces = vec![(CODE, bytes(&[SELF])), (0x1_0000, image)];
        let mut b = Bench::with(2, Some(12), RAM, pieces, CODE);
        let (mut rx, mut tx) = bring_up(&mut b, 8, 0x1_0000, 0x1_1000);
        // used rings in pages that are still shared; the available index is 0 there
        reg(&mut b, 0x070, 0);
        assert!(negotiate(&mut b));
        rx.used = 0x1_2000 + 0x804;
        tx.used = 0x1_3000 + 0x804;
        rx.setup(&mut b);
        tx.setup(&mut b);
        reg(&mut b, 0x070, 15);
        (rx.used_seen, tx.used_seen) = (0x0101, 0x0101); // what the image holds
        b.write(0x2_0000, &[5; 72]);
        tx.descriptor(&b, 0, 0x2_0000, 72, 0, 0);
        rx.descriptor(&b, 0, 0x1_4ff0, 100, WRITE, 0); // over two shared pages
        rx.offer(&b, 0);
        tx.offer(&b, 0);
        b.get(NET_BASE); // the stub has its frame now
        // VM 1 takes the rest
        let mut held = 0;
        while b.try_write_of(1, 0x2_0000 + 4096 * held, &[1]) {
            held += 1;
        }
        assert!(held > 3);
        b.reset_of(1);
        for page in 0..held - spare {
            b.write_of(1, 0x2_0000 + 4096 * page, &[1]);
        }
        tx.notify(&mut b);
        b.mail().send_frame(&[6; 60]);
        let mut stops = 0;
        for _ in 0..4 {
            stops += u32::from(b.slice(1).exit == EXIT_NO_FRAME);
        }
        assert_eq!(b.vm().net.status & NEEDS_RESET, 0, "{spare} spare frames");
        assert!(stops > 0);
        b.reset_of(1);
        b.slice(1);
        b.slice(1);
        assert_eq!(b.vm().net.errors, 0);
        let mut frame = [0; 1514];
        assert_eq!(
            b.mail().take_frame(&mut frame),
            Some(60),
            "{spare} spare frames: the packet was sent once"
        );
        assert_eq!(b.mail().take_frame(&mut frame), None);
        assert_eq!(b.read(0x1_4ffc, 60), [6; 60]);
        assert_eq!((b.vm().net.rx_frames, b.vm().net.tx_frames), (1, 1));
        assert_eq!(interrupt_status(&mut b), 1);
    }
}

/// Threads that take frames at once, and give them back: each frame has one owner at a time.
#[test]
fn many_threads_share_the_pool() {
    use emulator::abi::{SliceRequest, TIME_VIRTUAL};
    use emulator::backend::cpu::{Config, CpuMachines};
    use emulator::backend::{Machines, Slice};
    use emulator::memory::{BootMemory, Piece};
    const VMS: u32 = 8;
    let boot = BootMemory {
        ram_bytes: RAM.into(),
        entry: CODE,
        dtb_address: 0,
        pieces: vec![Piece { name: "test", address: CODE, bytes: bytes(&dirty(0x1_0000, 40)) }],
    };
    // frames for all but one VM: the pool is always nearly empty
    let machines = CpuMachines::new(Config {
        boot: boot.into(),
        vms: VMS,
        threads: 4,
        private_frames: Some(40 * (VMS - 1)),
        epoch_ns: 0,
        seed: Some(1),
    })
    .unwrap();
    let scheduler = std::sync::Mutex::new(());
    std::thread::scope(|scope| {
        for (thread, mut engine) in machines.engines().unwrap().into_iter().enumerate() {
            let (machines, scheduler) = (&machines, &scheduler);
            scope.spawn(move || {
                let mine = [2 * thread as u32, 2 * thread as u32 + 1];
                let mut results = Vec::new();
                for round in 0..300 {
                    for vm in mine {
                        for _ in 0..4 {
                            let request = SliceRequest {
                                budget: 60 + round % 50,
                                now_ticks: 0,
                                time_mode: TIME_VIRTUAL,
                                reserved: 0,
                            };
                            engine.run(&[Slice { vm, request }], &mut results, None).unwrap();
                        }
                        let mut count = 0u32;
                        for page in 0..40 {
                            let mut word = [0; 4];
                            machines.read_ram(vm, 0x1_0008 + 4096 * page, &mut word);
                            let value = u32::from_le_bytes(word);
                            assert!(value == 0 || value == 40 - page, "VM {vm}, page {page} holds {value}");
                            count += u32::from(value != 0);
                        }
                        // SAFETY: only this thread runs the VM.
                        assert!(count <= unsafe { machines.vm(vm) }.ram.private_frames);
                        if round % 2 == vm as u64 % 2 {
                            let _one_at_a_time = scheduler.lock().unwrap();
                            machines.reset(vm).unwrap();
                        }
                    }
                }
            });
        }
    });
}

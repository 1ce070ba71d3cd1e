//! Linux boots to READY, and to the same state bit for bit whatever the slices and the engine. Needs a guest image: the folder that
//! GUEST_IMAGE names (`cargo xtask test` builds one).

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::Path;

use common::{Bench, By};
use emulator::abi::*;
use emulator::guest::GuestImage;

fn image() -> Option<GuestImage> {
    let Some(folder) = std::env::var_os("GUEST_IMAGE") else {
        println!("SKIPPED: no guest image: GUEST_IMAGE is not set (cargo xtask test sets it)");
        return None;
    };
    Some(GuestImage::load(Path::new(&folder), None).unwrap_or_else(|error| panic!("{error}")))
}

fn bench(image: &GuestImage) -> Bench {
    let pieces = vec![
        (0, image.kernel.clone()),
        (image.initrd_addr, image.initrd.clone()),
        (image.dtb_addr, image.dtb.clone()),
    ];
    let b = Bench::with(1, None, image.ram_bytes, pieces, 0);
    b.hart().x[11] = image.dtb_addr;
    b
}

/// Runs until so many steps have been taken, or READY was printed; reads the console on the way.
fn run(b: &mut Bench, budget: u64, until: u64, console: &mut Vec<u8>) {
    while b.hart().steps < until {
        let result = b.slice(budget.min(until - b.hart().steps));
        b.mail().drain_console(console);
        assert!(
            matches!(result.exit, EXIT_BUDGET | EXIT_DRAIN),
            "exit {} after {} steps:\n{}",
            result.exit,
            b.hart().steps,
            String::from_utf8_lossy(console)
        );
    }
}

#[test]
fn boots_alike_in_all_slices() {
    let Some(image) = image() else { return };
    // step() keeps no translations and decodes each instruction anew; Warp is the GPU's engine W
    const SLICES: [u64; 7] = [1_000_000, 65_537, 4_999, 701, 1_000_000, 1_000_000, 4_999];
    let by = [By::Threaded, By::Threaded, By::Threaded, By::Threaded, By::Step, By::Warp, By::Warp];
    let mut benches: Vec<(Bench, Vec<u8>)> = SLICES.iter().map(|_| (bench(&image), Vec::new())).collect();
    for ((b, _), by) in benches.iter_mut().zip(by) {
        b.by = by;
    }
    let mut ready = None;
    for until in (1..=24).map(|i| i * 1_000_000) {
        for ((b, console), budget) in benches.iter_mut().zip(SLICES) {
            run(b, budget, until, console);
        }
        let (first, others) = benches.split_at(1);
        let (b, console) = &first[0];
        let expected = (b.state(0), b.ram_hash(0));
        for ((b, other), budget) in others.iter().zip(&SLICES[1..]) {
            assert_eq!(
                String::from_utf8_lossy(other),
                String::from_utf8_lossy(console),
                "console after {until} steps, slices of {budget}"
            );
            assert_eq!(b.state(0), expected.0, "hart after {until} steps, slices of {budget}");
            assert_eq!(b.ram_hash(0), expected.1, "RAM after {until} steps, slices of {budget}");
        }
        if ready.is_none() && console.windows(5).any(|window| window == b"READY") {
            ready = Some(until);
        }
    }
    let text = String::from_utf8_lossy(&benches[0].1).into_owned();
    let ready = ready.unwrap_or_else(|| panic!("not READY after 24 M instructions:\n{text}"));
    println!("READY within {ready} instructions; the same in slices of {SLICES:?}");
    assert!(!text.contains("Kernel panic") && !text.contains("Oops"), "{text}");
}

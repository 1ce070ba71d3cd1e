//! Boots one VM from files and prints its console: `boot IMAGE INITRD INITRD_ADDR DTB DTB_ADDR RAM_MIB SECONDS`.

use std::io::Write;
use std::sync::Arc;

use emulator::abi::{EXIT_IDLE, SliceRequest, TIME_VIRTUAL};
use emulator::backend::cpu::{Config, CpuMachines};
use emulator::backend::{Machines, Slice};
use emulator::memory::{BootMemory, Piece};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let number = |i: usize| u32::from_str_radix(args[i].trim_start_matches("0x"), 16);
    let boot = Arc::new(BootMemory {
        ram_bytes: args[6].parse::<u64>()? << 20,
        entry: 0,
        dtb_address: number(5)?,
        pieces: vec![
            Piece { name: "kernel", address: 0, bytes: std::fs::read(&args[1])? },
            Piece { name: "initrd", address: number(3)?, bytes: std::fs::read(&args[2])? },
            Piece { name: "device tree", address: number(5)?, bytes: std::fs::read(&args[4])? },
        ],
    });
    if let Some(repeats) = args.get(8) {
        return repeat(&boot, repeats.parse()?);
    }
    let start = std::time::Instant::now();
    let machines = CpuMachines::new(Config {
        boot,
        vms: 1,
        threads: 1,
        private_frames: None,
        epoch_ns: 1_700_000_000_000_000_000,
        seed: Some(1),
    })?;
    let mut engine = machines.engines()?.remove(0);
    let mut console = Vec::new();
    let mut results = Vec::new();
    let limit: f64 = args[7].parse()?;
    while start.elapsed().as_secs_f64() < limit {
        results.clear();
        let request = SliceRequest { budget: 1_000_000, now_ticks: 0, time_mode: TIME_VIRTUAL, reserved: 0 };
        engine.run(&[Slice { vm: 0, request }], &mut results, None)?;
        console.clear();
        machines.mailbox(0).drain_console(&mut console);
        std::io::stdout().write_all(&console)?;
        if console.windows(5).any(|window| window == b"READY") || results[0].exit == EXIT_IDLE {
            break;
        }
    }
    println!();
    println!("{:.3} s {:?} {:?}", start.elapsed().as_secs_f64(), results, machines.memory());
    Ok(())
}

/// Boots again and again to READY and prints the rate of each boot.
fn repeat(boot: &Arc<BootMemory>, repeats: u32) -> Result<(), Box<dyn std::error::Error>> {
    for _ in 0..repeats {
        let start = std::time::Instant::now();
        let machines = CpuMachines::new(Config {
            boot: Arc::clone(boot),
            vms: 1,
            threads: 1,
            private_frames: None,
            epoch_ns: 1_700_000_000_000_000_000,
            seed: Some(1),
        })?;
        let mut engine = machines.engines()?.remove(0);
        let mut console = Vec::new();
        let mut results = Vec::new();
        while !console.windows(5).any(|window| window == b"READY") {
            results.clear();
            let request =
                SliceRequest { budget: 500_000, now_ticks: 0, time_mode: TIME_VIRTUAL, reserved: 0 };
            engine.run(&[Slice { vm: 0, request }], &mut results, None)?;
            machines.mailbox(0).drain_console(&mut console);
        }
        let seconds = start.elapsed().as_secs_f64();
        let retired = results[0].instret as f64;
        println!(
            "{:.4} s, {:.1} M instructions, {:.1} MIPS",
            seconds,
            retired / 1e6,
            retired / 1e6 / seconds
        );
    }
    Ok(())
}

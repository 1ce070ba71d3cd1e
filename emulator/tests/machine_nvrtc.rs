//! The machine's headers compile for every supported GPU, without one, and what they need there.
#![allow(clippy::unwrap_used, reason = "it is part of tests")]
use std::path::PathBuf;

use emulator::backend::nvrtc::{Compiler, Error, HEADERS};

const SOURCE: &str = include_str!("../../kernels/tests/headers.cu");
const ARCHITECTURES: [&str; 4] = ["sm_75", "sm_80", "sm_90", "sm_120"];

/// The compiler, or why this test is skipped.
fn compiler() -> Option<Compiler> {
    // `cargo xtask test` installs the compiler there.
    let installed = std::env::var_os("NVRTC_ENVIRONMENT").map(PathBuf::from);
    match Compiler::find(&installed.into_iter().collect::<Vec<_>>()) {
        Ok(compiler) => Some(compiler),
        Err(error @ Error::NotFound { .. }) => {
            println!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Bytes of the `.text` sections of a cubin (a little-endian ELF64 file).
fn code_bytes(elf: &[u8]) -> u64 {
    let half = |at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().unwrap());
    let word = |at: usize| u32::from_le_bytes(elf[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    assert_eq!(&elf[..5], b"\x7fELF\x02", "a cubin is an ELF64 file");
    let (sections, size, count, names) =
        (long(40) as usize, half(58) as usize, half(60) as usize, half(62) as usize);
    let name_table = long(sections + names * size + 24) as usize;
    (0..count)
        .map(|i| sections + i * size)
        .filter(|at| elf[name_table + word(*at) as usize..].starts_with(b".text."))
        .map(|at| long(at + 32))
        .sum()
}

/// All numbers before `unit` in the compiler's report.
fn figures(log: &str, unit: &str) -> Vec<u64> {
    log.match_indices(unit)
        .filter_map(|(at, _)| {
            let before = log[..at].trim_end();
            before[before.rfind(|c: char| !c.is_ascii_digit()).map_or(0, |i| i + 1)..].parse().ok()
        })
        .collect()
}

#[test]
fn the_headers_compile_for_every_gpu() {
    let Some(compiler) = compiler() else { return };
    println!("NVRTC {:?} at {}", compiler.version(), compiler.path().display());
    for arch in ARCHITECTURES {
        let cubin = compiler
            .cubin("headers.cu", SOURCE, HEADERS, arch, &["--ptxas-options=-v"])
            .unwrap_or_else(|error| panic!("{error}"));
        let most = |unit| figures(&cubin.log, unit).into_iter().max();
        let sum = |unit| figures(&cubin.log, unit).into_iter().sum::<u64>();
        let registers = most(" registers").unwrap_or_else(|| panic!("no figures in:\n{}", cubin.log));
        println!(
            "{arch}: {registers} registers, {} bytes of stack at most in one function, {} bytes spilled, {} functions, \
             {} bytes of code",
            most(" bytes stack frame").unwrap_or(0),
            sum(" bytes spill stores") + sum(" bytes spill loads"),
            figures(&cubin.log, " bytes stack frame").len(),
            code_bytes(&cubin.code)
        );
        assert!(code_bytes(&cubin.code) > 10_000, "the kernel is not there");
        assert!(!cubin.log.contains("warning"), "{arch}:\n{}", cubin.log);
    }
}

#[test]
fn errors_name_source_and_line() {
    let Some(compiler) = compiler() else { return };
    let error = compiler.cubin("broken.cu", "\nint f( { }\n", &[], "sm_90", &[]).unwrap_err().to_string();
    assert!(error.contains("broken.cu(2)") && error.contains("sm_90"), "{error}");
    let error = compiler.cubin("fine.cu", "", &[], "sm_1", &[]).unwrap_err().to_string();
    assert!(error.contains("sm_1"), "{error}");
    assert!(matches!(compiler.cubin("a.cu", "\0", &[], "sm_90", &[]), Err(Error::Nul(_))));
}

#[test]
fn a_file_that_is_no_library_is_named() {
    let error = Compiler::load(std::path::Path::new(file!())).unwrap_err().to_string();
    assert!(error.contains("machine_nvrtc.rs"), "{error}");
}

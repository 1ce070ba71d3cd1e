//! Generates the C header of the ABI, with assertions of every size and offset, compiles the CPU engine, and embeds the
//! page's terminal if it is in the cache.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

#[path = "src/abi.rs"]
#[allow(dead_code)]
mod abi;
#[path = "build/xterm.rs"]
mod xterm;

/// Appends `static_assert`s for each structure; a field missing from a list does not compile.
macro_rules! layouts {
    ($out:ident, $($name:ident { $($field:ident),* $(,)? })*) => {$(
        let _exhaustive = |$crate::abi::$name { $($field: _),* }: $crate::abi::$name| ();
        let _ = writeln!(
            $out,
            "static_assert(sizeof({0}) == {1} && alignof({0}) == {2}, \"{0}\");",
            stringify!($name), size_of::<abi::$name>(), align_of::<abi::$name>(),
        );
        $(let _ = writeln!(
            $out,
            "ABI_OFFSET({0}, {1}, {2});",
            stringify!($name), stringify!($field), std::mem::offset_of!(abi::$name, $field),
        );)*
    )*};
}

/// The structures that kernels/ sees.
const STRUCTURES: [&str; 15] = [
    "Hart",
    "Plic",
    "Uart",
    "Virtq",
    "VirtioNet",
    "Rtc",
    "Ram",
    "Vm",
    "Slot",
    "Rings",
    "Mailbox",
    "Pool",
    "GpuSlice",
    "SliceRequest",
    "SliceResult",
];

fn layout_assertions() -> String {
    // NVRTC before 13.1 has no offsetof; sizes are asserted there, and offsets by every host compiler.
    let mut out = String::from(
        "\n#if defined(__CUDACC_RTC__)\n#define ABI_OFFSET(type, field, bytes)\n#else\n\
         #define ABI_OFFSET(type, field, bytes) \\\n    \
         static_assert(__builtin_offsetof(type, field) == bytes, #type \".\" #field)\n#endif\n",
    );
    layouts! { out,
        Hart { x, pc, steps, trapped, mode, sstatus, sie, sip, stvec, scounteren, senvcfg, sscratch, sepc, scause, stval, satp, reservation, waiting, stimecmp, time_base, time_shift, time_mode, entropy_key, entropy_count, last_trap, reserved }
        Plic { priority, level, pending, claimed, enable, threshold, reserved }
        Uart { ier, fcr, lcr, mcr, scr, divisor, msr, lsr_errors, thre_pending, rx_len, tx_len, reserved, rx, tx, newline_instret, newlines }
        Virtq { num, ready, desc, avail, used, last_avail, used_idx }
        VirtioNet { queue, status, interrupt, device_sel, driver_sel, driver_features, queue_sel, generation, mac, mtu, tx_stalled, reserved, rx_frames, rx_bytes, tx_frames, tx_bytes, rx_dropped, tx_dropped, errors }
        Rtc { epoch_ns, alarm_ns, latched_high, alarm_high, armed, irq_enabled, interrupt, reserved }
        Ram { table_ptr, pages, private_frames, code_used, code_hand, reserved, texts_made, traces_made }
        Vm { hart, ram, engine_ptr, number, exit, plic, uart, net, rtc, rings }
        Slot { len, flags, data }
        Rings { out_head, out_tail, in_head, in_tail, rx_head, rx_tail, tx_head, tx_tail }
        Mailbox { rings, out, input, rx, tx }
        Pool { base_ptr, ring_ptr, head, tail, capacity, shared_frames, code_of_ptr, code_frame_ptr, code_ptr, code_pages_per_vm, text_count, text_ptr, text_table_ptr, trace_ptr, text_capacity, text_slots, trace_capacity, trace_count, saved_ptr, code_epoch, reserved }
        GpuSlice { vm, cycles, request }
        SliceRequest { budget, now_ticks, time_mode, reserved }
        SliceResult { exit, private_frames, steps, wake_ticks, time_ticks, instret, newline_instret, rx_frames, tx_frames, net_dropped, pc, last_trap, code_pages, code_full }
    }
    out
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let kernels = PathBuf::from("../kernels");
    println!("cargo::rerun-if-changed=src/abi.rs");
    println!("cargo::rerun-if-changed=../kernels");

    xterm::embed(&out)?;

    let config = cbindgen::Config {
        language: cbindgen::Language::Cxx,
        no_includes: true,
        pragma_once: true,
        header: Some("// Generated from emulator/src/abi.rs.\n#define ABI_ALIGNED(n) alignas(n)".into()),
        layout: cbindgen::LayoutConfig { aligned_n: Some("ABI_ALIGNED".into()), ..Default::default() },
        // cbindgen leaves out what no exported function names
        export: cbindgen::ExportConfig {
            include: STRUCTURES.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        },
        constant: cbindgen::ConstantConfig { allow_static_const: false, ..Default::default() },
        ..Default::default()
    };
    let mut header = Vec::new();
    cbindgen::Builder::new().with_config(config).with_src("src/abi.rs").generate()?.write(&mut header);
    let mut header = String::from_utf8(header)?;
    header.push_str(&layout_assertions());
    std::fs::write(out.join("abi.h"), header)?;

    // MACHINE_SANITIZE=undefined: undefined behaviour in the machine stops the process (for tests; slow).
    println!("cargo::rerun-if-env-changed=MACHINE_SANITIZE");
    let sanitize = std::env::var("MACHINE_SANITIZE").unwrap_or_default();
    // Engine L for tests alone: four VMs in a warp, beside the one with a VM for itself.
    if std::env::var_os("CARGO_CFG_WINDOWS").is_none() {
        let mut shared = machine_build(&kernels, &out, &sanitize);
        shared.define("VMS_PER_WARP", "4").file(kernels.join("tests/warp_cpu.cpp"));
        for name in ["slots", "lane", "clock", "sync", "ballot", "shuffle", "exchange"] {
            shared.define(&format!("warp_{name}"), format!("warp_{name}_l4").as_str());
        }
        for name in ["switch_stack", "warp_run", "warp_share", "warp_forget", "warp_cycles"] {
            shared.define(&format!("machine_{name}"), format!("machine_{name}_l4").as_str());
        }
        shared.try_compile("machine_l4")?;
    }
    let mut build = machine_build(&kernels, &out, &sanitize);
    // GCC for Windows knows neither its types nor its sections; no test of the machine runs there.
    if std::env::var_os("CARGO_CFG_WINDOWS").is_none() {
        build.file(kernels.join("tests/warp_cpu.cpp")); // linked into tests alone
    }
    build.file(kernels.join("engine_cpu.cpp")).file(kernels.join("tests/step_cpu.cpp")); // the latter for tests alone
    build.try_compile("machine")?;
    Ok(())
}

/// How the machine is compiled for the CPU.
fn machine_build(kernels: &Path, out: &Path, sanitize: &str) -> cc::Build {
    let mut build = cc::Build::new();
    if !sanitize.is_empty() {
        build.flag(format!("-fsanitize={sanitize}")).flag("-fsanitize-undefined-trap-on-error");
    }
    build
        .cpp(true)
        .include(kernels)
        .include(out)
        .std("c++17")
        .opt_level(2) // also in debug builds: the threaded code needs the compiler's tail calls
        .debug(false)
        .pic(true)
        .flag("-fno-exceptions")
        .flag("-fno-rtti")
        .flag("-fno-strict-aliasing")
        .flag("-fomit-frame-pointer")
        .flag("-foptimize-sibling-calls")
        .flag("-fno-stack-protector")
        .flag_if_supported("-fcf-protection=none")
        .flag("-Wno-unused-function")
        .cpp_link_stdlib(None)
        .warnings(true);
    build
}

//! The device tree: rendered from dts/vm.dts.j2, compiled, and read back to check what the loader relies on.

use std::path::Path;

use fdt::Fdt;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, context};

use super::error::Error;
use super::manifest::Layout;
use super::text::Source;

/// The template, relative to the repository.
pub const TEMPLATE: &str = "dts/vm.dts.j2";

/// Reads the template.
pub fn template(root: &Path) -> Result<std::sync::Arc<Source>, Error> {
    Source::read(&root.join(TEMPLATE), root)
}

/// Renders the template for one layout.
pub fn render(template: &Source, layout: &Layout, bootargs: &str) -> Result<String, Error> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    let hex = |n: u64| format!("{n:#x}");
    env.render_named_str(
        &template.name,
        &template.text,
        context! {
            bootargs,
            ram_bytes => hex(layout.ram_bytes),
            initrd_start => hex(layout.initrd_address),
            initrd_end => hex(layout.initrd_address + layout.initrd_bytes),
        },
    )
    .map_err(|e| {
        let what = match e.kind() {
            minijinja::ErrorKind::UndefinedError => "a variable that is not set is used here".to_owned(),
            _ => format!(
                "the template is broken: {}",
                e.detail().map_or_else(|| e.kind().to_string(), str::to_owned)
            ),
        };
        let help = "Variables: bootargs, initrd_end, initrd_start, ram_bytes.".to_owned();
        template.error_at_line(e.line().unwrap_or(1), what, help)
    })
}

/// Whether device trees can be compiled. The builder installs the compiler with all else that it needs.
pub fn can_compile() -> bool {
    duct::cmd!("dtc", "--version").stdout_null().stderr_null().unchecked().run().is_ok()
}

/// Compiles device tree source.
pub fn compile(template: &Source, dts: &str) -> Result<Vec<u8>, Error> {
    let output = duct::cmd!("dtc", "-q", "-I", "dts", "-O", "dtb", "-o", "-", "-")
        .stdin_bytes(dts)
        .stdout_capture()
        .stderr_capture()
        .unchecked()
        .run();
    let output = match output {
        Ok(output) => output,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::plain(
                "the device tree compiler `dtc` is not on this machine",
                "Install it: apt-get install device-tree-compiler",
            ));
        }
        Err(e) => {
            return Err(Error::plain(
                format!("the device tree compiler `dtc` cannot be run: {e}"),
                "Check PATH.",
            ));
        }
    };
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim();
    // dtc counts lines of the rendered text; comments of the template that span lines shift them, so show the line.
    let line = said.split_once("<stdin>:").and_then(|(_, rest)| {
        rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse::<usize>().ok())
    });
    let rendered = line.and_then(|n| dts.lines().nth(n.saturating_sub(1))).unwrap_or("");
    let in_template = template.text.lines().position(|l| !rendered.trim().is_empty() && l == rendered);
    Err(template.error_at_line(
        in_template.map_or(1, |n| n + 1),
        format!("the device tree does not compile: {said}; the rendered line is `{}`", rendered.trim()),
        "Correct the template.".to_owned(),
    ))
}

/// Checks that a compiled tree says what the loader and the machine do.
pub fn check(dtb: &[u8], layout: &Layout, bootargs: &str) -> Result<(), Error> {
    let broken = |what: String| {
        Error::plain(
            format!("{TEMPLATE}: {what}"),
            "The machine and the loader rely on it: correct the template.",
        )
    };
    let fdt = Fdt::new(dtb).map_err(|e| broken(format!("the compiled tree cannot be read: {e}")))?;
    let node = |path: &str| fdt.find_node(path).ok_or_else(|| broken(format!("the node {path} is missing")));
    let cell = |path: &str, name: &str| -> Result<u64, Error> {
        let property = node(path)?.property(name);
        let value = property.filter(|p| p.value.len() == 4).and_then(|p| p.as_usize());
        value.map(|v| v as u64).ok_or_else(|| broken(format!("{path} has no cell {name}")))
    };
    let same = |what: &str, got: u64, want: u64| match got == want {
        true => Ok(()),
        false => Err(broken(format!("{what} is {got:#x}, not {want:#x}"))),
    };

    let memory = node("/memory@0")?;
    let mut regions = memory.reg().ok_or_else(|| broken("/memory@0 has no reg".to_owned()))?;
    let region = regions.next().ok_or_else(|| broken("/memory@0 has an empty reg".to_owned()))?;
    same("the start of memory", region.starting_address as u64, 0)?;
    same("the size of memory", region.size.unwrap_or(0) as u64, layout.ram_bytes)?;
    same("linux,initrd-start", cell("/chosen", "linux,initrd-start")?, layout.initrd_address)?;
    let end = layout.initrd_address + layout.initrd_bytes;
    same("linux,initrd-end", cell("/chosen", "linux,initrd-end")?, end)?;
    let args = node("/chosen")?.property("bootargs").and_then(|p| p.as_str());
    if args != Some(bootargs) {
        return Err(broken(format!("bootargs is {args:?}, not {bootargs:?}")));
    }
    same("timebase-frequency", cell("/cpus", "timebase-frequency")?, 65_000_000)?;

    for (compatible, address, size, interrupt) in DEVICES {
        let found = fdt.find_compatible(&[compatible]);
        let found = found.ok_or_else(|| broken(format!("no node is compatible with {compatible}")))?;
        let (got_address, got_size) =
            bus_address(&fdt, found).ok_or_else(|| broken(format!("{} has no usable reg", found.name)))?;
        same(&format!("the address of {compatible}"), got_address, *address)?;
        same(&format!("the size of {compatible}"), got_size, *size)?;
        if let Some(want) = interrupt {
            let got = found.property("interrupts").and_then(|p| p.as_usize()).unwrap_or(0);
            same(&format!("the interrupt of {compatible}"), got as u64, *want)?;
        }
    }
    Ok(())
}

/// The devices of the machine: compatible, address, size, interrupt.
const DEVICES: &[(&str, u64, u64, Option<u64>)] = &[
    ("sifive,plic-1.0.0", 0xf000_0000, 0x20_2000, None),
    ("ns16550", 0xf400_0000, 0x100, Some(1)),
    ("virtio,mmio", 0xf410_0000, 0x200, Some(2)),
    ("google,goldfish-rtc", 0xf500_0000, 0x1000, Some(3)),
];

/// A device's address as the processor sees it, through the `ranges` of its bus.
fn bus_address(fdt: &Fdt<'_>, device: fdt::node::FdtNode<'_, '_>) -> Option<(u64, u64)> {
    let region = device.reg()?.next()?;
    let (address, size) = (region.starting_address as u64, region.size? as u64);
    let bus = fdt.find_compatible(&["simple-bus"])?;
    if !bus.children().any(|child| child.name == device.name) {
        return Some((address, size));
    }
    let ranges = bus.property("ranges")?.value;
    let word = |at: usize| ranges.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    match ranges.len() {
        0 => Some((address, size)),
        _ => {
            let (child, parent, len) = (word(0)?.into(), u64::from(word(4)?), u64::from(word(8)?));
            (address >= child && address - child + size <= len).then(|| (address - child + parent, size))
        }
    }
}

//! Memory for the CPU engine's native code. It is mapped twice, for writing and for running, so that no address can be
//! both written and run; where the host has no such thing, engines do without native code.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::memory::map::Mapping;

/// Jumps to an instruction before the code from there on becomes native.
pub const WARM_UP: u32 = 160;

/// Bytes that are used before long: the kernel's own native code is more than that.
const SOON: usize = 768 << 10;

/// Room for the native code of shared frames: the kernel's.
const SHARED_BYTES: usize = 4 << 20;
/// Room for each VM's own. When it is full, that VM's code starts over.
pub const VM_BYTES: usize = 256 << 10;
/// The least that is worth while.
const VM_BYTES_LEAST: usize = 64 << 10;
/// Offsets into native code have 32 bits, and not all of a host's address space is ours.
const BYTES_MOST: usize = 2 << 30;

/// What the engines see: `NativeCode` in `kernels/cpu_native.h`.
#[repr(C)]
#[derive(Debug)]
pub struct NativeCode {
    write: *mut u8,
    run: *const u8,
    shared_bytes: u64,
    shared_used: AtomicU64,
    entries: *mut u32,
    vm_used: *mut u32,
    vm_bytes: u32,
    warm_up: AtomicU32,
}

/// The memory itself.
#[derive(Debug)]
pub struct Native {
    code: NativeCode,
    bytes: usize,
    vms: u32,
    _entries: Mapping,
    _vm_used: Mapping,
}

// SAFETY: engines write the code and the entries through atomics or where no other engine looks.
unsafe impl Send for Native {}
// SAFETY: as above.
unsafe impl Sync for Native {}

impl Native {
    /// For `vms` VMs whose code pages have `code_page_bytes` all together. `None`: the host does not offer it.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub fn new(vms: u32, code_page_bytes: usize) -> Option<Self> {
        let page = 64 << 10;
        let vm_bytes = VM_BYTES.min((BYTES_MOST - SHARED_BYTES) / vms.max(1) as usize / page * page);
        if vm_bytes < VM_BYTES_LEAST {
            return None;
        }
        let bytes = SHARED_BYTES + vms as usize * vm_bytes;
        let entries = Mapping::new(code_page_bytes / 2).ok()?; // 4 bytes for each micro-op of 8
        let vm_used = Mapping::new(vms as usize * 4).ok()?;
        let (write, run) = map_twice(bytes)?;
        let code = NativeCode {
            write,
            run,
            shared_bytes: SHARED_BYTES as u64,
            shared_used: AtomicU64::new(0),
            entries: entries.as_ptr().cast(),
            vm_used: vm_used.as_ptr().cast(),
            vm_bytes: vm_bytes as u32,
            warm_up: AtomicU32::new(WARM_UP),
        };
        Some(Self { code, bytes, vms, _entries: entries, _vm_used: vm_used })
    }

    /// See above.
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    pub fn new(_vms: u32, _code_page_bytes: usize) -> Option<Self> {
        None
    }

    /// For the engines.
    pub fn code(&self) -> *const NativeCode {
        &raw const self.code
    }

    fn vm_used(&self, vm: u32) -> Option<&AtomicU32> {
        // SAFETY: in bounds of the mapping, which lives as long as `self`.
        (vm < self.vms).then(|| unsafe { AtomicU32::from_ptr(self.code.vm_used.add(vm as usize)) })
    }

    /// Bytes of code so far.
    pub fn used(&self) -> u64 {
        let own: u64 =
            (0..self.vms).filter_map(|vm| self.vm_used(vm)).map(|used| u64::from(used.load(Relaxed))).sum();
        self.code.shared_used.load(Relaxed).min(self.code.shared_bytes) + own
    }

    /// Forgets the native code of a VM's own. The VM must not be in an engine, nor keep decoded code.
    pub fn reset(&self, vm: u32) {
        if let Some(used) = self.vm_used(vm) {
            used.store(0, Relaxed);
        }
    }

    /// How often code must have run before it becomes native, for engines made from now on; 0: it never does.
    pub fn warm_up_after(&self, jumps: u8) {
        self.code.warm_up.store(jumps.into(), Relaxed);
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        // SAFETY: `new` made both mappings with this length, and no engine is left that runs the code.
        unsafe {
            libc::munmap(self.code.write.cast(), self.bytes);
            libc::munmap(self.code.run.cast_mut().cast(), self.bytes);
        }
    }
}

/// The same fresh memory twice: to be written, and to be run.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn map_twice(bytes: usize) -> Option<(*mut u8, *const u8)> {
    // SAFETY: plain system calls on a file of our own; what fails is noticed and given back.
    unsafe {
        let file = libc::memfd_create(c"native code".as_ptr(), libc::MFD_CLOEXEC);
        if file < 0 {
            return None;
        }
        let map = |protection| {
            let kind = libc::MAP_SHARED | libc::MAP_NORESERVE;
            let at = libc::mmap(std::ptr::null_mut(), bytes, protection, kind, file, 0);
            (at != libc::MAP_FAILED).then_some(at)
        };
        let sized = libc::ftruncate(file, bytes as libc::off_t) == 0;
        let write = sized.then(|| map(libc::PROT_READ | libc::PROT_WRITE)).flatten();
        let run = sized.then(|| map(libc::PROT_READ | libc::PROT_EXEC)).flatten();
        libc::close(file);
        if let (Some(write), Some(run)) = (write, run) {
            // All at once is faster than page by page; older kernels don't know how, and do without.
            libc::madvise(write, bytes.min(SOON), libc::MADV_POPULATE_WRITE);
            libc::madvise(run, bytes.min(SOON), libc::MADV_POPULATE_READ);
            return Some((write.cast(), run.cast_const().cast()));
        }
        for at in [write, run].into_iter().flatten() {
            libc::munmap(at, bytes);
        }
        None
    }
}

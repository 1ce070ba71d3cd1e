//! Memory for the CPU engine's native code. It is mapped twice, for writing and for running, so that no address can be
//! both written and run; where the host has no such thing, engines do without native code.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::memory::map::Mapping;

/// Jumps to an instruction before the code from there on becomes native.
pub const WARM_UP: u32 = 160;

/// What the engines see: `NativeCode` in `kernels/cpu_native.h`.
#[repr(C)]
#[derive(Debug)]
pub struct NativeCode {
    write: *mut u8,
    run: *const u8,
    bytes: u64,
    used: AtomicU64,
    entries: *mut u32,
    warm_up: AtomicU32,
}

/// The memory itself.
#[derive(Debug)]
pub struct Native {
    code: NativeCode,
    _entries: Mapping,
}

// SAFETY: engines write the code and the entries through atomics or where no other engine looks.
unsafe impl Send for Native {}
// SAFETY: as above.
unsafe impl Sync for Native {}

impl Native {
    /// Room for `bytes` of code, and for entries to code pages of `code_page_bytes` all together. `None`: the host
    /// does not offer it.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub fn new(bytes: usize, code_page_bytes: usize) -> Option<Self> {
        let entries = Mapping::new(code_page_bytes / 2).ok()?; // 4 bytes for each micro-op of 8
        // SAFETY: plain system calls; a failed one is noticed, and the mappings are given back on drop.
        unsafe {
            let file = libc::memfd_create(c"native code".as_ptr(), libc::MFD_CLOEXEC);
            if file < 0 {
                return None;
            }
            let map = |protection| {
                let at = libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, file, 0);
                (at != libc::MAP_FAILED).then_some(at.cast::<u8>())
            };
            let mapped = (libc::ftruncate(file, bytes as libc::off_t) == 0)
                .then(|| (map(libc::PROT_READ | libc::PROT_WRITE), map(libc::PROT_READ | libc::PROT_EXEC)));
            libc::close(file);
            match mapped {
                Some((Some(write), Some(run))) => {
                    let (used, warm_up) = (AtomicU64::new(0), AtomicU32::new(WARM_UP));
                    let entry = entries.as_ptr().cast();
                    let code = NativeCode { write, run, bytes: bytes as u64, used, entries: entry, warm_up };
                    Some(Self { code, _entries: entries })
                }
                Some((one, other)) => {
                    one.or(other).map(|at| libc::munmap(at.cast(), bytes));
                    None
                }
                None => None,
            }
        }
    }

    /// See above.
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    pub fn new(_bytes: usize, _code_page_bytes: usize) -> Option<Self> {
        None
    }

    /// For the engines.
    pub fn code(&self) -> *const NativeCode {
        &raw const self.code
    }

    /// Bytes of code so far.
    pub fn used(&self) -> u64 {
        self.code.used.load(Relaxed).min(self.code.bytes)
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
            libc::munmap(self.code.write.cast(), self.code.bytes as usize);
            libc::munmap(self.code.run.cast_mut().cast(), self.code.bytes as usize);
        }
    }
}

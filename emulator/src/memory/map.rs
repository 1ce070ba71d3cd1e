//! Anonymous memory that the kernel fills on first touch: big tables cost only what is used of them.

use std::ptr::NonNull;

/// Bytes before and behind each mapping that nobody may touch: what runs off its end stops instead of reaching what
/// the system put next to it.
#[cfg(unix)]
const GUARD: usize = 64 << 10;

/// A zeroed mapping, private to this process, given back on drop.
#[derive(Debug)]
pub struct Mapping {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory; what it holds is synchronised by its users.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps at least `bytes` of zeroed memory, page-aligned, without reserving swap for it.
    pub fn new(bytes: usize) -> std::io::Result<Self> {
        let bytes = bytes.max(1);
        #[cfg(unix)]
        {
            let too_large = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
            let bytes = bytes.checked_next_multiple_of(GUARD).ok_or_else(too_large)?;
            let all = bytes.checked_add(2 * GUARD).ok_or_else(too_large)?;
            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: a fresh anonymous mapping; no existing memory is affected.
            let outer = unsafe { libc::mmap(std::ptr::null_mut(), all, libc::PROT_NONE, kind, -1, 0) };
            if outer == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            // SAFETY: within the mapping.
            let at = unsafe { outer.cast::<u8>().add(GUARD) };
            let mapping = NonNull::new(at).map(|at| Self { at, bytes }).ok_or_else(too_large)?;
            // SAFETY: part of the fresh mapping, which `mapping` gives back if this fails.
            if unsafe { libc::mprotect(at.cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(mapping)
        }
        #[cfg(not(unix))]
        {
            let layout = std::alloc::Layout::from_size_align(bytes, 4096).map_err(std::io::Error::other)?;
            // SAFETY: the layout's size is not zero.
            let at = unsafe { std::alloc::alloc_zeroed(layout) };
            NonNull::new(at)
                .map(|at| Self { at, bytes })
                .ok_or_else(|| std::io::ErrorKind::OutOfMemory.into())
        }
    }

    /// Asks for large host pages: fewer faults and TLB misses where most of the mapping will be used in order.
    pub fn prefer_large_pages(self) -> Self {
        #[cfg(target_os = "linux")]
        // SAFETY: advice on a mapping of ours; a refusal changes nothing.
        unsafe {
            libc::madvise(self.at.as_ptr().cast(), self.bytes, libc::MADV_HUGEPAGE);
        }
        self
    }

    /// Start of the mapping.
    pub fn as_ptr(&self) -> *mut u8 {
        self.at.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        #[cfg(unix)]
        // SAFETY: `new` made this mapping, and nothing uses it any more.
        unsafe {
            libc::munmap(self.at.as_ptr().sub(GUARD).cast(), self.bytes + 2 * GUARD);
        }
        #[cfg(not(unix))]
        // SAFETY: `new` made this allocation with the same layout.
        unsafe {
            std::alloc::dealloc(
                self.at.as_ptr(),
                std::alloc::Layout::from_size_align_unchecked(self.bytes, 4096),
            );
        }
    }
}

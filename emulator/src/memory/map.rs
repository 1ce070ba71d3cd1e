//! Anonymous memory that the kernel fills on first touch: big tables cost only what is used of them.

use std::ptr::NonNull;

/// Bytes before and behind each mapping that nobody may touch: what runs off its end stops instead of reaching what
/// the system put next to it.
const GUARD: usize = 64 << 10;
/// Bytes of a large host page.
const LARGE_PAGE: usize = 2 << 20;

/// A zeroed mapping, private to this process, given back on drop.
#[derive(Debug)]
pub struct Mapping {
    at: NonNull<u8>,
    bytes: usize,
    /// All that was mapped, with what is out of bounds before and behind.
    #[cfg(unix)]
    outer: (*mut libc::c_void, usize),
}

// SAFETY: the mapping is plain memory; what it holds is synchronised by its users.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps at least `bytes` of zeroed memory, page-aligned, without reserving swap for it.
    pub fn new(bytes: usize) -> std::io::Result<Self> {
        Self::aligned(bytes, GUARD)
    }

    /// The same in large host pages where the system has them: fewer faults and TLB misses where most of the mapping
    /// will be used, in order.
    pub fn large(bytes: usize) -> std::io::Result<Self> {
        let mapping = Self::aligned(bytes, LARGE_PAGE)?;
        #[cfg(target_os = "linux")]
        // SAFETY: advice on a mapping of ours; a refusal changes nothing.
        unsafe {
            libc::madvise(mapping.at.as_ptr().cast(), mapping.bytes, libc::MADV_HUGEPAGE);
        }
        Ok(mapping)
    }

    /// `alignment` is a multiple of [`GUARD`] and a power of two.
    fn aligned(bytes: usize, alignment: usize) -> std::io::Result<Self> {
        let bytes = bytes.max(1);
        #[cfg(unix)]
        {
            let too_large = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
            let bytes = bytes.checked_next_multiple_of(GUARD).ok_or_else(too_large)?;
            let all = bytes.checked_add(GUARD + alignment).ok_or_else(too_large)?;
            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: a fresh anonymous mapping; no existing memory is affected.
            let outer = unsafe { libc::mmap(std::ptr::null_mut(), all, libc::PROT_NONE, kind, -1, 0) };
            if outer == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            // SAFETY: within the mapping.
            let at = unsafe { outer.cast::<u8>().add(GUARD) };
            // SAFETY: as well: GUARD and `bytes` lie behind, and the system's addresses are multiples of a page.
            let at = unsafe { at.add(at.align_offset(alignment).min(alignment - GUARD)) };
            let mapping =
                NonNull::new(at).map(|at| Self { at, bytes, outer: (outer, all) }).ok_or_else(too_large)?;
            // SAFETY: part of the fresh mapping, which `mapping` gives back if this fails.
            if unsafe { libc::mprotect(at.cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(mapping)
        }
        #[cfg(not(unix))]
        {
            // Large pages are for Linux; here a page's alignment will do.
            let _ = alignment;
            let layout = std::alloc::Layout::from_size_align(bytes, 4096).map_err(std::io::Error::other)?;
            // SAFETY: the layout's size is not zero.
            let at = unsafe { std::alloc::alloc_zeroed(layout) };
            NonNull::new(at)
                .map(|at| Self { at, bytes })
                .ok_or_else(|| std::io::ErrorKind::OutOfMemory.into())
        }
    }

    /// Start of the mapping.
    pub fn as_ptr(&self) -> *mut u8 {
        self.at.as_ptr()
    }

    /// Bytes that may be used.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        #[cfg(unix)]
        // SAFETY: `new` made this mapping, and nothing uses it any more.
        unsafe {
            libc::munmap(self.outer.0, self.outer.1);
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

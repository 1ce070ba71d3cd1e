//! Anonymous memory that the kernel fills on first touch: big tables cost only what is used of them.

use std::ptr::NonNull;

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
            // SAFETY: a fresh anonymous mapping; no existing memory is affected.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if at == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            NonNull::new(at.cast()).map(|at| Self { at, bytes }).ok_or_else(std::io::Error::last_os_error)
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
            libc::munmap(self.at.as_ptr().cast(), self.bytes);
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

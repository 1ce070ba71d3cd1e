//! The part of the CUDA driver that the back end needs, with owners that give back what they took.
//!
//! The driver's library is loaded at the first call; where there is none, `Driver::open` says so and nothing else here
//! can be reached.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys;

/// A call that the driver refused.
#[derive(Clone, Debug, thiserror::Error)]
#[error("CUDA: {call} failed: {reason} ({code:?})")]
pub struct CallError {
    /// Which function.
    pub call: &'static str,
    /// The driver's number for it.
    pub code: sys::CUresult,
    /// The driver's words.
    pub reason: String,
}

impl CallError {
    /// Whether memory ran out.
    pub fn is_out_of_memory(&self) -> bool {
        self.code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }
}

fn check(call: &'static str, code: sys::CUresult) -> Result<(), CallError> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: writes a pointer to a static string, or null for a number that it does not know.
    let known = unsafe { sys::cuGetErrorString(code, &mut text) } == sys::CUresult::CUDA_SUCCESS;
    let reason = match known && !text.is_null() {
        // SAFETY: a static, terminated string of the driver.
        true => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        false => "unknown error".to_owned(),
    };
    Err(CallError { call, code, reason })
}

/// Calls a function of the driver, all of whose pointers are to live places of the right size.
macro_rules! call {
    ($name:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: handles are live (their owners hold them), pointers lead to places of the function's types, and
        // lengths match: each use below is built so.
        check(stringify!($name), unsafe { sys::$name($($argument),*) })
    };
}

/// Why there is no driver to talk to.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No library.
    #[error(
        "no NVIDIA driver is installed (libcuda was not found); install the driver for your GPU, version 525 or later"
    )]
    NoDriver,
    /// It does not start, for instance because there is no device or the kernel module is not loaded.
    #[error("{0}; see that `nvidia-smi` lists a GPU")]
    Init(CallError),
}

/// The driver, started.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    version: i32,
}

impl Driver {
    /// Loads and starts the driver.
    pub fn open() -> Result<Self, OpenError> {
        // SAFETY: loads the driver's library, whose initialisers have no preconditions.
        if !unsafe { sys::is_culib_present() } {
            return Err(OpenError::NoDriver);
        }
        call!(cuInit(0)).map_err(OpenError::Init)?;
        let mut version = 0;
        call!(cuDriverGetVersion(&mut version)).map_err(OpenError::Init)?;
        Ok(Self { version })
    }

    /// The newest CUDA version that it knows, as in (13, 0).
    pub fn version(&self) -> (i32, i32) {
        (self.version / 1000, self.version % 1000 / 10)
    }

    /// Devices that it shows.
    pub fn devices(&self) -> Result<u32, CallError> {
        let mut count = 0;
        call!(cuDeviceGetCount(&mut count))?;
        Ok(count.unsigned_abs())
    }
}

/// What a device is.
#[derive(Clone, Debug)]
pub struct Properties {
    /// Number, as in `CUDA_VISIBLE_DEVICES`' order.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Compute capability, as in (9, 0).
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Blocks that a multiprocessor runs at once, at most.
    pub blocks: u32,
    /// What the multiprocessors' clock reaches at most.
    pub kilohertz: u32,
    /// Bytes of shared memory that a block may have, if its kernel asks for it.
    pub shared_bytes: u32,
}

impl Properties {
    /// The architecture that code is made for: `sm_90`.
    pub fn arch(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }
}

/// A device's primary context.
#[derive(Debug)]
pub struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
    properties: Properties,
}

// SAFETY: a context may be current in any number of threads.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens device `ordinal` and makes it current in this thread.
    pub fn open(_: &Driver, ordinal: u32) -> Result<Arc<Self>, CallError> {
        let mut device = 0;
        call!(cuDeviceGet(&mut device, ordinal as i32))?;
        let mut name = [0; 256];
        call!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
        // SAFETY: the driver terminates the name within the buffer.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let attribute = |attribute| {
            let mut value = 0;
            call!(cuDeviceGetAttribute(&mut value, attribute, device)).map(|()| value.unsigned_abs())
        };
        use sys::CUdevice_attribute as A;
        let properties = Properties {
            ordinal,
            name,
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            blocks: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR)?,
            kilohertz: attribute(A::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
            shared_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        };
        let mut handle = std::ptr::null_mut();
        call!(cuDevicePrimaryCtxRetain(&mut handle, device))?;
        let context = Arc::new(Self { device, handle, properties });
        context.make_current()?;
        Ok(context)
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Makes the context this thread's.
    pub fn make_current(&self) -> Result<(), CallError> {
        call!(cuCtxSetCurrent(self.handle))
    }

    /// Free and total bytes of device memory.
    pub fn memory(&self) -> Result<(u64, u64), CallError> {
        let (mut free, mut total) = (0, 0);
        call!(cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // A failure at the end has no one to go to.
        let _ = call!(cuDevicePrimaryCtxRelease_v2(self.device));
    }
}

/// Memory of the device, given back on drop.
#[derive(Debug)]
pub struct Buffer {
    context: Arc<Context>,
    at: sys::CUdeviceptr,
    bytes: usize,
}

impl Buffer {
    /// Takes at least one byte; the contents are undefined.
    pub fn new(context: &Arc<Context>, bytes: u64) -> Result<Self, CallError> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).max(1);
        let mut at = 0;
        call!(cuMemAlloc_v2(&mut at, bytes))?;
        Ok(Self { context: Arc::clone(context), at, bytes })
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.at
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Copies plain values to it, `offset` bytes from its start, and waits for the copy.
    pub fn write<T: Copy>(&self, stream: &Stream, offset: u64, values: &[T]) -> Result<(), CallError> {
        let bytes = size_of_val(values);
        assert!(offset as usize + bytes <= self.bytes, "a copy beyond the end of device memory");
        if bytes == 0 {
            return Ok(());
        }
        call!(cuMemcpyHtoDAsync_v2(self.at + offset, values.as_ptr().cast(), bytes, stream.handle))?;
        stream.wait()
    }

    /// Copies plain values from it, `offset` bytes from its start.
    ///
    /// # Safety
    /// What is there must be valid values of the type.
    pub unsafe fn read<T: Copy>(
        &self,
        stream: &Stream,
        offset: u64,
        values: &mut [T],
    ) -> Result<(), CallError> {
        let bytes = size_of_val(values);
        assert!(offset as usize + bytes <= self.bytes, "a copy beyond the end of device memory");
        if bytes == 0 {
            return Ok(());
        }
        call!(cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), self.at + offset, bytes, stream.handle))?;
        stream.wait()
    }

    /// Zeroes a part of it, in the stream's order.
    pub fn zero(&self, stream: &Stream, offset: u64, bytes: u64) -> Result<(), CallError> {
        assert!(offset + bytes <= self.bytes as u64, "zeroes beyond the end of device memory");
        if bytes == 0 {
            return Ok(());
        }
        call!(cuMemsetD8Async(self.at + offset, 0, bytes as usize, stream.handle))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let _ = self.context.make_current();
        // After a fault in a kernel the context refuses everything; the process' end frees the memory then.
        let _ = call!(cuMemFree_v2(self.at));
    }
}

/// Pinned host memory that the device can reach, given back on drop.
pub struct Pinned<T> {
    context: Arc<Context>,
    host: NonNull<T>,
    device: u64,
    count: usize,
}

// SAFETY: the memory is plain; what is in it is synchronised by its users.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl<T> std::fmt::Debug for Pinned<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinned").field("host", &self.host).field("count", &self.count).finish_non_exhaustive()
    }
}

impl<T: Copy> Pinned<T> {
    /// Room for `count` values; the contents are undefined.
    pub fn new(context: &Arc<Context>, count: usize) -> Result<Self, CallError> {
        let mut at = std::ptr::null_mut();
        let bytes = count.max(1) * size_of::<T>();
        // Not write-combined: the host reads it all the time.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        call!(cuMemHostAlloc(&mut at, bytes, flags))?;
        let host = NonNull::new(at.cast()).ok_or(CallError {
            call: "cuMemHostAlloc",
            code: sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY,
            reason: "it gave no memory".into(),
        })?;
        let mut pinned = Self { context: Arc::clone(context), host, device: 0, count };
        call!(cuMemHostGetDevicePointer_v2(&mut pinned.device, at, 0))?;
        Ok(pinned)
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.device
    }

    /// Its address on the host.
    pub fn as_ptr(&self) -> *mut T {
        self.host.as_ptr()
    }

    /// Values that it has room for.
    pub fn count(&self) -> usize {
        self.count
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _ = self.context.make_current();
        let _ = call!(cuMemFreeHost(self.host.as_ptr().cast()));
    }
}

/// Host memory of somebody else's that the device can reach, at the host's own addresses, until this is dropped.
#[derive(Debug)]
pub struct Registered {
    context: Arc<Context>,
    at: *mut c_void,
}

impl Registered {
    /// Gives the device access to `bytes` bytes at `at`.
    ///
    /// # Safety
    /// The memory is mapped there, and stays so while this lives.
    pub unsafe fn new(context: &Arc<Context>, at: *mut c_void, bytes: usize) -> Result<Self, CallError> {
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        call!(cuMemHostRegister_v2(at, bytes, flags))?;
        let registered = Self { context: Arc::clone(context), at };
        let mut device = 0;
        call!(cuMemHostGetDevicePointer_v2(&mut device, at, 0))?;
        if device != at as u64 {
            return Err(CallError {
                call: "cuMemHostGetDevicePointer",
                code: sys::CUresult::CUDA_ERROR_NOT_SUPPORTED,
                reason: "the device does not see host memory at the host's addresses".into(),
            });
        }
        Ok(registered)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _ = self.context.make_current();
        let _ = call!(cuMemHostUnregister(self.at));
    }
}

/// A queue of work.
#[derive(Debug)]
pub struct Stream {
    context: Arc<Context>,
    handle: sys::CUstream,
}

// SAFETY: the driver locks its queues.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A queue that waits for no other.
    pub fn new(context: &Arc<Context>) -> Result<Self, CallError> {
        let mut handle = std::ptr::null_mut();
        call!(cuStreamCreate(&mut handle, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32))?;
        Ok(Self { context: Arc::clone(context), handle })
    }

    /// Waits until all its work is done.
    pub fn wait(&self) -> Result<(), CallError> {
        call!(cuStreamSynchronize(self.handle))
    }

    /// Whether all its work is done.
    pub fn is_done(&self) -> Result<bool, CallError> {
        // SAFETY: the stream is live.
        match unsafe { sys::cuStreamQuery(self.handle) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuStreamQuery", code).map(|()| true),
        }
    }

    /// Queues a launch.
    pub fn launch(
        &self,
        function: &Function,
        blocks: u32,
        threads: u32,
        shared_bytes: u32,
        arguments: &mut [Argument],
    ) -> Result<(), CallError> {
        let mut pointers: Vec<*mut c_void> = arguments.iter_mut().map(Argument::as_ptr).collect();
        call!(cuLaunchKernel(
            function.handle,
            blocks,
            1,
            1,
            threads,
            1,
            1,
            shared_bytes,
            self.handle,
            pointers.as_mut_ptr(),
            std::ptr::null_mut(),
        ))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.context.make_current();
        let _ = call!(cuStreamDestroy_v2(self.handle));
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// An address on the device.
    Address(u64),
    /// A 32-bit number.
    Word(u32),
}

impl Argument {
    fn as_ptr(&mut self) -> *mut c_void {
        match self {
            Self::Address(value) => std::ptr::from_mut(value).cast(),
            Self::Word(value) => std::ptr::from_mut(value).cast(),
        }
    }
}

/// Machine code on the device.
#[derive(Debug)]
pub struct Module {
    context: Arc<Context>,
    handle: sys::CUmodule,
}

// SAFETY: a module is immutable once loaded.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin.
    pub fn load(context: &Arc<Context>, cubin: &[u8]) -> Result<Arc<Self>, CallError> {
        let mut handle = std::ptr::null_mut();
        call!(cuModuleLoadData(&mut handle, cubin.as_ptr().cast()))?;
        Ok(Arc::new(Self { context: Arc::clone(context), handle }))
    }

    /// One of its kernels.
    pub fn function(self: &Arc<Self>, name: &CStr) -> Result<Function, CallError> {
        let mut handle = std::ptr::null_mut();
        call!(cuModuleGetFunction(&mut handle, self.handle, name.as_ptr()))?;
        Ok(Function { _module: Arc::clone(self), handle })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.make_current();
        let _ = call!(cuModuleUnload(self.handle));
    }
}

/// A kernel.
#[derive(Debug)]
pub struct Function {
    _module: Arc<Module>,
    handle: sys::CUfunction,
}

// SAFETY: immutable.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// What a kernel takes of each thread's share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Registers of each thread.
    pub registers: u32,
    /// Bytes of stack and spilled registers of each thread.
    pub local_bytes: u32,
    /// Bytes of static shared memory of each block.
    pub shared_bytes: u32,
}

impl Function {
    /// Lets a block have so many bytes of dynamic shared memory: above 48 KiB a kernel must ask.
    pub fn allow_shared(&self, bytes: u32) -> Result<(), CallError> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        call!(cuFuncSetAttribute(self.handle, attribute, bytes as i32))
    }

    /// What it takes.
    pub fn resources(&self) -> Result<Resources, CallError> {
        let attribute = |attribute| {
            let mut value = 0;
            call!(cuFuncGetAttribute(&mut value, attribute, self.handle)).map(|()| value.unsigned_abs())
        };
        use sys::CUfunction_attribute as A;
        Ok(Resources {
            registers: attribute(A::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: attribute(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            shared_bytes: attribute(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
        })
    }
}

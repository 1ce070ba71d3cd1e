//! NVIDIA's run-time compiler: finds its library and turns CUDA C++ into machine code for one architecture. No GPU and
//! no toolkit is needed.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::Library;

/// The headers of the machine, by the names that they include each other with.
pub const HEADERS: &[(&str, &str)] = &[
    ("abi.h", include_str!(concat!(env!("OUT_DIR"), "/abi.h"))),
    ("base.cuh", include_str!("../../../kernels/base.cuh")),
    ("brief.cuh", include_str!("../../../kernels/brief.cuh")),
    ("bus.cuh", include_str!("../../../kernels/bus.cuh")),
    ("csr.cuh", include_str!("../../../kernels/csr.cuh")),
    ("engine_w.cuh", include_str!("../../../kernels/engine_w.cuh")),
    ("isa.cuh", include_str!("../../../kernels/isa.cuh")),
    ("mailbox.cuh", include_str!("../../../kernels/mailbox.cuh")),
    ("memory.cuh", include_str!("../../../kernels/memory.cuh")),
    ("mmu.cuh", include_str!("../../../kernels/mmu.cuh")),
    ("plic.cuh", include_str!("../../../kernels/plic.cuh")),
    ("rtc.cuh", include_str!("../../../kernels/rtc.cuh")),
    ("sbi.cuh", include_str!("../../../kernels/sbi.cuh")),
    ("serve.cuh", include_str!("../../../kernels/serve.cuh")),
    ("step.cuh", include_str!("../../../kernels/step.cuh")),
    ("system.cuh", include_str!("../../../kernels/system.cuh")),
    ("trace.cuh", include_str!("../../../kernels/trace.cuh")),
    ("translations.cuh", include_str!("../../../kernels/translations.cuh")),
    ("trap.cuh", include_str!("../../../kernels/trap.cuh")),
    ("uart.cuh", include_str!("../../../kernels/uart.cuh")),
    ("virtio_net.cuh", include_str!("../../../kernels/virtio_net.cuh")),
    ("warp.cuh", include_str!("../../../kernels/warp.cuh")),
];

/// Environment variable with the path of the library, or of the folder that it is in; looked at first.
pub const LIBRARY_VARIABLE: &str = "NVRTC_LIBRARY";

/// Why there is no machine code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No library anywhere.
    #[error(
        "the CUDA run-time compiler (NVRTC, version 12 or 13) was not found; install a CUDA toolkit, or \
         `pip install nvidia-cuda-nvrtc`, or set {LIBRARY_VARIABLE} to its path. Looked at:{}",
        .looked_at.iter().map(|path| format!("\n  {}", path.display())).collect::<String>()
    )]
    NotFound {
        /// Files that were tried.
        looked_at: Vec<PathBuf>,
    },
    /// The file is there but is not the library.
    #[error("{}: not usable as NVRTC: {cause}", path.display())]
    Load {
        /// Which file.
        path: PathBuf,
        /// The loader's words.
        cause: libloading::Error,
    },
    /// A name or text with a NUL byte.
    #[error("{0} has a NUL byte in it")]
    Nul(String),
    /// The source does not compile.
    #[error("{name} does not compile for {arch} with NVRTC {version}:\n{log}")]
    Compile {
        /// Name of the source.
        name: String,
        /// `sm_90` and the like.
        arch: String,
        /// The compiler's version.
        version: String,
        /// Its messages.
        log: String,
    },
    /// The library refused a call.
    #[error("NVRTC: {call} failed: {reason}")]
    Call {
        /// Which function.
        call: &'static str,
        /// Its error, in its words.
        reason: String,
    },
}

type Program = *mut std::ffi::c_void;
type Status = c_int;

/// The functions that we use.
#[derive(Clone, Copy)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
}

/// A loaded compiler.
#[derive(Clone)]
pub struct Compiler {
    functions: Functions,
    path: PathBuf,
    version: (u32, u32),
    _library: Arc<Library>,
}

/// Machine code, and what the compiler said.
#[derive(Clone, Debug)]
pub struct Cubin {
    /// An ELF file for the CUDA driver.
    pub code: Vec<u8>,
    /// Warnings and, with `--ptxas-options=-v`, resources.
    pub log: String,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").field("path", &self.path).field("version", &self.version).finish()
    }
}

impl Compiler {
    /// Finds the compiler: [`LIBRARY_VARIABLE`], then a toolkit, the system's library path, the active Python
    /// environment, and at last the folders in `also` and what lies in them.
    pub fn find(also: &[PathBuf]) -> Result<Self, Error> {
        let mut looked_at = Vec::new();
        for candidate in candidates(also) {
            // A bare name is for the system's loader; a path must exist.
            if candidate.components().count() > 1 && !candidate.is_file() {
                looked_at.push(candidate);
                continue;
            }
            match Self::load(&candidate) {
                Ok(compiler) => return Ok(compiler),
                Err(_) if candidate.components().count() == 1 => looked_at.push(candidate),
                Err(error) => return Err(error),
            }
        }
        Err(Error::NotFound { looked_at })
    }

    /// Loads the compiler from a file.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let fail = |cause| Error::Load { path: path.to_owned(), cause };
        // SAFETY: NVRTC's initialisers have no preconditions.
        let library = unsafe { Library::new(path) }.map_err(fail)?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the type in `Functions` is that of the function in nvrtc.h.
                *unsafe { library.get($name) }.map_err(fail)?
            };
        }
        let functions = Functions {
            version: function!(b"nvrtcVersion\0"),
            error_string: function!(b"nvrtcGetErrorString\0"),
            create: function!(b"nvrtcCreateProgram\0"),
            destroy: function!(b"nvrtcDestroyProgram\0"),
            compile: function!(b"nvrtcCompileProgram\0"),
            log_size: function!(b"nvrtcGetProgramLogSize\0"),
            log: function!(b"nvrtcGetProgramLog\0"),
            cubin_size: function!(b"nvrtcGetCUBINSize\0"),
            cubin: function!(b"nvrtcGetCUBIN\0"),
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point to integers.
        let status = unsafe { (functions.version)(&mut major, &mut minor) };
        let compiler = Self {
            functions,
            path: path.to_owned(),
            version: (major.unsigned_abs(), minor.unsigned_abs()),
            _library: Arc::new(library),
        };
        compiler.check("nvrtcVersion", status)?;
        Ok(compiler)
    }

    /// Where the library was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Major and minor version.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Compiles `source` with in-memory `headers` to machine code of `arch` (`sm_90`, ...).
    pub fn cubin(
        &self,
        name: &str,
        source: &str,
        headers: &[(&str, &str)],
        arch: &str,
        options: &[&str],
    ) -> Result<Cubin, Error> {
        let text = |what: &str, text: &str| CString::new(text).map_err(|_| Error::Nul(what.to_owned()));
        let (source, c_name) = (text(name, source)?, text("the name", name)?);
        let mut names = Vec::new();
        let mut contents = Vec::new();
        for (name, content) in headers {
            names.push(text("a header's name", name)?);
            contents.push(text(name, content)?);
        }
        let arch_option = format!("--gpu-architecture={arch}");
        let options = ["--std=c++17", arch_option.as_str()]
            .iter()
            .chain(options)
            .map(|option| text("an option", option))
            .collect::<Result<Vec<_>, _>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (name_pointers, content_pointers, option_pointers) =
            (pointers(&names), pointers(&contents), pointers(&options));

        let mut handle: Program = std::ptr::null_mut();
        // SAFETY: all strings and arrays live until the end of this function, lengths match.
        let status = unsafe {
            (self.functions.create)(
                &mut handle,
                source.as_ptr(),
                c_name.as_ptr(),
                headers.len() as c_int,
                content_pointers.as_ptr(),
                name_pointers.as_ptr(),
            )
        };
        self.check("nvrtcCreateProgram", status)?;
        let program = Guard { compiler: self, handle };
        // SAFETY: as above, and the program is live.
        let compiled = unsafe {
            (self.functions.compile)(program.handle, option_pointers.len() as c_int, option_pointers.as_ptr())
        };
        let log = program.read("nvrtcGetProgramLog", self.functions.log_size, self.functions.log)?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_owned();
        if compiled != 0 {
            let log = if log.is_empty() { self.reason(compiled) } else { log };
            let version = format!("{}.{}", self.version.0, self.version.1);
            return Err(Error::Compile { name: name.to_owned(), arch: arch.to_owned(), version, log });
        }
        let code = program.read("nvrtcGetCUBIN", self.functions.cubin_size, self.functions.cubin)?;
        Ok(Cubin { code, log })
    }

    fn reason(&self, status: Status) -> String {
        // SAFETY: returns a static string for any status.
        unsafe { CStr::from_ptr((self.functions.error_string)(status)) }.to_string_lossy().into_owned()
    }

    fn check(&self, call: &'static str, status: Status) -> Result<(), Error> {
        if status == 0 { Ok(()) } else { Err(Error::Call { call, reason: self.reason(status) }) }
    }
}

/// A program of the compiler, destroyed on drop.
struct Guard<'a> {
    compiler: &'a Compiler,
    handle: Program,
}

impl Guard<'_> {
    fn read(
        &self,
        call: &'static str,
        size_of: unsafe extern "C" fn(Program, *mut usize) -> Status,
        get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ) -> Result<Vec<u8>, Error> {
        let mut size = 0;
        // SAFETY: the program is live, and the buffer has the size that the library asks for.
        unsafe {
            self.compiler.check(call, size_of(self.handle, &mut size))?;
            let mut buffer = vec![0u8; size];
            self.compiler.check(call, get(self.handle, buffer.as_mut_ptr().cast()))?;
            Ok(buffer)
        }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: created by `cubin`, destroyed once.
        unsafe { (self.compiler.functions.destroy)(&mut self.handle) };
    }
}

#[cfg(windows)]
const NAMES: &[&str] = &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];
#[cfg(not(windows))]
const NAMES: &[&str] = &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// Files to try, in order.
fn candidates(also: &[PathBuf]) -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let mut found = Vec::new();
    let folder = |found: &mut Vec<PathBuf>, folder: &Path| {
        found.extend(NAMES.iter().map(|name| folder.join(name)));
    };
    if let Some(path) = variable(LIBRARY_VARIABLE) {
        if path.is_dir() { folder(&mut found, &path) } else { found.push(path) }
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(variable);
    for toolkit in toolkits.chain([PathBuf::from("/usr/local/cuda")]) {
        for sub in ["lib64", "targets/x86_64-linux/lib", "bin", "bin/x64"] {
            folder(&mut found, &toolkit.join(sub));
        }
    }
    found.extend(NAMES.iter().map(PathBuf::from));
    let python = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable);
    for root in python.chain(also.iter().cloned()) {
        for site in site_packages(&root) {
            for sub in ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "nvidia/cu13/bin/x86_64"] {
                folder(&mut found, &site.join(sub));
            }
        }
    }
    found
}

/// Folders under an environment's root where Python packages may lie.
fn site_packages(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_owned(), root.join("Lib/site-packages")];
    if let Ok(entries) = std::fs::read_dir(root.join("lib")) {
        let mut versions: Vec<PathBuf> =
            entries.flatten().map(|entry| entry.path().join("site-packages")).collect();
        versions.sort();
        found.extend(versions);
    }
    found
}

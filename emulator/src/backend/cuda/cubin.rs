//! Machine code for a device: compiled once, then found in a cache by the hash of all that it depends on.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::choice::{EngineKind, Translations};
use crate::backend::nvrtc::{Compiler, Error, HEADERS};

/// The kernels' source; the machine's headers come by name.
const NAME: &str = "gpu.cu";
const SOURCE: &str = include_str!("../../../../kernels/gpu.cu");
/// Bytes of the check sum at the start of a cached file.
const SUM_BYTES: usize = 32;

/// Code, and what it took to get it.
#[derive(Clone, Debug)]
pub struct Code {
    /// An ELF file for the driver.
    pub cubin: Vec<u8>,
    /// Found in the cache.
    pub cached: bool,
    /// Time to compile or to read.
    pub took: Duration,
    /// Why the cache could not be written, if it could not.
    pub cache_trouble: Option<String>,
}

/// `$XDG_CACHE_HOME/linux-on-gpu/cubin`, else `~/.cache/linux-on-gpu/cubin`; none if neither variable is set.
pub fn cache_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let root = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
    Some(root.join("linux-on-gpu").join("cubin"))
}

/// The kernels of an engine for `arch`, with at most `registers` registers a thread.
pub fn kernels(
    compiler: &Compiler,
    arch: &str,
    kind: EngineKind,
    translations: Translations,
    registers: u32,
    cache: Option<&Path>,
) -> Result<Code, Error> {
    let limit = format!("--maxrregcount={registers}");
    let sharing = format!("--define-macro=VMS_PER_WARP={}", kind.vms_per_warp());
    let data = format!("--define-macro=DATA_ENTRIES={}u", translations.data);
    let fetch = format!("--define-macro=FETCH_ENTRIES={}u", translations.fetch);
    let options = [limit.as_str(), &sharing, &data, &fetch, "--generate-line-info"];
    let key = key(compiler.version(), arch, &options, SOURCE, HEADERS);
    cached(cache, &key, || Ok(compiler.cubin(NAME, SOURCE, HEADERS, arch, &options)?.code))
}

/// The hash of what decoded code depends on: the kernels that made it, and the image.
pub fn format_key(arch: &str, kind: EngineKind, image: &str) -> String {
    let sharing = kind.vms_per_warp().to_string();
    key((0, 0), arch, &[&sharing, image], SOURCE, HEADERS)
}

/// The hash of everything that the code depends on. Lengths keep neighbouring texts apart.
fn key(version: (u32, u32), arch: &str, options: &[&str], source: &str, headers: &[(&str, &str)]) -> String {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    add(&format!("{}.{}", version.0, version.1));
    add(arch);
    add(&options.join("\0"));
    add(source);
    for (name, text) in headers {
        add(name);
        add(text);
    }
    hex::encode(hash.finalize())
}

/// What `make` makes, from the cache if it is there and whole.
fn cached(
    folder: Option<&Path>,
    key: &str,
    make: impl FnOnce() -> Result<Vec<u8>, Error>,
) -> Result<Code, Error> {
    let began = Instant::now();
    let file = folder.map(|folder| folder.join(key));
    if let Some(cubin) = file.as_ref().and_then(|file| read(file)) {
        return Ok(Code { cubin, cached: true, took: began.elapsed(), cache_trouble: None });
    }
    let cubin = make()?;
    let written = file.map_or(Ok(()), |file| write(&file, &cubin));
    let cache_trouble = written.err().map(|error| {
        let folder = folder.map(|folder| folder.display().to_string()).unwrap_or_default();
        format!("{folder}: the compiled kernels can't be kept for the next start: {error}")
    });
    Ok(Code { cubin, cached: false, took: began.elapsed(), cache_trouble })
}

/// A file of the cache, if its check sum is right.
fn read(file: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(file).ok()?;
    let (sum, cubin) = bytes.split_at_checked(SUM_BYTES)?;
    (Sha256::digest(cubin).as_slice() == sum).then(|| cubin.to_vec())
}

/// Readers see the old file or the new one, never a part.
fn write(file: &Path, cubin: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    new.write_all(&Sha256::digest(cubin))?;
    new.write_all(cubin)?;
    new.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn code_is_made_once_and_again_when_its_file_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("a/b");
        let made = Cell::new(0);
        let get = |key: &str| {
            let make = || {
                made.set(made.get() + 1);
                Ok(b"machine code".to_vec())
            };
            let code = cached(Some(&cache), key, make).unwrap();
            assert_eq!(code.cubin, b"machine code");
            assert!(code.cache_trouble.is_none());
            code.cached
        };
        assert_eq!([get("k"), get("k"), get("other"), get("k")], [false, true, false, true]);
        for damage in [&b"short"[..], &[7; 44]] {
            std::fs::write(cache.join("k"), damage).unwrap();
            assert_eq!([get("k"), get("k")], [false, true]);
        }
        let mut bytes = std::fs::read(cache.join("k")).unwrap();
        bytes.pop();
        std::fs::write(cache.join("k"), bytes).unwrap();
        assert_eq!([get("k"), get("k")], [false, true]);
        assert_eq!(made.get(), 5);
        // No leftovers of temporary files.
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 2);
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_no_failure() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let code = cached(Some(&file), "k", || Ok(vec![1])).unwrap();
        assert!(!code.cached && code.cache_trouble.is_some());
        assert!(!cached(None, "k", || Ok(vec![1])).unwrap().cached);
    }

    #[test]
    fn the_key_covers_all_that_matters() {
        let headers = [("a.cuh", "x")];
        let base = key((13, 0), "sm_90", &["-O3"], "source", &headers);
        assert_eq!(base, key((13, 0), "sm_90", &["-O3"], "source", &headers));
        for other in [
            key((13, 1), "sm_90", &["-O3"], "source", &headers),
            key((13, 0), "sm_80", &["-O3"], "source", &headers),
            key((13, 0), "sm_90", &["-O2"], "source", &headers),
            key((13, 0), "sm_90", &["-O3"], "sourcf", &headers),
            key((13, 0), "sm_90", &["-O3"], "source", &[("a.cuh", "y")]),
            key((13, 0), "sm_90", &["-O3"], "source", &[("b.cuh", "x")]),
            key((13, 0), "sm_90", &["-O3"], "source", &[("a.cu", "hx")]),
        ] {
            assert_ne!(base, other);
        }
    }
}

//! The folder of a running fleet: lock, control socket, console logs.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
#[cfg(unix)]
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why a fleet's folder could not be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Another fleet holds the same ports.
    #[error(
        "another fleet, process {pid}, runs on the ports from {port_base} ({}); end it or choose another --port-base",
        folder.display()
    )]
    Running {
        /// Its process id.
        pid: String,
        /// Its first port.
        port_base: u16,
        /// Its folder.
        folder: PathBuf,
    },
    /// Nobody serves there.
    #[error("no fleet runs on the ports from {port_base} ({} does not answer); start one, or give its --port-base",
        socket.display())]
    NotRunning {
        /// The ports asked for.
        port_base: u16,
        /// Where its control socket would be.
        socket: PathBuf,
    },
    /// The folder in the temporary folder was made by somebody else.
    #[error("{} belongs to another user or is open to others; remove it, or give --state-dir", .0.display())]
    Foreign(PathBuf),
    /// An operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> PlaceError {
    let path = path.to_owned();
    move |source| PlaceError::Io { path, source }
}

/// The folder in which all of this user's fleets have theirs: `$XDG_RUNTIME_DIR/linux-on-gpu`, or one in the temporary
/// folder with the user's number in its name.
pub fn default_root() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
    match runtime {
        Some(dir) if dir.is_absolute() => dir.join("linux-on-gpu"),
        #[cfg(unix)]
        _ => std::env::temp_dir().join(format!("linux-on-gpu-{}", rustix::process::getuid().as_raw())),
        // Each user has a temporary folder.
        #[cfg(not(unix))]
        _ => std::env::temp_dir().join("linux-on-gpu"),
    }
}

/// Paths of one fleet's folder. One fleet a port base.
#[derive(Clone, Debug)]
pub struct Place {
    /// The folder.
    pub folder: PathBuf,
    /// The fleet's first port.
    pub port_base: u16,
}

impl Place {
    /// The folder of the fleet with that port base under `root`.
    pub fn new(root: &Path, port_base: u16) -> Self {
        Self { folder: root.join(port_base.to_string()), port_base }
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("control.sock")
    }

    /// The console logs' folder.
    pub fn console(&self) -> PathBuf {
        self.folder.join("console")
    }

    /// Makes the folder and takes its lock, which the operating system drops when the process ends, however it ends.
    pub fn claim(&self) -> Result<Claim, PlaceError> {
        let root = self.folder.parent().unwrap_or(&self.folder);
        check_root(root)?;
        make_private(&self.folder)?;
        let path = self.folder.join("lock");
        let mut options = OpenOptions::new();
        #[cfg(unix)]
        options.mode(0o600);
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(io_error(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // Some systems let nobody read what is locked.
                let _ = file.read_to_string(&mut pid);
                let pid = if pid.trim().is_empty() { "unknown".to_owned() } else { pid.trim().to_owned() };
                return Err(PlaceError::Running {
                    pid,
                    port_base: self.port_base,
                    folder: self.folder.clone(),
                });
            }
            Err(TryLockError::Error(error)) => return Err(io_error(&path)(error)),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(io_error(&path))?;
        let socket = self.socket();
        // We hold the lock, so a socket that lies here is of a fleet that was killed.
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&socket)(error)),
            _ => Ok(Claim { place: self.clone(), _lock: file }),
        }
    }
}

/// A claimed folder: this process is the fleet of these ports.
#[derive(Debug)]
pub struct Claim {
    /// The folder.
    pub place: Place,
    _lock: File,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The lock file stays: removing it would let two fleets lock two different files of one name.
        let _ = fs::remove_file(self.place.socket());
    }
}

/// Makes the root if need be. In one where others may move our folder, nothing would be ours.
fn check_root(root: &Path) -> Result<(), PlaceError> {
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    builder.mode(0o700);
    builder.recursive(true).create(root).map_err(io_error(root))?;
    is_ours(root)
}

#[cfg(not(unix))]
fn is_ours(_root: &Path) -> Result<(), PlaceError> {
    Ok(())
}

#[cfg(unix)]
fn is_ours(root: &Path) -> Result<(), PlaceError> {
    let meta = fs::metadata(root).map_err(io_error(root))?;
    let ours = meta.uid() == rustix::process::getuid().as_raw() || meta.uid() == 0;
    let open = meta.mode() & 0o022 != 0 && meta.mode() & 0o1000 == 0;
    if ours && !open { Ok(()) } else { Err(PlaceError::Foreign(root.to_owned())) }
}

/// Makes one fleet's folder, for this user alone.
fn make_private(folder: &Path) -> Result<(), PlaceError> {
    #[cfg_attr(not(unix), expect(unused_mut, reason = "there are no modes"))]
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    builder.mode(0o700);
    match builder.create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other.map_err(io_error(folder))?,
    }
    keep_private(folder)
}

#[cfg(not(unix))]
fn keep_private(_folder: &Path) -> Result<(), PlaceError> {
    Ok(())
}

#[cfg(unix)]
fn keep_private(folder: &Path) -> Result<(), PlaceError> {
    // Not followed: in a shared temporary folder a link could lead anywhere.
    let meta = fs::symlink_metadata(folder).map_err(io_error(folder))?;
    if !meta.is_dir() || meta.uid() != rustix::process::getuid().as_raw() {
        return Err(PlaceError::Foreign(folder.to_owned()));
    }
    if meta.mode() & 0o077 != 0 {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(io_error(folder))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_fleet_a_port_base() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::new(root.path(), 4000);
        let claim = place.claim().unwrap();
        let error = place.claim().unwrap_err();
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
        Place::new(root.path(), 5000).claim().unwrap();
        drop(claim);
        place.claim().unwrap();
    }

    #[test]
    fn what_a_killed_fleet_left_is_cleared() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::new(root.path(), 4000);
        fs::create_dir(&place.folder).unwrap();
        drop(std::os::unix::net::UnixListener::bind(place.socket()).unwrap());
        fs::write(place.folder.join("lock"), "999999\n").unwrap();
        let claim = place.claim().unwrap();
        assert!(!place.socket().exists());
        assert_eq!(fs::metadata(&place.folder).unwrap().mode() & 0o777, 0o700);
        drop(claim);
    }

    #[test]
    fn a_link_in_place_of_the_folder_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), root.path().join("4000")).unwrap();
        assert!(matches!(Place::new(root.path(), 4000).claim(), Err(PlaceError::Foreign(_))));
    }
}

//! One run at a time. The lock is the kernel's (`flock`), so it ends with the process that holds it, however that ends.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, io};

use anyhow::{Context, Result};
use tokio::time::{Instant, sleep};

/// How often a waiting run looks whether its turn has come.
const POLL: Duration = Duration::from_millis(20);

const REMEDY: &str = "run as root, or set RUNTIME_DIRECTORY to a directory that can be written";

/// Another run held the lock until the deadline.
#[derive(Debug)]
pub struct Busy {
    path: PathBuf,
    waited: Duration,
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Busy { path, waited } = self;
        write!(f, "another eniup run held {} for the {:.1} s of this run's time", path.display(), waited.as_secs_f64())
    }
}

impl std::error::Error for Busy {}

/// Where the lock and the ledger are: `$RUNTIME_DIRECTORY`, as systemd gives it, or `/run/eniup`.
pub fn runtime_directory() -> PathBuf {
    match std::env::var_os("RUNTIME_DIRECTORY").filter(|path| !path.is_empty()) {
        Some(path) => path.into(),
        None => "/run/eniup".into(),
    }
}

/// Makes the directory if it is missing, and waits for the lock until the deadline. It is held as long as the file is.
///
/// # Errors
/// [`Busy`], or the directory cannot be used.
pub async fn acquire(directory: &Path, deadline: Instant) -> Result<File> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .with_context(|| format!("cannot make the directory {} for the lock; {REMEDY}", directory.display()))?;
    let path = directory.join("lock");
    // Whoever may open a file may lock it, so nobody else may.
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("cannot open the lock {}; {REMEDY}", path.display()))?;
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                sleep(POLL.min(deadline - Instant::now())).await;
            }
            Err(TryLockError::WouldBlock) => return Err(Busy { path, waited: started.elapsed() }.into()),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", path.display()));
            }
        }
    }
}

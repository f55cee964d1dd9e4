//! One run at a time. The lock is the kernel's (`flock`), so it ends with the process that holds it, however that ends.

use std::fs::{self, File, Metadata, TryLockError};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, io};

use anyhow::{Context, Result, ensure};
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

/// The right to act, for as long as this lives. It is not stopped by its terminal meanwhile (Ctrl-Z): nobody else could act.
pub struct Turn {
    file: File,
    /// Turns are numbered, as long as the file can be read and written.
    number: Option<u64>,
    _unstopped: Unstopped,
}

impl Turn {
    /// Ends it, and says which one it was.
    pub fn end(self) -> Option<u64> {
        self.number
    }

    /// Whether nobody else has had a turn since that one.
    pub fn is_next_after(&self, ended: Option<u64>) -> bool {
        ended.is_some_and(|ended| self.number == Some(ended + 1))
    }

    fn begin(file: File) -> Turn {
        let mut turn = Turn { file, number: None, _unstopped: Unstopped::begin() };
        turn.number = turn.count().ok();
        turn
    }

    /// Of one length always, so that it can be written anew where nothing else can.
    fn count(&self) -> io::Result<u64> {
        let mut text = String::new();
        (&self.file).read_to_string(&mut text)?;
        let number = text.trim_end().parse().unwrap_or(0u64).wrapping_add(1);
        self.file.write_all_at(format!("{number:020}\n").as_bytes(), 0)?;
        Ok(number)
    }
}

/// Makes the directory if it is missing, and waits for the lock until the deadline.
///
/// # Errors
/// [`Busy`], or the directory cannot be used.
pub async fn acquire(directory: &Path, deadline: Instant) -> Result<Turn> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .with_context(|| format!("cannot make the directory {} for the lock; {REMEDY}", directory.display()))?;
    let path = directory.join("lock");
    let failed = || format!("cannot open the lock {}; {REMEDY}", path.display());
    let started = Instant::now();
    let mut file = open(&path).with_context(failed)?;
    loop {
        match file.try_lock() {
            Ok(()) if is_there(&file, &path) => return Ok(Turn::begin(file)),
            // Somebody has taken it away, and others lock the one that came in its place.
            Ok(()) => file = open(&path).with_context(failed)?,
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

/// Whoever may open a file may lock it, so nobody else may. What is there and is no file would keep the run waiting.
fn open(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.create(true).truncate(false).read(true).write(true).mode(0o600);
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path)?;
    ensure!(file.metadata()?.is_file(), "it is there and is no file");
    Ok(file)
}

fn is_there(file: &File, path: &Path) -> bool {
    let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
    let is_same = |there: Metadata| file.metadata().is_ok_and(|own| identity(own) == identity(there));
    fs::symlink_metadata(path).is_ok_and(is_same)
}

/// The signals by which a terminal stops a process, ignored for as long as this lives.
struct Unstopped(Vec<(libc::c_int, libc::sigaction)>);

impl Unstopped {
    fn begin() -> Unstopped {
        let ignored = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].into_iter().filter_map(|signal| {
            // SAFETY: all zeros are the default action, and ignoring needs no handler.
            let mut ignore: libc::sigaction = unsafe { std::mem::zeroed() };
            ignore.sa_sigaction = libc::SIG_IGN;
            let mut before = ignore;
            // SAFETY: both are of this function.
            let result = unsafe { libc::sigaction(signal, &ignore, &mut before) };
            (result == 0).then_some((signal, before))
        });
        Unstopped(ignored.collect())
    }
}

impl Drop for Unstopped {
    fn drop(&mut self) {
        for (signal, before) in &self.0 {
            // SAFETY: it was the action before, handler and all.
            unsafe { libc::sigaction(*signal, before, std::ptr::null_mut()) };
        }
    }
}

//! One run at a time. The lock is the kernel's (`flock`), so it ends with the process that holds it, however that ends.

use std::fs::{self, File, Metadata, TryLockError};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, io};

use anyhow::{Context, Result, ensure};
use tokio::time::{Instant, sleep};

use crate::whole_file;

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
    _file: File,
    _unstopped: Unstopped,
}

/// What was done in all turns, as the lock's file counts it. Whoever gives its turn away sees by it what others have done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Deeds {
    /// Rounds of changes.
    pub changes: u64,
    /// What somebody has decided by hand about changes: a release, a run on trial, its end.
    pub decisions: u64,
}

/// What has come before, in all turns.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Past {
    pub deeds: Deeds,
    /// When the youngest reading of metadata ended by which a run has acted, or found nothing to do; in milliseconds since boot.
    pub read: u64,
}

/// # Errors
/// The file cannot be read. What is no number in it counts as none.
pub fn past(directory: &Path) -> Result<Past> {
    let text = whole_file::read(&directory.join("lock"))?.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut numbers = text.split_whitespace().map(|number| number.parse().unwrap_or_default());
    let mut next = || numbers.next().unwrap_or_default();
    Ok(Past { deeds: Deeds { changes: next(), decisions: next() }, read: next() })
}

/// # Errors
/// As for [`past`].
pub fn deeds(directory: &Path) -> Result<Deeds> {
    Ok(past(directory)?.deeds)
}

/// To be called by whoever has the turn, before changes are made.
pub fn count_change(directory: &Path) {
    count(directory, |past| past.deeds.changes = past.deeds.changes.wrapping_add(1));
}

/// The same for a decision.
pub fn count_decision(directory: &Path) {
    count(directory, |past| past.deeds.decisions = past.deeds.decisions.wrapping_add(1));
}

/// The same for the end of a reading of all of metadata, in milliseconds since boot.
pub fn count_reading(directory: &Path, ended: u64) {
    count(directory, |past| past.read = ended);
}

fn count(directory: &Path, more: impl FnOnce(&mut Past)) {
    let mut past = past(directory).unwrap_or_default();
    more(&mut past);
    let Past { deeds: Deeds { changes, decisions }, read } = past;
    // Of one length always, so that it can be written anew where nothing else can.
    let text = format!("{changes:020} {decisions:020} {read:020}\n");
    let file = File::options().write(true).open(directory.join("lock"));
    if let Err(error) = file.and_then(|file| file.write_all_at(text.as_bytes(), 0)) {
        tracing::warn!("cannot count what is done in {}/lock: {error}", directory.display());
    }
}

/// The lock's file. It and its directory are made if they are missing.
///
/// # Errors
/// The directory cannot be used.
pub fn prepare(directory: &Path) -> Result<File> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .with_context(|| format!("cannot make the directory {} for the lock; {REMEDY}", directory.display()))?;
    open(&directory.join("lock"))
}

/// Waits for the lock until the deadline.
///
/// # Errors
/// [`Busy`], or the directory cannot be used.
pub async fn acquire(directory: &Path, deadline: Instant) -> Result<Turn> {
    let path = directory.join("lock");
    let started = Instant::now();
    let mut file = prepare(directory)?;
    loop {
        match file.try_lock() {
            Ok(()) if is_there(&file, &path) => return Ok(Turn { _file: file, _unstopped: Unstopped::begin() }),
            // Somebody has taken it away, and others lock the one that came in its place.
            Ok(()) => file = open(&path)?,
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
    let open = || {
        let mut options = File::options();
        options.create(true).truncate(false).read(true).write(true).mode(0o600);
        let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path)?;
        ensure!(file.metadata()?.is_file(), "it is there and is no file");
        Ok(file)
    };
    open().with_context(|| format!("cannot open the lock {}; {REMEDY}", path.display()))
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

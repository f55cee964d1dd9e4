//! Standard error for a process that must not be held up by whoever reads it: a connection that is cut off leaves a
//! terminal that takes no more, and a plain write would wait for as long as that lasts.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::thread::sleep;
use std::time::Duration;

/// How long all writes together wait for a slow reader. What comes later is lost where it would have to wait.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);

pub struct Unhindered {
    file: File,
    patience: Duration,
}

impl Unhindered {
    /// None where it is nothing that could keep a writer waiting, or cannot be opened anew. Anew, since whoever else
    /// writes to the same terminal (a shell) shares its flags.
    pub fn open() -> Option<Unhindered> {
        const STDERR: &str = "/proc/self/fd/2";
        let kind = fs::metadata(STDERR).ok()?.file_type();
        let mut options = File::options();
        options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = (kind.is_fifo() || kind.is_char_device()).then(|| options.open(STDERR).ok()).flatten()?;
        Some(Unhindered { file, patience: PATIENCE })
    }
}

impl Write for Unhindered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.file.write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock && !self.patience.is_zero() => {
                    self.patience = self.patience.saturating_sub(PAUSE);
                    sleep(PAUSE);
                }
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

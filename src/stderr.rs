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
    way: Way,
    patience: Duration,
}

enum Way {
    File(File),
    /// It cannot be opened anew, but one write alone can be told not to wait.
    Socket,
}

impl Unhindered {
    /// None where it is nothing that could keep a writer waiting, or cannot be opened anew. Anew, since whoever else
    /// writes to the same terminal (a shell) shares its flags.
    pub fn open() -> Option<Unhindered> {
        const STDERR: &str = "/proc/self/fd/2";
        let kind = fs::metadata(STDERR).ok()?.file_type();
        let mut options = File::options();
        options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let way = match kind {
            kind if kind.is_socket() => Way::Socket,
            kind if kind.is_fifo() || kind.is_char_device() => Way::File(options.open(STDERR).ok()?),
            _ => return None,
        };
        Some(Unhindered { way, patience: PATIENCE })
    }
}

impl Way {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Way::File(file) => file.write(bytes),
            Way::Socket => {
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                // SAFETY: reads `bytes`, which live as long as the call.
                let sent = unsafe { libc::send(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len(), flags) };
                usize::try_from(sent).map_err(|_| io::Error::last_os_error())
            }
        }
    }
}

impl Write for Unhindered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.way.write(bytes) {
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

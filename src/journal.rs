//! The native protocol of systemd's journal: an entry is one datagram of fields, so that `journalctl ENI_ID=eni-…` finds it.
//! <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>

use std::fs;
use std::io::{self, ErrorKind};
use std::os::linux::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

const SOCKET: &str = "/run/systemd/journal/socket";

/// A journal that takes nothing must not keep the network waiting for longer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Bytes of one value. All of an entry's together stay far below what a socket sends in one piece (`net.core.wmem_default`,
/// 208 KiB), so no file has to be handed over instead.
const LONGEST: usize = 16 << 10;

#[derive(Debug)]
pub struct Journal {
    socket: UnixDatagram,
}

impl Journal {
    /// # Errors
    /// There are no Unix sockets for this process: a unit may forbid them.
    pub fn open() -> io::Result<Journal> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Journal { socket })
    }

    /// Each value below its name. A field is what journald takes for one: capital letters, digits and underscores.
    ///
    /// # Errors
    /// Nobody is there, or takes nothing for too long.
    pub fn send(&self, fields: &[(&str, &str)]) -> io::Result<()> {
        // By its path each time: whoever holds the socket may be another one by now.
        let sent = self.socket.send_to(&entry(fields), SOCKET);
        if sent.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            // It was waited for once; from here on it is told what it takes at once.
            self.socket.set_nonblocking(true)?;
        }
        sent.map(drop)
    }
}

/// Whether stderr is what systemd has connected with the journal, as it says in `$JOURNAL_STREAM`; a shell that redirects
/// stderr leaves the variable as it is.
pub fn is_stderr() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    fs::metadata("/proc/self/fd/2").is_ok_and(|stderr| stream == format!("{}:{}", stderr.st_dev(), stderr.st_ino()))
}

fn entry(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        let value = beginning(value);
        bytes.extend(name.as_bytes());
        if value.contains('\n') {
            bytes.push(b'\n');
            bytes.extend((value.len() as u64).to_le_bytes());
        } else {
            bytes.push(b'=');
        }
        bytes.extend(value.as_bytes());
        bytes.push(b'\n');
    }
    bytes
}

fn beginning(value: &str) -> &str {
    let end = (0..=LONGEST.min(value.len())).rev().find(|end| value.is_char_boundary(*end));
    &value[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_of_several_lines_tells_its_length() {
        let bytes = entry(&[("PRIORITY", "4"), ("MESSAGE", "one\ntwo=2")]);
        assert_eq!(bytes, b"PRIORITY=4\nMESSAGE\n\x09\0\0\0\0\0\0\0one\ntwo=2\n");
    }

    #[test]
    fn a_long_value_is_cut_between_two_characters() {
        let bytes = entry(&[("MESSAGE", &"…".repeat(LONGEST))]);
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.len() <= LONGEST + "MESSAGE=\n".len() && text.ends_with("…\n"));
    }
}

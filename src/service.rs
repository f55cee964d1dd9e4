//! What systemd wants to hear of a service that stays: sd_notify(3) and its watchdog. Without systemd nothing is said.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

pub struct Service {
    socket: Option<(UnixDatagram, SocketAddr)>,
    last_status: String,
}

impl Service {
    /// By `$NOTIFY_SOCKET`: a path, or with `@` an abstract name.
    pub fn of_environment() -> Service {
        let socket = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()).map(open).transpose();
        let socket = socket.unwrap_or_else(|error| {
            tracing::warn!("systemd's NOTIFY_SOCKET cannot be used: {error}");
            None
        });
        Service { socket, last_status: String::new() }
    }

    pub fn say(&self, what: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(what.as_bytes(), address)
        {
            tracing::debug!("systemd does not listen: {error}");
        }
    }

    /// One line for `systemctl status`.
    pub fn status(&mut self, status: &str) {
        if self.last_status != status {
            self.say(&format!("STATUS={status}"));
            self.last_status = status.into();
        }
    }

    /// How often the watchdog wants to hear of us: twice in the time that it waits.
    pub fn watchdog(&self) -> Option<Duration> {
        let variable = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let is_ours =
            std::env::var_os("WATCHDOG_PID").is_none() || variable("WATCHDOG_PID") == Some(std::process::id().into());
        let time = variable("WATCHDOG_USEC").filter(|time| is_ours && *time > 0)?;
        Some(Duration::from_micros(time) / 2)
    }
}

fn open(path: OsString) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A systemd that is busy must not stop the work.
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

//! A card: the network card of a virtual machine, and the fabric's end of it. Both are datagram sockets with a name, QEMU's
//! (`-netdev dgram`) and the fabric's, and a datagram is a frame: no link of this machine has a part in it.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::fabric::End;
use crate::kernel;
use crate::vpc::Mac;

/// Frames that wait at a socket; the kernel's own choice is 10.
const QUEUE: &str = "4096";

/// Bytes of them.
const WAITING: usize = 8 << 20;

pub struct Card {
    socket: Socket,
    machine: SockAddr,
    names: Names,
}

/// Where the two sockets of a card are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Names {
    pub fabric: PathBuf,
    /// QEMU makes it when the card is plugged in.
    pub machine: PathBuf,
}

impl Names {
    /// In the machine's folder, by the card's station address.
    pub fn of(folder: &Path, mac: Mac) -> Names {
        let name = mac.to_string().replace(':', "");
        Names { fabric: folder.join(format!("{name}.fabric")), machine: folder.join(format!("{name}.machine")) }
    }
}

impl Card {
    pub fn create(folder: &Path, mac: Mac) -> Result<Card> {
        // It counts for the sockets that are made after it, also by whoever is started from here.
        kernel::sysctl("unix/max_dgram_qlen", QUEUE)?;
        let names = Names::of(folder, mac);
        let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
        let own = SockAddr::unix(&names.fabric)?;
        socket.bind(&own).with_context(|| format!("making {}", names.fabric.display()))?;
        socket.set_nonblocking(true)?;
        // What a machine that gets no turn has not read yet counts as the sender's.
        kernel::set_send_queue(&socket, WAITING)?;
        Ok(Card { socket, machine: SockAddr::unix(&names.machine)?, names })
    }
}

impl End for Card {
    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.socket).read(frame)
    }

    /// Fails while the machine does not have the card.
    fn write(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.send_to(frame, &self.machine).map(|_| ())
    }
}

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // The folder may be gone already.
        let _ = fs::remove_file(&self.names.fabric);
    }
}

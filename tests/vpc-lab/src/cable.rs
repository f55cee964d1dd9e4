//! A cable: a link in a guest, and the fabric's end of it, where whole frames are read and written. Made of a veth pair and
//! a packet socket, which an ordinary user has in a user namespace, too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::fabric::End;
use crate::kernel;
use crate::node::Node;
use crate::vpc::Mac;

/// Bytes; the fabric's end must take whatever the guest's MTU is.
const LARGEST_MTU: u32 = 65_535;

/// Bytes of frames that wait for the fabric. Ordinary users get what `net.core.rmem_max` allows.
const QUEUE: usize = 8 << 20;

pub struct Cable {
    /// The name of the fabric's end.
    end: String,
    frames: File,
}

impl Cable {
    /// Gives a node a link with this name and station address. The fabric's end is in the calling thread's namespace.
    pub fn plug_into(node: &Node, link: &str, mac: Mac) -> Result<Cable> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let end = format!("port{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let fabric = File::open("/proc/thread-self/ns/net").context("opening the fabric's namespace")?;
        node.enter(|| {
            kernel::create_veth(link, &end, &fabric)?;
            kernel::set_mac(link, mac)?;
            // The fabric is no driver: it wants frames of the link's size, with their checksums.
            kernel::disable_offload(link)
        })?;
        kernel::set_mtu(&end, LARGEST_MTU)?;
        let frames = open(&end).with_context(|| format!("opening the fabric's end of {link}"))?;
        kernel::set_up(&end)?;
        Ok(Cable { end, frames: File::from(frames) })
    }
}

impl End for Cable {
    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.frames).read(frame)
    }

    fn write(&self, frame: &[u8]) -> io::Result<()> {
        (&self.frames).write(frame).map(|_| ())
    }
}

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.frames.as_fd()
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // It is gone already when the guest's namespace went first.
        let _ = kernel::delete_link(&self.end);
    }
}

fn open(end: &str) -> Result<OwnedFd> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(all))))?;
    socket.set_nonblocking(true)?;
    kernel::set_receive_queue(&socket, QUEUE)?;
    kernel::make_driver_like(&socket)?;
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: a packet address fits into a storage made for all of them.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = i32::try_from(kernel::index(end)?)?;
    // SAFETY: the storage holds a packet address of this length.
    let address = unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
    socket.bind(&address)?;
    Ok(socket.into())
}

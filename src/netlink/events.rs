//! Being told that something has changed. What it is, is not asked: whoever is told looks at everything anew.

use std::io;

use futures::FutureExt;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

/// `RTNLGRP_*` of `linux/rtnetlink.h`: links, and addresses, routes and rules of both families.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

pub struct Events {
    socket: TokioSocket,
}

impl Events {
    /// Needs a running tokio runtime, and no privilege.
    ///
    /// # Errors
    /// The kernel has no rtnetlink socket to give.
    pub fn open() -> io::Result<Events> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        let groups = GROUPS.iter().fold(0, |groups, group| groups | 1 << (group - 1));
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        Ok(Events { socket })
    }

    /// Waits until something has changed. Events that the kernel had no room for are a change, too.
    ///
    /// # Errors
    /// The socket is of no use any more.
    pub async fn changed(&mut self) -> io::Result<()> {
        self.one().await
    }

    /// Forgets what has been told by now.
    ///
    /// # Errors
    /// As for [`Events::changed`].
    pub fn forget(&mut self) -> io::Result<()> {
        while let Some(result) = self.one().now_or_never() {
            result?;
        }
        Ok(())
    }

    async fn one(&mut self) -> io::Result<()> {
        let mut datagram = Vec::with_capacity(64 * 1024);
        match self.socket.recv(&mut datagram).await {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

//! Being told that something has changed. What it is, is not asked: whoever is told looks at everything anew.

use std::io;

use futures::FutureExt;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::rule::RuleAttribute;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

/// `RTNLGRP_*` of `linux/rtnetlink.h`: links, and addresses, routes and rules of both families.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

/// Something was taken away; `RTM_*` of `linux/rtnetlink.h`.
const REMOVALS: [u16; 3] = [libc::RTM_DELADDR, libc::RTM_DELROUTE, libc::RTM_DELRULE];

pub struct Events {
    socket: TokioSocket,
    /// The protocol of what is ours.
    mark: u8,
    last_remover: Option<u32>,
}

impl Events {
    /// Needs a running tokio runtime, and no privilege.
    ///
    /// # Errors
    /// The kernel has no rtnetlink socket to give.
    pub fn open(mark: u8) -> io::Result<Events> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        let groups = GROUPS.iter().fold(0, |groups, group| groups | 1 << (group - 1));
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        Ok(Events { socket, mark, last_remover: None })
    }

    /// By which protocol it is told from now on what is ours.
    pub fn ours_has(&mut self, mark: u8) {
        self.mark = mark;
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

    /// The port of the socket by which something of ours was taken away since this was asked last: mostly the number of its
    /// process, since the kernel gives a process's first socket that number.
    pub fn take_remover(&mut self) -> Option<u32> {
        self.last_remover.take()
    }

    async fn one(&mut self) -> io::Result<()> {
        let mut datagram = Vec::with_capacity(64 * 1024);
        match self.socket.recv(&mut datagram).await {
            Ok(_) => {
                self.last_remover = remover(&datagram, self.mark).or(self.last_remover);
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Who has asked for what the message tells of, if it tells of the removal of something with this mark. The kernel's own doing
/// has port 0.
fn remover(datagram: &[u8], mark: u8) -> Option<u32> {
    let kind = u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?);
    if !REMOVALS.contains(&kind) {
        return None;
    }
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram).ok()?;
    let protocol = match message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(route)) => u8::from(route.header.protocol),
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRule(rule)) => {
            rule.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::Protocol(number) => Some(u8::from(*number)),
                _ => None,
            })?
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(address)) => {
            address.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Protocol(number) => Some(u8::from(*number)),
                _ => None,
            })?
        }
        _ => return None,
    };
    Some(message.header.port_number).filter(|port| *port != 0 && protocol == mark)
}

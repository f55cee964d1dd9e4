//! The kernel's own answer to which way a packet would go: `RTM_GETROUTE`.

use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::observe::ip;
use super::{Error, Netlink};
use crate::explain::Said;
use crate::fib::{Packet, Refusal, Way};
use crate::net::{Family, HasFamily};

impl Netlink {
    /// What the kernel would do with the packet.
    ///
    /// # Errors
    /// The conversation broke. That the kernel refuses the packet is an answer.
    pub async fn ask(&mut self, packet: &Packet) -> Result<Said, Error> {
        match self.request(RouteNetlinkMessage::GetRoute(question(packet))).await {
            Ok(RouteNetlinkMessage::NewRoute(message)) => Ok(said(&message, packet.input.is_some())),
            Ok(other) => Err(Error::Garbled(format!("{other:?} in answer to a question for a route"))),
            Err(error) => match refusal(&error, packet) {
                Some(said) => Ok(said),
                None => Err(error),
            },
        }
    }
}

fn question(packet: &Packet) -> RouteMessage {
    let mut message = RouteMessage::default();
    let family = packet.destination.family();
    message.header.address_family = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.flags = RouteFlags::LookupTable;
    message.header.destination_prefix_length = family.bits();
    message.attributes.push(RouteAttribute::Destination(packet.destination.into()));
    if let Some(source) = packet.source {
        message.header.source_prefix_length = family.bits();
        message.attributes.push(RouteAttribute::Source(source.into()));
    }
    message.attributes.extend(packet.input.map(RouteAttribute::Iif));
    message.attributes.extend(packet.output.map(RouteAttribute::Oif));
    if packet.mark != 0 {
        message.attributes.push(RouteAttribute::Mark(packet.mark));
    }
    message
}

fn said(message: &RouteMessage, is_forwarded: bool) -> Said {
    let (mut link, mut gateway, mut source) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Gateway(via) => gateway = ip(via),
            RouteAttribute::PrefSource(preferred) => source = ip(preferred),
            _ => {}
        }
    }
    match (message.header.kind, link) {
        (RouteType::Local | RouteType::Anycast, _) => Said::Way { way: Way::Here, source },
        // What comes in for everybody is for this machine, too.
        (RouteType::Broadcast, _) if is_forwarded => Said::Way { way: Way::Here, source },
        (RouteType::Unicast, Some(link)) => Said::Way { way: Way::Out { link, gateway }, source },
        (RouteType::Broadcast | RouteType::Multicast, Some(link)) if !is_forwarded => {
            Said::Way { way: Way::Out { link, gateway }, source }
        }
        (kind, _) => Said::Nothing(format!("it was asked, and tells a route of kind {kind:?}")),
    }
}

/// What an errno says of the packet.
fn refusal(error: &Error, packet: &Packet) -> Option<Said> {
    let nowhere = |refusal| Some(Said::Way { way: Way::Nowhere(refusal), source: None });
    match error.errno()? {
        libc::ENETUNREACH => nowhere(Refusal::NoRoute),
        libc::EHOSTUNREACH if packet.input.is_some() => {
            Some(Said::Nothing("it was asked, and does not forward it, or no route leads there (EHOSTUNREACH)".into()))
        }
        libc::EHOSTUNREACH => nowhere(Refusal::Unreachable),
        libc::EACCES => nowhere(Refusal::Prohibited),
        libc::EXDEV => {
            Some(Said::Nothing("it was asked, and rp_filter drops what comes in by that link from that source".into()))
        }
        libc::EINVAL => nowhere(Refusal::Blackhole),
        _ => None,
    }
}

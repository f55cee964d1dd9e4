//! What the lab itself sets up in a network namespace, as a distribution, a container engine or an administrator would:
//! links, addresses, routes, by netlink of its own. Everything acts on the namespace of the calling thread.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope, CacheInfo};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use socket2::{Domain, Socket as Socket2, Type};

use crate::vpc::Mac;

/// `RTPROT_KERNEL`: routes that the kernel makes for links and addresses.
const KERNEL: u8 = 2;
/// `RTPROT_STATIC`, `RTPROT_RA` and `RTPROT_DHCP`.
pub const STATIC: u8 = 4;
pub const RA: u8 = 9;
pub const DHCP: u8 = 16;

pub const MAIN: u32 = 254;
const LOCAL: u32 = 255;

/// Lets the kernel finish checksums and cut segments itself before a link of this namespace sends.
pub fn disable_offload(link: &str) -> Result<()> {
    /// `ETHTOOL_STXCSUM` of `linux/ethtool.h`; segmentation needs it and goes with it.
    const SET_TX_CHECKSUMS: u32 = 0x17;
    let socket = Socket2::new(Domain::IPV4, Type::DGRAM, None)?;
    let mut value = [SET_TX_CHECKSUMS, 0];
    let mut request = interface_request(link)?;
    request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
    // SAFETY: the request and the value that it points to live as long as the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, std::ptr::from_mut(&mut request)) } {
        -1 => Err(io::Error::last_os_error()).with_context(|| format!("switching off {link}'s offloading")),
        _ => Ok(()),
    }
}

/// Bytes that may wait until the other side has read them: as many as the user may have.
pub fn set_send_queue(socket: &Socket2, bytes: usize) -> io::Result<()> {
    match set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, bytes as libc::c_int) {
        Ok(()) => Ok(()),
        // Only the machine's own root may go above its limit.
        Err(_) => socket.set_send_buffer_size(bytes),
    }
}

/// Bytes that may wait to be read: as many as the user may have.
pub fn set_receive_queue(socket: &Socket2, bytes: usize) -> io::Result<()> {
    match set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes as libc::c_int) {
        Ok(()) => Ok(()),
        // Only the machine's own root may go above its limit.
        Err(_) => socket.set_recv_buffer_size(bytes),
    }
}

/// Lets a packet socket not see what it sends itself, and send past the queueing discipline: that one takes frames only
/// some time after the carrier came, and loses those before.
pub fn make_driver_like(socket: &Socket2) -> io::Result<()> {
    set_option(socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
    set_option(socket, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1)
}

fn set_option(socket: &Socket2, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value lives as long as the call and has this length.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(&value).cast(), length) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn interface_request(name: &str) -> Result<libc::ifreq> {
    let name = CString::new(name)?;
    let bytes = name.as_bytes_with_nul();
    // SAFETY: all zeros is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if bytes.len() > request.ifr_name.len() {
        bail!("{name:?} is too long for a link's name");
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(request)
}

/// The index of a link.
pub fn index(name: &str) -> Result<u32> {
    let name_z = CString::new(name)?;
    // SAFETY: the name ends in zero.
    match unsafe { libc::if_nametoindex(name_z.as_ptr()) } {
        0 => Err(io::Error::last_os_error()).with_context(|| format!("looking for the link {name}")),
        index => Ok(index),
    }
}

pub fn set_up(link: &str) -> Result<()> {
    set_link(link, true, Vec::new())
}

pub fn set_down(link: &str) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index(link)?;
    message.header.change_mask = LinkFlags::Up;
    change(RouteNetlinkMessage::SetLink(message), 0).with_context(|| format!("setting {link} down"))
}

pub fn set_mtu(link: &str, mtu: u32) -> Result<()> {
    set_link(link, false, vec![LinkAttribute::Mtu(mtu)])
}

/// Gives a link another station address; it has to be down.
pub fn set_mac(link: &str, mac: Mac) -> Result<()> {
    set_link(link, false, vec![LinkAttribute::Address(mac.0.into())])
}

/// Makes a link a port of a bridge.
pub fn set_controller(link: &str, controller: &str) -> Result<()> {
    set_link(link, false, vec![LinkAttribute::Controller(index(controller)?)])
}

pub fn set_group(link: &str, group: u32) -> Result<()> {
    set_link(link, false, vec![LinkAttribute::Group(group)])
}

/// The link must be down.
pub fn rename(link: &str, name: &str) -> Result<()> {
    set_link(link, false, vec![LinkAttribute::IfName(name.into())])
}

fn set_link(link: &str, is_up: bool, attributes: Vec<LinkAttribute>) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index(link)?;
    if is_up {
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = LinkFlags::Up;
    }
    message.attributes = attributes;
    change(RouteNetlinkMessage::SetLink(message), 0).with_context(|| format!("setting {link}"))
}

pub fn create_bridge(name: &str) -> Result<()> {
    create_link(name, InfoKind::Bridge, None)
}

/// A pair of links, the second one in another namespace.
pub fn create_veth(name: &str, peer: &str, peer_namespace: &impl AsRawFd) -> Result<()> {
    let mut other = LinkMessage::default();
    other.attributes = vec![LinkAttribute::IfName(peer.into()), LinkAttribute::NetNsFd(peer_namespace.as_raw_fd())];
    create_link(name, InfoKind::Veth, Some(InfoData::Veth(InfoVeth::Peer(other))))
}

pub fn delete_link(name: &str) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index(name)?;
    change(RouteNetlinkMessage::DelLink(message), 0).with_context(|| format!("deleting the link {name}"))
}

fn create_link(name: &str, kind: InfoKind, data: Option<InfoData>) -> Result<()> {
    let mut message = LinkMessage::default();
    let info = std::iter::once(LinkInfo::Kind(kind)).chain(data.map(LinkInfo::Data)).collect();
    message.attributes = vec![LinkAttribute::IfName(name.into()), LinkAttribute::LinkInfo(info)];
    let message = RouteNetlinkMessage::NewLink(message);
    change(message, NLM_F_CREATE | NLM_F_EXCL).with_context(|| format!("making the link {name}"))
}

/// Seconds that an address lives, as a DHCP client sets it; for ever when none is given. The kernel makes the connected
/// route. IPv6 without duplicate address detection.
pub fn add_address(link: &str, net: IpNet, lifetime: Option<u32>) -> Result<()> {
    let mut message = AddressMessage::default();
    message.header.family = family(net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.index = index(link)?;
    message.attributes = vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
    if net.addr().is_ipv6() {
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    if let Some(seconds) = lifetime {
        let mut cache = CacheInfo::default();
        cache.ifa_preferred = seconds;
        cache.ifa_valid = seconds;
        message.attributes.push(AddressAttribute::CacheInfo(cache));
    }
    let message = RouteNetlinkMessage::NewAddress(message);
    change(message, NLM_F_CREATE | NLM_F_EXCL).with_context(|| format!("adding {net} to {link}"))
}

/// All addresses of this namespace.
pub fn addresses() -> Result<BTreeSet<IpAddr>> {
    let own = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Local(own) | AddressAttribute::Address(own) => Some(*own),
        _ => None,
    };
    let messages = dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let all = messages.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewAddress(address) => address.attributes.iter().find_map(own),
        _ => None,
    });
    Ok(all.collect())
}

/// Until packets for an address of this node reach it: the kernel has a worker make an IPv6 address's local route.
pub fn await_local(address: IpAddr) -> Result<()> {
    /// `RTF_LOCAL`.
    const LOCAL: u32 = 0x8000_0000;
    let IpAddr::V6(address) = address else { return Ok(()) };
    let shown = format!("{:032x} 80 ", u128::from(address));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let routes = fs::read_to_string("/proc/thread-self/net/ipv6_route")?;
        let flags = |line: &str| u32::from_str_radix(line.split_whitespace().nth(8)?, 16).ok();
        if routes.lines().any(|line| line.starts_with(&shown) && flags(line).is_some_and(|flags| flags & LOCAL != 0)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{address} does not become local");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn delete_address(link: &str, net: IpNet) -> Result<()> {
    let mut message = AddressMessage::default();
    message.header.family = family(net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.index = index(link)?;
    message.attributes = vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
    change(RouteNetlinkMessage::DelAddress(message), 0).with_context(|| format!("deleting {net} of {link}"))
}

/// A route as somebody other than eniup makes it.
pub struct Route<'a> {
    pub destination: IpNet,
    pub gateway: Option<IpAddr>,
    pub link: &'a str,
    pub table: u32,
    pub metric: u32,
    pub protocol: u8,
}

impl<'a> Route<'a> {
    /// In `main`, static.
    pub fn new(destination: IpNet, gateway: Option<IpAddr>, link: &'a str) -> Route<'a> {
        Route { destination, gateway, link, table: MAIN, metric: 0, protocol: STATIC }
    }
}

pub fn add_route(route: &Route) -> Result<()> {
    let Route { destination, gateway, link, table, metric, protocol } = route;
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination.addr());
    message.header.destination_prefix_length = destination.prefix_len();
    message.header.protocol = (*protocol).into();
    message.header.kind = RouteType::Unicast;
    let is_direct = gateway.is_none() && destination.addr().is_ipv4();
    message.header.scope = if is_direct { RouteScope::Link } else { RouteScope::Universe };
    if destination.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(destination.network().into()));
    }
    message.attributes.extend(gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
    message.attributes.push(RouteAttribute::Oif(index(link)?));
    message.attributes.push(RouteAttribute::Table(*table));
    if *metric != 0 {
        message.attributes.push(RouteAttribute::Priority(*metric));
    }
    let message = RouteNetlinkMessage::NewRoute(message);
    change(message, NLM_F_CREATE | NLM_F_EXCL).with_context(|| format!("adding the route to {destination}"))
}

/// Lets this machine answer for all addresses of a net.
pub fn answer_for(net: IpNet) -> Result<()> {
    let mut message = RouteMessage::default();
    message.header.address_family = family(net.addr());
    message.header.destination_prefix_length = net.prefix_len();
    message.header.kind = RouteType::Local;
    message.header.scope = RouteScope::Host;
    if net.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(net.network().into()));
    }
    message.attributes.extend([RouteAttribute::Oif(index("lo")?), RouteAttribute::Table(LOCAL)]);
    let message = RouteNetlinkMessage::NewRoute(message);
    change(message, NLM_F_CREATE | NLM_F_EXCL).with_context(|| format!("answering for {net}"))
}

/// A routing policy rule of somebody other than eniup: those that VPNs add around ours.
pub struct Rule {
    pub is_ipv6: bool,
    pub priority: u32,
    pub table: u32,
    pub mark: Option<(u32, u32)>,
    pub is_inverted: bool,
    pub suppress_prefix_length: Option<u32>,
}

impl Rule {
    /// Everything looks up the table.
    pub fn new(is_ipv6: bool, priority: u32, table: u32) -> Rule {
        Rule { is_ipv6, priority, table, mark: None, is_inverted: false, suppress_prefix_length: None }
    }
}

pub fn add_rule(rule: &Rule) -> Result<()> {
    let Rule { is_ipv6, priority, table, mark, is_inverted, suppress_prefix_length } = rule;
    let mut message = RuleMessage::default();
    message.header.family = if *is_ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    if *is_inverted {
        message.header.flags = netlink_packet_route::rule::RuleFlags::Invert;
    }
    message.attributes = vec![RuleAttribute::Priority(*priority), RuleAttribute::Table(*table)];
    if let Some((mark, mask)) = mark {
        message.attributes.extend([RuleAttribute::FwMark(*mark), RuleAttribute::FwMask(*mask)]);
    }
    message.attributes.extend(suppress_prefix_length.map(RuleAttribute::SuppressPrefixLen));
    let message = RouteNetlinkMessage::NewRule(message);
    change(message, NLM_F_CREATE | NLM_F_EXCL).with_context(|| format!("adding the rule of priority {priority}"))
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// One request, one acknowledgement.
fn change(message: RouteNetlinkMessage, flags: u16) -> Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags | NLM_F_REQUEST | NLM_F_ACK;
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)?.payload {
        NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
        NetlinkPayload::Error(error) => Err(error.to_io().into()),
        other => bail!("the kernel answered {other:?}"),
    }
}

/// Addresses, routes and rules that carry another protocol number than this one, each as text that changes when the object
/// does; without the kernel's own routes and without what only counts time.
pub fn objects_but_of(protocol: u8) -> Result<BTreeSet<String>> {
    let mut objects = BTreeSet::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let (mut route, mut rule) = (RouteMessage::default(), RuleMessage::default());
        route.header.address_family = family;
        rule.header.family = family;
        for request in [RouteNetlinkMessage::GetRoute(route), RouteNetlinkMessage::GetRule(rule)] {
            objects.extend(dump(request)?.into_iter().filter_map(|message| shown_unless(message, protocol)));
        }
    }
    let addresses = dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    objects.extend(addresses.into_iter().filter_map(|message| shown_unless(message, protocol)));
    Ok(objects)
}

/// What there is of these addresses and prefixes: addresses within them, whoever added them, rules from exactly them that carry
/// this protocol number; and rules and routes of the table, if one is given.
pub fn traces(protocol: u8, sources: &[IpNet], table: Option<u32>) -> Result<Vec<String>> {
    let mut traces = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let (mut route, mut rule) = (RouteMessage::default(), RuleMessage::default());
        route.header.address_family = family;
        rule.header.family = family;
        let is_of_route =
            |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Table(of) if Some(*of) == table);
        let is_of_rule =
            |attribute: &RuleAttribute| matches!(attribute, RuleAttribute::Table(of) if Some(*of) == table);
        let is_its =
            |attribute: &RuleAttribute| matches!(attribute, RuleAttribute::Protocol(of) if u8::from(*of) == protocol);
        for message in dump(RouteNetlinkMessage::GetRoute(route))? {
            if matches!(&message, RouteNetlinkMessage::NewRoute(route) if route.attributes.iter().any(is_of_route)) {
                traces.push(format!("{message:?}"));
            }
        }
        for message in dump(RouteNetlinkMessage::GetRule(rule))? {
            let RouteNetlinkMessage::NewRule(rule) = &message else { continue };
            let from = rule.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::Source(from) => IpNet::new(*from, rule.header.src_len).ok(),
                _ => None,
            });
            let is_from_them = from.is_some_and(|from| sources.contains(&from)) && rule.attributes.iter().any(is_its);
            if is_from_them || rule.attributes.iter().any(is_of_rule) {
                traces.push(format!("{message:?}"));
            }
        }
    }
    let is_theirs = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Local(own) | AddressAttribute::Address(own) => sources.iter().any(|net| net.contains(own)),
        _ => false,
    };
    for message in dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        if matches!(&message, RouteNetlinkMessage::NewAddress(address) if address.attributes.iter().any(is_theirs)) {
            traces.push(format!("{message:?}"));
        }
    }
    Ok(traces)
}

fn shown_unless(message: RouteNetlinkMessage, protocol: u8) -> Option<String> {
    match message {
        RouteNetlinkMessage::NewAddress(mut address) => {
            let is_its = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Protocol(number) if u8::from(*number) == protocol);
            let is_its = address.attributes.iter().any(is_its);
            address.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::CacheInfo(_)));
            // Link-local ones are the kernel's, and change by themselves while they are tried.
            (!is_its && address.header.scope != AddressScope::Link).then(|| format!("{address:?}"))
        }
        RouteNetlinkMessage::NewRoute(mut route) => {
            let number = u8::from(route.header.protocol);
            route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
            (number != protocol && number != KERNEL).then(|| format!("{route:?}"))
        }
        RouteNetlinkMessage::NewRule(rule) => {
            let is_its = |attribute: &RuleAttribute| matches!(attribute, RuleAttribute::Protocol(number) if u8::from(*number) == protocol);
            (!rule.attributes.iter().any(is_its)).then(|| format!("{rule:?}"))
        }
        _ => None,
    }
}

fn dump(request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer, 0)?;
    let mut messages = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)?;
            rest = rest.get((message.header.length as usize).next_multiple_of(4)..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => messages.push(inner),
                NetlinkPayload::Done(_) => return Ok(messages),
                other => bail!("{other:?} in a dump"),
            }
        }
    }
}

/// Sets a file below `/proc/sys/net` of this namespace.
pub fn sysctl(path: &str, value: &str) -> Result<()> {
    let file = format!("/proc/sys/net/{path}");
    fs::write(&file, value).with_context(|| format!("writing {value} to {file}"))
}

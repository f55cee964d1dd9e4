//! What the VPC does with a frame: pure, from the truth of EC2 and the port by which the frame came.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::dhcp;
use crate::vpc::{Eni, Mac, Port, World, router};
use crate::wire::{self, End, EtherType, Packet};

/// The router's station address in every subnet, and the metadata service's.
pub const ROUTER_MAC: Mac = Mac([0x02, 0xec, 0x20, 0, 0, 1]);
pub const METADATA_MAC: Mac = Mac([0x02, 0xec, 0x20, 0, 0, 2]);

pub const METADATA_IPV4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub const METADATA_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// The router's link-local address, the same everywhere.
pub const ROUTER_IPV6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0xec2, 0, 0, 0, 0, 0, 1);

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    Deliver {
        to: Port,
        frame: Vec<u8>,
    },
    /// Back out of the port by which it came.
    Reply(Vec<u8>),
    Drop(Reason),
    /// Nothing that would be carried anywhere: an ENI's questions about itself (gratuitous ARP, duplicate address detection),
    /// and what hosts outside the VPC say to nobody.
    Ignore,
}

/// Why a packet was dropped.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reason {
    SourceMac,
    /// The source check: an address or delegated prefix of another ENI of the same instance.
    WrongEni,
    /// The source check: of an ENI of another instance. It forwards, perhaps to an address that it does not have yet; or it has
    /// lost the address to that one.
    OthersAddress,
    /// The source check: of no ENI.
    SourceAddress,
    /// Multicast, broadcast and link-local traffic: a VPC carries none of it.
    LocalOnly,
    /// Neither ARP nor IP.
    NotIp,
    /// ARP or neighbour discovery for an address that no ENI of the subnet has.
    Unanswered,
    /// The destination check: handed to an ENI that does not have the address.
    DestinationCheck,
    NoRoute,
    /// To the internet from an address without an elastic IP.
    NoPublicAddress,
    /// To an ENI that is attached to no running instance.
    NotAttached,
    /// The guest's link takes no frames: it is down.
    LinkDown,
    /// The lab was told to lose it.
    Loss,
    Malformed,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Reason::SourceMac => "source-mac",
            Reason::WrongEni => "wrong-eni",
            Reason::OthersAddress => "others-address",
            Reason::SourceAddress => "source-address",
            Reason::LocalOnly => "local-only",
            Reason::NotIp => "not-ip",
            Reason::Unanswered => "unanswered",
            Reason::DestinationCheck => "destination-check",
            Reason::NoRoute => "no-route",
            Reason::NoPublicAddress => "no-public-address",
            Reason::NotAttached => "not-attached",
            Reason::LinkDown => "link-down",
            Reason::Loss => "loss",
            Reason::Malformed => "malformed",
        })
    }
}

/// What becomes of a frame.
pub fn forward(world: &World, ingress: &Port, frame: &[u8]) -> Verdict {
    let Some((destination, source, kind)) = wire::ethernet(frame) else { return Verdict::Drop(Reason::Malformed) };
    let packet = wire::packet(frame, kind);
    let frame = Frame { bytes: frame, destination, source, kind };
    match (ingress, packet) {
        (Port::Eni(eni), packet) => match world.enis.get(eni) {
            Some(eni) if is_attached(world, eni) => from_eni(world, eni, &frame, packet),
            _ => Verdict::Drop(Reason::NotAttached),
        },
        // Hosts of the internet and metadata services have no subnet: every address is behind the router.
        (_, packet) => match asked(&frame, packet) {
            Some(asked) => Verdict::Reply(asked.reply(ROUTER_MAC)),
            None => match (ingress, packet) {
                (_, None) => Verdict::Ignore,
                (_, Some(packet)) if is_multicast(packet.destination) => Verdict::Ignore,
                (Port::Internet(_), Some(packet)) => from_internet(world, &frame, packet),
                (Port::Metadata(instance), Some(packet)) => {
                    let owner = world.enis_of(instance).into_iter().find(|eni| eni.owns(packet.destination));
                    owner.map_or(Verdict::Drop(Reason::NoRoute), |eni| deliver(world, eni, frame.bytes))
                }
                (Port::Eni(_), Some(_)) => Verdict::Ignore,
            },
        },
    }
}

struct Frame<'a> {
    bytes: &'a [u8],
    destination: Mac,
    source: Mac,
    kind: EtherType,
}

/// A question for the station address of an IP address.
enum Asked {
    Ipv4 { asker: (Mac, Ipv4Addr), address: Ipv4Addr },
    Ipv6 { asker: (Mac, Ipv6Addr), address: Ipv6Addr },
}

impl Asked {
    fn address(&self) -> IpAddr {
        match self {
            Asked::Ipv4 { address, .. } => (*address).into(),
            Asked::Ipv6 { address, .. } => (*address).into(),
        }
    }

    fn reply(&self, mac: Mac) -> Vec<u8> {
        match self {
            Asked::Ipv4 { asker, address } => wire::arp_reply(*asker, *address, mac),
            Asked::Ipv6 { asker, address } => wire::neighbour_advertisement(*asker, *address, mac),
        }
    }

    /// Duplicate address detection and gratuitous ARP ask for what the asker is about to have.
    fn is_for_oneself(&self) -> bool {
        match self {
            Asked::Ipv4 { asker: (_, asker), address } => asker == address || asker.is_unspecified(),
            Asked::Ipv6 { asker: (_, asker), .. } => asker.is_unspecified(),
        }
    }
}

fn asked(frame: &Frame, packet: Option<Packet>) -> Option<Asked> {
    if frame.kind == EtherType::Arp {
        let (mac, asker, address) = wire::arp_request(frame.bytes)?;
        return Some(Asked::Ipv4 { asker: (mac, asker), address });
    }
    let packet = packet?;
    let address = wire::neighbour_solicitation(frame.bytes, &packet)?;
    let IpAddr::V6(asker) = packet.source else { return None };
    Some(Asked::Ipv6 { asker: (frame.source, asker), address })
}

fn is_multicast(address: IpAddr) -> bool {
    address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST)
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn is_attached(world: &World, eni: &Eni) -> bool {
    let instance = eni.attachment.as_ref().and_then(|at| world.instances.get(&at.instance));
    instance.is_some_and(|instance| instance.is_running)
}

fn subnets(world: &World, eni: &Eni) -> Vec<IpNet> {
    let Some(subnet) = world.subnets.get(&eni.subnet) else { return Vec::new() };
    subnet.ipv4.map(IpNet::from).into_iter().chain(subnet.ipv6s.iter().map(|net| IpNet::from(*net))).collect()
}

fn from_eni(world: &World, eni: &Eni, frame: &Frame, packet: Option<Packet>) -> Verdict {
    if frame.source != eni.mac {
        return Verdict::Drop(Reason::SourceMac);
    }
    if let Some(asked) = asked(frame, packet) {
        return answer(world, eni, &asked);
    }
    let Some(packet) = packet else { return Verdict::Drop(Reason::NotIp) };
    if wire::is_router_solicitation(frame.bytes, &packet) {
        let IpAddr::V6(asker) = packet.source else { return Verdict::Ignore };
        let has_ipv6 = subnets(world, eni).iter().any(|net| net.addr().is_ipv6());
        return match has_ipv6 && !asker.is_unspecified() {
            true => Verdict::Reply(wire::router_advertisement((eni.mac, asker), (ROUTER_MAC, ROUTER_IPV6))),
            false => Verdict::Ignore,
        };
    }
    if packet.protocol == wire::UDP && dhcp::is_for_server(&frame.bytes[packet.transport.min(frame.bytes.len())..]) {
        return lease(world, eni, frame, &packet).map_or(Verdict::Ignore, Verdict::Reply);
    }
    let is_local_only = is_multicast(packet.destination) || is_link_local(packet.destination);
    let is_local_source = is_link_local(packet.source) || packet.source.is_unspecified();
    if is_local_only && is_local_source {
        return Verdict::Drop(Reason::LocalOnly);
    }
    if eni.source_dest_check && !eni.owns(packet.source) {
        let at = eni.attachment.as_ref().map(|at| at.instance.as_str()).unwrap_or_default();
        let is_of_instance = world.enis_of(at).iter().any(|other| other.owns(packet.source));
        let is_of_another = || world.enis.values().any(|other| other.attachment.is_some() && other.owns(packet.source));
        return Verdict::Drop(match is_of_instance {
            true => Reason::WrongEni,
            false if is_of_another() => Reason::OthersAddress,
            false => Reason::SourceAddress,
        });
    }
    if is_local_only || is_local_source {
        return Verdict::Drop(Reason::LocalOnly);
    }
    if frame.destination == ROUTER_MAC { route(world, eni, frame, &packet) } else { switch(world, eni, frame, &packet) }
}

/// The VPC answers for every address of the subnet that an ENI has, and for the router.
fn answer(world: &World, eni: &Eni, asked: &Asked) -> Verdict {
    let address = asked.address();
    if asked.is_for_oneself() || eni.owns(address) {
        return Verdict::Ignore;
    }
    let nets = subnets(world, eni);
    let is_router = nets.iter().any(|net| router(*net) == address)
        || address == IpAddr::V6(ROUTER_IPV6)
        || address == IpAddr::V4(METADATA_IPV4);
    if is_router {
        return Verdict::Reply(asked.reply(ROUTER_MAC));
    }
    let neighbour = world.enis.values().find(|other| other.subnet == eni.subnet && other.owns(address));
    neighbour.map_or(Verdict::Drop(Reason::Unanswered), |neighbour| Verdict::Reply(asked.reply(neighbour.mac)))
}

fn lease(world: &World, eni: &Eni, frame: &Frame, packet: &Packet) -> Option<Vec<u8>> {
    let subnet = world.subnets.get(&eni.subnet)?.ipv4?;
    let IpAddr::V4(router) = router(subnet.into()) else { return None };
    let payload = frame.bytes.get(packet.transport + 8..)?;
    dhcp::answer(payload, eni.mac, *eni.ipv4s.first()?, subnet, (ROUTER_MAC, router))
}

/// Straight to another ENI of the subnet. The VPC carries a packet by its address; the station address only says that it is
/// not for the router. So an address that has moved is reached at once, whatever its neighbours remember.
fn switch(world: &World, eni: &Eni, frame: &Frame, packet: &Packet) -> Verdict {
    let neighbours = || world.enis.values().filter(|other| other.subnet == eni.subnet);
    let station = neighbours().find(|other| other.mac == frame.destination);
    let owner = neighbours().find(|other| other.owns(packet.destination));
    match (station, owner) {
        // A NAT box or firewall takes what is not for itself.
        (Some(station), _) if !station.source_dest_check => hand(world, station, frame.bytes.to_vec()),
        (_, Some(owner)) => hand(world, owner, wire::with_macs(frame.bytes, owner.mac, frame.source)),
        (Some(_), None) => Verdict::Drop(Reason::DestinationCheck),
        (None, None) => Verdict::Drop(Reason::NoRoute),
    }
}

/// By the VPC router: local, the subnet's own routes, peered VPCs, the internet.
fn route(world: &World, eni: &Eni, frame: &Frame, packet: &Packet) -> Verdict {
    let to = packet.destination;
    if to == IpAddr::V4(METADATA_IPV4) || to == IpAddr::V6(METADATA_IPV6) {
        let Some(at) = &eni.attachment else { return Verdict::Drop(Reason::NotAttached) };
        let frame = wire::with_macs(frame.bytes, METADATA_MAC, ROUTER_MAC);
        return Verdict::Deliver { to: Port::Metadata(at.instance.clone()), frame };
    }
    let Some(subnet) = world.subnets.get(&eni.subnet) else { return Verdict::Drop(Reason::NoRoute) };
    let is_local = |vpc: &str| world.vpcs.get(vpc).is_some_and(|cidrs| cidrs.iter().any(|cidr| cidr.contains(&to)));
    if is_local(&subnet.vpc) {
        let owner = world.owner_of(&subnet.vpc, to);
        return owner.map_or(Verdict::Drop(Reason::NoRoute), |owner| deliver(world, owner, frame.bytes));
    }
    let by_eni = subnet.routes.iter().filter(|(net, _)| net.contains(&to)).max_by_key(|(net, _)| net.prefix_len());
    if let Some(target) = by_eni.and_then(|(_, target)| world.enis.get(target)) {
        return match target.source_dest_check {
            true => Verdict::Drop(Reason::DestinationCheck),
            false => deliver(world, target, frame.bytes),
        };
    }
    let mut peers = world.peerings.iter().filter(|(from, _)| *from == subnet.vpc).map(|(_, to)| to);
    if let Some(peer) = peers.find(|peer| is_local(peer)) {
        let owner = world.owner_of(peer, to);
        return owner.map_or(Verdict::Drop(Reason::NoRoute), |owner| deliver(world, owner, frame.bytes));
    }
    to_internet(world, &subnet.vpc, frame, packet)
}

/// IPv4 leaves as the elastic IP in front of its source; IPv6 as it is.
fn to_internet(world: &World, vpc: &str, frame: &Frame, packet: &Packet) -> Verdict {
    let mut bytes = frame.bytes.to_vec();
    if let IpAddr::V4(private) = packet.source {
        let owner = world.owner_of(vpc, private.into());
        let public = owner.and_then(|eni| {
            let behind = (eni.id.clone(), private);
            world.elastic_ips.iter().find(|(_, taken)| taken.as_ref() == Some(&behind)).map(|(public, _)| *public)
        });
        let Some(public) = public else { return Verdict::Drop(Reason::NoPublicAddress) };
        wire::rewrite4(&mut bytes, End::Source, public);
    }
    let to = packet.destination;
    let host = world.internet_hosts.iter().find(|(_, host)| {
        host.ipv4.is_some_and(|address| to == IpAddr::V4(address))
            || host.ipv6.is_some_and(|address| to == IpAddr::V6(address))
    });
    match host {
        Some((name, host)) => {
            let frame = wire::with_macs(&bytes, host.mac, ROUTER_MAC);
            Verdict::Deliver { to: Port::Internet(name.clone()), frame }
        }
        // An elastic IP of this region, or an address of another VPC: back in by the internet gateway.
        None => into_vpc(world, bytes, to),
    }
}

fn from_internet(world: &World, frame: &Frame, packet: Packet) -> Verdict {
    into_vpc(world, frame.bytes.to_vec(), packet.destination)
}

fn into_vpc(world: &World, mut bytes: Vec<u8>, to: IpAddr) -> Verdict {
    match to {
        IpAddr::V4(public) => {
            let Some(Some((eni, private))) = world.elastic_ips.get(&public) else {
                return Verdict::Drop(Reason::NoRoute);
            };
            wire::rewrite4(&mut bytes, End::Destination, *private);
            world.enis.get(eni).map_or(Verdict::Drop(Reason::NoRoute), |eni| deliver(world, eni, &bytes))
        }
        IpAddr::V6(_) => {
            let owner = world.enis.values().find(|eni| eni.owns(to));
            owner.map_or(Verdict::Drop(Reason::NoRoute), |eni| deliver(world, eni, &bytes))
        }
    }
}

/// From the router to the ENI.
fn deliver(world: &World, eni: &Eni, frame: &[u8]) -> Verdict {
    hand(world, eni, wire::with_macs(frame, eni.mac, ROUTER_MAC))
}

fn hand(world: &World, eni: &Eni, frame: Vec<u8>) -> Verdict {
    match is_attached(world, eni) && !eni.is_efa_only {
        true => Verdict::Deliver { to: Port::Eni(eni.id.clone()), frame },
        false => Verdict::Drop(Reason::NotAttached),
    }
}

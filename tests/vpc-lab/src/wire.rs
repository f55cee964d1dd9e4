//! Ethernet, ARP, IP and neighbour discovery as bytes: reading them, answering them, and rewriting addresses with their
//! checksums. What a frame should become is for `forward`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::vpc::Mac;

pub const ETHERNET: usize = 14;
const IPV6: usize = 40;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EtherType {
    Ipv4,
    Ipv6,
    Arp,
    Other(u16),
}

/// The Ethernet header: destination, source, type.
pub fn ethernet(frame: &[u8]) -> Option<(Mac, Mac, EtherType)> {
    let header = frame.get(..ETHERNET)?;
    let kind = match u16::from_be_bytes([header[12], header[13]]) {
        0x0800 => EtherType::Ipv4,
        0x86dd => EtherType::Ipv6,
        0x0806 => EtherType::Arp,
        other => EtherType::Other(other),
    };
    Some((mac(&header[..6]), mac(&header[6..12]), kind))
}

fn mac(bytes: &[u8]) -> Mac {
    let mut mac = [0; 6];
    mac.copy_from_slice(bytes);
    Mac(mac)
}

/// The same frame between other stations.
pub fn with_macs(frame: &[u8], destination: Mac, source: Mac) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&destination.0);
    frame[6..12].copy_from_slice(&source.0);
    frame
}

fn frame(destination: Mac, source: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&destination.0[..], &source.0, &kind.to_be_bytes(), payload].concat()
}

/// What matters of an IP packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// Where the transport header begins, from the start of the frame.
    pub transport: usize,
}

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMPV6: u8 = 58;

/// Reads the IP header behind the Ethernet header.
pub fn packet(frame: &[u8], kind: EtherType) -> Option<Packet> {
    let ip = frame.get(ETHERNET..)?;
    match kind {
        EtherType::Ipv4 => {
            let header = ip.get(..20)?;
            let length = usize::from(header[0] & 0x0f) * 4;
            ip.get(..length)?;
            Some(Packet {
                source: ipv4(&header[12..16]).into(),
                destination: ipv4(&header[16..20]).into(),
                protocol: header[9],
                transport: ETHERNET + length,
            })
        }
        EtherType::Ipv6 => {
            let header = ip.get(..IPV6)?;
            let mut protocol = header[6];
            let mut transport = ETHERNET + IPV6;
            // Hop-by-hop options stand before the ICMPv6 of multicast listener reports.
            if protocol == 0 {
                let options = frame.get(transport..transport + 2)?;
                protocol = options[0];
                transport += (usize::from(options[1]) + 1) * 8;
            }
            Some(Packet {
                source: ipv6(&header[8..24]).into(),
                destination: ipv6(&header[24..40]).into(),
                protocol,
                transport,
            })
        }
        EtherType::Arp | EtherType::Other(_) => None,
    }
}

fn ipv4(bytes: &[u8]) -> Ipv4Addr {
    Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])
}

fn ipv6(bytes: &[u8]) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(bytes);
    octets.into()
}

/// An ARP request: who asks, and for which address.
pub fn arp_request(frame: &[u8]) -> Option<(Mac, Ipv4Addr, Ipv4Addr)> {
    let arp = frame.get(ETHERNET..ETHERNET + 28)?;
    let is_request = arp[..8] == [0, 1, 8, 0, 6, 4, 0, 1];
    is_request.then(|| (mac(&arp[8..14]), ipv4(&arp[14..18]), ipv4(&arp[24..28])))
}

/// The answer "`address` is at `mac`".
pub fn arp_reply(asker: (Mac, Ipv4Addr), address: Ipv4Addr, mac: Mac) -> Vec<u8> {
    let (asker_mac, asker_address) = asker;
    let head: &[u8] = &[0, 1, 8, 0, 6, 4, 0, 2];
    let arp = [head, &mac.0, &address.octets(), &asker_mac.0, &asker_address.octets()].concat();
    frame(asker_mac, mac, 0x0806, &arp)
}

/// The address that a neighbour solicitation asks for.
pub fn neighbour_solicitation(frame: &[u8], packet: &Packet) -> Option<Ipv6Addr> {
    let icmp = frame.get(packet.transport..)?;
    let is_solicitation = packet.protocol == ICMPV6 && icmp.first() == Some(&135);
    is_solicitation.then(|| icmp.get(8..24).map(ipv6)).flatten()
}

/// Whether this is a router solicitation.
pub fn is_router_solicitation(frame: &[u8], packet: &Packet) -> bool {
    packet.protocol == ICMPV6 && frame.get(packet.transport) == Some(&133)
}

/// The answer "`address` is at `mac`", solicited and overriding.
pub fn neighbour_advertisement(to: (Mac, Ipv6Addr), address: Ipv6Addr, mac: Mac) -> Vec<u8> {
    let flags: &[u8] = &[136, 0, 0, 0, 0x60, 0, 0, 0];
    let icmp = [flags, &address.octets(), &[2, 1], &mac.0].concat();
    icmpv6(to, (mac, address), icmp)
}

/// "Here is the router, addresses are by DHCPv6": managed, lifetime half an hour, no prefix to make addresses of.
pub fn router_advertisement(to: (Mac, Ipv6Addr), router: (Mac, Ipv6Addr)) -> Vec<u8> {
    let (router_mac, _) = router;
    let lifetime = 1800u16.to_be_bytes();
    let head: &[u8] = &[134, 0, 0, 0, 64, 0x80, lifetime[0], lifetime[1], 0, 0, 0, 0, 0, 0, 0, 0];
    icmpv6(to, router, [head, &[1, 1], &router_mac.0].concat())
}

fn icmpv6(to: (Mac, Ipv6Addr), from: (Mac, Ipv6Addr), mut icmp: Vec<u8>) -> Vec<u8> {
    let length = icmp.len() as u16;
    let pseudo = [&from.1.octets()[..], &to.1.octets(), &u32::from(length).to_be_bytes(), &[0, 0, 0, ICMPV6]].concat();
    let sum = checksum(&[pseudo.as_slice(), icmp.as_slice()].concat());
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(length.to_be_bytes());
    header.extend([ICMPV6, 255]);
    let ip = [header.as_slice(), &from.1.octets(), &to.1.octets(), &icmp].concat();
    frame(to.0, from.0, 0x86dd, &ip)
}

/// A UDP datagram in IPv4, with all checksums (UDP's left out, as IPv4 allows).
pub fn udp4(to: (Mac, Ipv4Addr, u16), from: (Mac, Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let length = (20 + 8 + payload.len()) as u16;
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, UDP, 0, 0];
    ip[2..4].copy_from_slice(&length.to_be_bytes());
    ip.extend(from.1.octets());
    ip.extend(to.1.octets());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(from.2.to_be_bytes());
    ip.extend(to.2.to_be_bytes());
    ip.extend((8 + payload.len() as u16).to_be_bytes());
    ip.extend([0, 0]);
    ip.extend(payload);
    frame(to.0, from.0, 0x0800, &ip)
}

/// The internet checksum (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Which end of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Source,
    Destination,
}

/// Gives an IPv4 packet another source or destination, with the checksums of IP, TCP, UDP and ICMP; in an ICMP error the
/// packet that it quotes is rewritten as well, at its other end.
pub fn rewrite4(frame: &mut [u8], end: End, to: Ipv4Addr) {
    let Some(packet) = packet(frame, EtherType::Ipv4) else { return };
    let at = ETHERNET + if end == End::Source { 12 } else { 16 };
    let from = ipv4(&frame[at..at + 4]);
    frame[at..at + 4].copy_from_slice(&to.octets());
    adjust(frame, ETHERNET + 10, from, to);
    // A later fragment has no transport header.
    let is_first = u16::from_be_bytes([frame[ETHERNET + 6], frame[ETHERNET + 7]]) & 0x1fff == 0;
    match packet.protocol {
        TCP if is_first => adjust(frame, packet.transport + 16, from, to),
        UDP if is_first && frame.get(packet.transport + 6..packet.transport + 8) != Some(&[0, 0]) => {
            adjust(frame, packet.transport + 6, from, to);
        }
        ICMP if is_first && matches!(frame.get(packet.transport), Some(3 | 11 | 12)) => {
            rewrite_quoted(frame, packet.transport, end, to);
        }
        _ => {}
    }
}

fn rewrite_quoted(frame: &mut [u8], icmp: usize, end: End, to: Ipv4Addr) {
    let at = icmp + 8 + if end == End::Source { 16 } else { 12 };
    if frame.len() < icmp + 8 + 20 {
        return;
    }
    let from = ipv4(&frame[at..at + 4]);
    frame[at..at + 4].copy_from_slice(&to.octets());
    adjust(frame, icmp + 8 + 10, from, to);
    frame[icmp + 2..icmp + 4].copy_from_slice(&[0, 0]);
    let sum = checksum(&frame[icmp..]);
    frame[icmp + 2..icmp + 4].copy_from_slice(&sum.to_be_bytes());
}

/// Corrects a checksum for a changed address (RFC 1624).
fn adjust(frame: &mut [u8], at: usize, from: Ipv4Addr, to: Ipv4Addr) {
    let Some(field) = frame.get(at..at + 2) else { return };
    let mut sum = u32::from(!u16::from_be_bytes([field[0], field[1]]));
    for (old, new) in from.octets().chunks(2).zip(to.octets().chunks(2)) {
        sum += u32::from(!u16::from_be_bytes([old[0], old[1]]));
        sum += u32::from(u16::from_be_bytes([new[0], new[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// One line for people: `10.0.1.5 > 10.0.2.7 tcp 443 > 51000`.
pub fn describe(frame: &[u8]) -> String {
    let Some((destination, source, kind)) = ethernet(frame) else { return "a frame too short for Ethernet".into() };
    let Some(packet) = packet(frame, kind) else { return format!("{source} > {destination} {kind:?}") };
    let Packet { source, destination, protocol, transport } = packet;
    let ports = || {
        let ports = frame.get(transport..transport + 4)?;
        Some((u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]])))
    };
    match (protocol, ports()) {
        (TCP, Some((from, to))) => format!("{source} > {destination} tcp {from} > {to}"),
        (UDP, Some((from, to))) => format!("{source} > {destination} udp {from} > {to}"),
        (ICMP | ICMPV6, _) => {
            format!("{source} > {destination} icmp type {}", frame.get(transport).copied().unwrap_or_default())
        }
        (protocol, _) => format!("{source} > {destination} protocol {protocol}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const B: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn is_whole(bytes: &[u8]) -> bool {
        checksum(bytes) == 0
    }

    #[test]
    fn a_rewritten_packet_has_the_checksum_that_a_new_one_would_have() {
        let (from, to) = (Ipv4Addr::new(10, 0, 0, 9), Ipv4Addr::new(10, 0, 1, 7));
        let mut frame = udp4((B, to, 7), (A, from, 5000), b"hello");
        assert!(is_whole(&frame[ETHERNET..ETHERNET + 20]));
        rewrite4(&mut frame, End::Source, Ipv4Addr::new(203, 0, 113, 5));
        rewrite4(&mut frame, End::Destination, Ipv4Addr::new(198, 51, 100, 200));
        assert!(is_whole(&frame[ETHERNET..ETHERNET + 20]));
        let expected =
            udp4((B, Ipv4Addr::new(198, 51, 100, 200), 7), (A, Ipv4Addr::new(203, 0, 113, 5), 5000), b"hello");
        assert_eq!(frame, expected);
    }

    #[test]
    fn a_tcp_checksum_follows_the_address() {
        let (from, to) = (Ipv4Addr::new(10, 0, 0, 9), Ipv4Addr::new(10, 0, 1, 7));
        let tcp_sum = |source: Ipv4Addr, tcp: &[u8]| {
            let pseudo = [&source.octets()[..], &to.octets(), &[0, TCP], &(tcp.len() as u16).to_be_bytes()].concat();
            checksum(&[pseudo.as_slice(), tcp].concat())
        };
        let mut frame = udp4((B, to, 7), (A, from, 5000), &[1; 12]);
        frame[ETHERNET + 9] = TCP;
        let at = ETHERNET + 20;
        frame[at + 16..at + 18].copy_from_slice(&[0, 0]);
        let sum = tcp_sum(from, &frame[at..]);
        frame[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(tcp_sum(from, &frame[at..]), 0);
        let public = Ipv4Addr::new(203, 0, 113, 5);
        rewrite4(&mut frame, End::Source, public);
        assert_eq!(tcp_sum(public, &frame[at..]), 0);
    }

    #[test]
    fn a_neighbour_advertisement_carries_a_right_checksum() {
        let (to, address): (Ipv6Addr, Ipv6Addr) = ("fe80::1".parse().unwrap(), "fe80:ec2::1".parse().unwrap());
        let frame = neighbour_advertisement((A, to), address, B);
        let icmp = &frame[ETHERNET + IPV6..];
        let length = (icmp.len() as u32).to_be_bytes();
        let pseudo = [&address.octets()[..], &to.octets(), &length, &[0, 0, 0, ICMPV6]].concat();
        assert!(is_whole(&[pseudo.as_slice(), icmp].concat()));
    }
}

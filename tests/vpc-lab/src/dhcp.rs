//! The VPC's DHCPv4 server: it knows one answer for each ENI, its primary private address.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::vpc::Mac;
use crate::wire::udp4;

const SERVER: u16 = 67;
const CLIENT: u16 = 68;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Bytes of the fixed part, before the cookie.
const FIXED: usize = 236;

/// Seconds; EC2's leases are as long.
const LEASE: u32 = 3600;
/// Option 26: what the VPC carries.
const MTU: u16 = 9001;

/// Answers a DISCOVER with an OFFER and a REQUEST with an ACK. `payload` is the UDP payload sent to port 67.
pub fn answer(
    payload: &[u8],
    mac: Mac,
    address: Ipv4Addr,
    subnet: Ipv4Net,
    router: (Mac, Ipv4Addr),
) -> Option<Vec<u8>> {
    let kind = match message_type(payload)? {
        1 => 2,
        3 => 5,
        _ => return None,
    };
    let (router_mac, router) = router;
    let mut reply = vec![0; FIXED];
    reply[..4].copy_from_slice(&[2, 1, 6, 0]);
    // Transaction, seconds and flags as asked.
    reply[4..12].copy_from_slice(payload.get(4..12)?);
    reply[16..20].copy_from_slice(&address.octets());
    reply[20..24].copy_from_slice(&router.octets());
    reply[28..34].copy_from_slice(&mac.0);
    reply.extend(COOKIE);
    reply.extend([53, 1, kind]);
    for (code, value) in [(54, router), (1, subnet.netmask()), (3, router), (28, subnet.broadcast())] {
        reply.extend([code, 4]);
        reply.extend(value.octets());
    }
    reply.extend([51, 4]);
    reply.extend(LEASE.to_be_bytes());
    reply.extend([26, 2]);
    reply.extend(MTU.to_be_bytes());
    reply.push(255);
    let broadcast = Mac([0xff; 6]);
    Some(udp4((broadcast, Ipv4Addr::BROADCAST, CLIENT), (router_mac, router, SERVER), &reply))
}

/// Option 53.
fn message_type(payload: &[u8]) -> Option<u8> {
    if payload.get(FIXED..FIXED + 4)? != COOKIE {
        return None;
    }
    let mut options = &payload[FIXED + 4..];
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [53, 1, kind, ..] => return Some(*kind),
            [255, ..] | [] | [_] => return None,
            [_, length, rest @ ..] => options = rest.get(usize::from(*length)..)?,
        }
    }
}

/// Whether a UDP datagram is for the server.
pub fn is_for_server(ports: &[u8]) -> bool {
    ports.get(..4).is_some_and(|ports| ports == [0, CLIENT as u8, 0, SERVER as u8])
}

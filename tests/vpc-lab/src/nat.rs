//! The NAT rule that container engines and NAT boxes write: masquerade what comes from a net and leaves by another link. Spoken
//! to nf_tables directly, so that no firewall program is needed.

use std::io;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

// From linux/netfilter/nfnetlink.h and nf_tables.h.
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NF_TABLES: u16 = 10;
const NEW_TABLE: u16 = NF_TABLES << 8;
const NEW_CHAIN: u16 = NF_TABLES << 8 | 3;
const NEW_RULE: u16 = NF_TABLES << 8 | 6;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;
const ERROR: u16 = 2;

const TABLE: &[u8] = b"lab\0";
const CHAIN: &[u8] = b"masquerade\0";
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const POSTROUTING: u32 = 4;
/// `NF_IP_PRI_NAT_SRC`.
const SOURCE_NAT: u32 = 100;
const REGISTER: u32 = 1;

/// Masquerades packets from `net` that leave by any link but `except`, in the calling thread's namespace.
pub fn masquerade(net: IpNet, except: &str) -> Result<()> {
    // Where the network header has the source address, and how long that is.
    let (family, at, length): (u8, u32, u32) = if net.addr().is_ipv4() { (IPV4, 12, 4) } else { (IPV6, 8, 16) };
    let hook = [attribute(1, &POSTROUTING.to_be_bytes()), attribute(2, &SOURCE_NAT.to_be_bytes())].concat();
    let chain = [attribute(1, TABLE), attribute(3, CHAIN), attribute(4 | NESTED, &hook), attribute(7, b"nat\0")];
    let source = [
        attribute(1, &REGISTER.to_be_bytes()),
        // `NFT_PAYLOAD_NETWORK_HEADER`.
        attribute(2, &1u32.to_be_bytes()),
        attribute(3, &at.to_be_bytes()),
        attribute(4, &length.to_be_bytes()),
    ];
    let masked = [
        attribute(1, &REGISTER.to_be_bytes()),
        attribute(2, &REGISTER.to_be_bytes()),
        attribute(3, &length.to_be_bytes()),
        attribute(4 | NESTED, &attribute(1, &octets(net.netmask()))),
        attribute(5 | NESTED, &attribute(1, &vec![0; length as usize])),
    ];
    // `NFT_META_OIFNAME`.
    let link = [attribute(1, &REGISTER.to_be_bytes()), attribute(2, &7u32.to_be_bytes())];
    let mut name = [0; 16];
    name[..except.len()].copy_from_slice(except.as_bytes());
    let expressions = [
        expression("payload", &source.concat()),
        expression("bitwise", &masked.concat()),
        expression("cmp", &compare(0, &octets(net.network()))),
        expression("meta", &link.concat()),
        expression("cmp", &compare(1, &name)),
        expression("masq", &[]),
    ];
    let rule = [attribute(1, TABLE), attribute(2, CHAIN), attribute(4 | NESTED, &expressions.concat())];
    let batch = [
        message(BATCH_BEGIN, REQUEST, 0, NF_TABLES, &[]),
        message(NEW_TABLE, REQUEST | ACK | CREATE, family, 0, &attribute(1, TABLE)),
        message(NEW_CHAIN, REQUEST | ACK | CREATE, family, 0, &chain.concat()),
        message(NEW_RULE, REQUEST | ACK | CREATE | APPEND, family, 0, &rule.concat()),
        message(BATCH_END, REQUEST, 0, NF_TABLES, &[]),
    ];
    send(&batch.concat(), 3).with_context(|| format!("masquerading {net} by nf_tables"))
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

/// `NFT_CMP_EQ` is 0, `NFT_CMP_NEQ` 1.
fn compare(operator: u32, value: &[u8]) -> Vec<u8> {
    [
        attribute(1, &REGISTER.to_be_bytes()),
        attribute(2, &operator.to_be_bytes()),
        attribute(3 | NESTED, &attribute(1, value)),
    ]
    .concat()
}

fn expression(name: &str, data: &[u8]) -> Vec<u8> {
    let name = attribute(1, format!("{name}\0").as_bytes());
    attribute(1 | NESTED, &[name, attribute(2 | NESTED, data)].concat())
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Behind the netlink header stands `struct nfgenmsg`: family, version, resource.
fn message(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let mut bytes = (20 + attributes.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

fn send(batch: &[u8], acknowledgements: usize) -> Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(batch, 0)?;
    let mut seen = 0;
    while seen < acknowledgements {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let Some(header) = rest.get(..20) {
            let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let kind = u16::from_ne_bytes([header[4], header[5]]);
            let errno = i32::from_ne_bytes([header[16], header[17], header[18], header[19]]);
            match (kind, errno) {
                (ERROR, 0) => seen += 1,
                (ERROR, errno) => return Err(io::Error::from_raw_os_error(-errno).into()),
                (kind, _) => bail!("the kernel answered with a message of kind {kind}"),
            }
            rest = rest.get(length.next_multiple_of(4).max(20)..).unwrap_or_default();
        }
    }
    Ok(())
}

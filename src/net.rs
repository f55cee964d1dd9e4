//! The kernel's words: links, addresses, routes and rules, as the desired and the observed side both use them.
//! Whose an object is, and whether it should be there, is for `policy` and `plan`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

/// An Ethernet address; shown as six lower-case hexadecimal bytes joined by colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The address made of these bytes, or nothing when there are not six (a loopback or tunnel link).
    pub fn from_bytes(bytes: &[u8]) -> Option<MacAddr> {
        bytes.try_into().ok().map(MacAddr)
    }

    /// Whether it can be one device's: neither all zeros nor a group address.
    pub fn is_device(self) -> bool {
        self.0 != [0; 6] && self.0[0] & 1 == 0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<MacAddr, String> {
        let not_a_mac =
            || format!("`{}` is not a MAC address (six hexadecimal bytes joined by colons)", text.escape_debug());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(not_a_mac)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(not_a_mac());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| not_a_mac())?;
        }
        if parts.next().is_some() {
            return Err(not_a_mac());
        }
        Ok(MacAddr(bytes))
    }
}

impl TryFrom<String> for MacAddr {
    type Error = String;
    fn try_from(text: String) -> Result<MacAddr, String> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Family {
    #[serde(rename = "ipv4")]
    V4,
    #[serde(rename = "ipv6")]
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The whole address space: `0.0.0.0/0` or `::/0`, the destination of a default route.
    pub fn everything(self) -> IpNet {
        match self {
            Family::V4 => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
            Family::V6 => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
        }
    }

    /// Length in bits of an address: 32 or 128.
    pub fn bits(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// The family of an address or prefix.
pub trait HasFamily {
    fn family(&self) -> Family;
}

impl HasFamily for IpAddr {
    fn family(&self) -> Family {
        if self.is_ipv4() { Family::V4 } else { Family::V6 }
    }
}

impl HasFamily for IpNet {
    fn family(&self) -> Family {
        self.addr().family()
    }
}

/// One network device. `index` is the kernel's name for it; `name` can change at any moment.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Link {
    pub index: u32,
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// The kind of a software device (`veth`, `bridge`, `vlan` …); a network card has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Index of the bridge, bond or VRF that this link is a port of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controller: Option<u32>,
    /// Set up by the administrator (`IFF_UP`); says nothing of the carrier.
    pub is_up: bool,
    /// Whether there is a cable, so to speak (`IFF_LOWER_UP`); none while the link is down, or where that was not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub has_carrier: Option<bool>,
    /// Bytes.
    pub mtu: u32,
    #[serde(default)]
    pub group: u32,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub altnames: BTreeSet<String>,
    /// An IPv4 address that goes takes along those that came after it with the same network: `promote_secondaries` is 0.
    #[serde(default)]
    pub drops_secondaries: bool,
    /// Absent when the kernel runs no IPv6 on this link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<LinkIpv6>,
}

/// What `/proc/sys/net/ipv6/conf/<link>/` says, as the kernel tells it in a link dump.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LinkIpv6 {
    /// 0: router advertisements are ignored; 1: taken unless forwarding; 2: always taken.
    pub accept_ra: i32,
    pub is_disabled: bool,
}

/// An address of a link. The same address with another length is another address to the kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Address {
    /// The address itself with its prefix length: `10.0.1.5/24`, not the network `10.0.1.0/24`.
    pub net: IpNet,
    /// `preferred_lft 0`: fully usable, but never chosen as source of unbound traffic.
    pub is_deprecated: bool,
    /// Whether the kernel made (or would make) a connected route for it: the opposite of `noprefixroute`.
    pub has_prefix_route: bool,
    /// It ends by itself unless somebody renews it, as DHCP's do.
    #[serde(default)]
    pub is_leased: bool,
    /// `IFA_PROTO`; 0 when the kernel was told none, or is too old to remember it (below 5.18).
    pub protocol: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteKind {
    Unicast,
    Unreachable,
    /// Any other type, by its number in `rtnetlink(7)`; never one of ours. One that is unicast is not as simple as those above:
    /// it is for certain sources, or one of several ways.
    Other(u8),
}

impl RouteKind {
    /// Whether packets go on by it, simple or not.
    pub fn is_unicast(self) -> bool {
        matches!(self, RouteKind::Unicast | RouteKind::Other(RTN_UNICAST))
    }
}

/// Of `linux/rtnetlink.h`.
const RTN_UNICAST: u8 = 1;

/// A route of one table. The link it leaves by stands beside it, since the desired side does not know links.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Route {
    pub destination: IpNet,
    pub kind: RouteKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Take the gateway as directly reachable although no route says so.
    #[serde(default)]
    pub is_onlink: bool,
    pub table: u32,
    pub metric: u32,
    /// `RTPROT_*`: who added it.
    pub protocol: u8,
}

/// A routing policy rule that looks up a table. `Ord` is the order in which the kernel would try them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Rule {
    pub priority: u32,
    pub family: Family,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<IpNet>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<IpNet>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iif: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oif: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
    /// `ip rule add not …`: it matches what its selectors do not.
    #[serde(default)]
    pub is_inverted: bool,
    /// The table looked up; 0 for a rule that does something else.
    pub table: u32,
    /// It looks nothing up: the rules go on at this priority, if there is one of it. The kernel keeps a table beside it
    /// without using it; ours have their ENI's, which tells whose they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goto: Option<u32>,
    /// Results with a prefix of this length or shorter are passed over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suppress_prefix_length: Option<u32>,
    /// Results by a link of this group are passed over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suppress_group: Option<u32>,
    pub protocol: u8,
    /// It has a part that this type does not hold (ports, user ids, another action …); never one of ours.
    #[serde(default)]
    pub has_more: bool,
}

/// A rule's selector of packets by their firewall mark: those of which the bits in `mask` are as in `value`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Mark {
    pub value: u32,
    pub mask: u32,
}

/// What the kernel was seen to have: facts, whoever made them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Observed {
    pub links: BTreeMap<u32, Link>,
    /// By link index.
    pub addresses: BTreeSet<(u32, Address)>,
    /// By link index; routes that need no link (unreachable, multipath …) have none.
    pub routes: BTreeSet<(Option<u32>, Route)>,
    pub rules: BTreeSet<Rule>,
    /// Whether the kernel has IPv6 at all (it can be booted with `ipv6.disable=1`).
    pub has_ipv6: bool,
}

impl Observed {
    /// A link's addresses, in their order.
    pub fn addresses_on(&self, link: u32) -> impl Iterator<Item = &Address> {
        let net = IpNet::V4(Ipv4Net::default());
        let least = Address { net, is_deprecated: false, has_prefix_route: false, is_leased: false, protocol: 0 };
        let from = self.addresses.range((link, least)..).take_while(move |(index, _)| *index == link);
        from.map(|(_, address)| address)
    }

    /// Whether the link can have addresses of this family: IPv6 may be missing from the kernel, or turned off.
    pub fn can_have(&self, link: &Link, family: Family) -> bool {
        let has_ipv6 = || self.has_ipv6 && link.ipv6.as_ref().is_some_and(|ipv6| !ipv6.is_disabled);
        family == Family::V4 || has_ipv6()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_reads_back_as_written_in_lower_case() {
        let mac: MacAddr = "0A:07:84:3d:6E:38".parse().unwrap();
        assert_eq!(mac.to_string(), "0a:07:84:3d:6e:38");
    }

    #[test]
    fn what_is_no_mac_address_is_refused() {
        for text in
            ["", "0a:07:84:3d:6e", "0a:07:84:3d:6e:38:00", "0a:07:84:3d:6e:3g", "a:07:84:3d:6e:38", "+a:07:84:3d:6e:38"]
        {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }
}

//! From the kernel's dumps to facts. Nothing is filtered: whose an object is, is for `policy`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Prop,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Error, Netlink};
use crate::net::{Address, Family, Link, LinkIpv6, MacAddr, Mark, Observed, Route, RouteKind, Rule};

/// `RTNL_FAMILY_IP6MR`-like families of rules are asked for by number; these two are all that matter here.
const FAMILIES: [(Family, AddressFamily); 2] = [(Family::V4, AddressFamily::Inet), (Family::V6, AddressFamily::Inet6)];

impl Netlink {
    /// All links, addresses, routes and rules of this network namespace.
    ///
    /// # Errors
    /// Any dump that is not whole: nothing may be concluded from a part.
    pub async fn observe(&mut self) -> Result<Observed> {
        let mut observed = Observed { links: self.links().await?, ..Observed::default() };
        let addresses = self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default())).await;
        for message in addresses.context("dumping addresses")? {
            if let RouteNetlinkMessage::NewAddress(message) = message {
                observed.addresses.extend(address(&message));
            }
        }
        for (family, kernel_family) in FAMILIES {
            let mut request = RouteMessage::default();
            request.header.address_family = kernel_family;
            let routes = self.dump(RouteNetlinkMessage::GetRoute(request)).await;
            for message in routes.with_context(|| format!("dumping {family} routes"))? {
                if let RouteNetlinkMessage::NewRoute(message) = message {
                    observed.routes.extend(ways(&message));
                }
            }
            let mut request = RuleMessage::default();
            request.header.family = kernel_family;
            match self.dump(RouteNetlinkMessage::GetRule(request)).await {
                // A kernel without IPv6 has no such rules to dump. It always has IPv4.
                Err(error) if family == Family::V6 && is_missing_family(&error) => continue,
                rules => {
                    for message in rules.with_context(|| format!("dumping {family} rules"))? {
                        if let RouteNetlinkMessage::NewRule(message) = message {
                            observed.rules.extend(rule(&message));
                        }
                    }
                }
            }
            observed.has_ipv6 |= family == Family::V6;
        }
        Ok(observed)
    }

    /// All links, by index.
    ///
    /// # Errors
    /// A dump that is not whole.
    pub async fn links(&mut self) -> Result<BTreeMap<u32, Link>> {
        let links = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).await.context("dumping links")?;
        let links = links.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(link(&message)),
            _ => None,
        });
        Ok(links.map(|link| (link.index, link)).collect())
    }

    /// The name that a link has at this moment.
    ///
    /// # Errors
    /// No such link (ENODEV), or no usable answer.
    pub async fn link_name(&mut self, index: u32) -> Result<String, Error> {
        let mut question = LinkMessage::default();
        question.header.index = index;
        match self.request(RouteNetlinkMessage::GetLink(question)).await? {
            RouteNetlinkMessage::NewLink(message) => Ok(link(&message).name),
            other => Err(Error::Garbled(format!("{other:?} in answer to a question for link {index}"))),
        }
    }
}

fn is_missing_family(error: &Error) -> bool {
    matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP))
}

fn link(message: &LinkMessage) -> Link {
    let is_up = message.header.flags.contains(LinkFlags::Up);
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        kind: None,
        controller: None,
        is_up,
        has_carrier: is_up.then(|| message.header.flags.contains(LinkFlags::LowerUp)),
        mtu: 0,
        group: 0,
        altnames: Default::default(),
        drops_secondaries: false,
        ipv6: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name.clone(),
            LinkAttribute::Address(bytes) => link.mac = MacAddr::from_bytes(bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Group(group) => link.group = *group,
            LinkAttribute::Controller(controller) => link.controller = Some(*controller),
            LinkAttribute::LinkInfo(infos) => link.kind = infos.iter().find_map(kind),
            LinkAttribute::PropList(properties) => {
                link.altnames = properties.iter().filter_map(altname).collect();
            }
            LinkAttribute::AfSpecUnspec(families) => {
                link.ipv6 = families.iter().find_map(link_ipv6);
                link.drops_secondaries = families.iter().any(drops_secondaries);
            }
            _ => {}
        }
    }
    link
}

fn kind(info: &LinkInfo) -> Option<String> {
    if let LinkInfo::Kind(kind) = info { Some(kind.to_string()) } else { None }
}

fn altname(property: &Prop) -> Option<String> {
    if let Prop::AltIfName(name) = property { Some(name.clone()) } else { None }
}

/// As far as the link's own setting says; `net.ipv4.conf.all` may say otherwise for all links.
fn drops_secondaries(family: &AfSpecUnspec) -> bool {
    let AfSpecUnspec::Inet(attributes) = family else { return false };
    attributes.iter().any(|attribute| matches!(attribute, AfSpecInet::DevConf(conf) if conf.promote_secondaries == 0))
}

fn link_ipv6(family: &AfSpecUnspec) -> Option<LinkIpv6> {
    let AfSpecUnspec::Inet6(attributes) = family else { return None };
    attributes.iter().find_map(|attribute| match attribute {
        AfSpecInet6::DevConf(conf) => Some(LinkIpv6 { accept_ra: conf.accept_ra, is_disabled: conf.disable_ipv6 != 0 }),
        _ => None,
    })
}

fn address(message: &AddressMessage) -> Option<(u32, Address)> {
    let mut local = None;
    let mut peer = None;
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let mut protocol = 0;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link IFA_ADDRESS is the other side's; IPv6 often has no IFA_LOCAL.
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(number) => protocol = u8::from(*number),
            _ => {}
        }
    }
    let net = IpNet::new(local.or(peer)?, message.header.prefix_len).ok()?;
    let address = Address {
        net,
        is_deprecated: flags.contains(AddressFlags::Deprecated),
        has_prefix_route: !flags.contains(AddressFlags::Noprefixroute),
        is_leased: !flags.contains(AddressFlags::Permanent),
        protocol,
    };
    Some((message.header.index, address))
}

/// By the message's own family, not the one asked for: a kernel without IPv6 answers a request for IPv6 routes with
/// those of all families that it has.
fn family(kernel_family: AddressFamily) -> Option<Family> {
    FAMILIES.iter().find(|(_, known)| *known == kernel_family).map(|(family, _)| *family)
}

/// One of several ways is a route of its own, by its link.
fn ways(message: &RouteMessage) -> Vec<(Option<u32>, Route)> {
    let ways = message.attributes.iter().filter_map(|attribute| match attribute {
        RouteAttribute::MultiPath(ways) => Some(ways.iter().map(|way| Some(way.interface_index)).collect()),
        _ => None,
    });
    let ways: Vec<Vec<Option<u32>>> = ways.collect();
    match (route(message), ways.concat()) {
        (None, _) => Vec::new(),
        (Some(simple), ways) if ways.is_empty() => vec![simple],
        (Some((_, route)), ways) => ways.into_iter().map(|link| (link, route)).collect(),
    }
}

fn route(message: &RouteMessage) -> Option<(Option<u32>, Route)> {
    let header = &message.header;
    let family = family(header.address_family)?;
    let mut link = None;
    let mut destination = None;
    let mut gateway = None;
    let mut table = u32::from(header.table);
    let mut metric = 0;
    let mut is_simple = header.source_prefix_length == 0 && header.tos == 0;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            // The header holds a byte and says 252 for all larger numbers.
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::MultiPath(_) | RouteAttribute::NhId(_) | RouteAttribute::Via(_) => is_simple = false,
            _ => {}
        }
    }
    // Cloned routes are the kernel's cache (exceptions), not configuration.
    if header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let kind = match header.kind {
        RouteType::Unicast if is_simple => RouteKind::Unicast,
        RouteType::Unreachable if is_simple => RouteKind::Unreachable,
        other => RouteKind::Other(other.into()),
    };
    let destination = match destination {
        Some(address) => IpNet::new(address, header.destination_prefix_length).ok()?,
        None => family.everything(),
    };
    let route = Route {
        destination,
        kind,
        gateway,
        is_onlink: header.flags.contains(RouteFlags::Onlink),
        table,
        metric,
        protocol: header.protocol.into(),
    };
    // IPv6 shows unreachable routes on the loopback link.
    Some((if kind == RouteKind::Unreachable { None } else { link }, route))
}

pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn rule(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let family = family(header.family)?;
    let mut rule = Rule {
        priority: 0,
        family,
        from: None,
        to: None,
        iif: None,
        oif: None,
        mark: None,
        is_inverted: header.flags.contains(RuleFlags::Invert),
        table: u32::from(header.table),
        goto: None,
        suppress_prefix_length: None,
        suppress_group: None,
        protocol: 0,
        has_more: ![RuleAction::ToTable, RuleAction::Goto].contains(&header.action) || header.tos != 0,
    };
    let (mut mark, mut mask) = (0, 0);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Source(address) => rule.from = IpNet::new(*address, header.src_len).ok(),
            RuleAttribute::Destination(address) => rule.to = IpNet::new(*address, header.dst_len).ok(),
            RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
            RuleAttribute::Oifname(name) => rule.oif = Some(name.clone()),
            RuleAttribute::Table(table) => rule.table = *table,
            // -1 means that none was given; the kernel sends it for rules that look up a table.
            RuleAttribute::SuppressPrefixLen(length) => rule.suppress_prefix_length = some_unless_minus_one(*length),
            RuleAttribute::SuppressIfGroup(group) => rule.suppress_group = some_unless_minus_one(*group),
            RuleAttribute::Goto(priority) => rule.goto = Some(*priority),
            RuleAttribute::Protocol(protocol) => rule.protocol = (*protocol).into(),
            RuleAttribute::FwMark(value) => mark = *value,
            RuleAttribute::FwMask(value) => mask = *value,
            // It comes with value 0 where none was given.
            RuleAttribute::TunId(0) => {}
            RuleAttribute::L3MDev(false) => {}
            RuleAttribute::Other(unknown) if says_nothing(unknown) => {}
            _ => rule.has_more = true,
        }
    }
    rule.mark = (mark != 0 || mask != 0).then_some(Mark { value: mark, mask });
    Some(rule)
}

/// The last of the rule attributes that there are: `FRA_DSCP_MASK`, since Linux 6.15.
const LAST_RULE_ATTRIBUTE: u16 = 30;

/// Whether an attribute that only a later kernel knows was not set: kernels tell some with each rule, as 0 or -1 where
/// nobody gave them. One with a value selects packets by something that is not known here.
fn says_nothing(attribute: &DefaultNla) -> bool {
    let mut value = vec![0; attribute.value_len()];
    attribute.emit_value(&mut value);
    let is_all = |byte: u8| value.iter().all(|other| *other == byte);
    attribute.kind() > LAST_RULE_ATTRIBUTE && (is_all(0) || is_all(0xff))
}

fn some_unless_minus_one(value: u32) -> Option<u32> {
    (value != u32::MAX).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_default_route_in_answer_to_a_request_for_ipv6_stays_ipv4() {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet([10, 0, 1, 1].into())));
        let (_, route) = route(&message).unwrap();
        assert_eq!(route.destination, Family::V4.everything());

        message.header.address_family = AddressFamily::Other(129);
        assert_eq!(super::route(&message), None);
    }

    #[test]
    fn a_rule_with_a_selector_that_nobody_knows_is_not_like_one_of_ours_and_one_that_is_not_set_is_no_selector() {
        let has_more = |kind: u16, value: &[u8]| {
            let mut message = RuleMessage::default();
            message.header.family = AddressFamily::Inet;
            message.header.action = RuleAction::ToTable;
            message.attributes.push(RuleAttribute::Other(DefaultNla::new(kind, value.to_vec())));
            rule(&message).unwrap().has_more
        };
        assert!(has_more(99, &[1, 0, 0, 0]));
        assert!(!has_more(99, &[0; 4]));
        assert!(!has_more(99, &[0xff; 4]));
        // `dscp 0` selects unmarked packets.
        assert!(has_more(25, &[0]));
    }
}

//! Every number and every choice that could have been otherwise, with its reason; and who owns what.

// A length of time, no clock.
use core::time::Duration;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};

use crate::config::Config;
use crate::eni::Slot;
use crate::net::{Address, Family, HasFamily, Link, Observed, Route, RouteKind, Rule};

/// Protocol number of our addresses (`IFA_PROTO`), routes (`RTA_PROTOCOL`) and rules (`FRA_PROTOCOL`).
/// Unused in iproute2's `rt_protos`; 99, the first that comes to mind, is taken.
pub const MARK: u8 = 176;

/// Tables 20000..=29999 hold one table for each slot: 100 a card. In use elsewhere: 2..25 and 10000+100c+d (VPC CNI,
/// amazon-ec2-net-utils), 10+n (Cilium), 100+n (cloud-init), from 30200 (nm-cloud-setup), 52 (Tailscale), 51820 (wg-quick).
pub const TABLE_BASE: u32 = 20_000;

/// More than the highest slot that EC2 has takes of tables (100 a card, 1 a device): 32 cards of 24 ENIs.
pub const SLOTS: u32 = 3_124;

/// Before all our source rules, with room for 387 more before it (`priority_before_guard`), after Tailscale's (5210..5270) and the CNIs' (10..1536).
pub const GUARD_PRIORITY: u32 = 19_900;

/// Rules for whole subnets come after every exact rule, so that the longest match wins.
pub const SUBNET_RULE_OFFSET: u32 = 4_000;

/// Link group of attached ENIs: the guard rule passes over routes by these links.
pub const LINK_GROUP: u32 = 20_000;

/// The guard rule takes only routes longer than this from `main`. A full-tunnel VPN in OpenVPN's manner puts
/// 0.0.0.0/1, 128.0.0.0/1, 2000::/3 and fc00::/7 there, and replies of ENI addresses must not follow those.
pub const GUARD_PREFIX_LENGTH: u32 = 7;

/// The table that unbound traffic uses: `RT_TABLE_MAIN`.
pub const MAIN_TABLE: u32 = 254;

/// The table of this machine's own addresses: `RT_TABLE_LOCAL`.
pub const LOCAL_TABLE: u32 = 255;

/// What the kernel has in `main` for every link with IPv6.
pub const IPV6_LINK_LOCAL: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 64));

/// The kernel gives an IPv6 route that names no metric 1024; said outright so that both families read back as written.
pub const IPV6_METRIC: u32 = 1024;

/// `unreachable default` of the highest metric: used only when the link's own routes are gone, so that a flapping link
/// fails closed instead of leaking by another ENI.
pub const LAST_METRIC: u32 = u32::MAX;

/// Metric of a default route given to `main` for a family that the primary ENI has not: behind any other manager's.
pub const MAIN_METRIC: u32 = 20_000;

/// `RTN_LOCAL`: the kernel's own route for an address of this machine.
pub const LOCAL_ROUTE: u8 = 2;

/// Of the kernel's own rule for `main`: one behind it decides nothing that `main` can.
pub const MAIN_PRIORITY: u32 = 32_766;

/// Protocol numbers of routes that have an owner, as iproute2's `rt_protos` has them.
pub const PROTOCOLS_IN_USE: [(u8, &str); 23] = [
    (1, "the kernel (redirects)"),
    (2, "the kernel"),
    (3, "the boot scripts"),
    (4, "the administrator (static)"),
    (8, "gated"),
    (9, "the kernel (router advertisements)"),
    (10, "mrt"),
    (11, "zebra"),
    (12, "bird"),
    (13, "dnrouted"),
    (14, "xorp"),
    (15, "ntk"),
    (16, "the DHCP client"),
    (17, "mrouted"),
    (18, "keepalived"),
    (42, "babel"),
    (84, "ovn"),
    (99, "openr"),
    (186, "bgp"),
    (187, "isis"),
    (188, "ospf"),
    (189, "rip"),
    (192, "eigrp"),
];

/// `RTPROT_KERNEL`: routes that the kernel made for addresses and links.
pub const KERNEL_PROTOCOL: u8 = 2;

/// The default of a run's deadline: an attached ENI is usually all there within it, and boot does not wait longer.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Between two readings of metadata by `watch`: nobody who has typed a change in EC2 waits longer without noticing.
pub const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// What may be chosen for [`TIMEOUT`]: who waits for nothing at all cannot ask metadata either, and more than an hour is for ever.
pub const TIMEOUTS: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);

/// What may be chosen instead: metadata is not asked more often, whatever is wished, and no more rarely than anybody would
/// call staying.
pub const INTERVAL: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);

/// Milliseconds between the two complete snapshots that prove that something is gone. Metadata was seen to be stale, or to
/// lack what is there, for moments (amazon-vpc-cni-k8s issue 1967, amazon-ec2-net-utils issue 161).
pub const PROOF_PAUSE: u64 = 10_000;

/// Milliseconds after an address has come to an ENI for which metadata that gives it to another one needs proof, too: it may be
/// older.
pub const ARRIVAL_DOUBT: u64 = 60_000;

/// How long a run on trial may wait for its confirmation: long enough to type it, and no longer than somebody sits there.
pub const TRIAL: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// How often metadata is asked for while a run waits for its confirmation, and how many times in a row it may fail to
/// answer: a packet or two are lost now and then, a way that is lost stays so.
pub const WATCH_PAUSE: Duration = Duration::from_secs(2);
pub const WATCH_FAILURES: u32 = 3;

/// Kinds of software devices that can stand for an ENI's link: `veth` and `tun` do so in simulations. Any other kind
/// is stacked on a link, or imitates its MAC (vlan, macvlan, bridge, bond), and is left alone.
pub const LINK_KINDS: [&str; 2] = ["tun", "veth"];

/// Kinds of those that are stacked on one other link.
pub const STACKED_KINDS: [&str; 5] = ["ipvlan", "ipvtap", "macvlan", "macvtap", "vlan"];

/// The routing table of a slot. Unique as long as slots are.
pub fn table(config: &Config, slot: Slot) -> u32 {
    config.table_base + 100 * slot.network_card + slot.device_number
}

/// Names under which people find the link whatever the kernel called it, as Amazon Linux 2023 has them.
pub fn altnames(id: &str, slot: Slot) -> Vec<String> {
    let Slot { network_card, device_number } = slot;
    let by_slot = match network_card {
        0 => format!("device-number-{device_number}"),
        card => format!("device-number-{device_number}.{card}"),
    };
    // 127 bytes is what the kernel takes for an alternative name; a longer or odd id is no name.
    let is_name =
        !id.is_empty() && id.len() < 128 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if is_name { vec![by_slot, id.to_string()] } else { vec![by_slot] }
}

/// The metric of our ordinary routes.
pub fn metric(family: Family) -> u32 {
    match family {
        Family::V4 => 0,
        Family::V6 => IPV6_METRIC,
    }
}

/// The metric of routes in `main` that are chosen for the ENI with this table: behind the default, which is one ENI's alone. No two
/// ENIs have the same, or one would keep the other's route to the same place out.
pub fn chosen_metric(config: &Config, table: u32) -> u32 {
    MAIN_METRIC + (table - config.table_base)
}

/// An address as we add it: its way back is in the ENI's own table, so the kernel makes no connected route in `main`.
pub fn address(config: &Config, net: IpNet, is_deprecated: bool) -> Address {
    Address { net, is_deprecated, has_prefix_route: false, is_leased: false, protocol: config.mark }
}

/// A unicast route as we add it.
pub fn route(
    config: &Config,
    destination: IpNet,
    gateway: Option<std::net::IpAddr>,
    table: u32,
    family: Family,
) -> Route {
    let protocol = config.mark;
    Route { destination, kind: RouteKind::Unicast, gateway, is_onlink: false, table, metric: metric(family), protocol }
}

/// An ENI's last resort, so that it fails closed: behind its other routes, or in its own table (`last_table`).
pub fn unreachable_default(config: &Config, table: u32, family: Family) -> Route {
    Route {
        kind: RouteKind::Unreachable,
        metric: LAST_METRIC,
        ..route(config, family.everything(), None, last_table(config, table, family), family)
    }
}

/// The table that holds the last resort of the ENI with this table. IPv6 passes over a router that did not answer when
/// there is another route in the table, even one that refuses, and asks the router again only a minute later
/// (`router_probe_interval`); alone in its table the router is asked again by the next packet.
pub fn last_table(config: &Config, table: u32, family: Family) -> u32 {
    match family {
        Family::V4 => table,
        Family::V6 => table + config.subnet_rule_offset,
    }
}

/// Whether this is one of those that hold a last resort and nothing else.
pub fn is_last_table(config: &Config, table: u32) -> bool {
    let first = config.table_base + config.subnet_rule_offset;
    (first..first + SLOTS).contains(&table)
}

/// The rule that leads to the last resort what this one, an ENI's, led to no route.
pub fn last_rule(config: &Config, rule: &Rule) -> Option<Rule> {
    let table = last_table(config, rule.table, rule.family);
    let priority = rule.priority + config.subnet_rule_offset;
    (table != rule.table).then(|| Rule { priority, table, ..rule.clone() })
}

/// A rule that looks up a table, as we add it; the caller says what it matches.
pub fn rule(config: &Config, family: Family, priority: u32, table: u32) -> Rule {
    Rule {
        priority,
        family,
        from: None,
        to: None,
        iif: None,
        oif: None,
        mark: None,
        is_inverted: false,
        table,
        goto: None,
        suppress_prefix_length: None,
        suppress_group: None,
        protocol: config.mark,
        has_more: false,
    }
}

/// For packets made on this machine: `iif lo`. Forwarded ones (a NAT box, a firewall) are never captured, and
/// reverse-path checks still match it, so strict `rp_filter` passes.
pub fn source_rule(config: &Config, source: IpNet, family: Family, priority: u32, table: u32) -> Rule {
    Rule { from: Some(source), iif: Some("lo".into()), ..rule(config, family, priority, table) }
}

/// For delegated prefixes, of which containers send: no `iif lo`, as their packets are forwarded.
pub fn prefix_rule(config: &Config, prefix: IpNet, table: u32) -> Rule {
    Rule { from: Some(prefix), ..rule(config, prefix.family(), table, table) }
}

/// Whether the best default of a family in `main`, among these routes, leaves by one of these links, or may.
pub fn is_best_default_by<'a>(
    links: &BTreeSet<u32>,
    routes: impl Iterator<Item = &'a (Option<u32>, Route)>,
    family: Family,
) -> bool {
    let is_default = |(_, route): &&(Option<u32>, Route)| {
        (route.table, route.destination) == (MAIN_TABLE, family.everything()) && route.kind.is_unicast()
    };
    let defaults: Vec<_> = routes.filter(is_default).collect();
    let best = defaults.iter().map(|(_, route)| route.metric).min();
    let mut best = defaults.iter().filter(|(_, route)| Some(route.metric) == best);
    // The kernel names no link where a next hop is an object of its own.
    best.any(|(link, _)| link.map_or(!links.is_empty(), |link| links.contains(&link)))
}

/// "If `main` has a specific route by something that is not an ENI (docker0, cni0, a veth, wg0), use it": without it a
/// container cannot talk to the host's ENI addresses, since the reply goes to the VPC (amazon-ec2-net-utils issue 97).
pub fn guard_rule(config: &Config, family: Family) -> Rule {
    Rule {
        suppress_prefix_length: Some(GUARD_PREFIX_LENGTH),
        suppress_group: Some(config.link_group),
        ..rule(config, family, config.guard_priority, MAIN_TABLE)
    }
}

/// What is taken out of the guard rule's hands comes before it, by the length of the route in `main` that it stands for:
/// the longest match first, as in `main` itself; and of one length in the order that the rules have behind the guard,
/// told by how many times `subnet_rule_offset` they are after the ENI's exact ones: 0 to 2.
pub fn priority_before_guard(config: &Config, route: &IpNet, rank: u32) -> u32 {
    config.guard_priority.saturating_sub(3 * (u32::from(route.prefix_len()) + 1) - rank)
}

/// Before `main`: what it has for certain destinations, and instead of its own default that of the rule's table.
pub fn rules_before_main(rule: &Rule, [specific, default]: [u32; 2]) -> [Rule; 2] {
    let main = Rule { priority: specific, table: MAIN_TABLE, suppress_prefix_length: Some(0), ..rule.clone() };
    [main, Rule { priority: default, ..rule.clone() }]
}

/// What others have for specific destinations, for traffic that went past their rules: after the guard rule and before all
/// source rules, in the order of theirs.
pub fn priority_after_guard(config: &Config, n: usize) -> u32 {
    let last = config.table_base.saturating_sub(1).max(config.guard_priority);
    u32::try_from(n).map_or(last, |n| config.guard_priority.saturating_add(1 + n).min(last))
}

/// A rule that others can go on at, and that does nothing: its table is empty.
pub fn landing_rule(config: &Config, family: Family, priority: u32) -> Rule {
    rule(config, family, priority, config.table_base.saturating_sub(1))
}

/// For sockets bound to the device (`ping -I eth1`, SO_BINDTODEVICE), though `main` has no route by it.
pub fn bound_rule(config: &Config, link_name: &str, family: Family, table: u32) -> Rule {
    Rule { oif: Some(link_name.into()), ..rule(config, family, table, table) }
}

/// Whether the rule leads to a table of an ENI. What else we have of rules goes before those of all ENIs.
pub fn leads_to_eni(config: &Config, rule: &Rule) -> bool {
    (config.table_base..=config.table_base + SLOTS + config.subnet_rule_offset).contains(&rule.table)
}

pub fn owns_address(config: &Config, address: &Address) -> bool {
    address.protocol == config.mark
}

/// Of other types than we write, somebody else must have made it with our number; a request to delete it could hit
/// another one.
pub fn owns_route(config: &Config, route: &Route) -> bool {
    route.protocol == config.mark && !matches!(route.kind, RouteKind::Other(_))
}

/// Our mark, and nothing that our rules never have.
pub fn owns_rule(config: &Config, rule: &Rule) -> bool {
    rule.protocol == config.mark && !rule.has_more
}

/// Whether the route is in `main` for some destinations, each link's own ones left out.
pub fn is_mains_for_some(route: &Route) -> bool {
    let is_everything = route.destination.prefix_len() == 0;
    route.table == MAIN_TABLE && route.kind.is_unicast() && !is_everything && !is_link_local(route)
}

/// Every link has such a route, and a packet to there is bound to its link.
pub fn is_link_local(route: &Route) -> bool {
    match route.destination.addr() {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Whether this is one of ours for what an ENI sends, and no copy of somebody's that is tried once more.
pub fn is_source_rule(config: &Config, rule: &Rule) -> bool {
    let is_copy = rule.priority < config.table_base && rule.goto.is_none() && rule.to.is_none();
    owns_rule(config, rule) && rule.from.is_some() && !rule.is_inverted && !is_copy
}

/// Whether this sends what the primary, of this table, has for another ENI's subnet by its own link.
pub fn keeps_primary_apart(config: &Config, rule: &Rule, table: u32) -> bool {
    owns_rule(config, rule) && (rule.table, rule.priority) == (table, table) && rule.to.is_some()
}

/// Whether this is a rule for all traffic of many addresses, as those of delegated prefixes are. One for all traffic of a single address
/// is astray.
pub fn is_of_prefix(rule: &Rule) -> bool {
    let is_network = rule.from.is_some_and(|from| from.prefix_len() < from.max_prefix_len());
    is_network && rule.iif.is_none() && rule.oif.is_none() && rule.to.is_none()
}

/// Whether the kernel is still busy with an address of ours. It acknowledges an IPv6 address and finishes it later, on a
/// worker (`addrconf_dad_work`): until its local route is there, packets to it are lost.
pub fn is_settling(config: &Config, observed: &Observed) -> bool {
    let is_local = |route: &Route| route.kind == RouteKind::Other(LOCAL_ROUTE);
    let local: BTreeSet<(Option<u32>, IpNet)> = observed
        .routes
        .iter()
        .filter(|(_, route)| is_local(route))
        .map(|(index, route)| (*index, route.destination))
        .collect();
    let is_up = |index: &u32| observed.links.get(index).is_some_and(|link| link.is_up);
    let ours = observed.addresses.iter().filter(|(index, address)| owns_address(config, address) && is_up(index));
    let mut ipv6 = ours.filter(|(_, address)| address.net.addr().is_ipv6());
    ipv6.any(|(index, address)| !local.contains(&(Some(*index), address.net.addr().into())))
}

/// Whether this link can be an ENI's own: not stacked on another one. A port of a bridge or bond may be, but is then
/// somebody else's to configure.
pub fn can_be_eni(link: &Link) -> bool {
    link.kind.as_deref().is_none_or(|kind| LINK_KINDS.contains(&kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link that is up or down with an address of ours, and the kernel's local route for it or not.
    fn machine(net: &str, is_up: bool, has_local_route: bool) -> Observed {
        let config = Config::default();
        let net: IpNet = net.parse().unwrap();
        let link = Link {
            index: 7,
            name: "eth1".into(),
            mac: None,
            kind: None,
            controller: None,
            is_up,
            has_carrier: None,
            mtu: 9001,
            group: 0,
            altnames: BTreeSet::new(),
            drops_secondaries: false,
            ipv6: None,
        };
        let mut observed = Observed { has_ipv6: true, ..Observed::default() };
        observed.links.insert(7, link);
        observed.addresses.insert((7, address(&config, net, false)));
        let local = Route {
            kind: RouteKind::Other(LOCAL_ROUTE),
            protocol: KERNEL_PROTOCOL,
            ..route(&config, net.addr().into(), None, 255, Family::V6)
        };
        observed.routes.extend(has_local_route.then_some((Some(7), local)));
        observed
    }

    #[test]
    fn an_ipv6_address_settles_when_its_local_route_stands() {
        let is_settling =
            |net, is_up, has_local_route| super::is_settling(&Config::default(), &machine(net, is_up, has_local_route));
        assert!(is_settling("2001:db8::5/128", true, false));
        assert!(!is_settling("2001:db8::5/128", true, true));
        // The kernel has no use for it while the link is down, and IPv4 is ready with its acknowledgement.
        assert!(!is_settling("2001:db8::5/128", false, false));
        assert!(!is_settling("10.0.0.5/24", true, false));
    }
}

//! From the attached ENIs to what the kernel should have: per ENI its link, addresses, routes and rules, keyed by MAC.
//! Which link carries that MAC, and what is there already, is for `plan`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::config::choices::{Choices, ExtraRoute, MainRoutes, Tables};
use crate::config::{Config, Rules};
use crate::cover::{cover, exact, of_family, overlap};
use crate::eni::{Attached, Eni, show_source};
use crate::net::{Address, Family, HasFamily, MacAddr, Route, RouteKind, Rule};
use crate::policy;

/// A desired object with the reason it is wanted, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted<T> {
    pub object: T,
    pub reason: String,
}

fn wanted<T>(object: T, reason: impl Into<String>) -> Wanted<T> {
    Wanted { object, reason: reason.into() }
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Desired {
    pub enis: BTreeMap<MacAddr, DesiredEni>,
    /// Rules that belong to no single ENI.
    pub rules: Vec<Wanted<Rule>>,
    /// ENIs that are listed but pending: nothing of theirs may be removed.
    pub pending: BTreeSet<MacAddr>,
    /// ENIs that are somebody else's, or may be: nothing of theirs is touched at all.
    pub left_alone: BTreeSet<MacAddr>,
    /// ENIs of other VPCs, as configured, pending ones too: what is in `main` of them is nobody else's business.
    pub isolated: BTreeSet<MacAddr>,
    /// Whether the snapshot told all there is, so that what it does not name does not exist.
    pub is_complete: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DesiredEni {
    pub id: String,
    pub table: u32,
    pub link: DesiredLink,
    /// In the order in which they are to be added: the primary IPv4 address stands before the secondary ones.
    pub addresses: Vec<Wanted<Address>>,
    /// In the order in which they are to be added: a gateway after the route by which it is reached.
    pub routes: Vec<Wanted<Route>>,
    pub rules: Vec<Wanted<Rule>>,
    /// Of the primary: what all its traffic would be led to its table by; it is wanted for some destinations only.
    pub narrowed: Vec<Rule>,
    /// Families for which a socket bound to the link finds its way by the ENI's table.
    pub bound_families: Vec<Family>,
    /// Whether all that metadata gives it is desired; if not (a dispute), nothing of what is there may be removed.
    pub is_whole: bool,
    /// Addresses that stay as they are, if they are there.
    pub left_alone: BTreeSet<IpNet>,
    /// Whether metadata gives it any address; one that has none needs no link either (EFA-only).
    pub has_addresses: bool,
}

/// How an ENI's link should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DesiredLink {
    /// The primary's: the distribution looks after it.
    Left,
    /// A secondary ENI's: up, as large as the primary's or as chosen, deaf to router advertisements, known by more names.
    Kept { altnames: Vec<String>, mtu: Option<u32> },
}

/// What decides about one ENI beside its own.
struct Machine<'a> {
    attached: &'a Attached,
    config: &'a Config,
    sources: Sources,
}

/// What the kernel should have, from metadata and configuration alone.
pub fn desired(attached: &Attached, config: &Config) -> Desired {
    let machine = Machine { attached, config, sources: Sources::of(attached) };
    let has_others = attached.ready.keys().any(|mac| *mac != attached.primary);
    let primary = attached.primary_eni().map(|primary| primary_eni(&machine, primary));
    let is_earlier = |wanted: &Wanted<Rule>| wanted.object.to.is_some_and(|to| attached.earlier_subnets.contains(&to));
    let is_kept_apart = primary.as_ref().is_some_and(|primary| primary.rules.iter().any(is_earlier));
    let is_beside_others = has_others || is_kept_apart || attached.is_main_anothers;
    let mut desired = Desired {
        enis: BTreeMap::new(),
        rules: Vec::new(),
        pending: attached.pending.keys().copied().collect(),
        left_alone: attached.ignored.keys().chain(&attached.undecided).copied().collect(),
        isolated: attached.choices.keys().filter(|mac| is_isolated(attached, **mac)).copied().collect(),
        is_complete: attached.is_complete(),
    };
    if !is_beside_others {
        // One ENI alone needs no policy routing: only its missing secondary addresses.
        let alone = |primary| DesiredEni { routes: Vec::new(), rules: Vec::new(), narrowed: Vec::new(), ..primary };
        desired.enis.extend(primary.map(|primary| (attached.primary, alone(primary))));
        return desired;
    }
    for family in Family::BOTH {
        let reason = "routes of containers, bridges and tunnels in main go before those of the ENIs";
        desired.rules.push(wanted(policy::guard_rule(config, family), reason));
    }
    let secondaries = attached.ready.iter().filter(|(mac, _)| **mac != attached.primary);
    desired.enis.extend(secondaries.map(|(mac, eni)| (*mac, secondary_eni(&machine, *mac, eni))));
    desired.enis.extend(primary.map(|primary| (attached.primary, primary)));
    desired
}

/// The primary ENI stays as the distribution made it. Added are its missing secondary addresses, and narrow rules that
/// keep its replies to the other ENIs' subnets symmetric when another manager has put those subnets into `main`
/// (amazon-ec2-net-utils issue 174).
fn primary_eni(machine: &Machine, eni: &Eni) -> DesiredEni {
    let Machine { attached, config, .. } = *machine;
    let table = policy::table(config, eni.slot);
    let mut routes = Vec::new();
    let mut rules = Vec::new();
    let mut narrowed = Vec::new();
    for family in Family::BOTH.into_iter().filter(|family| eni.has_family(*family)) {
        routes.extend(table_routes(eni, family, table, config));
        let sources = sources_of_rules(machine, attached.primary, eni, family);
        let of_addresses =
            sources.iter().map(|source| policy::source_rule(config, source.prefix, family, table, table));
        let of_prefixes = eni.prefixes(family).into_iter().map(|prefix| policy::prefix_rule(config, prefix, table));
        let of_family: Vec<Rule> = of_addresses.chain(of_prefixes).collect();
        for subnet in other_subnets(attached, family) {
            let reason = format!("{}'s own traffic to another ENI's subnet leaves by {}", eni.id, eni.id);
            let to_subnet = of_family.iter().map(|rule| Rule { to: Some(subnet), ..rule.clone() });
            rules.extend(to_subnet.map(|rule| wanted(rule, reason.clone())));
        }
        narrowed.extend(of_family);
    }
    // One address of each family is the distribution's, by DHCP; metadata lists it first.
    let secondaries = Family::BOTH.into_iter().flat_map(|family| eni.addresses(family));
    let secondaries = secondaries.filter(|address| !eni.is_distributions(*address));
    let left_alone = eni.left_alone();
    let secondaries = secondaries.map(IpNet::from).filter(|net| !left_alone.contains(net));
    let addresses = secondaries.map(|net| {
        wanted(policy::address(config, net, net.addr().is_ipv6()), format!("secondary address of {}", eni.id))
    });
    DesiredEni {
        id: eni.id.clone(),
        table,
        link: DesiredLink::Left,
        addresses: addresses.collect(),
        routes,
        rules,
        narrowed,
        bound_families: Vec::new(),
        is_whole: !attached.disputes.contains_key(&attached.primary),
        left_alone: eni.left_alone(),
        has_addresses: true,
    }
}

fn secondary_eni(machine: &Machine, mac: MacAddr, eni: &Eni) -> DesiredEni {
    let Machine { attached, config, .. } = *machine;
    let table = policy::table(config, eni.slot);
    let choices = attached.choices.get(&mac).cloned().unwrap_or_default();
    let families: Vec<Family> = Family::BOTH.into_iter().filter(|family| eni.has_family(*family)).collect();
    let mut routes = Vec::new();
    let mut rules = Vec::new();
    for &family in &families {
        let reason = format!("{} fails closed: without its link its traffic goes nowhere", eni.id);
        routes.push(wanted(policy::unreachable_default(config, table, family), reason));
        routes.extend(table_routes(eni, family, table, config));
        routes.extend(link_local_route(eni, family, table, config));
        if stands_in_for_primary(attached, mac, family) || still_stands_in(attached, mac, family) {
            routes.extend(main_default(eni, family, config));
        }
        if !choices.is_isolated() && choices.main_routes == Some(MainRoutes::Connected) {
            routes.extend(connected_routes(eni, family, table, config));
        }
        rules.extend(source_rules(machine, mac, eni, family));
    }
    let chosen: Vec<Wanted<Route>> =
        families.iter().flat_map(|family| chosen_routes(eni, *family, table, &choices, config)).collect();
    let is_replaced = |route: &Route| {
        let same = |chosen: &Route| (chosen.destination, chosen.table) == (route.destination, route.table);
        route.kind == RouteKind::Unicast && chosen.iter().any(|chosen| same(&chosen.object))
    };
    routes.retain(|route| !is_replaced(&route.object));
    routes.extend(chosen);
    // A chosen route to the whole subnet is in the place of the one by which the router is found.
    let is_subnet = |route: &Route| route.table == table && route.kind == RouteKind::Unicast && route.gateway.is_none();
    let subnets = routes.iter().map(|route| &route.object).filter(|route| is_subnet(route));
    let subnets: Vec<IpNet> = subnets.map(|route| route.destination).collect();
    let is_found = |gateway: IpAddr| subnets.iter().any(|subnet| subnet.contains(&gateway));
    for route in routes.iter_mut().map(|route| &mut route.object) {
        route.is_onlink |= route.gateway.is_some_and(|gateway| gateway.is_ipv4() && !is_found(gateway));
    }
    DesiredEni {
        id: eni.id.clone(),
        table,
        link: DesiredLink::Kept { altnames: policy::altnames(&eni.id, eni.slot), mtu: choices.mtu },
        addresses: addresses(eni, config),
        routes,
        rules,
        narrowed: Vec::new(),
        bound_families: families.clone(),
        is_whole: !attached.disputes.contains_key(&mac),
        left_alone: eni.left_alone(),
        has_addresses: !families.is_empty(),
    }
}

/// The primary IPv4 address with the subnet's length, so that the kernel takes it as source for the ENI's traffic;
/// secondary ones as /32 after it, since a /24 added first would take its place, and /24 ones vanish with their primary
/// when `promote_secondaries` is 0. IPv6 as /128, all but one deprecated (the first, as long as the kernel has none): otherwise
/// the address added last would become the source of unbound traffic.
fn addresses(eni: &Eni, config: &Config) -> Vec<Wanted<Address>> {
    let length = eni.ipv4_subnet.map_or(32, |subnet| subnet.prefix_len());
    let left_alone = eni.left_alone();
    let mut addresses = Vec::new();
    let in_order = Family::BOTH.into_iter().flat_map(|family| eni.addresses(family).into_iter().enumerate());
    for (n, address) in in_order.filter(|(_, address)| !left_alone.contains(&IpNet::from(*address))) {
        let net = match address.is_ipv4() && n == 0 {
            true => IpNet::new(address, length).unwrap_or_else(|_| address.into()),
            false => address.into(),
        };
        let kind = if n == 0 { "first" } else { "secondary" };
        let reason = format!("{kind} address of {}", eni.id);
        addresses.push(wanted(policy::address(config, net, eni.is_deprecated(address)), reason));
    }
    addresses
}

/// The subnet on-link and everything else by the VPC router. No `src`: it would need the address first, and the kernel
/// picks the ENI's first address by itself.
fn table_routes(eni: &Eni, family: Family, table: u32, config: &Config) -> Vec<Wanted<Route>> {
    let mut routes = Vec::new();
    for subnet in eni.subnets(family) {
        routes.push(wanted(policy::route(config, subnet, None, table, family), format!("subnet of {}", eni.id)));
    }
    if let Some(router) = eni.router(family) {
        let route = policy::route(config, family.everything(), Some(router), table, family);
        routes.push(wanted(route, format!("VPC router of {}", eni.id)));
    }
    routes
}

/// A socket that talks to a neighbour's link-local address is bound to the link, so the rule for bound sockets sends it
/// to the ENI's table, and the guard rule passes over `main`'s route by this link: without its own it would go by the
/// VPC router.
fn link_local_route(eni: &Eni, family: Family, table: u32, config: &Config) -> Option<Wanted<Route>> {
    match family {
        Family::V4 => None,
        Family::V6 => {
            let route = policy::route(config, policy::IPV6_LINK_LOCAL, None, table, family);
            Some(wanted(route, format!("neighbours of {}", eni.id)))
        }
    }
}

/// For unbound traffic to the ENI's neighbours, as chosen. Behind any other manager's route to the same subnet.
fn connected_routes(eni: &Eni, family: Family, table: u32, config: &Config) -> Vec<Wanted<Route>> {
    let route = |subnet| Route {
        metric: policy::chosen_metric(config, table),
        ..policy::route(config, subnet, None, policy::MAIN_TABLE, family)
    };
    let reason = format!("unbound traffic to {}'s subnet leaves by it, as configured", eni.id);
    eni.subnets(family).into_iter().map(|subnet| wanted(route(subnet), reason.clone())).collect()
}

/// Routes that are chosen for the ENI; each replaces the one to its destination that would be there otherwise.
fn chosen_routes(eni: &Eni, family: Family, table: u32, choices: &Choices, config: &Config) -> Vec<Wanted<Route>> {
    let mut routes = Vec::new();
    for chosen in choices.routes.iter().filter(|chosen| chosen.to.family() == family) {
        let Some(gateway) = chosen.via.or_else(|| eni.router(family)) else { continue };
        let in_table = |table, metric| {
            // `main` has no connected route by which the gateway could be found.
            let is_onlink = family == Family::V4;
            let route = Route { is_onlink, metric, ..policy::route(config, chosen.to, Some(gateway), table, family) };
            wanted(route, format!("configured for {}", eni.id))
        };
        let in_own = || in_table(table, policy::metric(family));
        let in_main = || in_table(policy::MAIN_TABLE, policy::chosen_metric(config, table));
        match chosen.tables {
            _ if choices.is_isolated() => routes.push(in_own()),
            Tables::Eni => routes.push(in_own()),
            Tables::Main => routes.push(in_main()),
            Tables::Both => routes.extend([in_own(), in_main()]),
        }
    }
    routes
}

/// Without a default of its own, a family that only a secondary ENI has could not be used by unbound traffic at all.
fn main_default(eni: &Eni, family: Family, config: &Config) -> Option<Wanted<Route>> {
    let route = Route {
        // `main` has no connected route for this subnet; IPv6's router is link-local and needs none.
        is_onlink: family == Family::V4,
        metric: policy::MAIN_METRIC,
        ..policy::route(config, family.everything(), Some(eni.router(family)?), policy::MAIN_TABLE, family)
    };
    Some(wanted(route, format!("the primary ENI has no {family}, and {} stands in for it", eni.id)))
}

/// Whether this ENI has the default of a family that the primary ENI is known not to have: the one that does already, else the first
/// (by card, then device) with that family. One that is isolated does not count.
fn stands_in_for_primary(attached: &Attached, mac: MacAddr, family: Family) -> bool {
    let is_missing = attached.primary_eni().is_some_and(|primary| primary.addresses(family).is_empty());
    let with_family =
        attached.ready.iter().filter(|(mac, eni)| eni.has_family(family) && !is_isolated(attached, **mac));
    let rank = |eni: &Eni| (!eni.stands_in.contains(&family), eni.slot);
    let is_missing = is_missing && !has_chosen_default(attached, family);
    is_missing && with_family.min_by_key(|(_, eni)| rank(eni)).is_some_and(|(first, _)| *first == mac)
}

/// Whether a default of the family is chosen for `main`, by whichever ENI.
fn has_chosen_default(attached: &Attached, family: Family) -> bool {
    let is_default = |route: &ExtraRoute| route.to == family.everything() && route.tables != Tables::Eni;
    let can_have = |mac: &MacAddr| attached.ready.get(mac).is_none_or(|eni| eni.has_family(family));
    let mut choices = attached.choices.iter().filter(|(mac, choices)| can_have(mac) && !choices.is_isolated());
    choices.any(|(_, choices)| choices.routes.iter().any(is_default))
}

/// Whether this ENI has the only default of a family that the primary ENI has come to have, without proof yet.
fn still_stands_in(attached: &Attached, mac: MacAddr, family: Family) -> bool {
    let has_come = attached.primary_eni().is_some_and(|primary| !primary.addresses(family).is_empty());
    let stands_in = attached.ready.get(&mac).is_some_and(|eni| eni.stands_in.contains(&family));
    has_come && stands_in && mac != attached.primary && !is_isolated(attached, mac)
}

fn is_isolated(attached: &Attached, mac: MacAddr) -> bool {
    attached.choices.get(&mac).is_some_and(Choices::is_isolated)
}

fn source_rules(machine: &Machine, mac: MacAddr, eni: &Eni, family: Family) -> Vec<Wanted<Rule>> {
    let config = machine.config;
    let table = policy::table(config, eni.slot);
    let mut rules = Vec::new();
    for source in sources_of_rules(machine, mac, eni, family) {
        let priority = if source.is_subnet { table + config.subnet_rule_offset } else { table };
        let reason = format!("traffic from {} leaves by {}", show_source(&source.prefix), eni.id);
        rules.push(wanted(policy::source_rule(config, source.prefix, family, priority, table), reason));
    }
    for prefix in eni.prefixes(family) {
        let rule = policy::prefix_rule(config, prefix, table);
        rules.push(wanted(rule, format!("traffic from delegated prefix {prefix} leaves by {}", eni.id)));
    }
    let last = rules.iter().filter_map(|rule| policy::last_rule(config, &rule.object));
    let reason = format!("{} fails closed: without its link its traffic goes nowhere", eni.id);
    let last: Vec<Wanted<Rule>> = last.map(|rule| wanted(rule, reason.clone())).collect();
    rules.extend(last);
    rules
}

struct SourceOfRule {
    prefix: IpNet,
    /// The whole subnet, which no other ENI has an address in.
    is_subnet: bool,
}

/// The prefixes that stand for an ENI's addresses in rules.
fn sources_of_rules(machine: &Machine, mac: MacAddr, eni: &Eni, family: Family) -> Vec<SourceOfRule> {
    let Machine { attached, config, sources: everybody } = machine;
    let own: Vec<IpNet> = eni.addresses(family).into_iter().map(IpNet::from).collect();
    let rules = attached.choices.get(&mac).and_then(|choices| choices.rules).unwrap_or(config.rules);
    let mut sources = Vec::new();
    let subnets = eni.subnets(family);
    for (n, &subnet) in subnets.iter().enumerate() {
        // Should CIDRs overlap, each source is the first one's.
        let is_new = |source: &&IpNet| !subnets[..n].iter().any(|earlier| earlier.contains(*source));
        let inside = own.iter().filter(|source| subnet.contains(*source)).filter(is_new);
        let mut inside: Vec<IpNet> = inside.copied().collect();
        if inside.is_empty() {
            continue;
        }
        let others = everybody.of_others_in(&subnet, mac);
        // What somebody else has put on its link is its own, too, unless it is another's.
        let held = attached.held.iter().filter(|(_, holder)| *holder == Some(mac)).map(|(source, _)| source);
        let held = held.filter(|source| subnet.contains(*source) && !own.contains(source)).filter(is_new);
        inside.extend(held.filter(|source| !others.iter().any(|other| overlap(other, source))));
        // The rest of an isolated ENI's subnet may be somebody else's, who has the same one.
        if rules == Rules::PerAddress || is_isolated(attached, mac) {
            sources.extend(inside.into_iter().map(|prefix| SourceOfRule { prefix, is_subnet: false }));
            continue;
        }
        // A pending ENI may have any address: cover nothing that could be its own. Its exact rules, if it has any, come
        // before a rule for the whole subnet; a rule for the whole subnet that it has comes after exact ones.
        let prefixes = match everybody.may_have_more_in(&subnet, mac, &others) {
            true => exact(&inside),
            false => cover(&inside, &others, subnet),
        };
        sources.extend(prefixes.into_iter().map(|prefix| SourceOfRule { prefix, is_subnet: prefix == subnet }));
    }
    sources
}

/// What all attached ENIs send from, ready or not, as far as known.
struct Sources {
    /// In order, with the ENI that sends from it; none where no ENI is to.
    known: Vec<(IpNet, Option<MacAddr>)>,
    /// The ENIs of which it is not known, and what is known of their subnets.
    unknown: Vec<(MacAddr, Vec<IpNet>)>,
    /// There may be ENIs of which nothing is known.
    is_list_whole: bool,
}

impl Sources {
    fn of(attached: &Attached) -> Sources {
        let ready = attached.ready.iter();
        let ready = ready.flat_map(|(mac, eni)| eni.all_sources().into_iter().map(|source| (source, Some(*mac))));
        let disputed = attached.disputes.values().flatten().map(|dispute| (dispute.source, None));
        // What an ENI is given is its own, whoever else claims it or has it on a link.
        let nobodys = disputed.chain(attached.held.iter().copied());
        let nobodys = nobodys.filter(|(source, _)| !attached.ready.values().any(|eni| eni.has(source)));
        let mut sources = Sources {
            known: ready.chain(nobodys).collect(),
            unknown: Vec::new(),
            is_list_whole: attached.malformed.is_empty(),
        };
        let pending = attached.pending.iter();
        let pending = pending.map(|(mac, pending)| (*mac, pending.sources.clone(), pending.subnets.clone()));
        let ignored = attached.ignored.iter();
        let ignored = ignored.map(|(mac, ignored)| (*mac, ignored.sources(), ignored.subnets()));
        for (mac, known, subnets) in pending.chain(ignored) {
            match known {
                Some(known) => sources.known.extend(known.into_iter().map(|source| (source, Some(mac)))),
                None => sources.unknown.push((mac, subnets)),
            }
        }
        for (source, _) in &mut sources.known {
            *source = source.trunc();
        }
        sources.known.sort_unstable();
        sources
    }

    /// Those of the other ENIs that overlap this subnet.
    fn of_others_in(&self, subnet: &IpNet, mac: MacAddr) -> Vec<IpNet> {
        let at_or_after = |address: IpAddr| self.known.partition_point(|(source, _)| source.addr() < address);
        let inside = self.known[at_or_after(subnet.network())..].iter();
        let inside = inside.take_while(|(source, _)| source.addr() <= subnet.broadcast());
        // What begins before the subnet and overlaps it has it inside.
        let around =
            (0..subnet.prefix_len()).filter_map(|length| Some(IpNet::new(subnet.addr(), length).ok()?.trunc()));
        let around = around.filter(|net| net.addr() < subnet.network()).flat_map(|net| {
            let same = self.known[at_or_after(net.addr())..].iter();
            same.take_while(move |(source, _)| source.addr() == net.addr()).filter(move |(source, _)| *source == net)
        });
        around.chain(inside).filter(|(_, owner)| *owner != Some(mac)).map(|(source, _)| *source).collect()
    }

    /// Whether another ENI may have addresses in this subnet beside these.
    fn may_have_more_in(&self, subnet: &IpNet, mac: MacAddr, known: &[IpNet]) -> bool {
        let unknown: Vec<_> = self.unknown.iter().filter(|(other, _)| *other != mac).collect();
        let is_near = || unknown.iter().flat_map(|(_, subnets)| subnets).any(|other| overlap(other, subnet));
        (!self.is_list_whole || !unknown.is_empty()) && (!known.is_empty() || is_near())
    }
}

/// The subnets of all ENIs but the primary and isolated ones, as far as known. The subnet of an isolated one means others
/// to everybody else.
fn other_subnets(attached: &Attached, family: Family) -> BTreeSet<IpNet> {
    let ready = attached.ready.iter().filter(|(mac, _)| **mac != attached.primary && !is_isolated(attached, **mac));
    let ready = ready.filter(|(_, eni)| eni.has_family(family)).flat_map(|(_, eni)| eni.subnets(family));
    let pending = attached.pending.iter().filter(|(mac, _)| **mac != attached.primary && !is_isolated(attached, **mac));
    let pending = pending.flat_map(|(_, pending)| of_family(&pending.subnets, family));
    let ignored = attached.ignored.iter().filter(|(mac, _)| **mac != attached.primary);
    let ignored = ignored.flat_map(|(_, ignored)| of_family(&ignored.subnets(), family));
    let of_isolated = attached.ready.iter().filter(|(mac, _)| is_isolated(attached, **mac));
    let of_isolated: Vec<IpNet> = of_isolated.flat_map(|(_, eni)| eni.subnets(family)).collect();
    let earlier = attached.earlier_subnets.iter().copied();
    let earlier = earlier.filter(|subnet| subnet.family() == family && !of_isolated.contains(subnet));
    ready.chain(pending).chain(ignored).chain(earlier).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_in_a_subnet_is_all_that_overlaps_it() {
        let nets = [
            "10.0.0.255/32",
            "10.0.1.0/24",
            "10.0.1.0/28",
            "10.0.1.255/32",
            "10.0.2.0/32",
            "10.0.0.0/16",
            "10.0.0.0/23",
            "10.0.1.128/25",
            "0.0.0.0/0",
            "::/0",
            "2001:db8::/32",
            "2001:db8:0:1::7/128",
            "2001:db8:0:2::/80",
        ];
        let nets: Vec<IpNet> = nets.iter().map(|net| net.parse().unwrap()).collect();
        let mac = |n: u8| MacAddr::from_bytes(&[2, 0, 0, 0, 0, n]).unwrap();
        let mut known: Vec<(IpNet, Option<MacAddr>)> =
            nets.iter().enumerate().map(|(n, net)| (*net, Some(mac(n as u8 % 3)))).collect();
        known.sort();
        let sources = Sources { known: known.clone(), unknown: Vec::new(), is_list_whole: true };
        for subnet in &nets {
            for own in [0, 1, 2].map(mac) {
                let is_meant = |(net, owner): &&(IpNet, Option<MacAddr>)| *owner != Some(own) && overlap(net, subnet);
                let expected: Vec<IpNet> = known.iter().filter(is_meant).map(|(net, _)| *net).collect();
                let mut found = sources.of_others_in(subnet, own);
                found.sort();
                assert_eq!(found, expected, "in {subnet}");
            }
        }
    }
}

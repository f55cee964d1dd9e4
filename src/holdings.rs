//! What of ours the kernel has for one ENI, whatever metadata says of that ENI now.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::config::Config;
use crate::eni::{Attached, Claim, Dispute, Eni, Pending, Reason};
use crate::net::{Family, HasFamily, Link, MacAddr, Observed, Route, RouteKind, Rule};
use crate::policy;

/// What of ours the kernel has for one ENI.
pub struct Own {
    /// Addresses as whole-length prefixes, and delegated prefixes.
    pub sources: BTreeSet<IpNet>,
    /// Addresses that somebody else has put on the link, a DHCP client above all, and that our rules send its way.
    served: BTreeSet<IpNet>,
    /// The subnets in its tables.
    subnets: BTreeSet<IpNet>,
    has_routes: bool,
}

impl Own {
    pub fn on(link: &Link, eni: Option<&Eni>, observed: &Observed, config: &Config) -> Own {
        let routes: Vec<&Route> = routes_of(link, observed, config).collect();
        let mut tables: BTreeSet<u32> = routes.iter().map(|route| route.table).collect();
        tables.extend(eni.map(|eni| policy::table(config, eni.slot)));
        let is_of_prefix = |rule: &Rule| match policy::keeps_primary_apart(config, rule, config.table_base) {
            // Of the primary such a rule is for another ENI's subnet.
            true => policy::is_of_prefix(&Rule { to: None, ..rule.clone() }),
            false => policy::is_of_prefix(rule),
        };
        let is_prefix =
            |rule: &&Rule| policy::is_source_rule(config, rule) && is_of_prefix(rule) && tables.contains(&rule.table);
        let is_subnet = |route: &&&Route| route.kind == RouteKind::Unicast && route.gateway.is_none();
        // An IPv6 table also has the link-local one, which is every link's.
        let in_tables = routes.iter().filter(is_subnet).map(|route| route.destination);
        let in_tables: BTreeSet<IpNet> = in_tables.filter(|subnet| *subnet != policy::IPV6_LINK_LOCAL).collect();
        let addresses = observed.addresses_on(link.index).filter(|address| policy::owns_address(config, address));
        // The ENI that was in this slot before may have left rules for prefixes of another subnet in the table, and where no
        // subnet is told there is no way for them to lead to.
        let can_be_its = |prefix: &IpNet| {
            let told = eni.map(|eni| eni.subnets(prefix.family())).unwrap_or_default();
            // A family that is lost as a whole has lost its subnet, too; by then the routes tell of it.
            let known: Vec<&IpNet> =
                if told.is_empty() { of_family(&in_tables, prefix) } else { told.iter().collect() };
            // Nor has a link on which IPv6 is turned off.
            observed.can_have(link, prefix.family()) && known.iter().any(|subnet| subnet.contains(prefix))
        };
        let prefixes = observed.rules.iter().filter(is_prefix).filter_map(|rule| rule.from).filter(can_be_its);
        let leads_here =
            |rule: &&Rule| policy::is_source_rule(config, rule) && !is_of_prefix(rule) && tables.contains(&rule.table);
        let is_served = |address: &IpAddr| {
            let mut from = observed.rules.iter().filter(leads_here).filter_map(|rule| rule.from);
            from.any(|from| from.contains(address))
        };
        let of_others = observed.addresses_on(link.index).filter(|address| !policy::owns_address(config, address));
        let served = of_others.map(|address| address.net.addr()).filter(is_served).map(IpNet::from);
        Own {
            sources: addresses.map(|address| address.net.addr().into()).chain(prefixes).collect(),
            served: served.collect(),
            subnets: in_tables.clone(),
            has_routes: !routes.is_empty(),
        }
    }

    /// What would go, or lose its way, if the ENI had no more than this. What somebody else has put on the link keeps its way beside any
    /// other address of its subnet.
    pub fn at_stake(&self, eni: &Eni) -> BTreeSet<IpNet> {
        let is_beside_another = |source: &&IpNet| {
            let family = source.family();
            let addresses = eni.addresses(family);
            let mut subnets = eni.subnets(family).into_iter().filter(|subnet| subnet.contains(*source));
            subnets.any(|subnet| addresses.iter().any(|address| subnet.contains(address)))
        };
        let served = self.served.iter().filter(|source| !is_beside_another(source));
        self.sources.iter().chain(served).copied().collect()
    }

    pub fn is_empty(&self) -> bool {
        self.sources.is_empty() && !self.has_routes
    }

    /// The ENI as one that keeps all it has.
    pub fn pending(&self, link: &Link, reason: Reason) -> Pending {
        Pending {
            id: link.altnames.iter().find(|name| name.starts_with("eni-")).cloned(),
            reason,
            sources: Some(self.sources.union(&self.served).copied().collect()),
            subnets: self.subnets.iter().copied().collect(),
        }
    }
}

/// Ours by this link in tables of ENIs. One in a table of last resorts is astray, and tells of nothing.
pub fn routes_of<'a>(link: &Link, observed: &'a Observed, config: &Config) -> impl Iterator<Item = &'a Route> {
    let on_link = observed.routes.iter().filter(move |(index, _)| *index == Some(link.index)).map(|(_, route)| route);
    let is_enis = |table| table != policy::MAIN_TABLE && !policy::is_last_table(config, table);
    on_link.filter(move |route| policy::owns_route(config, route) && is_enis(route.table))
}

/// The subnets of other ENIs to which our rules send the primary's traffic by its own table. None where its link is not here: then
/// those rules go.
pub fn kept_apart_from(attached: &Attached, observed: &Observed, config: &Config) -> BTreeSet<IpNet> {
    let is_its = |link: &Link| link.mac == Some(attached.primary) && policy::can_be_eni(link);
    let Some(primary) = attached.primary_eni().filter(|_| observed.links.values().any(is_its)) else {
        return BTreeSet::new();
    };
    let table = policy::table(config, primary.slot);
    let narrow = observed.rules.iter().filter(|rule| policy::keeps_primary_apart(config, rule, table));
    narrow.filter_map(|rule| rule.to).collect()
}

/// Subnets of a prefix's family.
fn of_family<'a>(subnets: &'a BTreeSet<IpNet>, prefix: &IpNet) -> Vec<&'a IpNet> {
    subnets.iter().filter(|subnet| subnet.family() == prefix.family()).collect()
}

/// What stays with an ENI no other has yet, nor a part of it, nor what it is a part of: rules of either would take it.
pub fn keep_from_others(attached: &mut Attached, stay: &[IpNet], keeper: MacAddr) {
    let by = attached.name_of(keeper);
    let others = attached.ready.iter().filter(|(mac, _)| **mac != keeper);
    let disputes = others.flat_map(|(mac, eni)| {
        let is_kept = |source: &IpNet| stay.iter().any(|stays| stays.contains(source) || source.contains(stays));
        let sources = eni.all_sources().into_iter().filter(is_kept);
        sources.map(|source| (*mac, Dispute { source, by: by.clone(), claim: Claim::Keeps }))
    });
    let disputes = disputes.collect();
    attached.leave_disputed(disputes);
}

/// Gives an ENI what its link has of these.
pub fn stay_with(attached: &mut Attached, mac: MacAddr, stay: Vec<IpNet>, own: &Own, link: &Link) {
    let Some(eni) = attached.ready.get_mut(&mac) else { return };
    // Its routes and rules could not be had beside those of other subnets, nor without its subnet: all stays as it is. The
    // primary's addresses need none.
    let needs_no_subnet = |source: &IpNet| mac == attached.primary && source.prefix_len() == source.family().bits();
    let is_of_no_subnet = |source: &IpNet| {
        let told = eni.subnets(source.family());
        match told.is_empty() {
            // A family that is lost as a whole has lost its subnet, too.
            true => !needs_no_subnet(source) && !own.subnets.iter().any(|subnet| subnet.contains(source)),
            false => !told.iter().any(|subnet| subnet.contains(source)),
        }
    };
    // An ENI has one IPv4 subnet.
    let ipv4s: Vec<&IpNet> =
        stay.iter().filter(|source| source.family() == Family::V4 && !needs_no_subnet(source)).collect();
    let is_one = |subnet: &IpNet| ipv4s.iter().all(|source| subnet.contains(*source));
    let are_of_one = ipv4s.is_empty() || eni.ipv4_subnet.is_some() || own.subnets.iter().any(is_one);
    if stay.iter().any(is_of_no_subnet) || !are_of_one {
        attached.ready.remove(&mac);
        attached.pending.insert(mac, own.pending(link, Reason::Renumbered));
        return;
    }
    stay.into_iter().for_each(|source| put_back(eni, source, own));
}

fn put_back(eni: &mut Eni, source: IpNet, own: &Own) {
    let is_address = source.prefix_len() == source.family().bits();
    match (source, source.addr()) {
        (_, IpAddr::V4(address)) if is_address => eni.ipv4s.push(address),
        (_, IpAddr::V6(address)) if is_address => eni.ipv6s.push(address),
        (IpNet::V4(prefix), _) => eni.ipv4_prefixes.push(prefix),
        (IpNet::V6(prefix), _) => eni.ipv6_prefixes.push(prefix),
    }
    eni.unproven.insert(source);
    if !eni.subnets(source.family()).iter().any(|subnet| subnet.contains(&source)) {
        for subnet in own.subnets.iter().filter(|subnet| subnet.contains(&source)) {
            match subnet {
                IpNet::V4(subnet) => eni.ipv4_subnet = Some(*subnet),
                IpNet::V6(subnet) => eni.ipv6_subnets.push(*subnet),
            }
        }
    }
}

/// Whether an ENI can have what is of this family on this link: it is its own, nobody's port, and IPv6 is not turned off on it.
pub fn can_keep(link: &Link, family: Family, observed: &Observed) -> bool {
    let is_twin = |other: &Link| other.index != link.index && other.mac == link.mac && policy::can_be_eni(other);
    policy::can_be_eni(link)
        && link.controller.is_none()
        && observed.can_have(link, family)
        && !observed.links.values().any(is_twin)
}

/// Whether another link has the same MAC. Which of them is the ENI's cannot be told, so nothing of it is done or undone.
pub fn has_twin(link: &Link, links: &[&Link]) -> bool {
    links.iter().any(|other| other.index != link.index && other.mac == link.mac)
}

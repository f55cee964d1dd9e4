//! What one reading of metadata leaves in doubt, and what links have to say to it: where it is not clear whose something is, it is left
//! as it is.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use crate::config::Config;
use crate::eni::{Attached, Claim, Dispute, Eni, Reason};
use crate::holdings::{Own, can_keep, has_twin, keep_from_others, routes_of, stay_with};
use crate::net::{Address, Family, HasFamily, Link, MacAddr, Observed, Route, RouteKind, Rule};
use crate::policy;

/// Leaves ENIs without what a pending ENI has, as nobody can tell whether metadata still gives it the same: what its link has,
/// whoever has put it there, what its rules send its way before those of the others, and what may be its containers'. What is
/// in dispute stays on the link that has it. Rules of ours that ENIs have which are left alone take what they take, too.
pub fn leave_to_pending(
    attached: &Attached,
    left_alone: &BTreeSet<MacAddr>,
    observed: &Observed,
    config: &Config,
) -> Attached {
    let mut attached = leave_to_distribution(attached, observed, config);
    let mut seen = BTreeSet::new();
    loop {
        // Whoever waits for that has something, too.
        let keepers = attached.pending.keys().chain(left_alone);
        let unseen: BTreeSet<MacAddr> = keepers.filter(|mac| !seen.contains(*mac)).copied().collect();
        if unseen.is_empty() {
            leave_where_it_is(&mut attached, observed, config);
            return attached;
        }
        leave_tables(&mut attached, &unseen, observed, config);
        let conflicts = conflicts_with(&unseen, &attached, left_alone, observed, config);
        attached.leave_disputed(conflicts);
        seen.extend(unseen);
    }
}

/// A table in which a pending ENI has its routes is no other's: metadata may be stale that gives its slot to another one.
fn leave_tables(attached: &mut Attached, keepers: &BTreeSet<MacAddr>, observed: &Observed, config: &Config) {
    for link in observed.links.values().filter(|link| policy::can_be_eni(link)) {
        let is_pending = |mac: &MacAddr| keepers.contains(mac) && attached.pending.contains_key(mac);
        let Some(keeper) = link.mac.filter(is_pending) else { continue };
        let by = attached.name_of(keeper);
        let tables: BTreeSet<u32> = routes_of(link, observed, config).map(|route| route.table).collect();
        let has_come = |(_, eni): &(&MacAddr, &Eni)| tables.contains(&policy::table(config, eni.slot));
        let come = attached.ready.iter().filter(has_come).map(|(mac, eni)| (*mac, eni.slot)).collect::<Vec<_>>();
        for (mac, slot) in come {
            attached.set_aside(mac, Reason::SlotTaken { slot, by: by.clone() });
        }
    }
}

fn conflicts_with(
    keepers: &BTreeSet<MacAddr>,
    attached: &Attached,
    left_alone: &BTreeSet<MacAddr>,
    observed: &Observed,
    config: &Config,
) -> Vec<(MacAddr, Dispute)> {
    let mut conflicts = Vec::new();
    let mut dispute = |mac: MacAddr, source: IpNet, by: MacAddr, claim: Claim| {
        conflicts.push((mac, Dispute { source, by: attached.name_of(by), claim }));
    };
    for link in observed.links.values().filter(|link| policy::can_be_eni(link)) {
        let Some(mac) = link.mac.filter(|mac| keepers.contains(mac)) else { continue };
        let is_left_alone = left_alone.contains(&mac) && !attached.pending.contains_key(&mac);
        let is_other = |other: &MacAddr| *other != mac && !(is_left_alone && left_alone.contains(other));
        let ready = || attached.ready.iter().filter(|(other, _)| is_other(other));
        // Rules in the tables of a ready ENI are that one's, or go.
        let of_eni = |(_, eni): (&MacAddr, &Eni)| {
            Family::BOTH.map(|family| policy::last_table(config, policy::table(config, eni.slot), family))
        };
        let of_ready: BTreeSet<u32> = ready().flat_map(of_eni).collect();
        let tables = routes_of(link, observed, config).map(|route| route.table);
        let tables: BTreeSet<u32> = tables.filter(|table| !of_ready.contains(table)).collect();
        let captures =
            |rule: &&Rule| policy::is_source_rule(config, rule) && tables.contains(&rule.table) && rule.to.is_none();
        let captures: Vec<&Rule> = observed.rules.iter().filter(captures).collect();
        let mut held = Own::on(link, None, observed, config).sources;
        let is_by_rule = |source: &IpNet| captures.iter().any(|rule| rule.from == Some(*source));
        held.retain(|source| source.prefix_len() == source.family().bits() || is_by_rule(source));
        held.extend(observed.addresses_on(link.index).map(|address| IpNet::from(address.net.addr())));
        // Metadata tells all of it, and what others put there is their business.
        held.retain(|_| !is_left_alone);
        for (other, eni) in ready() {
            // The primary's come by `main`, after all rules of ours.
            let is_before =
                |rule: &&&Rule| rule.priority < policy::table(config, eni.slot) || *other == attached.primary;
            for source in eni.all_sources() {
                let mut captured = captures.iter().filter(is_before).filter_map(|rule| rule.from);
                if held.iter().any(|held| held.contains(&source) || source.contains(held)) {
                    dispute(*other, source, mac, Claim::Has);
                } else if captured.any(|from| from.contains(&source)) {
                    dispute(*other, source, mac, if is_left_alone { Claim::LeftAlone } else { Claim::Captures });
                }
            }
        }
    }
    // Which addresses an ENI's containers have the kernel does not tell, but how they are reached.
    if let Some((by, _)) = attached.pending.iter().find(|(_, pending)| pending.sources.is_none()) {
        let of_containers = addresses_of_containers(attached, observed);
        // Of the primary a container network's addresses are not ours to give.
        for (mac, eni) in attached.ready.iter().filter(|(mac, _)| **mac != attached.primary) {
            let sources = eni.all_sources().into_iter().filter(|source| of_containers.contains(source));
            sources.for_each(|source| dispute(*mac, source, *by, Claim::Routes));
        }
    }
    conflicts
}

/// What links have and will have further, be they of ENIs or not: of ours that is all that metadata tells, which is known, and what
/// cannot be taken away for want of it.
pub fn held(attached: &Attached, observed: &Observed, config: &Config) -> BTreeSet<(IpNet, Option<MacAddr>)> {
    let stays = |link: &Link, address: &Address| {
        let is_ready = |mac| attached.ready.contains_key(&mac);
        let is_listed =
            |mac| is_ready(mac) || attached.pending.contains_key(&mac) || attached.ignored.contains_key(&mac);
        match link.mac {
            _ if !policy::owns_address(config, address) => true,
            Some(mac) if is_ready(mac) => attached.disputes.contains_key(&mac),
            Some(mac) if is_listed(mac) => true,
            Some(_) | None => !attached.is_complete(),
        }
    };
    let links: Vec<&Link> = observed.links.values().filter(|link| policy::can_be_eni(link)).collect();
    let is_enis = |link: &Link| policy::can_be_eni(link) && !has_twin(link, &links);
    let held = observed.addresses.iter().filter_map(|(index, address)| {
        let link = observed.links.get(index).filter(|link| stays(link, address))?;
        Some((address.net.addr().into(), link.mac.filter(|_| is_enis(link))))
    });
    held.collect()
}

/// Which of the primary's addresses are the distribution's tells its link better than metadata's order: what DHCP has put there, else
/// the first one unless it is ours, else one that is there and not ours. What it has there is in no dispute, and no other ENI's.
fn leave_to_distribution(attached: &Attached, observed: &Observed, config: &Config) -> Attached {
    let mut attached = attached.clone();
    let primary = attached.primary;
    let is_its = |link: &&Link| link.mac == Some(primary) && policy::can_be_eni(link);
    let links = observed.links.values().filter(is_its);
    let there: Vec<&Address> = links.flat_map(|link| observed.addresses_on(link.index)).collect();
    let foreign: Vec<&Address> = there.iter().filter(|there| !policy::owns_address(config, there)).copied().collect();
    let is_on_link = |address: IpAddr| there.iter().any(|there| there.net.addr() == address);
    let of_others = |address: &IpAddr| foreign.iter().find(|there| there.net.addr() == *address);
    let Some(eni) = attached.ready.get_mut(&primary) else { return attached };
    let of_family = |family| {
        let told = eni.addresses(family);
        let leased = told.iter().find(|address| of_others(address).is_some_and(|there| there.is_leased));
        // The first one never changes, so what is told instead of one that is leased is not it.
        let has_lease =
            family == Family::V4 && foreign.iter().any(|there| there.is_leased && there.net.addr().is_ipv4());
        let is_ours = |address: &&IpAddr| is_on_link(**address) && of_others(address).is_none();
        let first = || told.first().filter(|address| !is_ours(address));
        let there = || told.iter().find(|address| of_others(address).is_some());
        if has_lease { leased.copied() } else { leased.or_else(first).or_else(there).copied() }
    };
    eni.distributions = Some(Family::BOTH.into_iter().filter_map(of_family).collect());
    let doubtful: BTreeSet<IpNet> =
        eni.all_sources().into_iter().filter(|source| !eni.is_distributions(source.addr())).collect();
    let name = attached.name_of(primary);
    let mut claims: Vec<(MacAddr, Dispute)> = Vec::new();
    let in_pending = attached.pending.iter().filter_map(|(mac, pending)| match &pending.reason {
        Reason::Disputed(dispute) => Some((mac, dispute)),
        _ => None,
    });
    let in_disputes = attached.disputes.iter().flat_map(|(mac, disputes)| disputes.iter().map(move |one| (mac, one)));
    for (mac, dispute) in in_pending.chain(in_disputes).filter(|(_, dispute)| dispute.by == name) {
        let overlapping = doubtful.iter().filter(|source| source.contains(&dispute.source));
        let by = attached.name_of(*mac);
        claims.extend(
            overlapping.map(|source| (primary, Dispute { source: *source, by: by.clone(), claim: Claim::Given })),
        );
    }
    let eni = &attached.ready[&primary];
    for net in what_it_stands_on(&foreign, eni).into_iter().filter(|net| !eni.has(net)) {
        for (mac, other) in attached.ready.iter().filter(|(mac, _)| **mac != primary) {
            let claimed = other.all_sources().into_iter().filter(|source| source.contains(&net));
            claims.extend(claimed.map(|source| (*mac, Dispute { source, by: name.clone(), claim: Claim::StandsOn })));
        }
    }
    attached.leave_disputed(claims);
    attached
}

/// The primary's first address never changes, so nobody else is given it: what DHCP has put on its link, else the one that has the
/// subnet's length, else the only one.
fn what_it_stands_on(foreign: &[&Address], eni: &Eni) -> Vec<IpNet> {
    let of_family = |family| -> Vec<IpNet> {
        let subnets = eni.subnets(family);
        let near: Vec<&&Address> =
            foreign.iter().filter(|there| subnets.iter().any(|subnet| subnet.contains(&there.net.addr()))).collect();
        let those = |is: &dyn Fn(&Address) -> bool| -> Vec<IpNet> {
            near.iter().filter(|there| is(there)).map(|there| there.net.addr().into()).collect()
        };
        let leased = those(&|there| there.is_leased);
        let with_length = those(&|there| there.net.prefix_len() < family.bits());
        match (leased.is_empty(), with_length.len()) {
            (false, _) => leased,
            (true, 1) => with_length,
            (true, _) if near.len() == 1 => those(&|_| true),
            (true, _) => Vec::new(),
        }
    };
    Family::BOTH.into_iter().flat_map(of_family).collect()
}

/// What unbound sockets talk from is not changed by what metadata says first.
pub fn prefer_as_is(attached: &mut Attached, observed: &Observed, config: &Config) {
    for link in observed.links.values().filter(|link| policy::can_be_eni(link)) {
        let Some((mac, eni)) = link.mac.and_then(|mac| Some((mac, attached.ready.get_mut(&mac)?))) else { continue };
        let disputed = attached.disputes.get(&mac).into_iter().flatten().map(|dispute| dispute.source);
        let known: BTreeSet<IpNet> = disputed.chain(eni.sources(Family::V6)).collect();
        let preferred = |is_ours: bool| -> BTreeSet<Ipv6Addr> {
            let there = observed.addresses_on(link.index).filter(|there| !there.is_deprecated);
            let there = there.filter(|there| policy::owns_address(config, there) == is_ours);
            let addresses = there.filter_map(|there| match there.net.addr() {
                IpAddr::V6(address) => Some(address).filter(|address| known.contains(&IpAddr::V6(*address).into())),
                IpAddr::V4(_) => None,
            });
            addresses.collect()
        };
        let (ours, of_others) = (preferred(true), preferred(false));
        let is_first = eni.ipv6s.first().is_some_and(|first| ours.contains(first) || of_others.contains(first));
        eni.prefers = ours.first().or(of_others.first()).copied().filter(|_| !is_first);
    }
}

/// Which ENI has the default of a family that the primary lacks is not changed by another one that comes.
pub fn stand_in_as_is(attached: &mut Attached, observed: &Observed, config: &Config) {
    let lacks = |family: &Family| attached.primary_eni().is_some_and(|primary| primary.addresses(*family).is_empty());
    for family in Family::BOTH.into_iter().filter(lacks).collect::<Vec<_>>() {
        let is_ours = |route: &Route| {
            let is_default = (route.table, route.destination) == (policy::MAIN_TABLE, family.everything());
            is_default && policy::owns_route(config, route) && route.metric == policy::MAIN_METRIC
        };
        let ours = observed.routes.iter().filter(|(_, route)| is_ours(route));
        let links = ours.filter_map(|(index, _)| observed.links.get(&(*index)?));
        // One that cannot have it any more leaves that to another.
        for mac in links.filter(|link| can_keep(link, family, observed)).filter_map(|link| link.mac) {
            attached.ready.entry(mac).and_modify(|eni| _ = eni.stands_in.insert(family));
        }
    }
}

/// To which `main` leads by links that are no ENIs', each alone.
fn addresses_of_containers(attached: &Attached, observed: &Observed) -> BTreeSet<IpNet> {
    let is_enis = |mac: MacAddr| attached.ready.contains_key(&mac) || attached.pending.contains_key(&mac);
    let is_other = |index: u32| observed.links.get(&index).is_some_and(|link| !link.mac.is_some_and(is_enis));
    let is_host = |route: &Route| {
        let net = &route.destination;
        (route.table, &route.kind) == (policy::MAIN_TABLE, &RouteKind::Unicast)
            && net.prefix_len() == net.family().bits()
    };
    let routes = observed.routes.iter().filter(|(index, route)| is_host(route) && index.is_some_and(is_other));
    routes.map(|(_, route)| route.destination).collect()
}

/// What is disputed, or given to an ENI that is pending, or may be, nobody gets now; whoever has it works on with it meanwhile.
fn leave_where_it_is(attached: &mut Attached, observed: &Observed, config: &Config) {
    let disputed = attached.disputes.values().flatten().map(|dispute| dispute.source);
    let pending = attached.pending.values().filter(|pending| pending.reason.may_pass());
    let waited_for = pending.clone().flat_map(|pending| pending.sources.iter().flatten().copied());
    let waited_for: BTreeSet<IpNet> = disputed.chain(waited_for).collect();
    // Of these nobody knows what they are given, but in which subnets.
    let unknown: Vec<Vec<IpNet>> =
        pending.filter(|pending| !pending.is_known()).map(|pending| pending.subnets.clone()).collect();
    let may_be_given = |source: &IpNet| {
        let is_in = |subnets: &Vec<IpNet>| subnets.is_empty() || subnets.iter().any(|subnet| subnet.contains(source));
        waited_for.iter().any(|other| other.contains(source) || source.contains(other)) || unknown.iter().any(is_in)
    };
    if waited_for.is_empty() && unknown.is_empty() {
        return;
    }
    let links: Vec<&Link> = observed.links.values().filter(|link| policy::can_be_eni(link)).collect();
    for link in links.iter().filter(|link| !has_twin(link, &links)) {
        let Some((mac, eni)) = link.mac.and_then(|mac| Some((mac, attached.ready.get(&mac)?))) else { continue };
        let own = Own::on(link, Some(eni), observed, config);
        let is_left = |source: &&IpNet| {
            let is_given = attached.ready.values().any(|eni| eni.has(source));
            may_be_given(source) && !is_given && !has_dispute(attached, mac, source)
        };
        let stay: Vec<IpNet> = own.at_stake(eni).iter().filter(is_left).copied().collect();
        keep_from_others(attached, &stay, mac);
        stay_with(attached, mac, stay, &own, link);
    }
}

/// Then it stays anyway.
fn has_dispute(attached: &Attached, mac: MacAddr, source: &IpNet) -> bool {
    attached.disputes.get(&mac).into_iter().flatten().any(|dispute| dispute.source == *source)
}

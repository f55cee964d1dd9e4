//! Taking away everything that is ours, and nothing else: needs no metadata, only our marks and the ledger.

use std::collections::BTreeSet;

use crate::config::Config;
use crate::ledger::{Found, Ledger};
use crate::net::{Family, Link, Observed};
use crate::operation::{LinkChange, LinkRef, Operation};
use crate::plan::{LeftAlone, Plan, Step};
use crate::policy;
use crate::selection::ignored_links;

/// What has to go, in the order of operations: addresses, rules, routes, then the links as they were found. What is on ignored links
/// stays, but on one whose ENI was named.
pub fn release(observed: &Observed, named: Option<&Share>, ledger: &Ledger, config: &Config) -> Plan {
    let mut steps = Vec::new();
    let mut push = |operation: Operation, reason: &str| {
        steps.push(Step { eni: None, operation, reason: reason.into() });
    };
    let mark = format!("carries eniup's mark, protocol {}", config.mark);
    for (index, address) in &observed.addresses {
        if let Some(link) = observed.links.get(index).filter(|_| policy::owns_address(config, address)) {
            push(Operation::DeleteAddress { link: reference(link), address: *address }, &mark);
        }
    }
    for rule in observed.rules.iter().filter(|rule| policy::owns_rule(config, rule)) {
        push(Operation::DeleteRule { rule: rule.clone() }, &mark);
    }
    for (index, route) in observed.routes.iter().filter(|(_, route)| policy::owns_route(config, route)) {
        let link = index.and_then(|index| observed.links.get(&index)).map(reference);
        push(Operation::DeleteRoute { link, route: *route }, &mark);
    }
    for link in observed.links.values() {
        if link.group == config.link_group {
            push(Operation::ResetLink { link: reference(link), change: LinkChange::Group(0) }, "eniup's link group");
        }
        if let Some(found) = ledger.links.get(&link.index) {
            for change in changes_back(link, found, observed, config) {
                push(Operation::ResetLink { link: reference(link), change }, "as eniup found it");
            }
        }
    }
    let is_named = |index: &u32| named.is_some_and(|named| named.link == *index);
    let ignored = ignored_links(observed, config).into_iter().filter(|index| !is_named(index)).collect();
    let left_alone = LeftAlone::of_links(ignored, observed, config);
    // The group is of use to the rules of others only, and goes with the last of those.
    let stays = |step: &Step| left_alone.has(&step.operation) && !is_group(&step.operation);
    let (stays, mut steps): (Vec<Step>, Vec<Step>) = steps.into_iter().partition(stays);
    let leads_somewhere =
        |step: &Step| matches!(step.operation, Operation::DeleteRule { .. } | Operation::DeleteRoute { .. });
    if stays.iter().any(leads_somewhere) {
        steps.retain(|step| !keeps_apart(&step.operation, config));
    }
    steps.sort_by_key(|step| (step.operation.phase(), step.operation.turn()));
    Plan { steps, ..Plan::default() }
}

/// Whether it takes away what keeps the traffic of an ignored ENI that has something of ours, and that of the primary, from each other's
/// links: what goes before the rules of all ENIs, the primary's own rules and table, and the links' group.
fn keeps_apart(operation: &Operation, config: &Config) -> bool {
    let of_primary = config.table_base;
    match operation {
        Operation::ResetLink { .. } => is_group(operation),
        Operation::DeleteRule { rule } => !policy::leads_to_eni(config, rule) || rule.table == of_primary,
        Operation::DeleteRoute { route, .. } => route.table == of_primary,
        _ => false,
    }
}

fn is_group(operation: &Operation) -> bool {
    matches!(operation, Operation::ResetLink { change: LinkChange::Group(_), .. })
}

/// What belongs to one ENI, by what the kernel alone tells.
pub struct Share {
    pub link: u32,
    tables: BTreeSet<u32>,
    /// `main` has routes by the link, which the guard rule would follow for other ENIs if it were in no group.
    keeps_group: bool,
}

impl Share {
    /// None when no link has the ENI's id among its names.
    pub fn of(id: &str, observed: &Observed, config: &Config) -> Option<Share> {
        let link = observed.links.values().find(|link| link.altnames.contains(id))?;
        let is_its = |name: &String| *name == link.name || link.altnames.contains(name);
        let routes = observed.routes.iter().filter(|(index, _)| *index == Some(link.index)).map(|(_, route)| route);
        let by_route = routes.filter(|route| policy::owns_route(config, route)).map(|route| route.table);
        let rules = observed.rules.iter().filter(|rule| policy::owns_rule(config, rule));
        let by_rule = rules.filter(|rule| rule.oif.as_ref().is_some_and(is_its)).map(|rule| rule.table);
        let tables = by_route.chain(by_rule).filter(|table| *table != policy::MAIN_TABLE);
        let tables = tables.flat_map(|table| Family::BOTH.map(|family| policy::last_table(config, table, family)));
        let tables: BTreeSet<u32> = tables.collect();
        let mut rules = observed.rules.iter().filter(|rule| policy::owns_rule(config, rule));
        let is_beside_others = rules.any(|rule| policy::leads_to_eni(config, rule) && !tables.contains(&rule.table));
        let mut mains = observed.routes.iter().filter(|(_, route)| policy::is_mains_for_some(route));
        let is_mains = mains.any(|(index, route)| *index == Some(link.index) && !policy::owns_route(config, route));
        Some(Share { link: link.index, tables, keeps_group: is_beside_others && is_mains })
    }

    /// The steps that are about it.
    pub fn only(&self, plan: Plan) -> Plan {
        let is_its = |operation: &Operation| match operation {
            Operation::ResetLink { .. } if self.keeps_group && is_group(operation) => false,
            Operation::DeleteAddress { link, .. } | Operation::ResetLink { link, .. } => link.index == self.link,
            Operation::DeleteRoute { link, route } => {
                link.as_ref().is_some_and(|link| link.index == self.link) || self.tables.contains(&route.table)
            }
            Operation::DeleteRule { rule } => self.tables.contains(&rule.table),
            Operation::SetLink { .. }
            | Operation::AddAddress { .. }
            | Operation::ChangeAddress { .. }
            | Operation::AddRoute { .. }
            | Operation::AddRule { .. } => false,
        };
        Plan { steps: plan.steps.into_iter().filter(|step| is_its(&step.operation)).collect(), ..plan }
    }
}

pub fn reference(link: &Link) -> LinkRef {
    LinkRef { index: link.index, name: link.name.clone() }
}

/// The link goes down first, so that it takes no router advertisement in between; it stays up, and deaf to those, when
/// somebody else uses it by now.
pub fn changes_back(link: &Link, found: &Found, observed: &Observed, config: &Config) -> Vec<LinkChange> {
    let mut changes = Vec::new();
    let Found { is_up, mtu, accept_ra, altnames } = found;
    let goes_down = *is_up == Some(false) && link.is_up && !is_used_by_others(link, observed, config);
    if goes_down {
        changes.push(LinkChange::Down);
    }
    if let (Some(accept_ra), Some(ipv6)) = (accept_ra, &link.ipv6)
        && ipv6.accept_ra != *accept_ra
        && (goes_down || !link.is_up || *is_up != Some(false))
    {
        changes.push(LinkChange::AcceptRa(*accept_ra));
    }
    if let Some(mtu) = mtu.filter(|mtu| *mtu != link.mtu) {
        changes.push(LinkChange::Mtu(mtu));
    }
    // A ledger may say twice what the kernel has once.
    let given: BTreeSet<&String> = altnames.iter().filter(|name| link.altnames.contains(*name)).collect();
    changes.extend(given.into_iter().map(|name| LinkChange::DeleteAltname(name.clone())));
    changes
}

/// Whether somebody else's addresses or routes are on the link; the kernel's own link-local ones do not count.
fn is_used_by_others(link: &Link, observed: &Observed, config: &Config) -> bool {
    let is_link_local = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(_) => false,
        std::net::IpAddr::V6(address) => address.is_unicast_link_local() || address.is_multicast(),
    };
    let addresses = observed.addresses.iter().filter(|(index, _)| *index == link.index);
    let mut others = addresses.filter(|(_, address)| !policy::owns_address(config, address));
    let has_address = others.any(|(_, address)| !is_link_local(address.net.addr()));
    let routes = observed.routes.iter().filter(|(index, _)| *index == Some(link.index));
    let has_route = routes
        .filter(|(_, route)| !policy::owns_route(config, route))
        // The kernel makes local, broadcast, multicast and link-local routes for every link and address.
        .any(|(_, route)| route.protocol != policy::KERNEL_PROTOCOL);
    has_address || has_route
}

//! What is taken away all the same stays where it is an ENI's that is left alone, or others need it.

use std::collections::BTreeSet;

use super::Step;
use crate::config::Config;
use crate::net::{Address, Family, MacAddr, Observed, Rule};
use crate::operation::{LinkRef, Operation};
use crate::policy;

/// The links of ENIs that are left alone, and what of ours is there from before: on the link and in the ENI's tables.
pub struct LeftAlone {
    links: BTreeSet<u32>,
    names: BTreeSet<String>,
    tables: BTreeSet<u32>,
}

impl LeftAlone {
    pub fn of_enis(enis: &BTreeSet<MacAddr>, observed: &Observed, config: &Config) -> LeftAlone {
        let links = observed.links.values().filter(|link| link.mac.is_some_and(|mac| enis.contains(&mac)));
        LeftAlone::of_links(links.map(|link| link.index).collect(), observed, config)
    }

    pub fn of_links(links: BTreeSet<u32>, observed: &Observed, config: &Config) -> LeftAlone {
        let is_of_links = |index: &Option<u32>| index.is_some_and(|index| links.contains(&index));
        let names = links.iter().filter_map(|index| Some(observed.links.get(index)?.name.clone())).collect();
        let is_by_name = |rule: &&Rule| rule.oif.as_ref().is_some_and(|oif| BTreeSet::contains(&names, oif));
        let by_rules = observed.rules.iter().filter(is_by_name).map(|rule| rule.table);
        let by_routes = observed.routes.iter().filter(|(index, _)| is_of_links(index)).map(|(_, route)| route.table);
        // `main` is everybody's.
        let tables = by_rules.chain(by_routes).filter(|table| *table != policy::MAIN_TABLE);
        let tables = tables.flat_map(|table| Family::BOTH.map(|family| policy::last_table(config, table, family)));
        let tables = tables.collect();
        LeftAlone { links, names, tables }
    }

    /// Whether the operation would touch any of it.
    pub fn has(&self, operation: &Operation) -> bool {
        let is_table = |table: u32| self.tables.contains(&table);
        let is_link = |link: &LinkRef| self.links.contains(&link.index);
        match operation {
            Operation::AddRule { rule } | Operation::DeleteRule { rule } => {
                is_table(rule.table) || rule.oif.as_ref().is_some_and(|oif| self.names.contains(oif))
            }
            Operation::AddRoute { link, route } | Operation::DeleteRoute { link, route } => {
                is_table(route.table) || link.as_ref().is_some_and(is_link)
            }
            Operation::SetLink { link, .. }
            | Operation::ResetLink { link, .. }
            | Operation::AddAddress { link, .. }
            | Operation::ChangeAddress { link, .. }
            | Operation::DeleteAddress { link, .. } => is_link(link),
        }
    }
}

/// What goes before the rules of all ENIs (the guard above all) is needed by those of an ENI that is left alone, too: as long as
/// one stays that is not wanted, they are not taken away.
pub(super) fn spare_shared_rules(
    removals: &mut Vec<Step>,
    wanted: &BTreeSet<Rule>,
    observed: &Observed,
    config: &Config,
) {
    let going: BTreeSet<&Rule> = removals.iter().filter_map(|step| deleted_rule(&step.operation)).collect();
    let stays_unwanted = |rule: &&Rule| {
        let is_of_eni = policy::owns_rule(config, rule) && policy::leads_to_eni(config, rule);
        is_of_eni && !wanted.contains(*rule) && !going.contains(rule)
    };
    if observed.rules.iter().any(|rule| stays_unwanted(&rule)) {
        let is_shared = |rule: &Rule| !policy::leads_to_eni(config, rule);
        removals.retain(|step| !deleted_rule(&step.operation).is_some_and(is_shared));
    }
}

/// Our addresses with which the kernel would take somebody else's stay. What is said of each.
pub fn spare_carriers(removals: &mut Vec<Step>, observed: &Observed, config: &Config) -> Vec<String> {
    let mut notes = Vec::new();
    removals.retain(|step| {
        let Operation::DeleteAddress { link, address } = &step.operation else { return true };
        let drops = observed.links.get(&link.index).is_some_and(|link| link.drops_secondaries);
        let is_taken_along = |other: &&Address| {
            other.net.addr().is_ipv4() && other.net.trunc() == address.net.trunc() && other.net != address.net
        };
        let mut others = observed.addresses_on(link.index).filter(|other| !policy::owns_address(config, other));
        let Some(other) = others.find(is_taken_along).filter(|_| drops) else { return true };
        notes.push(format!(
            "{} stays on {}: the kernel would take {} along, which is not eniup's (net.ipv4.conf.{}.promote_secondaries is 0)",
            address.net, link.name, other.net, link.name
        ));
        false
    });
    notes
}

fn deleted_rule(operation: &Operation) -> Option<&Rule> {
    if let Operation::DeleteRule { rule } = operation { Some(rule) } else { None }
}

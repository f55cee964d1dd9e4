//! Back to what was: every object that a run on trial has named, as the run found it. Whatever else is on the machine is
//! not named here, and so it is left alone, also what has come meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::ledger::Found;
use crate::net::{Address, Link, Observed};
use crate::operation::{LinkChange, Operation};
use crate::plan::{Plan, Step, spare_carriers};
use crate::release::{changes_back, reference};

/// What a run names, as it was when the run came to it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Before {
    /// What was there; links of which something else is named, too.
    had: Observed,
    /// What was not there.
    lacked: Observed,
    /// By link index: what is set.
    set: BTreeMap<u32, Vec<LinkChange>>,
}

impl Before {
    pub fn is_empty(&self) -> bool {
        *self == Before::default()
    }

    /// The same, with what these steps name, of which it must know before they are made. What it knows already stands: by
    /// now the run may have changed it.
    pub fn noting(&self, steps: &[Step], observed: &Observed) -> Before {
        let mut before = self.clone();
        for step in steps {
            before.note(&step.operation, observed);
        }
        before
    }

    fn note(&mut self, operation: &Operation, observed: &Observed) {
        let Before { had, lacked, set } = self;
        match operation {
            Operation::SetLink { link, change } | Operation::ResetLink { link, change } => {
                note_link(had, link.index, observed);
                let changes = set.entry(link.index).or_default();
                if !changes.contains(change) {
                    changes.push(change.clone());
                }
            }
            Operation::AddAddress { link, address }
            | Operation::ChangeAddress { link, address }
            | Operation::DeleteAddress { link, address } => {
                note_link(had, link.index, observed);
                // An address that is changed takes the place of what is there.
                let is_same = |(index, there): &&(u32, Address)| *index == link.index && there.net == address.net;
                let there = observed.addresses.iter().filter(is_same).copied();
                for key in there.chain([(link.index, *address)]) {
                    note(&mut had.addresses, &mut lacked.addresses, &observed.addresses, key);
                }
            }
            Operation::AddRoute { link, route } | Operation::DeleteRoute { link, route } => {
                let index = link.as_ref().map(|link| link.index);
                index.into_iter().for_each(|index| note_link(had, index, observed));
                note(&mut had.routes, &mut lacked.routes, &observed.routes, (index, *route));
            }
            Operation::AddRule { rule } | Operation::DeleteRule { rule } => {
                note(&mut had.rules, &mut lacked.rules, &observed.rules, rule.clone());
            }
        }
    }
}

fn note_link(had: &mut Observed, index: u32, observed: &Observed) {
    if let Some(link) = observed.links.get(&index) {
        had.links.entry(index).or_insert_with(|| link.clone());
    }
}

fn note<T: Ord>(had: &mut BTreeSet<T>, lacked: &mut BTreeSet<T>, observed: &BTreeSet<T>, object: T) {
    if had.contains(&object) || lacked.contains(&object) {
        return;
    }
    match observed.contains(&object) {
        true => had.insert(object),
        false => lacked.insert(object),
    };
}

/// What is left to be done so that all that was named is as it was, in the order of operations. Of a link that is gone
/// nothing can be put back.
pub fn rollback(before: &Before, now: &Observed, config: &Config) -> Plan {
    let mut operations = Vec::new();
    before.put_addresses_back(now, &mut operations);
    for (index, route) in before.lacked.routes.intersection(&now.routes) {
        let link = index.and_then(|index| before.link(index, now)).map(reference);
        operations.push(Operation::DeleteRoute { link, route: *route });
    }
    for (index, route) in before.had.routes.difference(&now.routes) {
        let link = index.and_then(|index| before.link(index, now)).map(reference);
        if link.is_some() || index.is_none() {
            operations.push(Operation::AddRoute { link, route: *route });
        }
    }
    for rule in before.lacked.rules.intersection(&now.rules) {
        operations.push(Operation::DeleteRule { rule: rule.clone() });
    }
    for rule in before.had.rules.difference(&now.rules) {
        operations.push(Operation::AddRule { rule: rule.clone() });
    }
    before.set_links_back(now, config, &mut operations);
    operations.sort_by_key(|operation| (operation.phase(), operation.turn(), rank(operation)));
    let step =
        |operation| Step { eni: None, operation, reason: "as it was before the run that was not confirmed".into() };
    let mut steps = operations.into_iter().map(step).collect();
    let notes = spare_carriers(&mut steps, now, config);
    Plan { steps, notes, ..Plan::default() }
}

/// Within a phase: what others rest on comes first. A gateway needs its connected route, and the address with the
/// subnet's length is the one from which unbound sockets talk, if it is the first.
fn rank(operation: &Operation) -> u8 {
    match operation {
        Operation::AddRoute { route, .. } => route.gateway.is_some().into(),
        Operation::AddAddress { address, .. } => address.net.prefix_len(),
        Operation::SetLink { .. }
        | Operation::AddRule { .. }
        | Operation::DeleteRule { .. }
        | Operation::ChangeAddress { .. }
        | Operation::DeleteAddress { .. }
        | Operation::DeleteRoute { .. }
        | Operation::ResetLink { .. } => 0,
    }
}

impl Before {
    /// The link with this index, if it is still the one that was found.
    fn link<'a>(&self, index: u32, now: &'a Observed) -> Option<&'a Link> {
        let found = self.had.links.get(&index)?;
        now.links.get(&index).filter(|link| link.mac == found.mac)
    }

    fn put_addresses_back(&self, now: &Observed, operations: &mut Vec<Operation>) {
        let Before { had, lacked, set: _ } = self;
        for (index, address) in had.addresses.difference(&now.addresses) {
            let Some(link) = self.link(*index, now).map(reference) else { continue };
            let on_link = now.addresses.iter().filter(|(on, _)| on == index);
            let mut same = on_link.filter(|(_, there)| there.net.addr() == address.net.addr()).peekable();
            let is_ours = |there: &(u32, Address)| lacked.addresses.contains(there);
            match same.peek() {
                Some(there) if is_ours(there) && there.1.net == address.net => {
                    operations.push(Operation::ChangeAddress { link, address: *address });
                }
                // Somebody else has given it to the link meanwhile.
                Some(there) if !is_ours(there) => {}
                Some(_) | None => operations.push(Operation::AddAddress { link, address: *address }),
            }
        }
        let is_changed = |index: u32, address: &Address| {
            had.addresses.iter().any(|(on, found)| *on == index && found.net == address.net)
        };
        for (index, address) in lacked.addresses.intersection(&now.addresses) {
            if let Some(link) = self.link(*index, now).filter(|_| !is_changed(*index, address)) {
                operations.push(Operation::DeleteAddress { link: reference(link), address: *address });
            }
        }
    }

    /// As far as the settings are still what the run made of them.
    fn set_links_back(&self, now: &Observed, config: &Config, operations: &mut Vec<Operation>) {
        for (index, changes) in &self.set {
            let (Some(found), Some(link)) = (self.had.links.get(index), self.link(*index, now)) else { continue };
            let mut settings = Found::default();
            let mut back = Vec::new();
            for change in changes.iter().filter(|change| is_so(change, link)) {
                settings.note(change, found);
                if matches!(change, LinkChange::Group(_)) && link.group != found.group {
                    back.push(LinkChange::Group(found.group));
                }
            }
            // A name that the link had already is none that it was given.
            settings.altnames.retain(|name| !found.altnames.contains(name));
            back.extend(changes_back(link, &settings, now, config));
            let reset = |change| Operation::ResetLink { link: reference(link), change };
            operations.extend(back.into_iter().map(reset));
        }
    }
}

fn is_so(change: &LinkChange, link: &Link) -> bool {
    match change {
        LinkChange::AcceptRa(value) => link.ipv6.as_ref().is_some_and(|ipv6| ipv6.accept_ra == *value),
        LinkChange::Mtu(mtu) => link.mtu == *mtu,
        LinkChange::Group(group) => link.group == *group,
        LinkChange::AddAltname(name) => link.altnames.contains(name),
        LinkChange::DeleteAltname(name) => !link.altnames.contains(name),
        LinkChange::Up => link.is_up,
        LinkChange::Down => !link.is_up,
    }
}

//! What is ours and not wanted, as far as there is proof that it is not.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::{Keep, Step};
use crate::config::Config;
use crate::desired::{Desired, DesiredEni, DesiredLink};
use crate::net::{Family, Link, MacAddr, Observed, Route, Rule};
use crate::operation::{LinkRef, Operation};
use crate::place::{Trouble, TroubleKind};
use crate::policy;

pub(super) struct Unwanted<'a> {
    pub desired: &'a Desired,
    pub observed: &'a Observed,
    pub placed: &'a BTreeMap<MacAddr, (&'a DesiredEni, &'a Link)>,
    pub troubles: &'a BTreeMap<MacAddr, Trouble>,
    pub config: &'a Config,
}

impl Unwanted<'_> {
    pub fn steps(&self, keep: &Keep) -> Vec<Step> {
        let mut steps = Vec::new();
        for (index, address) in self.observed.addresses.iter().filter(|key| !keep.addresses.contains(key)) {
            if policy::owns_address(self.config, address) && self.address_may_go(*index) {
                let operation = Operation::DeleteAddress { link: self.reference(*index), address: *address };
                steps.push(self.step(self.eni_of_link(*index), operation, "metadata does not have it on this ENI"));
            }
        }
        for rule in self.observed.rules.iter().filter(|rule| !keep.rules.contains(rule)) {
            if policy::owns_rule(self.config, rule) && self.rule_may_go(rule, keep) {
                let operation = Operation::DeleteRule { rule: rule.clone() };
                steps.push(self.step(self.eni_of_table(rule.table), operation, "no ENI needs it"));
            }
        }
        for (index, route) in self.observed.routes.iter().filter(|key| !keep.routes.contains(key)) {
            if policy::owns_route(self.config, route) && self.route_may_go(*index, route, keep) {
                let operation =
                    Operation::DeleteRoute { link: index.map(|index| self.reference(index)), route: *route };
                // Whoever has the table by now may need its place first.
                let holder = index.and_then(|index| self.eni_of_link(index));
                steps.push(self.step(holder.or(self.eni_of_table(route.table)), operation, "no ENI needs it"));
            }
        }
        steps
    }

    /// Whether metadata told all there is. An ENI without an address whose link is here is taken for one that has lost
    /// them in a stale read.
    fn is_complete(&self) -> bool {
        let has_lost = |trouble: &Trouble| matches!(trouble.kind, TroubleKind::NoAddress { .. });
        self.desired.is_complete && !self.troubles.values().any(has_lost)
    }

    fn step(&self, eni: Option<&DesiredEni>, operation: Operation, reason: &str) -> Step {
        Step { eni: eni.map(|eni| eni.id.clone()), operation, reason: reason.into() }
    }

    fn reference(&self, index: u32) -> LinkRef {
        let name = self.observed.links.get(&index).map_or_else(|| format!("if{index}"), |link| link.name.clone());
        LinkRef { index, name }
    }

    fn eni_of_link(&self, index: u32) -> Option<&DesiredEni> {
        self.placed.values().find(|(_, link)| link.index == index).map(|(eni, _)| *eni)
    }

    fn eni_of_table(&self, table: u32) -> Option<&DesiredEni> {
        self.placed.values().find(|(eni, _)| self.is_of(eni, table)).map(|(eni, _)| *eni)
    }

    /// An ENI whose link is here but not ours to manage keeps what it has.
    fn is_in_trouble(&self, mac: MacAddr) -> bool {
        self.troubles.get(&mac).is_some_and(|trouble| !matches!(trouble.kind, TroubleKind::NoLink { .. }))
    }

    fn address_may_go(&self, index: u32) -> bool {
        match self.observed.links.get(&index).and_then(|link| link.mac) {
            Some(mac) if self.desired.pending.contains(&mac) || self.is_in_trouble(mac) => false,
            Some(mac) if self.placed.contains_key(&mac) => self.placed[&mac].0.is_whole,
            // No attached ENI's: proof that it should go is a snapshot that told all there is.
            Some(_) | None => self.is_complete(),
        }
    }

    /// A ready ENI's source rules follow from its own addresses, which are known; but as long as anything is pending those stay that
    /// a rule for the whole subnet would replace, for another ENI may have got one for the same subnet while this one was
    /// pending. Everything else (the guard, rules to
    /// other ENIs' subnets, tables of ENIs that are not here) also from what all others have; but those before the guard
    /// rule from what was observed in `main`. What leads nowhere does not keep an address from its way.
    fn rule_may_go(&self, rule: &Rule, keep: &Keep) -> bool {
        let is_sure = rule.to.is_none() || rule.priority < self.config.guard_priority || self.takes_anothers(rule);
        let is_not_its = |eni: &DesiredEni| eni.is_whole && (self.is_complete() || !is_within_subnet_rule(rule, eni));
        let is_own = is_sure && self.eni_of_table(rule.table).is_some_and(is_not_its);
        let is_proven = self.is_complete() || self.is_link_gone(rule.table, keep);
        is_own || is_proven && !self.is_table_in_trouble(rule.table) || self.is_in_the_way(rule, keep)
    }

    fn route_may_go(&self, index: Option<u32>, route: &Route, keep: &Keep) -> bool {
        let is_of_trouble = index
            .and_then(|index| self.observed.links.get(&index)?.mac)
            .is_some_and(|mac| self.is_in_trouble(mac) || self.desired.pending.contains(&mac));
        let is_own = self.eni_of_table(route.table).is_some_and(|eni| eni.is_whole && eni.link != DesiredLink::Left);
        let is_proven = self.is_complete() || self.is_link_gone(route.table, keep);
        !is_of_trouble && (is_own || is_proven && !self.is_table_in_trouble(route.table))
    }

    /// Whether no link is in the rule's tables any more, and it takes what an ENI has by now before that one's own rules.
    fn is_in_the_way(&self, rule: &Rule, keep: &Keep) -> bool {
        let Some(from) = rule.from.filter(|_| rule.to.is_none() && !rule.is_inverted) else { return false };
        let [own, _] = self.tables_with(rule.table);
        let leads_nowhere = || !self.observed.routes.iter().any(|(link, route)| link.is_some() && route.table == own);
        let is_taken = |source: &IpNet| {
            let is_before = |kept: &Rule| {
                let is_its = kept.to.is_none() && kept.from.is_some_and(|from| from.contains(source));
                is_its && kept.priority < rule.priority && policy::leads_to_eni(self.config, kept)
            };
            from.contains(source) && !keep.rules.iter().any(is_before)
        };
        policy::leads_to_eni(self.config, rule)
            && leads_nowhere()
            && self.sources_here().any(|source| is_taken(&source))
    }

    /// Whether it takes what another ENI has by now than that of its table.
    fn takes_anothers(&self, rule: &Rule) -> bool {
        let Some((from, own)) = rule.from.zip(self.eni_of_table(rule.table)) else { return false };
        let others = self.placed.values().filter(|(eni, _)| eni.table != own.table);
        others.flat_map(|other| self.sources_of(other)).any(|source| from.contains(&source))
    }

    /// What the ENIs whose links are here have or will have.
    fn sources_here(&self) -> impl Iterator<Item = IpNet> {
        self.placed.values().flat_map(|eni| self.sources_of(eni))
    }

    fn sources_of(&self, (eni, link): &(&DesiredEni, &Link)) -> Vec<IpNet> {
        let wanted = eni.addresses.iter().map(|wanted| wanted.object.net.addr().into());
        let there = self.observed.addresses_on(link.index).map(|address| address.net.addr().into());
        let prefixes = eni.rules.iter().map(|wanted| &wanted.object).filter(|rule| policy::is_of_prefix(rule));
        wanted.chain(there).chain(prefixes.filter_map(|rule| rule.from)).collect()
    }

    /// Whether this is a table of an ENI whose link has left the machine: no route by any link is in its tables, and its
    /// rule for bound sockets names a link that is not here, or no rule leads to them any more. Its rules lead nowhere, and
    /// one for a whole subnet would cut off another ENI that has come into that subnet.
    fn is_link_gone(&self, table: u32, keep: &Keep) -> bool {
        let tables = self.tables_with(table);
        let mut rules = self.observed.rules.iter();
        let stays = |rule: &Rule| policy::owns_rule(self.config, rule) && !self.is_in_the_way(rule, keep);
        let has_rule = rules.any(|rule| tables.contains(&rule.table) && stays(rule));
        let mut names = self.observed.rules.iter().filter_map(|rule| self.bound_to(rule, tables[0])).peekable();
        // A name that another ENI's link has by now says nothing.
        let is_others = |link: &Link| self.eni_of_link(link.index).is_some();
        let is_here = |name: &str| self.observed.links.values().any(|link| link.name == name && !is_others(link));
        let mut routes = self.observed.routes.iter();
        let has_route = routes.any(|(link, route)| link.is_some() && tables.contains(&route.table));
        let is_told = names.peek().is_some() || !has_rule;
        is_told && !has_route && !names.any(is_here) && self.eni_of_table(table).is_none()
    }

    /// The tables of the slot that this one belongs to, first that of its routes.
    fn tables_with(&self, table: u32) -> [u32; 2] {
        let own = table.checked_sub(self.config.subnet_rule_offset).filter(|own| *own >= self.config.table_base);
        let own = own.unwrap_or(table);
        [own, policy::last_table(self.config, own, Family::V6)]
    }

    /// The link whose bound sockets find the table by this rule, if that is what the rule is for.
    fn bound_to<'r>(&self, rule: &'r Rule, table: u32) -> Option<&'r str> {
        let name = rule.oif.as_deref()?;
        (*rule == policy::bound_rule(self.config, name, rule.family, table)).then_some(name)
    }

    fn is_table_in_trouble(&self, table: u32) -> bool {
        self.desired.enis.iter().any(|(mac, eni)| self.is_of(eni, table) && self.is_in_trouble(*mac))
    }

    fn is_of(&self, eni: &DesiredEni, table: u32) -> bool {
        Family::BOTH.into_iter().any(|family| table == policy::last_table(self.config, eni.table, family))
    }
}

/// Whether the ENI is to have a rule for the whole subnet of which this one covers a part. As nobody else is known to have anything in
/// that subnet, it is right.
fn is_within_subnet_rule(rule: &Rule, eni: &DesiredEni) -> bool {
    let mut wanted = eni.rules.iter().map(|wanted| &wanted.object);
    let is_part = |wanted: &Rule| {
        let Some((whole, part)) = wanted.from.zip(rule.from) else { return false };
        let is_same =
            (&wanted.iif, &wanted.oif, wanted.to, wanted.table) == (&rule.iif, &rule.oif, rule.to, rule.table);
        is_same && wanted.priority > rule.priority && whole.contains(&part)
    };
    wanted.any(is_part)
}

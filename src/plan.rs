//! Desired minus observed, as ordered operations. MAC meets link here. An empty plan is the proof that all is well.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::IpNet;

use crate::config::Config;
use crate::desired::{Desired, DesiredEni, DesiredLink, Wanted};
use crate::eni::{Attached, Eni};
use crate::net::{Address, Family, HasFamily, Link, LinkIpv6, MacAddr, Observed, Route, RouteKind, Rule};
use crate::operation::{LinkChange, LinkRef, Operation};
use crate::place::{Trouble, TroubleKind, find_link, place};
use crate::policy;
use crate::precedence::{Circumstances, OfEni, before_guard, before_main, limits, past_others};

/// What is to be done, in order, and what stands in the way.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    pub steps: Vec<Step>,
    /// ENIs that cannot be brought about on this machine as it is; nothing of theirs is touched.
    pub troubles: BTreeMap<MacAddr, Trouble>,
    /// What an administrator should know though all is done.
    pub notes: Vec<String>,
}

/// An operation, the ENI it belongs to (none: the whole machine) and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    pub eni: Option<String>,
    pub operation: Operation,
    pub reason: String,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}  # {}", self.operation, self.reason)
    }
}

impl Step {
    /// The same facts for programs: `eni` (null for the whole machine), `action`, `command`, `reason`.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "eni": self.eni,
            "action": self.operation.action(),
            "command": self.operation.to_string(),
            "reason": self.reason,
        })
    }
}

/// What is left to be done so that the kernel has what is desired, and no more of ours.
pub fn plan(desired: &Desired, observed: &Observed, primary: MacAddr, config: &Config) -> Plan {
    let mut plan = Plan::default();
    let mut placed: BTreeMap<MacAddr, (&DesiredEni, &Link)> = BTreeMap::new();
    for (mac, eni) in &desired.enis {
        match place(*mac, eni, observed) {
            Ok(Some(link)) => _ = placed.insert(*mac, (eni, link)),
            Ok(None) => {}
            Err(kind) => _ = plan.troubles.insert(*mac, Trouble { eni: eni.id.clone(), kind }),
        }
    }
    let primary_mtu = find_link(primary, observed).ok().flatten().map(|link| link.mtu);

    let mut keep = Keep::default();
    for rule in desired.rules.iter().filter(|rule| observed.has_ipv6 || rule.object.family == Family::V4) {
        keep.rules.insert(rule.object.clone());
        plan.want_rule(None, rule, observed);
    }
    for (eni, link) in placed.values() {
        plan.want_link(eni, link, primary_mtu, observed);
        if !desired.rules.is_empty() {
            plan.want_group(Some(eni), link, &eni.id, config);
        }
        plan.want_objects(eni, link, desired, observed, &mut keep, config);
    }
    // The guard rule has to know a pending ENI's link too: another manager may have put its subnet into main.
    let pending = desired.pending.difference(&desired.left_alone);
    let pending = pending.filter_map(|mac| find_link(*mac, observed).ok().flatten());
    for link in pending.filter(|_| !desired.rules.is_empty()) {
        plan.want_group(None, link, "a pending ENI", config);
    }
    for (eni, rule) in plan.because_of_others(desired, observed, primary, &placed, &keep, config) {
        keep.rules.insert(rule.object.clone());
        plan.want_rule(eni, &rule, observed);
    }
    let unwanted = Unwanted { desired, observed, placed: &placed, troubles: &plan.troubles.clone(), config };
    let left_alone = LeftAlone::of_enis(&desired.left_alone, observed, config);
    let mut removals = unwanted.steps(&keep);
    removals.retain(|step| !left_alone.has(&step.operation));
    spare_shared_rules(&mut removals, &keep.rules, observed, config);
    plan.notes.extend(spare_carriers(&mut removals, observed, config));
    plan.steps.extend(removals);
    // Stable: where nothing else orders them, each ENI's own order stays.
    plan.steps.sort_by_key(|step| (step.operation.phase(), step.operation.turn()));
    plan
}

/// A machine as it is before anything was configured but the primary ENI's link: what a snapshot of another machine is
/// planned against. Links are named eth0 (the primary), eth1, … by slot.
pub fn fresh_machine(attached: &Attached) -> Observed {
    let mut enis: Vec<(&MacAddr, &Eni)> = attached.ready.iter().collect();
    enis.sort_by_key(|(mac, eni)| (**mac != attached.primary, eni.slot));
    let enis = enis.into_iter().filter(|(_, eni)| Family::BOTH.into_iter().any(|family| eni.has_family(family)));
    let mut observed = Observed { has_ipv6: true, ..Observed::default() };
    for (n, (mac, _)) in enis.enumerate() {
        let index = n as u32 + 2;
        let is_primary = *mac == attached.primary;
        let link = Link {
            index,
            name: format!("eth{n}"),
            mac: Some(*mac),
            kind: None,
            controller: None,
            is_up: is_primary,
            has_carrier: None,
            mtu: if is_primary { JUMBO_MTU } else { DRIVER_MTU },
            group: 0,
            altnames: BTreeSet::new(),
            drops_secondaries: false,
            ipv6: Some(LinkIpv6 { accept_ra: 1, is_disabled: false }),
        };
        observed.links.insert(index, link);
    }
    observed
}

/// What DHCP says in a VPC, and what the drivers begin with.
const JUMBO_MTU: u32 = 9001;
const DRIVER_MTU: u32 = 1500;

/// The wanted objects that are there or will be: what is ours and not among them goes.
#[derive(Default)]
struct Keep {
    addresses: BTreeSet<(u32, Address)>,
    routes: BTreeSet<(Option<u32>, Route)>,
    rules: BTreeSet<Rule>,
}

/// Whether a pending ENI, which keeps all it has, has its route in this one's place in `main`.
fn is_place_kept(wanted: &Route, desired: &Desired, observed: &Observed) -> bool {
    let place = |route: &Route| (route.table, route.destination, route.metric, route.protocol);
    let is_pendings = |index: u32| {
        observed.links.get(&index).and_then(|link| link.mac).is_some_and(|mac| desired.pending.contains(&mac))
    };
    wanted.table == policy::MAIN_TABLE
        && observed.routes.iter().any(|(link, route)| place(route) == place(wanted) && link.is_some_and(is_pendings))
}

/// A second IPv4 address of the same subnet and length would be the kernel's secondary of the first, and go with it when that
/// one is taken away (`promote_secondaries`); by itself it stays.
fn beside(wanted: Address, on_link: &[&Address]) -> Address {
    let is_shared = on_link.iter().any(|there| there.net.trunc() == wanted.net.trunc());
    match wanted.net.family() {
        Family::V4 if is_shared => Address { net: wanted.net.addr().into(), ..wanted },
        Family::V4 | Family::V6 => wanted,
    }
}

fn reference(link: &Link) -> LinkRef {
    LinkRef { index: link.index, name: link.name.clone() }
}

impl Plan {
    fn push(&mut self, eni: Option<&DesiredEni>, operation: Operation, reason: impl Into<String>) {
        self.steps.push(Step { eni: eni.map(|eni| eni.id.clone()), operation, reason: reason.into() });
    }

    fn want_link(&mut self, eni: &DesiredEni, link: &Link, primary_mtu: Option<u32>, observed: &Observed) {
        let DesiredLink::Kept { altnames, mtu } = &eni.link else { return };
        let mut changes = Vec::new();
        if link.ipv6.as_ref().is_some_and(|ipv6| ipv6.accept_ra != 0) {
            changes.push((LinkChange::AcceptRa(0), "its router advertisements must not add a default route to main"));
        }
        match mtu {
            Some(mtu) if *mtu != link.mtu => changes.push((LinkChange::Mtu(*mtu), "as configured")),
            Some(_) => {}
            // DHCP would have told this ENI what it told the primary. An administrator's larger choice stays.
            None => {
                let mtu = primary_mtu.filter(|mtu| *mtu > link.mtu);
                changes.extend(mtu.map(|mtu| (LinkChange::Mtu(mtu), "as large as the primary ENI's")));
            }
        }
        for altname in altnames.iter().filter(|altname| !link.altnames.contains(*altname) && link.name != **altname) {
            let holder =
                observed.links.values().find(|other| other.name == *altname || other.altnames.contains(altname));
            match holder {
                Some(holder) => {
                    self.notes.push(format!("{} has the name {altname} that {} would get", holder.name, link.name))
                }
                None => changes.push((
                    LinkChange::AddAltname(altname.clone()),
                    "a name that does not change with the machine type",
                )),
            }
        }
        if !link.is_up {
            changes.push((LinkChange::Up, "the link is down"));
        }
        for (change, reason) in changes {
            self.push(Some(eni), Operation::SetLink { link: reference(link), change }, format!("{}: {reason}", eni.id));
        }
    }

    /// Whoever put the link into another group needs it there, so it stays.
    fn want_group(&mut self, eni: Option<&DesiredEni>, link: &Link, whose: &str, config: &Config) {
        if link.group == 0 {
            let operation = Operation::SetLink { link: reference(link), change: LinkChange::Group(config.link_group) };
            self.push(eni, operation, format!("{whose}: marks the link as an ENI's for the guard rule"));
        } else if link.group != config.link_group {
            let (name, group) = (&link.name, link.group);
            self.notes.push(format!(
                "{name} ({whose}) is in link group {group} and stays there: each route in main by it needs rules of its own, kept as of each run"
            ));
        }
    }

    /// The rules that follow from what others have configured.
    fn because_of_others<'b>(
        &mut self,
        desired: &Desired,
        observed: &Observed,
        primary: MacAddr,
        placed: &BTreeMap<MacAddr, (&'b DesiredEni, &'b Link)>,
        keep: &Keep,
        config: &Config,
    ) -> Vec<OfEni<'b>> {
        if desired.rules.is_empty() {
            return Vec::new();
        }
        let Keep { routes, rules, .. } = keep;
        let circumstances = Circumstances { desired, observed, placed, primary, routes, rules, config };
        self.notes.extend(limits(&circumstances));
        let mut rules = before_guard(&circumstances);
        rules.extend(past_others(&circumstances, &rules));
        rules.extend(before_main(&circumstances));
        rules
    }

    fn want_objects(
        &mut self,
        eni: &DesiredEni,
        link: &Link,
        desired: &Desired,
        observed: &Observed,
        keep: &mut Keep,
        config: &Config,
    ) {
        let is_possible = |family: Family| observed.can_have(link, family);
        let has_ipv6 = eni.addresses.iter().any(|address| address.object.net.family() == Family::V6);
        if has_ipv6 && observed.has_ipv6 && !is_possible(Family::V6) {
            let (id, name) = (&eni.id, &link.name);
            self.notes.push(format!(
                "IPv6 is turned off on {name} (net.ipv6.conf.{name}.disable_ipv6 is 1): the IPv6 addresses of {id} are not put there"
            ));
        }
        let routes = eni.routes.iter().filter(|route| is_possible(route.object.destination.family()));
        for route in routes.filter(|route| !is_place_kept(&route.object, desired, observed)) {
            self.want_route(eni, link, route, observed, keep);
        }
        for rule in eni.rules.iter().filter(|rule| is_possible(rule.object.family)) {
            keep.rules.insert(rule.object.clone());
            self.want_rule(Some(eni), rule, observed);
        }
        for family in eni.bound_families.iter().copied().filter(|family| is_possible(*family)) {
            let rule = policy::bound_rule(config, &link.name, family, eni.table);
            let reason = format!("sockets bound to {} find their way by {}", link.name, eni.id);
            keep.rules.insert(rule.clone());
            self.want_rule(Some(eni), &Wanted { object: rule, reason }, observed);
        }
        let on_link: Vec<&Address> = observed.addresses_on(link.index).collect();
        let left_alone = on_link.iter().filter(|address| eni.left_alone.contains(&address.net.addr().into()));
        keep.addresses.extend(left_alone.map(|address| (link.index, **address)));
        for address in eni.addresses.iter().filter(|address| is_possible(address.object.net.family())) {
            self.want_address(eni, link, address, &on_link, keep, config);
        }
    }

    fn want_route(
        &mut self,
        eni: &DesiredEni,
        link: &Link,
        wanted: &Wanted<Route>,
        observed: &Observed,
        keep: &mut Keep,
    ) {
        let link = match wanted.object.kind {
            RouteKind::Unicast => Some(link),
            RouteKind::Unreachable | RouteKind::Other(_) => None,
        };
        let key = (link.map(|link| link.index), wanted.object);
        if !observed.routes.contains(&key) {
            let operation = Operation::AddRoute { link: link.map(reference), route: wanted.object };
            self.push(Some(eni), operation, wanted.reason.clone());
        }
        keep.routes.insert(key);
    }

    fn want_rule(&mut self, eni: Option<&DesiredEni>, wanted: &Wanted<Rule>, observed: &Observed) {
        if !observed.rules.contains(&wanted.object) {
            self.push(eni, Operation::AddRule { rule: wanted.object.clone() }, wanted.reason.clone());
        }
    }

    /// The same address with another length, owner or lifetime (DHCP, keepalived) counts as there and is left alone. One of
    /// ours keeps its length: which of an ENI's addresses is the first may change, and the link's routes go with the last
    /// address that is taken away to come back with another length.
    fn want_address(
        &mut self,
        eni: &DesiredEni,
        link: &Link,
        wanted: &Wanted<Address>,
        on_link: &[&Address],
        keep: &mut Keep,
        config: &Config,
    ) {
        // They are in order, and an ENI may have many.
        let address = wanted.object.net.addr();
        let first = on_link.partition_point(|there| there.net.addr() < address);
        let same = on_link[first..].iter().copied().take_while(|there| there.net.addr() == address);
        let same: Vec<&Address> = same.collect();
        keep.addresses.insert((link.index, wanted.object));
        if same.iter().any(|address| !policy::owns_address(config, address) || **address == wanted.object) {
            return;
        }
        let but_length_and_lifetime = |there: &Address| {
            let Address { net, is_deprecated, is_leased, .. } = *there;
            Address { net, is_deprecated, is_leased, ..wanted.object }
        };
        let operation = match same.into_iter().find(|there| but_length_and_lifetime(there) == **there) {
            Some(there) => {
                keep.addresses.insert((link.index, *there));
                let address = Address { net: there.net, ..wanted.object };
                if address == *there {
                    return;
                }
                Operation::ChangeAddress { link: reference(link), address }
            }
            None => Operation::AddAddress { link: reference(link), address: beside(wanted.object, on_link) },
        };
        self.push(Some(eni), operation, wanted.reason.clone());
    }
}

/// The links of ENIs that are left alone, and what of ours is there from before: on the link and in the ENI's tables.
pub struct LeftAlone {
    links: BTreeSet<u32>,
    names: BTreeSet<String>,
    tables: BTreeSet<u32>,
}

impl LeftAlone {
    fn of_enis(enis: &BTreeSet<MacAddr>, observed: &Observed, config: &Config) -> LeftAlone {
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
pub fn spare_shared_rules(removals: &mut Vec<Step>, wanted: &BTreeSet<Rule>, observed: &Observed, config: &Config) {
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

fn deleted_rule(operation: &Operation) -> Option<&Rule> {
    if let Operation::DeleteRule { rule } = operation { Some(rule) } else { None }
}

/// What is ours and not wanted, as far as there is proof that it is not.
struct Unwanted<'a> {
    desired: &'a Desired,
    observed: &'a Observed,
    placed: &'a BTreeMap<MacAddr, (&'a DesiredEni, &'a Link)>,
    troubles: &'a BTreeMap<MacAddr, Trouble>,
    config: &'a Config,
}

impl Unwanted<'_> {
    fn steps(&self, keep: &Keep) -> Vec<Step> {
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
                steps.push(self.step(self.eni_of_table(route.table), operation, "no ENI needs it"));
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

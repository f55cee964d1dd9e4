//! Desired minus observed, as ordered operations. MAC meets link here. An empty plan is the proof that all is well.

mod spared;
mod unwanted;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use self::spared::spare_shared_rules;
pub use self::spared::{LeftAlone, spare_carriers};
use self::unwanted::Unwanted;
use crate::config::Config;
use crate::desired::{Desired, DesiredEni, DesiredLink, Wanted};
use crate::eni::{Attached, Eni};
use crate::net::{Address, Family, HasFamily, Link, LinkIpv6, MacAddr, Observed, Route, RouteKind, Rule};
use crate::operation::{LinkChange, LinkRef, Operation};
use crate::place::{Trouble, find_link, place};
use crate::policy;
use crate::precedence::{
    Circumstances, OfEni, apart_from_others, before_guard, before_main, limits, other_links, past_others,
};

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

    let families_without_rules = families_without_rules(desired, observed, primary, &placed);
    let mut keep = Keep { families_without_rules, ..Keep::default() };
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
    plan.sort();
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
    /// Of the primary, whose traffic routes in `main` would take that are new.
    families_without_rules: BTreeSet<Family>,
}

/// In which families the primary has addresses, or may have, of which metadata does not tell yet, so that it gets no rules for what it
/// sends from them. In a VPC what DHCP gives is EC2's.
fn families_without_rules(
    desired: &Desired,
    observed: &Observed,
    primary: MacAddr,
    placed: &BTreeMap<MacAddr, (&DesiredEni, &Link)>,
) -> BTreeSet<Family> {
    let is_without = |family: &Family| {
        let Some((eni, link)) = placed.get(&primary) else { return desired.pending.contains(&primary) };
        let mut leased = observed.addresses_on(link.index).filter(|there| there.is_leased);
        let has_lease = leased.any(|there| there.net.family() == *family);
        has_lease && !eni.narrowed.iter().any(|rule| rule.family == *family)
    };
    Family::BOTH.into_iter().filter(is_without).collect()
}

/// Whether an ENI that keeps all it has, pending or left alone, has its route in this one's place in `main`.
fn is_place_kept(wanted: &Route, desired: &Desired, observed: &Observed) -> bool {
    let place = |route: &Route| (route.table, route.destination, route.metric, route.protocol);
    let keeps_all = |mac: MacAddr| desired.pending.contains(&mac) || desired.left_alone.contains(&mac);
    let is_keepers = |index: u32| observed.links.get(&index).and_then(|link| link.mac).is_some_and(keeps_all);
    wanted.table == policy::MAIN_TABLE
        && observed.routes.iter().any(|(link, route)| place(route) == place(wanted) && link.is_some_and(is_keepers))
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
    /// Stable: where nothing else orders them, each ENI's own order stays. Where one of the same link is in the place of a wanted route,
    /// which the kernel gives to one alone, it goes right before that comes.
    fn sort(&mut self) {
        let place = |link: &Option<LinkRef>, route: &Route| {
            (link.as_ref().map(|link| link.index), route.table, route.destination, route.metric)
        };
        let coming = self.steps.iter().filter_map(|step| match &step.operation {
            Operation::AddRoute { link, route } => Some((place(link, route), step.operation.phase())),
            _ => None,
        });
        let coming: BTreeMap<_, u8> = coming.collect();
        self.steps.sort_by_cached_key(|step| {
            let next = match &step.operation {
                Operation::DeleteRoute { link, route } => coming.get(&place(link, route)),
                _ => None,
            };
            (next.copied().unwrap_or(step.operation.phase()), next.is_none(), step.operation.turn())
        });
    }

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
        let others = &other_links(desired, observed, primary);
        let circumstances =
            Circumstances { desired, observed, placed, primary, others, routes, rules, apart: &[], config };
        let apart = apart_from_others(&circumstances);
        let with_apart = || rules.iter().chain(apart.iter().map(|(_, rule)| &rule.object)).cloned().collect();
        let rules = if apart.is_empty() { Cow::Borrowed(rules) } else { Cow::Owned(with_apart()) };
        let circumstances = Circumstances { rules: &rules, apart: &apart, ..circumstances };
        self.notes.extend(limits(&circumstances));
        let mut because = before_guard(&circumstances);
        because.extend(apart.iter().cloned());
        because.extend(past_others(&circumstances, &because));
        because.extend(before_main(&circumstances));
        because
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
        let is_waited_for = |route: &Route| {
            let is_there = observed.routes.contains(&(Some(link.index), *route));
            let is_mains = route.table == policy::MAIN_TABLE;
            is_mains && !is_there && keep.families_without_rules.contains(&route.destination.family())
        };
        let (waiting, routes): (Vec<_>, Vec<_>) = routes.partition(|route| is_waited_for(&route.object));
        self.notes.extend(waiting.iter().map(|route| {
            let to = route.object.destination;
            format!("{to} by {} comes into main when metadata tells what the primary sends from, too", link.name)
        }));
        for route in routes.into_iter().filter(|route| !is_place_kept(&route.object, desired, observed)) {
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

//! What metadata no longer tells of is taken away only on proof: two complete snapshots that both lack it, some time apart.
//! Here the first of them is noted, and until the second has come metadata is taken as if it still told of it. A link that
//! is gone is proof at once; so is an address that metadata gives to another ENI by now, unless it has arrived a moment ago.

use std::collections::{BTreeMap, BTreeSet};
// A length of time, no clock.
use core::time::Duration;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::eni::{Attached, Claim, Dispute, Eni, Pending, Reason, show_source};
use crate::net::{HasFamily, Link, MacAddr, Observed, Route, RouteKind, Rule};
use crate::policy;

/// Something of ours in the kernel that metadata does not tell of: an address or delegated prefix of an attached ENI, or
/// all of an ENI whose link is still here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Lost {
    pub mac: MacAddr,
    /// None: the whole ENI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpNet>,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{} of ENI {}", show_source(source), self.mac),
            None => write!(f, "ENI {}, whose link is still here", self.mac),
        }
    }
}

/// When a snapshot was read: milliseconds since boot, time asleep included, so that neither a suspended machine nor a
/// clock that is set makes two snapshots seem further apart than they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    pub begun: u64,
    pub ended: u64,
}

/// Since when something is known to be lost: the end of the first complete snapshot without it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Sighting {
    #[serde(flatten)]
    pub lost: Lost,
    pub since: u64,
}

/// What has been added to ENIs lately, and when: metadata that is older gives it to whoever had it before. Addresses are
/// whole-length prefixes, as of a [`Lost`]; times are milliseconds since boot.
pub type Arrivals = BTreeMap<MacAddr, BTreeMap<IpNet, u64>>;

/// What a run leaves to the next ones.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Notes {
    #[serde(default)]
    pub sightings: BTreeSet<Sighting>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub arrivals: Arrivals,
    /// Notes from before then are lost (milliseconds since boot), so anything may have arrived right before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unknown_before: Option<u64>,
}

/// What a snapshot comes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Judgement {
    /// As metadata tells it, and with what is lost without proof.
    pub attached: Attached,
    /// To be known to the next run.
    pub sightings: BTreeSet<Sighting>,
    /// What stays for want of proof.
    pub postponed: BTreeSet<Lost>,
}

/// Puts back what is lost without proof.
pub fn judge(attached: &Attached, observed: &Observed, known: &Notes, taken: Taken, config: &Config) -> Judgement {
    let mut judgement = Judgement::nothing_is_doubted(attached);
    let links: Vec<&Link> = observed.links.values().filter(|link| policy::can_be_eni(link)).collect();
    for link in &links {
        let Some(mac) = link.mac else { continue };
        if attached.ready.contains_key(&mac) && has_twin(link, &links) {
            continue;
        }
        // Metadata that gives it to another one may be older than what it told a moment ago.
        let has_just_arrived = |source: &IpNet| {
            let since = known.arrivals.get(&mac).and_then(|of_eni| of_eni.get(source));
            since.into_iter().chain(&known.unknown_before).any(|since| is_recent(*since, taken))
        };
        let own = Own::on(link, attached.ready.get(&mac), observed, config);
        if let Some(eni) = attached.ready.get(&mac) {
            let is_told = !attached.disputes.contains_key(&mac);
            let lost = own.sources.iter().filter(|source| !eni.has(source));
            let lost = lost.filter(|source| !is_anybodys(source, attached, &links) || has_just_arrived(source));
            let stay: Vec<IpNet> = lost
                .copied()
                .filter(|source| !judgement.is_proven(Lost { mac, source: Some(*source) }, is_told, known, taken))
                .collect();
            judgement.forget(&stay, mac);
            stay_with(&mut judgement.attached, mac, stay, &own, link);
        } else if !attached.pending.contains_key(&mac) && !own.is_empty() {
            let lost = Lost { mac, source: None };
            if !judgement.is_proven(lost, attached.is_complete(), known, taken) {
                judgement.attached.pending.insert(mac, own.pending(link));
            }
        }
    }
    judgement
}

/// Leaves ENIs without what a pending ENI has, as nobody can tell whether metadata still gives it the same: what its link has,
/// whoever has put it there, what its rules send its way before those of the others, and what may be its containers'. What is
/// in dispute stays on the link that has it.
pub fn leave_to_pending(attached: &Attached, observed: &Observed, config: &Config) -> Attached {
    let mut attached = attached.clone();
    loop {
        let pending = attached.pending.len();
        let conflicts = conflicts_with_pending(&attached, observed, config);
        attached.leave_disputed(conflicts);
        // Whoever waits for that has something, too.
        if attached.pending.len() == pending {
            leave_where_it_is(&mut attached, observed, config);
            return attached;
        }
    }
}

fn conflicts_with_pending(attached: &Attached, observed: &Observed, config: &Config) -> Vec<(MacAddr, Dispute)> {
    let mut conflicts = Vec::new();
    let mut dispute = |mac: MacAddr, source: IpNet, by: MacAddr, claim: Claim| {
        conflicts.push((mac, Dispute { source, by: attached.name_of(by), claim }));
    };
    for link in observed.links.values().filter(|link| policy::can_be_eni(link)) {
        let Some(mac) = link.mac.filter(|mac| attached.pending.contains_key(mac)) else { continue };
        let mut held = Own::on(link, None, observed, config).sources;
        held.extend(observed.addresses_on(link.index).map(|address| IpNet::from(address.net.addr())));
        let tables: BTreeSet<u32> = routes_of(link, observed, config).map(|route| route.table).collect();
        let is_of_tables = |rule: &&Rule| policy::owns_rule(config, rule) && tables.contains(&rule.table);
        let captures = |rule: &&Rule| is_of_tables(rule) && rule.to.is_none() && rule.from.is_some();
        let captures: Vec<&Rule> = observed.rules.iter().filter(captures).collect();
        for (other, eni) in attached.ready.iter().filter(|(other, _)| **other != mac) {
            let table = policy::table(config, eni.slot);
            let is_before = |rule: &&&Rule| rule.priority < table;
            for source in eni.all_sources() {
                let mut captured = captures.iter().filter(is_before).filter_map(|rule| rule.from);
                if held.iter().any(|held| held.contains(&source) || source.contains(held)) {
                    dispute(*other, source, mac, Claim::Has);
                } else if captured.any(|from| from.contains(&source)) {
                    dispute(*other, source, mac, Claim::Captures);
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

/// What is disputed, or given to an ENI that is pending, nobody gets now; whoever has it works on with it meanwhile.
fn leave_where_it_is(attached: &mut Attached, observed: &Observed, config: &Config) {
    let disputed = attached.disputes.values().flatten().map(|dispute| dispute.source);
    let pending = attached.pending.values().filter(|pending| pending.reason.may_pass());
    let waited_for = pending.flat_map(|pending| pending.sources.iter().flatten().copied());
    let waited_for: BTreeSet<IpNet> = disputed.chain(waited_for).collect();
    if waited_for.is_empty() {
        return;
    }
    let links: Vec<&Link> = observed.links.values().filter(|link| policy::can_be_eni(link)).collect();
    for link in links.iter().filter(|link| !has_twin(link, &links)) {
        let Some((mac, eni)) = link.mac.and_then(|mac| Some((mac, attached.ready.get(&mac)?))) else { continue };
        let own = Own::on(link, Some(eni), observed, config);
        let is_left = |source: &&IpNet| {
            let is_waited_for = waited_for.iter().any(|other| other.contains(*source) || source.contains(other));
            let is_given = attached.ready.values().any(|eni| eni.has(source));
            is_waited_for && !is_given && !has_dispute(attached, mac, source)
        };
        let stay: Vec<IpNet> = own.sources.iter().filter(is_left).copied().collect();
        stay_with(attached, mac, stay, &own, link);
    }
}

/// Then it stays anyway.
fn has_dispute(attached: &Attached, mac: MacAddr, source: &IpNet) -> bool {
    attached.disputes.get(&mac).into_iter().flatten().any(|dispute| dispute.source == *source)
}

/// Gives an ENI what its link has of these.
fn stay_with(attached: &mut Attached, mac: MacAddr, stay: Vec<IpNet>, own: &Own, link: &Link) {
    let Some(eni) = attached.ready.get_mut(&mac) else { return };
    // Its routes and rules could not be had beside those of other subnets: all stays as it is.
    let is_of_another_subnet = |source: &IpNet| {
        let told = eni.subnets(source.family());
        !told.is_empty() && !told.iter().any(|subnet| subnet.contains(source))
    };
    if stay.iter().any(is_of_another_subnet) {
        attached.ready.remove(&mac);
        attached.pending.insert(mac, own.pending(link));
        return;
    }
    stay.into_iter().for_each(|source| put_back(eni, source, own));
}

impl Notes {
    /// Whether a snapshot that is taken now may prove something that this one cannot.
    pub fn is_proof_due(&self, taken: Taken, now: u64) -> bool {
        let mut due = self.sightings.iter().map(|sighting| sighting.since + policy::PROOF_PAUSE);
        due.any(|due| taken.begun < due && due <= now)
    }

    /// What is still of interest of it.
    pub fn recent_arrivals(&self, taken: Taken) -> Arrivals {
        let recent = |(mac, of_eni): (&MacAddr, &BTreeMap<IpNet, u64>)| {
            let of_eni = of_eni.iter().filter(|(_, since)| is_recent(**since, taken));
            (*mac, of_eni.map(|(source, since)| (*source, *since)).collect::<BTreeMap<_, _>>())
        };
        self.arrivals.iter().map(recent).filter(|(_, of_eni)| !of_eni.is_empty()).collect()
    }
}

/// Whether another link has the same MAC. Which of them is the ENI's cannot be told, so nothing of it is done or undone.
fn has_twin(link: &Link, links: &[&Link]) -> bool {
    links.iter().any(|other| other.index != link.index && other.mac == link.mac)
}

fn is_recent(since: u64, taken: Taken) -> bool {
    taken.begun < since.saturating_add(policy::ARRIVAL_DOUBT)
}

impl Taken {
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.ended.saturating_sub(self.begun))
    }
}

impl Judgement {
    /// Of a run by hand.
    pub fn nothing_is_doubted(attached: &Attached) -> Judgement {
        Judgement { attached: attached.clone(), sightings: BTreeSet::new(), postponed: BTreeSet::new() }
    }

    /// These stay with this ENI, so no other has them, nor a part of them.
    fn forget(&mut self, stay: &[IpNet], keeper: MacAddr) {
        for (_, eni) in self.attached.ready.iter_mut().filter(|(mac, _)| **mac != keeper) {
            let mut sources = eni.all_sources();
            sources.retain(|source| stay.iter().any(|stays| stays.contains(source)));
            eni.leave_out(&sources);
        }
    }

    /// Whether this may go; if not, it is postponed, and noted when the snapshot can be one of the two.
    fn is_proven(&mut self, lost: Lost, is_told: bool, known: &Notes, taken: Taken) -> bool {
        let since = known.sightings.iter().find(|sighting| sighting.lost == lost).map(|sighting| sighting.since);
        // A note of the future is of no clock that can be trusted.
        let since = since.filter(|since| *since <= taken.ended);
        if is_told && since.is_some_and(|since| taken.begun >= since + policy::PROOF_PAUSE) {
            // Noted until it is gone: a run may be killed before that.
            self.sightings.extend(since.map(|since| Sighting { lost, since }));
            return true;
        }
        let since = since.or(is_told.then_some(taken.ended));
        self.sightings.extend(since.map(|since| Sighting { lost, since }));
        self.postponed.insert(lost);
        false
    }
}

/// What of ours the kernel has for one ENI.
struct Own {
    /// Addresses as whole-length prefixes, and delegated prefixes.
    sources: BTreeSet<IpNet>,
    /// The subnets in its tables.
    subnets: BTreeSet<IpNet>,
    has_routes: bool,
}

impl Own {
    fn on(link: &Link, eni: Option<&Eni>, observed: &Observed, config: &Config) -> Own {
        let routes: Vec<&Route> = routes_of(link, observed, config).collect();
        let mut tables: BTreeSet<u32> = routes.iter().map(|route| route.table).collect();
        tables.extend(eni.map(|eni| policy::table(config, eni.slot)));
        let addresses = observed.addresses_on(link.index).filter(|address| policy::owns_address(config, address));
        let is_prefix = |rule: &&Rule| {
            policy::owns_rule(config, rule) && policy::is_of_prefix(rule) && tables.contains(&rule.table)
        };
        let is_subnet = |route: &&&Route| route.kind == RouteKind::Unicast && route.gateway.is_none();
        let in_tables: BTreeSet<IpNet> = routes.iter().filter(is_subnet).map(|route| route.destination).collect();
        // The ENI that was in this slot before may have left rules for prefixes of another subnet in the table.
        let can_be_its = |prefix: &IpNet| {
            let told = eni.map(|eni| eni.subnets(prefix.family())).unwrap_or_default();
            // A family that is lost as a whole has lost its subnet, too; by then the routes tell of it.
            let known: Vec<&IpNet> =
                if told.is_empty() { of_family(&in_tables, prefix) } else { told.iter().collect() };
            known.is_empty() || known.iter().any(|subnet| subnet.contains(prefix))
        };
        let prefixes = observed.rules.iter().filter(is_prefix).filter_map(|rule| rule.from).filter(can_be_its);
        Own {
            sources: addresses.map(|address| address.net.addr().into()).chain(prefixes).collect(),
            subnets: in_tables.clone(),
            has_routes: !routes.is_empty(),
        }
    }

    fn is_empty(&self) -> bool {
        self.sources.is_empty() && !self.has_routes
    }

    /// The ENI as one that keeps all it has.
    fn pending(&self, link: &Link) -> Pending {
        Pending {
            id: link.altnames.iter().find(|name| name.starts_with("eni-")).cloned(),
            reason: Reason::Unproven,
            sources: Some(self.sources.iter().copied().collect()),
            subnets: self.subnets.iter().copied().collect(),
        }
    }
}

/// Ours by this link in tables of ENIs.
fn routes_of<'a>(link: &Link, observed: &'a Observed, config: &Config) -> impl Iterator<Item = &'a Route> {
    let on_link = observed.routes.iter().filter(move |(index, _)| *index == Some(link.index)).map(|(_, route)| route);
    on_link.filter(move |route| policy::owns_route(config, route) && route.table != policy::MAIN_TABLE)
}

/// Subnets of a prefix's family; an IPv6 table also has the link-local one, which is every link's.
fn of_family<'a>(subnets: &'a BTreeSet<IpNet>, prefix: &IpNet) -> Vec<&'a IpNet> {
    let is_its = |subnet: &&IpNet| subnet.family() == prefix.family() && **subnet != policy::IPV6_LINK_LOCAL;
    subnets.iter().filter(is_its).collect()
}

/// Whether metadata gives this to any ENI that can have it now, whole or as part of a prefix, or to more than one. One whose
/// link is not here cannot.
fn is_anybodys(source: &IpNet, attached: &Attached, links: &[&Link]) -> bool {
    let disputed = attached.disputes.values().flatten().map(|dispute| dispute.source);
    let is_here = |mac: &MacAddr| links.iter().filter(|link| link.mac == Some(*mac)).count() == 1;
    let ready = attached.ready.iter().filter(|(mac, _)| is_here(mac));
    let ready = ready.flat_map(|(_, eni)| eni.sources(source.family()));
    ready.chain(disputed).any(|theirs| theirs.contains(source))
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
    // A family that is lost as a whole has lost its subnet, too.
    if eni.subnets(source.family()).is_empty() {
        for subnet in own.subnets.iter().filter(|subnet| subnet.contains(&source)) {
            match subnet {
                IpNet::V4(subnet) => eni.ipv4_subnet = Some(*subnet),
                IpNet::V6(subnet) => eni.ipv6_subnets.push(*subnet),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::desired;
    use crate::metadata::{Tree, attached};
    use crate::net::Family;
    use crate::plan::{fresh_machine, plan};

    /// Whether this rule stays, on a machine of which an automatic run sees for the first time that metadata lacks it.
    fn stays(prefix: &str) -> bool {
        let config = Config::default();
        let snapshot = include_str!("../tests/scenarios/two-subnets-dual-stack/metadata.json");
        let attached = attached(&Tree::from_json(snapshot).unwrap()).unwrap();
        let mut observed = fresh_machine(&attached);
        let table = policy::TABLE_BASE + 1;
        let from = Some(prefix.parse().unwrap());
        observed.rules.insert(Rule { from, ..policy::rule(&config, Family::V4, table, table) });
        let taken = Taken { begun: 1, ended: 2 };
        let believed = judge(&attached, &observed, &Notes::default(), taken, &config).attached;
        let plan = plan(&desired(&believed, &config), &observed, believed.primary, &config);
        !plan.steps.iter().any(|step| step.to_string().contains(&format!("rule del priority {table} from {prefix}")))
    }

    #[test]
    fn a_prefix_of_the_enis_subnet_stays_without_proof_and_one_of_whoever_was_in_its_slot_before_goes() {
        assert!(stays("10.0.1.96/28"));
        assert!(!stays("10.0.3.96/28"));
    }
}

//! What metadata no longer tells of is taken away only on proof: two complete snapshots that both lack it, some time apart.
//! Here the first of them is noted, and until the second has come metadata is taken as if it still told of it. A link that
//! is gone is proof at once; so is an address that metadata gives to another ENI by now, unless it has arrived a moment ago.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::eni::{Attached, Eni, Reason, show_source};
use crate::holdings::{Own, can_keep, has_twin, keep_from_others, kept_apart_from, stay_with};
use crate::net::{Family, HasFamily, Link, MacAddr, Observed, Route, RouteKind};
use crate::policy;

/// Something of ours in the kernel that metadata does not tell of: an address or delegated prefix of an attached ENI, its default in `main`
/// (as the prefix of length 0), all of an ENI whose link is still here, or the subnet of another ENI from which the primary is kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Lost {
    pub mac: MacAddr,
    /// None: the whole ENI, or what is named below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpNet>,
    /// Of the primary: its way to this subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<IpNet>,
    /// Its being left alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left_alone: bool,
}

impl Lost {
    fn all_of(mac: MacAddr) -> Lost {
        Lost { mac, source: None, to: None, left_alone: false }
    }

    fn source(mac: MacAddr, source: IpNet) -> Lost {
        Lost { source: Some(source), ..Lost::all_of(mac) }
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.left_alone {
            return write!(f, "that ENI {} is left alone", self.mac);
        }
        if let Some(subnet) = &self.to {
            return write!(f, "the way to {subnet}, once another ENI's subnet, by the primary ENI {}", self.mac);
        }
        match &self.source {
            Some(source) if source.prefix_len() == 0 => write!(f, "the default in main by ENI {}", self.mac),
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
    /// The ENIs that were attached, be they managed or not; none where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached: Option<BTreeSet<MacAddr>>,
    /// Those of them that were left alone.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left_alone: BTreeSet<MacAddr>,
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

/// Puts back what is lost without proof. `ours` is what of `attached` is ours to configure: what goes to others is lost.
pub fn judge(
    attached: &Attached,
    ours: &Attached,
    observed: &Observed,
    known: &Notes,
    taken: Taken,
    config: &Config,
) -> Judgement {
    let mut judgement = Judgement::nothing_is_doubted(attached);
    let may_have_been_attached = |link: &Link, mac: MacAddr| match &known.attached {
        Some(of_last) => of_last.contains(&mac),
        None => leads_to_others(link, attached, observed, config),
    };
    let links: Vec<&Link> = observed.links.values().filter(|link| policy::can_be_eni(link)).collect();
    for mac in known.left_alone.iter().filter(|mac| ours.ready.contains_key(mac)) {
        let lost = Lost { left_alone: true, ..Lost::all_of(*mac) };
        if !judgement.is_proven(lost, true, known, taken) {
            judgement.attached.still_left_alone.insert(*mac);
        }
    }
    let still_left_alone = judgement.attached.still_left_alone.clone();
    let is_anybodys = |source: &IpNet| is_anybodys(source, ours, &still_left_alone, &links, observed);
    let mut has_unlisted = false;
    for link in &links {
        let Some(mac) = link.mac else { continue };
        if attached.ready.contains_key(&mac) && has_twin(link, &links) {
            continue;
        }
        // Metadata that gives it to another one may be older than what it told a moment ago.
        let has_just_arrived = |source: &IpNet| {
            // The primary's first addresses never change, so nobody else can have had them.
            if attached.primary_eni().is_some_and(|eni| eni.is_distributions(source.addr())) {
                return false;
            }
            let since = known.arrivals.get(&mac).and_then(|of_eni| of_eni.get(source));
            since.into_iter().chain(&known.unknown_before).any(|since| is_recent(*since, taken))
        };
        let own = Own::on(link, attached.ready.get(&mac), observed, config);
        if let Some(eni) = attached.ready.get(&mac) {
            let is_told = !attached.disputes.contains_key(&mac);
            let lost = own.at_stake(eni).into_iter().filter(|source| !eni.has(source));
            let lost = lost.filter(|source| !is_anybodys(source) || has_just_arrived(source));
            let stay: Vec<IpNet> =
                lost.filter(|source| !judgement.is_proven(Lost::source(mac, *source), is_told, known, taken)).collect();
            keep_from_others(&mut judgement.attached, &stay, mac);
            stay_with(&mut judgement.attached, mac, stay, &own, link);
        // Of an ENI that is somebody else's we have nothing, but rules that keep others' traffic from its link.
        } else if !attached.pending.contains_key(&mac) && (!own.is_empty() || may_have_been_attached(link, mac)) {
            let lost = Lost::all_of(mac);
            has_unlisted = true;
            if !judgement.is_proven(lost, attached.is_complete(), known, taken) {
                judgement.attached.pending.insert(mac, own.pending(link, Reason::Unproven));
            }
        }
    }
    for (mac, family) in only_defaults(observed, config) {
        // Where the primary has none of the family, the default is wanted.
        let has_come = attached.primary_eni().is_some_and(|primary| !primary.addresses(family).is_empty());
        let lost = Lost::source(mac, family.everything());
        let is_told = !attached.disputes.contains_key(&attached.primary);
        if has_come && attached.ready.contains_key(&mac) && !judgement.is_proven(lost, is_told, known, taken) {
            judgement.attached.ready.entry(mac).and_modify(|eni| _ = eni.stands_in.insert(family));
        }
    }
    for to in doubtful_subnets(attached, has_unlisted, &links, observed, config) {
        let lost = Lost { to: Some(to), ..Lost::all_of(attached.primary) };
        if !judgement.is_proven(lost, attached.is_complete(), known, taken) {
            judgement.attached.earlier_subnets.insert(to);
        }
    }
    judgement
}

/// Whether `main` leads by this link where our rules keep the primary from: everywhere, or to another ENI's subnet.
fn leads_to_others(link: &Link, attached: &Attached, observed: &Observed, config: &Config) -> bool {
    let kept_apart = kept_apart_from(attached, observed, config);
    let is_there = |(index, route): &(Option<u32>, Route)| {
        let is_foreign = route.table == policy::MAIN_TABLE && !policy::owns_route(config, route);
        let is_kept_from = route.destination.prefix_len() == 0 || kept_apart.contains(&route.destination);
        *index == Some(link.index) && is_foreign && is_kept_from
    };
    !kept_apart.is_empty() && observed.routes.iter().any(is_there)
}

/// The subnets that our rules take for other ENIs' and metadata for nobody's, as far as an ENI that is here may be in them: it is
/// not listed any more, or told without a subnet of that family.
fn doubtful_subnets(
    attached: &Attached,
    has_unlisted: bool,
    links: &[&Link],
    observed: &Observed,
    config: &Config,
) -> Vec<IpNet> {
    let told: BTreeSet<IpNet> = attached.all_subnets().collect();
    let is_here = |mac: &MacAddr| links.iter().any(|link| link.mac == Some(*mac));
    let may_be_anothers = |subnet: &IpNet| {
        let is_untold =
            |(mac, eni): &(&MacAddr, &Eni)| **mac != attached.primary && eni.subnets(subnet.family()).is_empty();
        let untold = attached.ready.iter().filter(is_untold).map(|(mac, _)| mac);
        has_unlisted || untold.chain(attached.pending.keys()).any(is_here)
    };
    let kept_apart = kept_apart_from(attached, observed, config);
    kept_apart.difference(&told).copied().filter(may_be_anothers).collect()
}

/// The ENIs by whose link `main` has its only default of a family, and that is ours.
fn only_defaults(observed: &Observed, config: &Config) -> Vec<(MacAddr, Family)> {
    let of_family = |family: Family| {
        let is_default = move |route: &Route| {
            let is_unicast = route.kind == RouteKind::Unicast;
            is_unicast && (route.table, route.destination) == (policy::MAIN_TABLE, family.everything())
        };
        let in_main = observed.routes.iter().filter(|(_, route)| is_default(route));
        let (ours, of_others): (Vec<_>, Vec<_>) = in_main.partition(|(_, route)| policy::owns_route(config, route));
        let links = ours.into_iter().filter_map(|(index, _)| observed.links.get(&index?));
        let links = links.filter(|link| of_others.is_empty() && can_keep(link, family, observed));
        links.filter_map(|link| Some((link.mac?, family))).collect::<Vec<_>>()
    };
    Family::BOTH.into_iter().flat_map(of_family).collect()
}

impl Notes {
    /// Without what has arrived in the future, which is of no clock that can be trusted.
    pub fn until(mut self, now: u64) -> Notes {
        self.arrivals.values_mut().for_each(|of_eni| of_eni.retain(|_, since| *since <= now));
        self.unknown_before = self.unknown_before.filter(|before| *before <= now);
        self
    }

    /// Whether a snapshot that is taken now may prove something that this one cannot.
    pub fn is_proof_due(&self, taken: Taken, now: u64) -> bool {
        let mut due = self.sightings.iter().map(|sighting| sighting.since.saturating_add(policy::PROOF_PAUSE));
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

fn is_recent(since: u64, taken: Taken) -> bool {
    taken.begun < since.saturating_add(policy::ARRIVAL_DOUBT)
}

impl Judgement {
    /// Of a run by hand.
    pub fn nothing_is_doubted(attached: &Attached) -> Judgement {
        Judgement { attached: attached.clone(), sightings: BTreeSet::new(), postponed: BTreeSet::new() }
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

/// Whether metadata gives this to any ENI that can have it now, whole or as part of a prefix, or to more than one. One whose
/// link is not here or is somebody's port cannot, nor one that is somebody else's.
fn is_anybodys(
    source: &IpNet,
    ours: &Attached,
    still_left_alone: &BTreeSet<MacAddr>,
    links: &[&Link],
    observed: &Observed,
) -> bool {
    let disputed = ours.disputes.values().flatten().map(|dispute| dispute.source);
    let can_have = |mac: &MacAddr| {
        let mut of_eni = links.iter().filter(|link| link.mac == Some(*mac));
        of_eni.any(|link| can_keep(link, source.family(), observed)) && !still_left_alone.contains(mac)
    };
    let ready = ours.ready.iter().filter(|(mac, _)| can_have(mac));
    let ready = ready
        .flat_map(|(_, eni)| eni.sources(source.family()).into_iter().filter(|source| !eni.of_others.contains(source)));
    ready.chain(disputed).any(|theirs| theirs.contains(source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::desired;
    use crate::metadata::{Tree, attached};
    use crate::net::{Family, Rule};
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
        let believed = judge(&attached, &attached, &observed, &Notes::default(), taken, &config).attached;
        let plan = plan(&desired(&believed, &config), &observed, believed.primary, &config);
        !plan.steps.iter().any(|step| step.to_string().contains(&format!("rule del priority {table} from {prefix}")))
    }

    #[test]
    fn a_prefix_of_the_enis_subnet_stays_without_proof_and_one_of_whoever_was_in_its_slot_before_goes() {
        assert!(stays("10.0.1.96/28"));
        assert!(!stays("10.0.3.96/28"));
    }
}

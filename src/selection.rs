//! Which of the attached ENIs are eniup's to configure, by what the configuration says; the others are left alone.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::config::Config;
use crate::config::choices::Choices;
use crate::config::selector::{Attribute, Facts, Selector};
use crate::container_network::{ContainerNetwork, container_network};
use crate::doubt::{held, leave_to_pending, prefer_as_is, stand_in_as_is};
use crate::eni::{Attached, Eni, Ignored, Known, Pending, Reason};
use crate::holdings::{kept_apart_from, routes_of};
use crate::markers::Files;
use crate::metadata::{self, Tree, told};
use crate::net::{Family, Link, MacAddr, Observed, Route};
use crate::policy;

/// The attached ENIs with those set aside that are to be left alone, or may be.
pub fn select(attached: &Attached, tree: &Tree, observed: &Observed, files: &Files, config: &Config) -> Attached {
    let network = container_network(files, observed);
    let left_alone = left_alone(attached, network.as_ref(), tree, observed, config);
    // Before anything else: an ENI that is to be left alone has what it has, too.
    let attached = &leave_to_pending(attached, &left_alone, observed, config);
    // The machine stands on the primary, of which a container network has addresses only.
    let is_primary = |mac: &MacAddr| *mac == attached.primary;
    let has_attached = |mac: &MacAddr| network.as_ref().filter(|_| !is_primary(mac));
    let mut selected = attached.clone();
    let mut known = Vec::new();
    for (mac, eni) in &attached.ready {
        let facts = facts(*mac, Some(&eni.id), Some(eni), tree, observed);
        match verdict(&facts, has_attached(mac), config) {
            Verdict::Managed if attached.still_left_alone.contains(mac) => {
                let by = "what said so until now: that it does no more is not proven".into();
                selected.ready.remove(mac);
                selected.ignored.insert(*mac, Ignored { by, eni: Known::Ready(eni.clone()) });
            }
            Verdict::Managed => {
                let is_shared = is_primary(mac) && unmanaged(&facts, config).is_none();
                if let Some(ContainerNetwork { name, sign }) = network.as_ref().filter(|_| is_shared) {
                    selected.ready.insert(*mac, with_pods(eni));
                    let why = format!("all its addresses but the first are left to {name}, which is here ({sign})");
                    selected.shared.insert(*mac, why);
                }
                selected.choices.insert(*mac, choices(&facts, config));
            }
            Verdict::Ignored { by } => {
                selected.ready.remove(mac);
                selected.ignored.insert(*mac, Ignored { by, eni: Known::Ready(eni.clone()) });
            }
            Verdict::Undecided { by, by_tags } => {
                let reason = match by_tags && metadata::lacks_instance_tags(tree) {
                    true => Reason::NoTags { by },
                    false => Reason::Undecided { by },
                };
                selected.ready.remove(mac);
                selected.pending.insert(*mac, Pending::of(eni.clone(), reason));
                selected.undecided.insert(*mac);
            }
        }
        known.push(facts);
    }
    for (mac, pending) in &attached.pending {
        let facts = facts(*mac, pending.id.as_ref(), None, tree, observed);
        match verdict(&facts, has_attached(mac), config) {
            Verdict::Managed => _ = selected.choices.insert(*mac, choices(&facts, config)),
            Verdict::Ignored { by } => {
                selected.pending.remove(mac);
                selected.ignored.insert(*mac, Ignored { by, eni: Known::Pending(pending.clone()) });
            }
            Verdict::Undecided { .. } => _ = selected.undecided.insert(*mac),
        }
        known.push(facts);
    }
    selected.idle = idle(&known, config);
    selected.disputes.retain(|mac, _| selected.ready.contains_key(mac));
    selected.shared.retain(|mac, _| selected.ready.get(mac).is_some_and(|eni| !eni.of_others.is_empty()));
    // By what is selected in the end.
    let kept_apart = subnets_kept_apart(&selected, observed, config);
    selected.earlier_subnets.extend(kept_apart);
    selected.is_main_anothers = is_main_anothers(&selected, observed, config);
    selected.held = held(&selected, observed, config);
    prefer_as_is(&mut selected, observed, config);
    stand_in_as_is(&mut selected, observed, config);
    selected
}

/// What keeps the primary's traffic from other ENIs stays as long as metadata may not name every ENI's subnet, and as long as an ENI
/// that is left alone has something of ours.
fn subnets_kept_apart(selected: &Attached, observed: &Observed, config: &Config) -> BTreeSet<IpNet> {
    let kept_apart = kept_apart_from(selected, observed, config);
    let is_unread = selected.ignored.values().any(|ignored| ignored.pending().is_some());
    if !selected.is_complete() || is_unread {
        return kept_apart;
    }
    let has_ours = |link: &&Link| routes_of(link, observed, config).next().is_some();
    let ignored = observed.links.values().filter(has_ours).filter_map(|link| selected.ignored.get(&link.mac?));
    let of_ignored: BTreeSet<IpNet> = ignored.flat_map(|ignored| ignored.subnets()).collect();
    kept_apart.intersection(&of_ignored).copied().collect()
}

/// By what others have put there, and what of ours stays as its ENI is not configured: where the default is one ENI's, or other
/// destinations are behind one by our doing or of which nobody knows more, the primary's addresses need their own.
fn is_main_anothers(selected: &Attached, observed: &Observed, config: &Config) -> bool {
    let links_of = |macs: BTreeSet<MacAddr>| -> BTreeSet<u32> {
        let links = observed.links.values().filter(|link| policy::can_be_eni(link));
        links.filter(|link| link.mac.is_some_and(|mac| macs.contains(&mac))).map(|link| link.index).collect()
    };
    let others = links_of(selected.macs().filter(|mac| *mac != selected.primary).collect());
    let keepers = links_of(selected.pending.keys().chain(selected.ignored.keys()).copied().collect());
    let stays = |index: &Option<u32>| index.is_some_and(|index| keepers.contains(&index));
    let there = || observed.routes.iter().filter(|(index, route)| !policy::owns_route(config, route) || stays(index));
    let is_known_otherwise =
        |mac: &MacAddr| selected.undecided.contains(mac) || selected.choices.get(mac).is_some_and(Choices::is_isolated);
    let of_pending = links_of(selected.pending.keys().filter(|mac| !is_known_otherwise(mac)).copied().collect());
    let leads_away = |(index, route): &(Option<u32>, Route)| {
        let is_pendings = route.gateway.is_none() && index.is_some_and(|index| of_pending.contains(&index));
        (is_pendings || policy::owns_route(config, route)) && policy::is_mains_for_some(route)
    };
    Family::BOTH.into_iter().any(|family| policy::is_best_default_by(&others, there(), family))
        || there().any(leads_away)
}

/// The ENIs of which it is sure that they are to be left alone.
fn left_alone(
    attached: &Attached,
    network: Option<&ContainerNetwork>,
    tree: &Tree,
    observed: &Observed,
    config: &Config,
) -> BTreeSet<MacAddr> {
    let ready = attached.ready.iter().map(|(mac, eni)| (*mac, Some(&eni.id), Some(eni)));
    let pending = attached.pending.iter().map(|(mac, pending)| (*mac, pending.id.as_ref(), None));
    let is_ignored = |(mac, id, eni): &(MacAddr, Option<&String>, Option<&Eni>)| {
        let network = network.filter(|_| *mac != attached.primary);
        let verdict = verdict(&facts(*mac, *id, *eni, tree, observed), network, config);
        matches!(verdict, Verdict::Ignored { .. }) || attached.still_left_alone.contains(mac)
    };
    ready.chain(pending).filter(is_ignored).map(|(mac, _, _)| mac).collect()
}

/// The links that are to be left alone by what the kernel alone tells of them: where the ENI's metadata would have to be
/// asked, they are not.
pub fn ignored_links(observed: &Observed, config: &Config) -> BTreeSet<u32> {
    let is_ignored = |link: &&Link| matches!(verdict(&link_facts(link), None, config), Verdict::Ignored { .. });
    observed.links.values().filter(is_ignored).map(|link| link.index).collect()
}

/// Network cards that metadata does not list, though they may be ENIs: attached a moment ago, or no ENIs at all. A software
/// device counts until somebody uses it, as the veth ends of containers are used.
pub fn unlisted_links<'a>(attached: &Attached, observed: &'a Observed, config: &Config) -> Vec<&'a Link> {
    let ignored = ignored_links(observed, config);
    let is_listed = |mac: &MacAddr| attached.ready.contains_key(mac) || attached.pending.contains_key(mac);
    let is_unlisted = |link: &&Link| {
        let is_device = link.mac.is_some_and(|mac| mac.is_device() && !is_listed(&mac));
        let is_free = link.controller.is_none() && (link.kind.is_none() || !link.is_up);
        is_device && is_free && policy::can_be_eni(link) && !ignored.contains(&link.index)
    };
    observed.links.values().filter(is_unlisted).collect()
}

/// The entries of which it can be told that they mean none of these ENIs: one that comes later may be meant, or a word is
/// mistyped.
fn idle(known: &[Facts], config: &Config) -> Vec<String> {
    let Config { manage, ignore, enis, .. } = config;
    let entry = |key| move |selector| (key, selector);
    let of_enis = enis.iter().map(|(selector, _)| selector).map(entry("[[eni]]"));
    let entries = manage.iter().map(entry("[[manage]]")).chain(ignore.iter().map(entry("[[ignore]]"))).chain(of_enis);
    let is_idle = |selector: &Selector| known.iter().all(|facts| selector.selects(facts) == Some(false));
    let idle = entries.filter(|(_, selector)| is_idle(selector));
    idle.map(|(key, Selector { origin, .. })| format!("{key} at {origin} means no ENI that is attached now")).collect()
}

/// What is to become of an ENI, and which line of the configuration says so.
enum Verdict {
    Managed,
    Ignored {
        by: String,
    },
    /// `by_tags`: also by those of the instance.
    Undecided {
        by: String,
        by_tags: bool,
    },
}

fn verdict(facts: &Facts, network: Option<&ContainerNetwork>, config: &Config) -> Verdict {
    let Config { manage, ignore, .. } = config;
    if let Some(selector) = ignore.iter().find(|selector| selector.selects(facts) == Some(true)) {
        return Verdict::Ignored { by: format!("[[ignore]] at {}", selector.origin) };
    }
    let is_managed = |answer| manage.iter().find(|selector| selector.selects(facts) == answer);
    if let (Some(first), None, None) = (manage.first(), is_managed(Some(true)), is_managed(None)) {
        return Verdict::Ignored { by: format!("no [[manage]] means it (the first is at {})", first.origin) };
    }
    if let Some(selector) = ignore.iter().find(|selector| selector.selects(facts).is_none()) {
        return undecided("[[ignore]]", selector);
    }
    if let (None, Some(selector)) = (is_managed(Some(true)), is_managed(None)) {
        return undecided("[[manage]]", selector);
    }
    let unmanaged = unmanaged(facts, config);
    if let Some((selector, true)) = unmanaged {
        return Verdict::Ignored { by: format!("[[eni]] at {} (unmanaged)", selector.origin) };
    }
    if let Some((selector, _)) = config.enis.iter().find(|(selector, _)| selector.selects(facts).is_none()) {
        return undecided("[[eni]]", selector);
    }
    match network.filter(|_| manage.is_empty() && unmanaged.is_none()) {
        Some(ContainerNetwork { name, sign }) => Verdict::Ignored {
            by: format!("{name} is here ({sign}) and may have attached it; if it is yours, say so with [[manage]]"),
        },
        None => Verdict::Managed,
    }
}

/// What the last entry says that says whether this ENI is unmanaged, whatever it says besides; none when none does, or when
/// it cannot be told whether the last one means it.
fn unmanaged<'a>(facts: &Facts, config: &'a Config) -> Option<(&'a Selector, bool)> {
    let says = config.enis.iter().rev().filter_map(|(selector, choices)| Some((selector, choices.unmanaged?)));
    let mut says = says.filter(|(selector, _)| selector.selects(facts) != Some(false));
    says.next().filter(|(selector, _)| selector.selects(facts) == Some(true))
}

/// The primary of a machine with a container network, which has given every address but each family's first to a container
/// or will: an address that the machine itself had would no longer reach it.
fn with_pods(eni: &Eni) -> Eni {
    let all = Family::BOTH.into_iter().flat_map(|family| eni.addresses(family));
    let of_pods = all.filter(|address| !eni.is_distributions(*address)).map(IpNet::from);
    Eni { of_others: of_pods.collect(), ..eni.clone() }
}

fn undecided(entry: &str, selector: &Selector) -> Verdict {
    let by_tags = selector.wanted.contains_key(&Attribute::InstanceTag);
    Verdict::Undecided { by: format!("{entry} at {}", selector.origin), by_tags }
}

/// What all entries that mean this ENI choose for it.
fn choices(facts: &Facts, config: &Config) -> Choices {
    let meant = config.enis.iter().filter(|(selector, _)| selector.selects(facts) == Some(true));
    meant.fold(Choices::default(), |choices, (_, later)| choices.and_then(later))
}

/// What is known of an ENI. One that has no link has no name either.
fn facts(mac: MacAddr, id: Option<&String>, eni: Option<&Eni>, tree: &Tree, observed: &Observed) -> Facts {
    let one = |text: String| BTreeSet::from([text]);
    let links = observed.links.values().filter(|link| link.mac == Some(mac) && policy::can_be_eni(link));
    let mut facts: Facts = BTreeMap::from([(Attribute::Link, links.flat_map(names).collect())]);
    facts.insert(Attribute::Mac, one(mac.to_string()));
    facts.extend(id.map(|id| (Attribute::Id, one(id.clone()))));
    facts.extend(eni.map(|eni| (Attribute::NetworkCard, one(eni.slot.network_card.to_string()))));
    facts.extend(eni.map(|eni| (Attribute::DeviceNumber, one(eni.slot.device_number.to_string()))));
    let mut tell = |attribute, values: Option<BTreeSet<String>>| facts.extend(values.map(|values| (attribute, values)));
    // No ENI is in no subnet or in no security group: an empty answer has not told.
    let told = |tree, mac, key| told(tree, mac, key).filter(|values| !values.is_empty());
    tell(Attribute::SubnetId, told(tree, mac, "subnet-id"));
    tell(Attribute::VpcId, told(tree, mac, "vpc-id"));
    let groups = told(tree, mac, "security-groups").zip(told(tree, mac, "security-group-ids"));
    tell(Attribute::InstanceTag, metadata::instance_tags(tree));
    tell(Attribute::SecurityGroup, groups.map(|(names, ids)| names.into_iter().chain(ids).collect()));
    facts
}

/// What the kernel tells of an ENI; its id only where it is an alternative name of the link.
fn link_facts(link: &Link) -> Facts {
    let mut facts: Facts = BTreeMap::from([(Attribute::Link, names(link).collect())]);
    facts.extend(link.mac.map(|mac| (Attribute::Mac, BTreeSet::from([mac.to_string()]))));
    let id = link.altnames.iter().find(|name| name.starts_with("eni-"));
    facts.extend(id.map(|id| (Attribute::Id, BTreeSet::from([id.clone()]))));
    facts
}

fn names(link: &Link) -> impl Iterator<Item = String> {
    std::iter::once(&link.name).chain(&link.altnames).cloned()
}

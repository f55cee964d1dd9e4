//! What holds whatever metadata, machine and configuration are.

use std::collections::BTreeSet;

use eniup::config::Config;
use eniup::cover::overlap;
use eniup::desired::{Desired, desired};
use eniup::eni::Attached;
use eniup::markers::Files;
use eniup::metadata::{Answer, ROUTING_KEYS, Tree, eni_directory};
use eniup::net::{Family, MacAddr, Observed, Rule};
use eniup::operation::Operation;
use eniup::plan::{Plan, plan};
use eniup::policy;
use eniup::selection::select;
use eniup::status::{Sides, status};
use ipnet::IpNet;

use crate::model::apply;

/// No two ready ENIs share an id, a slot or a source; what each has lies in its subnets.
pub fn every_eni_has_its_own(attached: &Attached) {
    assert!(attached.ready.contains_key(&attached.primary) != attached.pending.contains_key(&attached.primary));
    for (mac, eni) in &attached.ready {
        assert!(!attached.pending.contains_key(mac), "{mac} is ready and pending");
        let others = || attached.ready.iter().filter(|(other, _)| *other != mac).map(|(_, other)| other);
        assert!(others().all(|other| other.id != eni.id && other.slot != eni.slot), "{attached:#?}");
        for family in Family::BOTH {
            for source in eni.sources(family) {
                assert!(eni.subnets(family).iter().any(|subnet| subnet.contains(&source)), "{source} of {mac}");
                let twice = others().find(|other| other.sources(family).iter().any(|theirs| overlap(theirs, &source)));
                assert!(twice.is_none(), "{source} is {mac}'s and {twice:?}'s");
            }
        }
    }
}

pub fn what_could_not_be_read_is_pending(tree: &Tree, attached: &Attached) {
    for mac in attached.ready.keys() {
        for key in ROUTING_KEYS {
            let answer = tree.get(&format!("{}{key}", eni_directory(*mac)));
            assert!(!matches!(answer, Answer::Unknown(_)), "{mac} is ready, and its {key} is not known");
        }
    }
}

/// One run makes the machine agree with metadata, and the next finds nothing to do; neither touches what is not ours.
pub fn one_run_converges(tree: &Tree, attached: &Attached, before: &Observed, config: &Config) {
    let mut after = before.clone();
    let (selected, desired, plan) = planned(tree, attached, before, config);
    nothing_foreign_goes(&plan, before, config);
    only_links_of_enis_are_set(&plan, &selected, before);
    for rule in desired.enis.values().flat_map(|eni| &eni.rules) {
        matches_its_own_enis_sources_only(&rule.object, &selected, &desired, config);
    }
    for step in &plan.steps {
        // Those that are for the whole machine repeat what somebody else's say.
        if let (Some(_), Operation::AddRule { rule }) = (&step.eni, &step.operation) {
            matches_its_own_enis_sources_only(rule, &selected, &desired, config);
        }
        assert!(!step.to_string().contains('\n'), "{step}");
    }
    let sides = Sides {
        tree,
        attached: &selected,
        observed: before,
        plan: &plan,
        config,
        troubles: &Default::default(),
        trial: None,
        taken_at: 0,
    };
    serde_json::to_string(&status(&sides)).expect("status can be shown");
    apply(&mut after, &plan);
    let (_, _, again) = planned(tree, attached, &after, config);
    assert_eq!(again.steps, [], "after\n{plan:#?}");
    assert_eq!(again.troubles, plan.troubles);
}

/// An automatic run that sees something for the first time takes no address away from a link that is here, but one that
/// metadata tells of elsewhere. `told` is what metadata says, `believed` what proof made of it.
pub fn first_sight_takes_no_address(
    tree: &Tree,
    told: &Attached,
    believed: &Attached,
    before: &Observed,
    config: &Config,
) {
    let (_, _, plan) = planned(tree, believed, before, config);
    let told: Vec<IpNet> = sources(told).into_iter().map(|(_, source)| source).collect();
    for step in &plan.steps {
        let Operation::DeleteAddress { link, address } = &step.operation else { continue };
        let link = &before.links[&link.index];
        let is_twice =
            before.links.values().filter(|other| policy::can_be_eni(other) && other.mac == link.mac).count() > 1;
        let stays = plan.steps.iter().any(|other| match &other.operation {
            Operation::AddAddress { link: on, address: same } => {
                on.index == link.index && same.net.addr() == address.net.addr()
            }
            _ => false,
        });
        let is_told = told.iter().any(|source| source.contains(&address.net.addr()));
        assert!(is_told || stays || is_twice || !policy::can_be_eni(link), "{step}, at first sight of {link:?}");
    }
}

fn planned(tree: &Tree, attached: &Attached, observed: &Observed, config: &Config) -> (Attached, Desired, Plan) {
    let selected = select(attached, tree, observed, &Files::default(), config);
    let desired = desired(&selected, config);
    let plan = plan(&desired, observed, selected.primary, config);
    (selected, desired, plan)
}

/// What a plan takes away is there, and carries the mark.
pub fn nothing_foreign_goes(plan: &Plan, before: &Observed, config: &Config) {
    for step in &plan.steps {
        let protocol = match &step.operation {
            Operation::DeleteAddress { link, address } if before.addresses.contains(&(link.index, *address)) => {
                address.protocol
            }
            Operation::ChangeAddress { link, address } => {
                let same = before.addresses.iter().find(|(on, there)| (*on, there.net) == (link.index, address.net));
                same.expect("what is changed is there").1.protocol
            }
            Operation::DeleteRoute { link, route }
                if before.routes.contains(&(link.as_ref().map(|link| link.index), *route)) =>
            {
                route.protocol
            }
            Operation::DeleteRule { rule } if before.rules.contains(rule) => rule.protocol,
            Operation::DeleteAddress { .. } | Operation::DeleteRoute { .. } | Operation::DeleteRule { .. } => {
                panic!("{step}: it is not there")
            }
            Operation::SetLink { .. } | Operation::AddRoute { .. } | Operation::AddRule { .. } => continue,
            Operation::AddAddress { .. } | Operation::ResetLink { .. } => continue,
        };
        assert_eq!(protocol, config.mark, "{step}");
    }
}

fn only_links_of_enis_are_set(plan: &Plan, selected: &Attached, before: &Observed) {
    let macs: BTreeSet<MacAddr> = selected.ready.keys().chain(selected.pending.keys()).copied().collect();
    for step in &plan.steps {
        let link = match &step.operation {
            Operation::SetLink { link, .. }
            | Operation::AddAddress { link, .. }
            | Operation::ChangeAddress { link, .. } => link,
            _ => continue,
        };
        let link = &before.links[&link.index];
        assert!(link.mac.is_some_and(|mac| macs.contains(&mac)) && link.controller.is_none(), "{step}: {link:?}");
    }
}

/// The promise: from an address of one ENI nothing leaves by another. What metadata gives to this ENI as well as to
/// another that is pending, or in dispute with it, is no other's.
fn matches_its_own_enis_sources_only(rule: &Rule, selected: &Attached, desired: &Desired, config: &Config) {
    let Some(from) = rule.from else { return };
    let is_of = |table: u32| [table, policy::last_table(config, table, rule.family)].contains(&rule.table);
    let mut owners = desired.enis.iter().filter(|(_, eni)| is_of(eni.table)).map(|(mac, _)| *mac);
    let owner = owners.next().unwrap_or_else(|| panic!("{rule:?} is no ENI's"));
    assert_eq!(owners.next(), None, "{rule:?} is two ENIs'");
    let eni = &selected.ready[&owner];
    let subnets = eni.all_subnets();
    // What stays for want of proof is as it was, whatever subnet it is of; nobody else has it.
    let is_known = subnets.iter().any(|subnet| subnet.contains(&from)) || eni.unproven.contains(&from);
    assert!(is_known, "{rule:?} reaches beyond {subnets:?}");
    let own = IpNet::aggregate(&eni.all_sources());
    for (mac, source) in sources(selected).into_iter().filter(|(mac, source)| *mac != owner && overlap(source, &from)) {
        let common = if from.contains(&source) { source } else { from };
        assert!(own.iter().any(|own| own.contains(&common)), "{rule:?} of {owner} matches {source} of {mac}");
    }
}

/// All that is known of who sends from what.
fn sources(selected: &Attached) -> Vec<(MacAddr, IpNet)> {
    let Attached { ready, pending, disputes, ignored, .. } = selected;
    let ready = ready.iter().map(|(mac, eni)| (*mac, eni.all_sources()));
    let pending = pending.iter().map(|(mac, pending)| (*mac, pending.sources.clone().unwrap_or_default()));
    let ignored = ignored.iter().map(|(mac, ignored)| (*mac, ignored.sources().unwrap_or_default()));
    let disputed =
        disputes.iter().map(|(mac, disputes)| (*mac, disputes.iter().map(|dispute| dispute.source).collect()));
    let all = ready.chain(pending).chain(ignored).chain(disputed);
    all.flat_map(|(mac, sources)| sources.into_iter().map(move |source| (mac, source))).collect()
}

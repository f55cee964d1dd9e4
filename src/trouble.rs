//! Which ENIs are not as they should be, and why, in words.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::eni::{Attached, Pending, Reason};
use crate::net::{Link, MacAddr, Observed};
use crate::plan::{Plan, Step};
use crate::report::{State, Trouble};
use crate::run::{Failure, unsettled};
use crate::selection::unlisted_links;

/// The ENIs for which something is left to do, with the first thing that failed.
pub fn plan_troubles(plan: &Plan, failures: &[Failure]) -> Vec<(String, Trouble)> {
    let mut troubles: Vec<(String, Trouble)> = Vec::new();
    for trouble in plan.troubles.values() {
        let state = if trouble.kind.may_pass() { State::Pending } else { State::Failed };
        troubles.push((trouble.eni.clone(), Trouble { state, why: trouble.kind.to_string() }));
    }
    let mut left: Vec<&Step> = plan.steps.iter().filter(|step| step.eni.is_some()).collect();
    // What failed explains what was left out because of it.
    left.sort_by_key(|step| !failures.iter().any(|(failed, _)| failed.operation == step.operation));
    for step in left {
        let Some(eni) = &step.eni else { continue };
        if troubles.iter().all(|(known, _)| known != eni) {
            let why = unsettled(std::slice::from_ref(step), failures).join("");
            troubles.push((eni.clone(), Trouble { state: State::Failed, why }));
        }
    }
    troubles
}

/// The troubles of a plan that was not carried out.
pub fn preview_troubles(attached: &Attached, plan: &Plan) -> Vec<(String, Trouble)> {
    let bare = Plan { steps: Vec::new(), ..plan.clone() };
    plan_troubles(&bare, &[]).into_iter().chain(pending_troubles(attached)).collect()
}

/// Every ENI that metadata lists, by the name that its troubles have.
pub fn listed(attached: &Attached) -> BTreeMap<String, State> {
    let name = |mac: &MacAddr, id: Option<&str>| id.map_or_else(|| format!("ENI {mac}"), String::from);
    let ready = attached.ready.values().map(|eni| (eni.id.clone(), State::Ready));
    let pending = attached.pending.iter().map(|(mac, pending)| (name(mac, pending.id.as_deref()), State::Pending));
    let ignored = attached.ignored.iter().map(|(mac, ignored)| (name(mac, ignored.id()), State::Ignored));
    ready.chain(pending).chain(ignored).collect()
}

/// What metadata does not tell yet, or tells wrongly.
pub fn pending_troubles(attached: &Attached) -> Vec<(String, Trouble)> {
    let pending = attached.pending.iter().map(|(mac, pending)| {
        let state = if pending.reason.may_pass() { State::Pending } else { State::Failed };
        let eni = pending.id.clone().unwrap_or_else(|| format!("ENI {mac}"));
        (eni, Trouble { state, why: pending.reason.to_string() })
    });
    let malformed = attached
        .malformed
        .iter()
        .enumerate()
        .map(|(n, why)| (format!("entry {}", n + 1), Trouble { state: State::Failed, why: why.clone() }));
    let disputed = attached.disputes.iter().filter_map(|(mac, disputes)| {
        let why: Vec<String> = disputes.iter().map(|dispute| dispute.to_string()).collect();
        Some((attached.ready.get(mac)?.id.clone(), Trouble { state: State::Pending, why: why.join("; ") }))
    });
    pending.chain(disputed).chain(malformed).collect()
}

/// What metadata tells, and is not done as long as it is not proven that another ENI has it no more.
pub fn waiting_for_proof(taken_as_true: &Attached) -> impl Iterator<Item = (String, Trouble)> {
    let is_itself = |(_, pending): &(&MacAddr, &Pending)| pending.reason == Reason::Unproven;
    let themselves: Vec<String> =
        taken_as_true.pending.iter().filter(is_itself).map(|(mac, _)| taken_as_true.name_of(*mac)).collect();
    pending_troubles(taken_as_true).into_iter().filter(move |(eni, _)| !themselves.contains(eni))
}

/// What is to be managed, and is not as long as that is not proven.
pub fn still_left_alone(taken_as_true: &Attached) -> impl Iterator<Item = (String, Trouble)> {
    let ignored = taken_as_true.ignored.iter().filter(|(mac, _)| taken_as_true.still_left_alone.contains(*mac));
    let why = "it was left alone until now, and that it is not to be any more is not proven";
    ignored.map(move |(mac, ignored)| {
        let eni = ignored.id().map_or_else(|| format!("ENI {mac}"), String::from);
        (eni, Trouble { state: State::Pending, why: why.into() })
    })
}

/// The links that metadata may come to tell of.
pub fn unlisted_troubles(attached: &Attached, observed: &Observed, config: &Config) -> Vec<(String, Trouble)> {
    let trouble = |mac| Trouble { state: State::Pending, why: format!("metadata does not list its MAC {mac}") };
    let of_link = |link: &Link| Some((format!("link {}", link.name), trouble(link.mac?)));
    unlisted_links(attached, observed, config).into_iter().filter_map(of_link).collect()
}

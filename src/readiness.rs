//! Whether an address or an ENI is configured, and what is missing: for whoever waits for it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::config::Config;
use crate::eni::{Attached, Dispute, Eni, Ignored};
use crate::explain::Said;
use crate::fib::{Packet, Way};
use crate::metadata::{self, Tree};
use crate::net::{Address, Family, Link, MacAddr, Observed, RouteKind};
use crate::operation::Operation;
use crate::place::find_link;
use crate::plan::{Plan, Step};
use crate::policy;
use crate::typo;

/// What is waited for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    Address(IpAddr),
    /// An ENI's id.
    Eni(String),
}

/// Each with a sentence for people, the target left out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Readiness {
    Ready(String),
    /// Something is missing, and it may come.
    Waits(String),
    /// It does not come by waiting.
    Never(String),
}

/// Of the addresses for documentation (RFC 5737, RFC 3849): they stand for any of the internet.
const INTERNET: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1))];

/// Only so many of a list are shown.
const SHOWN: usize = 20;

/// What the kernel is asked about an address: the way of what it sends to the internet.
pub fn question(address: IpAddr) -> Packet {
    let destination = INTERNET[usize::from(address.is_ipv6())];
    Packet { source: Some(address), destination, input: None, output: None, mark: 0 }
}

/// An address is configured when the kernel answers for it and sends what it sends by the same link: all that is to be known
/// of that the kernel knows, whoever has configured it.
pub fn of_address(address: IpAddr, observed: &Observed, said: &Said) -> Readiness {
    let on: BTreeSet<u32> =
        observed.addresses.iter().filter(|(_, there)| there.net.addr() == address).map(|(index, _)| *index).collect();
    let links: Vec<&Link> = on.iter().filter_map(|index| observed.links.get(index)).collect();
    let Some(first) = links.first() else { return Readiness::Waits("no link here has it".into()) };
    let name = &first.name;
    match said {
        _ if links.iter().all(|link| !link.is_up) => Readiness::Waits(format!("its link {name} is down")),
        _ if !has_local_route(address, observed) => {
            Readiness::Waits(format!("the kernel does not answer for it yet on {name}"))
        }
        Said::Way { way: Way::Out { link, .. }, .. } => match links.iter().find(|there| there.index == *link) {
            Some(link) => Readiness::Ready(format!("on {}, by which it also sends", link.name)),
            None => Readiness::Waits(format!("it is on {name}, but sends by {}", show_link(*link, observed))),
        },
        Said::Way { way: Way::Here, .. } => Readiness::Waits("what it sends does not leave this machine".into()),
        Said::Way { way: Way::Nowhere(refusal), .. } => {
            Readiness::Waits(format!("it is on {name}, but what it sends goes nowhere: {refusal}"))
        }
        Said::Way { way: Way::Unknown(doubt), .. } => Readiness::Waits(format!("it is on {name}, and {doubt}")),
        Said::Nothing(why) => Readiness::Waits(format!("it is on {name}, but the kernel does not tell its way: {why}")),
    }
}

/// IPv6 addresses get theirs when the kernel is done with them: with a worker, or with looking for duplicates.
fn has_local_route(address: IpAddr, observed: &Observed) -> bool {
    let is_local = RouteKind::Other(policy::LOCAL_ROUTE);
    observed.routes.iter().any(|(_, route)| route.kind == is_local && route.destination == address.into())
}

fn show_link(index: u32, observed: &Observed) -> String {
    observed.links.get(&index).map_or_else(|| format!("link {index}"), |link| link.name.clone())
}

/// What metadata says of an address that is not configured.
pub fn why_not(address: IpAddr, tree: &Tree, attached: &Attached) -> Readiness {
    let macs = attached.ready.keys().chain(attached.pending.keys()).chain(attached.ignored.keys());
    let associations = macs.flat_map(|mac| metadata::details(tree, *mac).associations);
    if let Some((_, private)) = associations.into_iter().find(|(public, _)| IpAddr::from(*public) == address) {
        return Readiness::Never(format!(
            "it is a public address, which no link ever has: wait for {private}, the private one behind it"
        ));
    }
    let in_dispute = |dispute: &&Dispute| dispute.source.contains(&IpNet::from(address));
    if let Some(dispute) = attached.disputes.values().flatten().find(in_dispute) {
        return Readiness::Waits(dispute.to_string());
    }
    let has_it = |eni: &Eni| eni.all_sources().contains(&address.into());
    if let Some(eni) = attached.ready.values().find(|eni| has_it(eni)) {
        return Readiness::Waits(format!("metadata gives it to {}", eni.id));
    }
    let ignored = attached.ignored.values().filter_map(|ignored| Some((ignored.ready()?, &ignored.by)));
    if let Some((eni, by)) = ignored.into_iter().find(|(eni, _)| has_it(eni)) {
        return Readiness::Waits(format!("metadata gives it to {}, which eniup leaves alone: {by}", eni.id));
    }
    let pending =
        attached.pending.values().filter(|pending| pending.sources.iter().flatten().any(|s| s.addr() == address));
    match pending.into_iter().next() {
        Some(pending) => Readiness::Waits(format!(
            "metadata gives it to {}, which is pending: {}",
            pending.id.as_deref().unwrap_or("an ENI"),
            pending.reason
        )),
        None => Readiness::Waits("metadata gives it to no ENI of this instance".into()),
    }
}

/// An ENI is configured when nothing is left to be added for it. What is left to be taken away takes nothing from anybody.
pub fn of_eni(id: &str, attached: &Attached, plan: &Plan, observed: &Observed, config: &Config) -> Readiness {
    if let Some((mac, eni)) = attached.ready.iter().find(|(_, eni)| eni.id == id) {
        return of_ready(*mac, eni, attached, plan, observed, config);
    }
    let is_it = |ignored: &&Ignored| ignored.id() == Some(id);
    if let Some(ignored) = attached.ignored.values().find(is_it) {
        return Readiness::Never(format!("eniup leaves it alone: {}", ignored.by));
    }
    match attached.pending.values().find(|pending| pending.id.as_deref() == Some(id)) {
        Some(pending) if pending.reason.may_pass() => Readiness::Waits(pending.reason.to_string()),
        Some(pending) => Readiness::Never(pending.reason.to_string()),
        None => {
            let known = known_ids(attached);
            let shown: Vec<&str> = known.iter().copied().take(SHOWN).collect();
            let hint = typo::hint(id, known.iter().copied());
            Readiness::Waits(format!("metadata has no such ENI; it has {}{hint}", shown.join(", ")))
        }
    }
}

fn of_ready(
    mac: MacAddr,
    eni: &Eni,
    attached: &Attached,
    plan: &Plan,
    observed: &Observed,
    config: &Config,
) -> Readiness {
    if let Some(trouble) = plan.troubles.get(&mac) {
        let why = trouble.kind.to_string();
        return if trouble.kind.may_pass() { Readiness::Waits(why) } else { Readiness::Never(why) };
    }
    if let Some(dispute) = attached.disputes.get(&mac).and_then(|disputes| disputes.first()) {
        return Readiness::Waits(dispute.to_string());
    }
    let is_left = |step: &&Step| step.eni.as_deref() == Some(&eni.id) && adds(&step.operation);
    let left: Vec<&Step> = plan.steps.iter().filter(is_left).collect();
    if let Some(first) = left.first() {
        let more = if left.len() > 1 { format!(" and {} more", left.len() - 1) } else { String::new() };
        return Readiness::Waits(format!("not done yet: {}{more}", first.operation));
    }
    match find_link(mac, observed).ok().flatten() {
        Some(link) if is_settling(link, observed, config) => {
            Readiness::Waits(format!("the kernel does not answer for all addresses on {} yet", link.name))
        }
        Some(link) => Readiness::Ready(format!("on {} with {}", link.name, show_addresses(eni))),
        None => Readiness::Ready("it has no address and no link, and needs none".into()),
    }
}

fn is_settling(link: &Link, observed: &Observed, config: &Config) -> bool {
    let of_link = |(index, _): &&(u32, Address)| *index == link.index;
    let addresses = observed.addresses.iter().filter(of_link).cloned().collect();
    policy::is_settling(config, &Observed { addresses, ..observed.clone() })
}

fn show_addresses(eni: &Eni) -> String {
    let all: Vec<String> =
        Family::BOTH.iter().flat_map(|family| eni.addresses(*family)).map(|a| a.to_string()).collect();
    let shown = all[..all.len().min(SHOWN)].join(", ");
    if all.len() > SHOWN { format!("{shown} and {} more", all.len() - SHOWN) } else { shown }
}

fn known_ids(attached: &Attached) -> BTreeSet<&str> {
    let ready = attached.ready.values().map(|eni| eni.id.as_str());
    let pending = attached.pending.values().filter_map(|pending| pending.id.as_deref());
    ready.chain(pending).chain(attached.ignored.values().filter_map(Ignored::id)).collect()
}

fn adds(operation: &Operation) -> bool {
    match operation {
        Operation::SetLink { .. }
        | Operation::AddRoute { .. }
        | Operation::AddRule { .. }
        | Operation::AddAddress { .. }
        | Operation::ChangeAddress { .. } => true,
        Operation::DeleteAddress { .. }
        | Operation::DeleteRule { .. }
        | Operation::DeleteRoute { .. }
        | Operation::ResetLink { .. } => false,
    }
}

/// The ENIs of which metadata is asked again: one that is waited for, and those that are not all there.
pub fn to_ask_again(target: &Target, attached: &Attached) -> BTreeSet<MacAddr> {
    match target {
        // Any of them may get it.
        Target::Address(_) => attached.ready.keys().chain(attached.pending.keys()).copied().collect(),
        Target::Eni(id) => {
            let its = attached.ready.iter().filter(|(_, eni)| eni.id == *id).map(|(mac, _)| *mac);
            attached.unsettled().into_iter().chain(its).collect()
        }
    }
}

/// An ENI's id as EC2 writes it.
///
/// # Errors
/// What is wrong with it.
pub fn parse_id(text: &str) -> Result<String, String> {
    let digits = text.strip_prefix("eni-").unwrap_or_default();
    let is_digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    match [8, 17].contains(&digits.len()) && digits.chars().all(is_digit) {
        true => Ok(text.into()),
        false => Err("an ENI's id is eni- and 8 or 17 hexadecimal digits, as eni-0123456789abcdef0".into()),
    }
}

/// An address that an ENI can have.
///
/// # Errors
/// What is wrong with it.
pub fn parse_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| "expected an address, as 10.0.1.20 or 2001:db8::20".to_string())?;
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    match address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_link_local {
        true => Err("no ENI has an address of that sort".into()),
        false => Ok(address),
    }
}

//! Both sides of every ENI, metadata's and the kernel's, for people as text and for programs as JSON.

// A length of time, no clock.
use core::time::Duration;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use anyhow::Result;
use serde::Serialize;

use crate::config::Config;
use crate::desired::desired;
use crate::eni::{Attached, Eni};
use crate::layout::{self, Column};
use crate::ledger::Noted;
use crate::metadata::{self, Tree};
use crate::net::{Address, Family, Link, MacAddr, Observed};
use crate::place::find_link;
use crate::plan::{Plan, plan};
use crate::policy;
use crate::report::{Exit, State, Trouble};
use crate::selection::select;
use crate::snapshot::Snapshot;
use crate::trial::Notice;
use crate::trouble::preview_troubles;

/// Raised when a key changes its meaning or goes away; keys may be added at any time.
const SCHEMA: u32 = 1;

#[derive(Serialize, Debug)]
pub struct Status {
    pub schema: u32,
    /// Seconds since 1970.
    pub taken_at: u64,
    /// How the last run on trial stands, while that matters.
    pub trial: Option<Notice>,
    pub enis: Vec<EniStatus>,
    /// Changes that a run would make and that belong to no single ENI.
    pub drift: Vec<String>,
    /// Listed entries that cannot be used.
    pub malformed: Vec<String>,
    pub notes: Vec<String>,
}

#[derive(Serialize, Debug)]
pub struct EniStatus {
    pub id: Option<String>,
    pub mac: MacAddr,
    pub is_primary: bool,
    pub state: State,
    pub why: Option<String>,
    /// Seconds since 1970: from then on runs found it so.
    pub since: Option<u64>,
    pub network_card: Option<u32>,
    pub device_number: Option<u32>,
    pub link: Option<LinkStatus>,
    pub table: Option<u32>,
    pub subnet_id: Option<String>,
    pub vpc_id: Option<String>,
    pub vpc_cidrs: Vec<String>,
    pub subnets: Vec<String>,
    pub security_groups: Vec<String>,
    pub security_group_ids: Vec<String>,
    pub addresses: Vec<AddressStatus>,
    pub delegated_prefixes: Vec<String>,
    /// The commands by which a run would bring it into agreement.
    pub drift: Vec<String>,
}

#[derive(Serialize, Debug)]
pub struct LinkStatus {
    pub name: String,
    pub altnames: Vec<String>,
    pub is_up: bool,
    pub has_carrier: Option<bool>,
    pub mtu: u32,
}

#[derive(Serialize, Debug)]
pub struct AddressStatus {
    pub address: IpAddr,
    /// The elastic or other public address in front of it.
    pub public: Option<std::net::Ipv4Addr>,
    pub in_metadata: bool,
    /// With its length there; none when the link does not have it.
    pub on_link: Option<String>,
    pub is_ours: bool,
}

/// Both sides, and what runs have noted.
#[derive(Clone, Copy)]
pub struct Sides<'a> {
    pub tree: &'a Tree,
    pub attached: &'a Attached,
    pub observed: &'a Observed,
    pub plan: &'a Plan,
    pub config: &'a Config,
    pub troubles: &'a BTreeMap<String, Noted>,
    pub trial: Option<&'a Notice>,
    /// Seconds since 1970.
    pub taken_at: u64,
}

/// Of a snapshot, which may be one of this very moment.
///
/// # Errors
/// It has no metadata, or none that can be used.
pub fn of_snapshot(snapshot: &Snapshot, config: &Config) -> Result<Status> {
    let (observed, tree) = (snapshot.observed(config.mark), snapshot.tree()?);
    let attached = select(&metadata::attached_here(&tree, &observed.links)?, &tree, &observed, &snapshot.files, config);
    let plan = plan(&desired(&attached, config), &observed, attached.primary, config);
    let troubles = snapshot.ledger.clone().of(attached.primary).troubles;
    Ok(status(&Sides {
        tree: &tree,
        attached: &attached,
        observed: &observed,
        plan: &plan,
        config,
        troubles: &troubles,
        trial: snapshot.trial.as_ref(),
        taken_at: snapshot.taken_at,
    }))
}

/// Puts both sides together.
pub fn status(sides: &Sides) -> Status {
    let Sides { attached, plan, trial, taken_at, .. } = *sides;
    let mut enis: Vec<EniStatus> = Vec::new();
    for (mac, eni) in &attached.ready {
        enis.push(eni_status(*mac, Some(eni), sides));
    }
    for mac in attached.pending.keys() {
        enis.push(eni_status(*mac, None, sides));
    }
    for (mac, ignored) in &attached.ignored {
        enis.push(eni_status(*mac, ignored.ready(), sides));
    }
    enis.sort_by_key(|eni| {
        (!eni.is_primary, eni.device_number.is_none(), eni.network_card, eni.device_number, eni.mac)
    });
    let machine = plan.steps.iter().filter(|step| step.eni.is_none());
    Status {
        schema: SCHEMA,
        taken_at,
        trial: trial.cloned(),
        enis,
        drift: machine.map(|step| step.operation.to_string()).collect(),
        malformed: attached.malformed.clone(),
        notes: plan.notes.iter().chain(&attached.idle).cloned().collect(),
    }
}

fn eni_status(mac: MacAddr, eni: Option<&Eni>, sides: &Sides) -> EniStatus {
    let Sides { tree, attached, observed, plan, config, .. } = *sides;
    let pending = attached.pending.get(&mac).or_else(|| attached.ignored.get(&mac)?.pending());
    let id = eni.map(|eni| eni.id.clone()).or_else(|| pending.and_then(|pending| pending.id.clone()));
    let steps = plan.steps.iter().filter(|step| step.eni.is_some() && step.eni == id);
    let drift: Vec<String> = steps.map(|step| step.operation.to_string()).collect();
    let name = id.clone().unwrap_or_else(|| format!("ENI {mac}"));
    let (trouble, since) = trouble(mac, &name, &drift, sides).unzip();
    let details = metadata::details(tree, mac);
    let link = find_link(mac, observed).ok().flatten();
    let both = |f: fn(&Eni, Family) -> Vec<ipnet::IpNet>| -> Vec<String> {
        let nets = eni.into_iter().flat_map(|eni| Family::BOTH.into_iter().flat_map(|family| f(eni, family)));
        nets.map(|net| net.to_string()).collect()
    };
    EniStatus {
        mac,
        is_primary: mac == attached.primary,
        state: trouble.as_ref().map_or(State::Ready, |trouble| trouble.state),
        since: since.flatten(),
        why: trouble.map(|trouble| trouble.why).or_else(|| attached.shared.get(&mac).cloned()),
        network_card: eni.map(|eni| eni.slot.network_card),
        device_number: eni.map(|eni| eni.slot.device_number),
        link: link.map(|link| LinkStatus {
            name: link.name.clone(),
            altnames: link.altnames.iter().cloned().collect(),
            is_up: link.is_up,
            has_carrier: link.has_carrier,
            mtu: link.mtu,
        }),
        table: eni.filter(|_| !attached.ignored.contains_key(&mac)).map(|eni| policy::table(config, eni.slot)),
        subnets: both(Eni::subnets),
        addresses: addresses(eni, link, &details, observed, config),
        delegated_prefixes: both(Eni::prefixes),
        subnet_id: details.subnet_id,
        vpc_id: details.vpc_id,
        vpc_cidrs: details.vpc_cidrs,
        security_groups: details.security_groups,
        security_group_ids: details.security_group_ids,
        drift,
        id,
    }
}

/// Why an ENI is not as it should be or is left alone, and since when, as far as that is noted.
fn trouble(mac: MacAddr, name: &str, drift: &[String], sides: &Sides) -> Option<(Trouble, Option<u64>)> {
    let Sides { attached, plan, troubles, .. } = *sides;
    if let Some(ignored) = attached.ignored.get(&mac) {
        return Some((Trouble { state: State::Ignored, why: ignored.by.clone() }, None));
    }
    let noted = troubles.get(name);
    let told = preview_troubles(attached, plan).into_iter().find(|(eni, _)| eni == name);
    if let Some((_, trouble)) = told {
        let since = noted.filter(|noted| noted.why == trouble.why).map(|noted| noted.since);
        return Some((trouble, since));
    }
    let (first, others) = drift.split_first()?;
    // What is to be done still, and was tried.
    if let Some(failed) = noted.filter(|noted| noted.is_failed) {
        let why = format!("the last run could not bring it about: {}", failed.why);
        return Some((Trouble { state: State::Failed, why }, Some(failed.since)));
    }
    let more = if others.is_empty() { String::new() } else { format!(", and {} more", others.len()) };
    Some((Trouble { state: State::Drifted, why: format!("a run would do `{first}`{more}") }, None))
}

/// Metadata's addresses in its order, then what only the link has.
fn addresses(
    eni: Option<&Eni>,
    link: Option<&Link>,
    details: &metadata::Details,
    observed: &Observed,
    config: &Config,
) -> Vec<AddressStatus> {
    let on_link: Vec<&Address> = observed
        .addresses
        .iter()
        .filter(|(index, _)| link.is_some_and(|link| link.index == *index))
        .map(|(_, address)| address)
        .collect();
    let row = |address: IpAddr, in_metadata: bool| {
        let there = on_link.iter().find(|there| there.net.addr() == address);
        let public = details.associations.iter().find(|(_, private)| IpAddr::from(**private) == address);
        AddressStatus {
            address,
            public: public.map(|(public, _)| *public),
            in_metadata,
            on_link: there.map(|there| there.net.to_string()),
            is_ours: there.is_some_and(|there| policy::owns_address(config, there)),
        }
    };
    let known: Vec<IpAddr> =
        eni.into_iter().flat_map(|eni| Family::BOTH.into_iter().flat_map(|family| eni.addresses(family))).collect();
    let is_link_local = |address: &IpAddr| matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    let others =
        on_link.iter().map(|there| there.net.addr()).filter(|there| !known.contains(there) && !is_link_local(there));
    known.iter().map(|address| row(*address, true)).chain(others.map(|address| row(address, false))).collect()
}

impl Status {
    pub fn exit(&self) -> Exit {
        let is_well = self.malformed.is_empty() && self.enis.iter().all(|eni| eni.state.is_well());
        if is_well { Exit::Ok } else { Exit::Degraded }
    }

    /// Whether all is well, in a sentence.
    fn summary(&self) -> String {
        let changes = self.drift.len() + self.enis.iter().map(|eni| eni.drift.len()).sum::<usize>();
        let unready = self.enis.iter().filter(|eni| !eni.state.is_well()).count();
        let remedy = "see `eniup plan`, run `eniup reconcile`";
        match (changes, unready) {
            (0, 0) => "The kernel agrees with metadata.".into(),
            (0, n) => format!("Nothing to change at the moment; {} not ready.", count(n, "ENI is", "ENIs are")),
            (n, _) => format!("{} would bring the kernel into agreement: {remedy}.", count(n, "change", "changes")),
        }
    }
}

fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// What is worth a colour on a terminal.
#[derive(Clone, Copy)]
enum Colour {
    Bold,
    Good,
    Waiting,
    Bad,
}

/// Status as a text for people.
pub struct Text<'a> {
    pub status: &'a Status,
    /// Escape sequences are for terminals alone.
    pub has_colour: bool,
    /// Letters in a line, where that is limited.
    pub width: Option<usize>,
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Status { schema: _, taken_at, trial, enis, drift, malformed, notes } = self.status;
        for eni in enis {
            self.write_eni(f, eni, *taken_at)?;
            writeln!(f)?;
        }
        for line in drift {
            writeln!(f, "would change: {}", plain(line))?;
        }
        if let Some(trial) = trial {
            writeln!(f, "note: {}", plain(&trial.to_string()))?;
        }
        for line in malformed.iter().chain(notes) {
            writeln!(f, "note: {}", plain(line))?;
        }
        writeln!(f, "{}", self.status.summary())
    }
}

impl Text<'_> {
    fn paint(&self, colour: Colour, text: &str) -> String {
        let code = match colour {
            Colour::Bold => 1,
            Colour::Good => 32,
            Colour::Waiting => 33,
            Colour::Bad => 31,
        };
        if self.has_colour { format!("\x1b[{code}m{}\x1b[0m", plain(text)) } else { plain(text) }
    }

    fn write_eni(&self, f: &mut fmt::Formatter, eni: &EniStatus, now: u64) -> fmt::Result {
        let colour = match eni.state {
            State::Ready => Colour::Good,
            State::Pending | State::Drifted => Colour::Waiting,
            State::Failed => Colour::Bad,
            State::Ignored => Colour::Bold,
        };
        let role = if eni.is_primary { "primary" } else { "secondary" };
        let id = self.paint(Colour::Bold, eni.id.as_deref().unwrap_or("(no id yet)"));
        let length = |since| humantime::format_duration(Duration::from_secs(now.saturating_sub(since)));
        let since = eni.since.map(|since| format!(" for {}", length(since))).unwrap_or_default();
        writeln!(f, "{id}  {role} ENI, {}{since}", self.paint(colour, &eni.state.to_string()))?;
        for (label, value) in facts(eni) {
            writeln!(f, "  {label:15}  {}", plain(&value))?;
        }
        write!(f, "{}", addresses_table(&eni.addresses, self.width))?;
        for line in &eni.drift {
            writeln!(f, "  would change: {}", plain(line))?;
        }
        Ok(())
    }
}

/// What is known of an ENI beside its addresses, by label.
fn facts(eni: &EniStatus) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    facts.extend(eni.why.iter().map(|why| ("why", why.clone())));
    facts.push(("MAC", eni.mac.to_string()));
    let slot = eni.network_card.zip(eni.device_number);
    facts.extend(slot.map(|(card, device)| ("card/device", format!("{card}/{device}"))));
    facts.push(("link", eni.link.as_ref().map_or_else(|| "none that is its own".into(), LinkStatus::to_string)));
    // The primary's own table serves a few narrow rules only; its traffic follows main.
    facts.extend(eni.table.filter(|_| !eni.is_primary).map(|table| ("table", table.to_string())));
    let subnet: Vec<&str> = eni.subnet_id.iter().chain(&eni.subnets).map(String::as_str).collect();
    facts.push(("subnet", subnet.join(" ")));
    let vpc: Vec<&str> = eni.vpc_id.iter().chain(&eni.vpc_cidrs).map(String::as_str).collect();
    facts.push(("VPC", vpc.join(" ")));
    facts.push(("security groups", eni.security_groups.join(", ")));
    // In an order of their own.
    facts.push(("group ids", eni.security_group_ids.join(" ")));
    facts.push(("prefixes", eni.delegated_prefixes.join(" ")));
    facts.retain(|(_, value)| !value.is_empty());
    facts
}

impl fmt::Display for LinkStatus {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let LinkStatus { name, altnames, is_up, has_carrier, mtu } = self;
        let state = match (is_up, has_carrier) {
            (false, _) => "down",
            (true, Some(false)) => "up, no carrier",
            (true, _) => "up",
        };
        write!(f, "{name}, {state}, MTU {mtu}")?;
        if altnames.is_empty() { Ok(()) } else { write!(f, ", also {}", altnames.join(", ")) }
    }
}

/// Columns that fit: that an address is public or in metadata is left out before what the link has.
fn addresses_table(addresses: &[AddressStatus], width: Option<usize>) -> String {
    if addresses.is_empty() {
        return String::new();
    }
    let column = |head, rank, cell: &dyn Fn(&AddressStatus) -> String| Column {
        head,
        cells: addresses.iter().map(cell).collect(),
        rank,
    };
    let on_link = |row: &AddressStatus| match &row.on_link {
        Some(net) if row.is_ours => format!("{net}, by eniup"),
        Some(net) => net.clone(),
        None => "no".into(),
    };
    let columns = vec![
        column("address", 0, &|row| row.address.to_string()),
        column("public", 2, &|row| row.public.map_or_else(|| "-".into(), |public| public.to_string())),
        column("in metadata", 1, &|row| if row.in_metadata { "yes" } else { "no" }.into()),
        column("on the link", 0, &on_link),
    ];
    layout::table(columns, width)
}

/// Metadata holds names that people chose; none of them may speak to the terminal.
fn plain(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_from_metadata_cannot_speak_to_the_terminal() {
        assert_eq!(plain("web \u{1b}]0;owned\u{7} ä"), "web \\u{1b}]0;owned\\u{7} ä");
    }
}

//! Both sides of every ENI, metadata's and the kernel's, for people as text and for programs as JSON.

use std::fmt::{self, Write as _};
use std::net::IpAddr;

use serde::Serialize;

use crate::config::Config;
use crate::eni::{Attached, Eni, Slot};
use crate::metadata::{self, Tree};
use crate::net::{Address, Family, Link, MacAddr, Observed};
use crate::plan::{Plan, find_link};
use crate::policy;
use crate::reconcile::preview_troubles;
use crate::report::{Exit, State};

/// Raised when a key changes its meaning or goes away; keys may be added at any time.
const SCHEMA: u32 = 1;

#[derive(Serialize, Debug)]
pub struct Status {
    pub schema: u32,
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
    #[serde(flatten)]
    pub slot: Option<Slot>,
    pub link: Option<LinkStatus>,
    pub table: Option<u32>,
    pub subnet_id: Option<String>,
    pub vpc_id: Option<String>,
    pub subnets: Vec<String>,
    pub security_groups: Vec<String>,
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

/// Puts both sides together.
pub fn status(tree: &Tree, attached: &Attached, observed: &Observed, plan: &Plan, config: &Config) -> Status {
    let mut enis: Vec<EniStatus> = Vec::new();
    for (mac, eni) in &attached.ready {
        enis.push(eni_status(*mac, Some(eni), tree, attached, observed, plan, config));
    }
    for mac in attached.pending.keys() {
        enis.push(eni_status(*mac, None, tree, attached, observed, plan, config));
    }
    enis.sort_by_key(|eni| (!eni.is_primary, eni.slot.is_none(), eni.slot, eni.mac));
    let machine = plan.steps.iter().filter(|step| step.eni.is_none());
    Status {
        schema: SCHEMA,
        enis,
        drift: machine.map(|step| step.operation.to_string()).collect(),
        malformed: attached.malformed.clone(),
        notes: plan.notes.clone(),
    }
}

fn eni_status(
    mac: MacAddr,
    eni: Option<&Eni>,
    tree: &Tree,
    attached: &Attached,
    observed: &Observed,
    plan: &Plan,
    config: &Config,
) -> EniStatus {
    let pending = attached.pending.get(&mac);
    let id = eni.map(|eni| eni.id.clone()).or_else(|| pending.and_then(|pending| pending.id.clone()));
    let name = id.clone().unwrap_or_else(|| format!("ENI {mac}"));
    let trouble =
        preview_troubles(attached, plan).into_iter().find(|(eni, _)| *eni == name).map(|(_, trouble)| trouble);
    let details = metadata::details(tree, mac);
    let link = find_link(mac, observed).ok().flatten();
    let both = |f: fn(&Eni, Family) -> Vec<ipnet::IpNet>| -> Vec<String> {
        let nets = eni.into_iter().flat_map(|eni| Family::BOTH.into_iter().flat_map(|family| f(eni, family)));
        nets.map(|net| net.to_string()).collect()
    };
    let drift = plan.steps.iter().filter(|step| step.eni.is_some() && step.eni == id);
    EniStatus {
        mac,
        is_primary: mac == attached.primary,
        state: trouble.as_ref().map_or(State::Ready, |trouble| trouble.state),
        why: trouble.map(|trouble| trouble.why),
        slot: eni.map(|eni| eni.slot),
        link: link.map(|link| LinkStatus {
            name: link.name.clone(),
            altnames: link.altnames.iter().cloned().collect(),
            is_up: link.is_up,
            mtu: link.mtu,
        }),
        table: eni.map(|eni| policy::table(config, eni.slot)),
        subnets: both(Eni::subnets),
        addresses: addresses(eni, link, &details, observed, config),
        delegated_prefixes: both(Eni::prefixes),
        subnet_id: details.subnet_id,
        vpc_id: details.vpc_id,
        security_groups: details.security_groups,
        drift: drift.map(|step| step.operation.to_string()).collect(),
        id,
    }
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
        let is_well = self.malformed.is_empty() && self.enis.iter().all(|eni| eni.state == State::Ready);
        if is_well { Exit::Ok } else { Exit::Degraded }
    }

    fn changes(&self) -> usize {
        self.drift.len() + self.enis.iter().map(|eni| eni.drift.len()).sum::<usize>()
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for eni in &self.enis {
            write!(f, "{eni}")?;
        }
        for line in &self.drift {
            writeln!(f, "would change: {line}")?;
        }
        for line in self.malformed.iter().chain(&self.notes) {
            writeln!(f, "note: {line}")?;
        }
        match self.changes() {
            0 => writeln!(f, "The kernel agrees with metadata."),
            1 => {
                writeln!(f, "1 change would bring the kernel into agreement: see `eniup plan`, run `eniup reconcile`.")
            }
            n => writeln!(
                f,
                "{n} changes would bring the kernel into agreement: see `eniup plan`, run `eniup reconcile`."
            ),
        }
    }
}

impl fmt::Display for EniStatus {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let role = if self.is_primary { "primary ENI" } else { "secondary ENI" };
        let id = self.id.as_deref().unwrap_or("(no id yet)");
        write!(f, "{id}  {role}, {}", self.state)?;
        match &self.why {
            Some(why) => writeln!(f, ": {why}")?,
            None if self.drift.is_empty() => writeln!(f)?,
            None => writeln!(f, ", {} to change", self.drift.len())?,
        }
        let mut place = format!("MAC {}", self.mac);
        if let Some(slot) = self.slot {
            let _ = write!(place, ", card/device {slot}");
        }
        if let Some(table) = self.table.filter(|_| !self.is_primary) {
            let _ = write!(place, ", table {table}");
        }
        writeln!(f, "  {place}")?;
        match &self.link {
            Some(link) => {
                let names =
                    if link.altnames.is_empty() { String::new() } else { format!(" ({})", link.altnames.join(", ")) };
                writeln!(
                    f,
                    "  link {}{names}, {}, MTU {}",
                    link.name,
                    if link.is_up { "up" } else { "down" },
                    link.mtu
                )?;
            }
            None => writeln!(f, "  no link on this machine")?,
        }
        let of =
            [self.subnet_id.as_deref().unwrap_or(""), &self.subnets.join(" "), self.vpc_id.as_deref().unwrap_or("")];
        let of: Vec<&str> = of.into_iter().filter(|part| !part.is_empty()).collect();
        if !of.is_empty() {
            writeln!(f, "  subnet {}", of.join(", "))?;
        }
        if !self.security_groups.is_empty() {
            writeln!(f, "  security groups {}", self.security_groups.join(", "))?;
        }
        write_addresses(f, &self.addresses)?;
        for prefix in &self.delegated_prefixes {
            writeln!(f, "  delegated prefix {prefix}")?;
        }
        for line in &self.drift {
            writeln!(f, "  would change: {line}")?;
        }
        writeln!(f)
    }
}

fn write_addresses(f: &mut fmt::Formatter, addresses: &[AddressStatus]) -> fmt::Result {
    if addresses.is_empty() {
        return Ok(());
    }
    let width = addresses.iter().map(|row| row.address.to_string().len()).max().unwrap_or(0).max("address".len());
    writeln!(f, "  {:width$}  {:15}  {:8}  on the link", "address", "public", "metadata")?;
    for row in addresses {
        let public = row.public.map(|public| public.to_string()).unwrap_or_default();
        let in_metadata = if row.in_metadata { "yes" } else { "no" };
        let on_link = match &row.on_link {
            Some(net) if row.is_ours => format!("{net}, by eniup"),
            Some(net) => net.clone(),
            None => "no".into(),
        };
        writeln!(f, "  {:width$}  {public:15}  {in_metadata:8}  {on_link}", row.address)?;
    }
    Ok(())
}

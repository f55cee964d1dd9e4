//! From a snapshot of instance metadata to the attached ENIs. The service's habits are written down here:
//! what its keys look like, which may be absent, and how a half-propagated ENI is told from a whole one.

mod details;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use self::details::{Details, details, instance_tags, lacks_instance_tags, told};
use self::tree::eni_mac;
pub use self::tree::{
    ASSOCIATIONS, Answer, DETAIL_KEYS, INSTANCE_TAGS, INTERFACES, PRIMARY_MAC, ROUTING_KEYS, SELECTOR_KEYS, SavedTree,
    Tree, eni_directory, lines, listed_macs,
};
use crate::eni::{Attached, Claim, Dispute, Eni, Pending, Reason, Slot};
use crate::net::{Family, Link, MacAddr};

/// Why there is no snapshot at all, as far as remedies differ. Of several ways that failed the last of these tells most.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    SwitchedOff,
    BadEndpoint,
    /// No route leads there.
    Unreachable,
    NoAnswer,
    /// The connection is refused: by a firewall, or nobody listens.
    Refused,
    Locked,
    /// It answers that it cannot answer now (429, 503).
    Overloaded,
    NotMetadata,
    Unauthorized,
    Forbidden,
}

/// A snapshot from which nothing can be concluded, so nothing is changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unusable {
    what: String,
}

impl Unusable {
    /// Of a snapshot that names another primary ENI than the one that was known, whose link is still here: an instance keeps
    /// its primary ENI as long as it lives.
    pub fn another_primary(named: MacAddr, known: MacAddr) -> Unusable {
        let known = format!("the primary ENI of this instance was {known}, whose link is still here");
        Unusable { what: format!("its key `{PRIMARY_MAC}` names {named}, but {known}") }
    }

    /// What is missing or wrong.
    pub fn what(&self) -> &str {
        &self.what
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "instance metadata cannot be used: {}; nothing was changed", self.what)
    }
}

impl std::error::Error for Unusable {}

/// Which ENI is the primary.
///
/// # Errors
/// The snapshot does not say.
pub fn primary(tree: &Tree) -> Result<MacAddr, Unusable> {
    let unusable = |what: String| Err(Unusable { what });
    match tree.get(PRIMARY_MAC) {
        Answer::Present(mac) => match eni_mac(mac.trim()) {
            Ok(mac) => Ok(mac),
            Err(why) => unusable(format!("its key `{PRIMARY_MAC}` names no primary ENI: {why}")),
        },
        Answer::Absent => unusable(format!("it has no key `{PRIMARY_MAC}`, which names the primary ENI")),
        Answer::Unknown(why) => unusable(format!("its key `{PRIMARY_MAC}` could not be read: {why}")),
    }
}

/// What a snapshot says of the attached ENIs.
///
/// # Errors
/// The snapshot does not say which ENIs are attached or which is the primary: then nothing can be concluded from it.
pub fn attached(tree: &Tree) -> Result<Attached, Unusable> {
    let mut attached = each_by_itself(tree)?;
    attached.set_clashes_aside();
    Ok(attached)
}

/// The same on a machine with these links. Metadata lists a detached ENI for minutes, after a forced detach until the machine is
/// stopped: one without a link takes nothing from one that has one.
///
/// # Errors
/// As for [`attached`].
pub fn attached_here(tree: &Tree, links: &BTreeMap<u32, Link>) -> Result<Attached, Unusable> {
    let mut attached = attached(tree)?;
    if attached.has_clashes() {
        attached = each_by_itself(tree)?;
        let is_gone = |mac: &MacAddr| *mac != attached.primary && links.values().all(|link| link.mac != Some(*mac));
        for (mac, clash) in attached.clashes().into_iter().filter(|(mac, _)| is_gone(mac)).collect::<Vec<_>>() {
            attached.set_aside(mac, Reason::Gone { clash });
        }
        attached.set_clashes_aside();
    }
    Ok(attached)
}

/// Each ENI as if there were no other.
fn each_by_itself(tree: &Tree) -> Result<Attached, Unusable> {
    let unusable = |what: String| Err(Unusable { what });
    let primary = primary(tree)?;
    let (macs, malformed) = match tree.get(INTERFACES) {
        Answer::Present(listing) => listed_macs(&listing),
        Answer::Absent => return unusable(format!("it has no `{INTERFACES}`, the list of network interfaces")),
        Answer::Unknown(why) => return unusable(format!("`{INTERFACES}` could not be read: {why}")),
    };
    if !macs.contains(&primary) {
        return unusable(format!("`{INTERFACES}` does not list the primary ENI ({primary}), so it cannot be whole"));
    }
    let has_many_cards = macs.iter().any(|&mac| matches!(Reader { tree, mac }.get("network-card"), Answer::Present(_)));

    let mut ready = BTreeMap::new();
    let mut pending = BTreeMap::new();
    for mac in macs {
        let reader = Reader { tree, mac };
        match reader.eni(mac == primary, has_many_cards) {
            Ok(eni) => _ = ready.insert(mac, eni),
            Err(reason) => _ = pending.insert(mac, reader.pending(reason)),
        }
    }
    if let Some(Eni { id, slot, .. }) = ready.get(&primary)
        && *slot != Slot::PRIMARY
    {
        let where_it_is = format!("{id} is card and device number {slot}, and the primary ENI is {}", Slot::PRIMARY);
        return unusable(format!("its key `{PRIMARY_MAC}` names {primary}, but {where_it_is}"));
    }
    Ok(Attached {
        primary,
        ready,
        pending,
        disputes: BTreeMap::new(),
        malformed,
        ignored: BTreeMap::new(),
        undecided: BTreeSet::new(),
        shared: BTreeMap::new(),
        held: BTreeSet::new(),
        earlier_subnets: BTreeSet::new(),
        is_main_anothers: false,
        still_left_alone: BTreeSet::new(),
        idle: Vec::new(),
        choices: BTreeMap::new(),
    })
}

impl Attached {
    fn set_clashes_aside(&mut self) {
        let ready = &self.ready;
        for (mac, reason) in id_conflicts(self.primary, ready).into_iter().chain(slot_conflicts(self.primary, ready)) {
            self.set_aside(mac, reason);
        }
        self.leave_disputed(source_conflicts(self));
    }

    /// Every ENI that clashes with another one, and in what.
    fn clashes(&self) -> Vec<(MacAddr, String)> {
        let reasons =
            id_conflicts(self.primary, &self.ready).into_iter().chain(slot_conflicts(self.primary, &self.ready));
        let reasons = reasons.map(|(mac, reason)| (mac, reason.to_string()));
        reasons.chain(source_conflicts(self).into_iter().map(|(mac, dispute)| (mac, dispute.clash()))).collect()
    }
}

/// ENIs by one id. Everything is told by id, from failures to the names of links, so it has to be clear whose it is.
fn id_conflicts(primary: MacAddr, ready: &BTreeMap<MacAddr, Eni>) -> Vec<(MacAddr, Reason)> {
    let mut conflicts = Vec::new();
    for (mac, eni) in ready.iter().filter(|(mac, _)| **mac != primary) {
        if let Some((by, _)) = ready.iter().find(|(other, candidate)| *other != mac && candidate.id == eni.id) {
            conflicts.push((*mac, Reason::IdTaken { mac: *mac, by: *by }));
        }
    }
    conflicts
}

/// ENIs that would need the same table. Which of two has its real slot cannot be known, so both wait, but never the
/// primary: its slot is 0/0.
fn slot_conflicts(primary: MacAddr, ready: &BTreeMap<MacAddr, Eni>) -> Vec<(MacAddr, Reason)> {
    let mut conflicts = Vec::new();
    for (mac, eni) in ready.iter().filter(|(mac, _)| **mac != primary) {
        let other = ready.iter().find(|(other, candidate)| *other != mac && candidate.slot == eni.slot);
        if let Some((_, other)) = other {
            conflicts.push((*mac, Reason::SlotTaken { slot: eni.slot, by: other.id.clone() }));
        }
    }
    conflicts
}

/// Every address and prefix that overlaps one of another ENI, ready or not: an address moves in one call, and metadata may show
/// it on both for a while.
fn source_conflicts(attached: &Attached) -> Vec<(MacAddr, Dispute)> {
    let of_ready = attached.ready.iter().map(|(mac, eni)| (*mac, eni.all_sources()));
    let is_gone = |pending: &Pending| matches!(pending.reason, Reason::Gone { .. });
    let of_pending = attached.pending.iter().filter(|(_, pending)| !is_gone(pending));
    let of_pending = of_pending.filter_map(|(mac, pending)| Some((*mac, pending.sources.clone()?)));
    let mut owners: BTreeMap<IpNet, Vec<MacAddr>> = BTreeMap::new();
    for (mac, sources) in of_ready.chain(of_pending) {
        for source in sources {
            owners.entry(source).or_default().push(mac);
        }
    }
    let name = |mac: &MacAddr| attached.name_of(*mac);
    let lengths: BTreeSet<u8> = owners.keys().map(IpNet::prefix_len).collect();
    let mut conflicts = Vec::new();
    for (source, macs) in &owners {
        let wider = lengths.iter().filter(|length| **length <= source.prefix_len());
        for wider in wider.filter_map(|length| Some(IpNet::new(source.addr(), *length).ok()?.trunc())) {
            for other in owners.get(&wider).into_iter().flatten() {
                for mac in macs.iter().filter(|mac| *mac != other) {
                    conflicts.push((*mac, Dispute { source: *source, by: name(other), claim: Claim::Given }));
                    conflicts.push((*other, Dispute { source: wider, by: name(mac), claim: Claim::Given }));
                }
            }
        }
    }
    conflicts
}

/// Reads the keys of one ENI.
struct Reader<'a> {
    tree: &'a Tree,
    mac: MacAddr,
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Answer {
        self.tree.get(&format!("{}{key}", eni_directory(self.mac)))
    }

    fn optional(&self, key: &str) -> Result<Option<String>, Reason> {
        match self.get(key) {
            Answer::Present(body) => Ok(Some(body)),
            Answer::Absent => Ok(None),
            Answer::Unknown(why) => Err(Reason::Unknown { key: key.into(), why }),
        }
    }

    fn eni(&self, is_primary: bool, has_many_cards: bool) -> Result<Eni, Reason> {
        if let Some(key) = self.tree.unlisted(&eni_directory(self.mac)) {
            let why = "it is there, and the list of this ENI's keys does not name it, so that list is not whole".into();
            return Err(Reason::Unknown { key: key.into(), why });
        }
        let id = self.value("interface-id")?.ok_or(Reason::NotThere { key: "interface-id" })?;
        let slot = self.slot(is_primary, has_many_cards)?;
        let eni = Eni {
            id,
            slot,
            ipv4s: self.list("local-ipv4s")?,
            ipv6s: self.list("ipv6s")?,
            ipv4_subnet: self.networks::<Ipv4Net>("subnet-ipv4-cidr-block")?.into_iter().next(),
            ipv6_subnets: self.networks("subnet-ipv6-cidr-blocks")?,
            ipv4_prefixes: self.networks("ipv4-prefix")?,
            ipv6_prefixes: self.networks("ipv6-prefix")?,
            unproven: BTreeSet::new(),
            of_others: BTreeSet::new(),
            distributions: None,
            prefers: None,
            stands_in: BTreeSet::new(),
        };
        // In a subnet with IPv4 every ENI has an IPv4 address (but an EFA-only one, which has none at all, and is no
        // primary): it is on its way, or a stale read has lost it.
        let is_efa_only = !is_primary && Family::BOTH.into_iter().all(|family| eni.sources(family).is_empty());
        if eni.ipv4_subnet.is_some() && eni.ipv4s.is_empty() && !is_efa_only {
            return Err(Reason::NotThere { key: "local-ipv4s" });
        }
        for (family, key) in [(Family::V4, "local-ipv4s"), (Family::V6, "ipv6s")] {
            self.check_sources(&eni, family, key)?;
        }
        Ok(eni)
    }

    /// 0/0 is the primary's slot and, on any other ENI, what metadata says before the real value has arrived
    /// (amazon-ec2-net-utils, `_get_device_number`). `network-card` is absent on types with one card, and for a moment
    /// after an attach on the others.
    fn slot(&self, is_primary: bool, has_many_cards: bool) -> Result<Slot, Reason> {
        let device_number = self.value("device-number")?;
        let network_card = self.value("network-card")?;
        if network_card.is_none() && has_many_cards && !is_primary {
            return Err(Reason::NotThere { key: "network-card" });
        }
        let device_number = match device_number {
            None if !is_primary => return Err(Reason::NotThere { key: "device-number" }),
            device_number => device_number.unwrap_or(0),
        };
        let slot = Slot { network_card: network_card.unwrap_or(0), device_number };
        if slot == Slot::PRIMARY && !is_primary {
            return Err(Reason::PlaceholderSlot);
        }
        // 32 cards of 24 ENIs are the most that EC2 has. Each card's ENIs need tables of their own within a hundred, and all of
        // them must end before those of the last resorts.
        for (key, number, last) in [("network-card", slot.network_card, 31), ("device-number", slot.device_number, 99)]
        {
            if number > last {
                return Err(Reason::Invalid { key: key.into(), why: format!("{slot} is out of range (0 to {last})") });
            }
        }
        Ok(slot)
    }

    /// Every address and prefix lies in the subnet, and with addresses there is a subnet.
    fn check_sources(&self, eni: &Eni, family: Family, key: &'static str) -> Result<(), Reason> {
        let subnets = eni.subnets(family);
        if subnets.is_empty() && !eni.sources(family).is_empty() {
            return Err(Reason::NotThere {
                key: match family {
                    Family::V4 => "subnet-ipv4-cidr-block",
                    Family::V6 => "subnet-ipv6-cidr-blocks",
                },
            });
        }
        let outside = |source: &IpNet| !subnets.iter().any(|subnet| subnet.contains(source));
        let subnets_shown = || subnets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
        if let Some(address) = eni.addresses(family).into_iter().find(|&address| outside(&IpNet::from(address))) {
            let why = format!("{address} is outside the ENI's subnet {}", subnets_shown());
            return Err(Reason::Invalid { key: key.into(), why });
        }
        // The VPC keeps it for itself in every subnet; as an address of this machine it would hide the way out.
        if let Some(router) = eni.router(family).filter(|router| eni.addresses(family).contains(router)) {
            return Err(Reason::Invalid { key: key.into(), why: format!("{router} is the VPC router's address") });
        }
        if let Some(prefix) = eni.prefixes(family).into_iter().find(outside) {
            let key = if family == Family::V4 { "ipv4-prefix" } else { "ipv6-prefix" };
            let why = format!("{prefix} is outside the ENI's subnet {}", subnets_shown());
            return Err(Reason::Invalid { key: key.into(), why });
        }
        Ok(())
    }

    /// A key that holds one value.
    fn value<T: FromStr>(&self, key: &'static str) -> Result<Option<T>, Reason> {
        let Some(body) = self.optional(key)? else { return Ok(None) };
        let text = body.trim();
        let invalid =
            || Reason::Invalid { key: key.into(), why: format!("`{}` is not what it holds", text.escape_debug()) };
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(invalid());
        }
        text.parse().map(Some).map_err(|_| invalid())
    }

    /// A key that holds a list of single addresses.
    fn list<T: FromStr + Ord + Copy + Into<IpAddr>>(&self, key: &'static str) -> Result<Vec<T>, Reason> {
        let addresses: Vec<T> = self.parse_lines(key, "an address", |text| text.parse().ok())?;
        match addresses.iter().map(|&address| address.into()).find(|address: &IpAddr| !is_usable(*address)) {
            Some(address) => {
                Err(Reason::Invalid { key: key.into(), why: format!("{address} cannot be the address of an ENI") })
            }
            None => Ok(addresses),
        }
    }

    /// A key that holds CIDRs. IPv6 ones are often written without `::`; the parser takes both.
    fn networks<T: FromStr + Ord + Copy + Into<IpNet>>(&self, key: &'static str) -> Result<Vec<T>, Reason> {
        let networks: Vec<T> = self.parse_lines(key, "a CIDR", |text| text.parse().ok())?;
        for &network in &networks {
            let network: IpNet = network.into();
            let invalid = |why: String| Err(Reason::Invalid { key: key.into(), why });
            if network.trunc() != network {
                return invalid(format!("{network} has host bits set ({} would be the network)", network.trunc()));
            }
            // EC2 makes IPv4 subnets of /16 to /28 and delegates /28, IPv6 subnets of /44 to /64 and delegates /80.
            // A little room, but never one that would capture the traffic of half the internet.
            let legal = match network {
                IpNet::V4(_) => 8..=30,
                IpNet::V6(_) => 16..=126,
            };
            if !legal.contains(&network.prefix_len()) {
                return invalid(format!("{network} cannot be a subnet or delegated prefix of a VPC"));
            }
        }
        Ok(networks)
    }

    fn parse_lines<T: Ord + Copy>(
        &self,
        key: &str,
        what: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Vec<T>, Reason> {
        let body = self.optional(key)?.unwrap_or_default();
        let mut values = Vec::new();
        let mut seen = BTreeSet::new();
        for line in lines(&body) {
            let value = parse(line).ok_or_else(|| Reason::Invalid {
                key: key.into(),
                why: format!("`{}` is not {what}", line.escape_debug()),
            })?;
            if seen.insert(value) {
                values.push(value);
            }
        }
        Ok(values)
    }

    /// What can be said of an ENI that is not ready.
    fn pending(&self, reason: Reason) -> Pending {
        let ipv4s: Result<Vec<Ipv4Addr>, _> = self.list("local-ipv4s");
        let ipv6s: Result<Vec<Ipv6Addr>, _> = self.list("ipv6s");
        let ipv4_prefixes: Result<Vec<Ipv4Net>, _> = self.networks("ipv4-prefix");
        let ipv6_prefixes: Result<Vec<Ipv6Net>, _> = self.networks("ipv6-prefix");
        let sources = match (ipv4s, ipv6s, ipv4_prefixes, ipv6_prefixes) {
            // No address at all is "not there yet" as likely as "none": it is not known.
            (Ok(ipv4s), Ok(ipv6s), Ok(_), Ok(_)) if ipv4s.is_empty() && ipv6s.is_empty() => None,
            (Ok(ipv4s), Ok(ipv6s), Ok(ipv4_prefixes), Ok(ipv6_prefixes)) => {
                let addresses = ipv4s.into_iter().map(|a| Ipv4Net::from(a).into());
                let addresses = addresses.chain(ipv6s.into_iter().map(|a| Ipv6Net::from(a).into()));
                let prefixes = ipv4_prefixes.into_iter().map(IpNet::from);
                Some(addresses.chain(prefixes).chain(ipv6_prefixes.into_iter().map(IpNet::from)).collect())
            }
            _ => None,
        };
        let ipv4_subnets: Vec<Ipv4Net> = self.networks("subnet-ipv4-cidr-block").unwrap_or_default();
        let ipv6_subnets: Vec<Ipv6Net> = self.networks("subnet-ipv6-cidr-blocks").unwrap_or_default();
        let subnets = ipv4_subnets.into_iter().map(IpNet::from).chain(ipv6_subnets.into_iter().map(IpNet::from));
        Pending { id: self.value("interface-id").unwrap_or_default(), reason, sources, subnets: subnets.collect() }
    }
}

/// Neither unspecified, loopback, multicast, link-local nor broadcast.
fn is_usable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            !(a.is_unspecified() || a.is_loopback() || a.is_multicast() || a.is_link_local() || a.is_broadcast())
        }
        IpAddr::V6(a) => !(a.is_unspecified() || a.is_loopback() || a.is_multicast() || a.is_unicast_link_local()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_may_spell_mac_addresses_in_upper_case() {
        let text = r#"{"leaves": {"mac": "0A:FF:00:00:00:01", "network/interfaces/macs/0A:FF:00:00:00:01/interface-id": "eni-01"}}"#;
        let attached = attached(&Tree::from_json(text).unwrap()).unwrap();
        assert_eq!(attached.primary_eni().map(|eni| eni.id.as_str()), Some("eni-01"));
    }

    #[test]
    fn nothing_is_concluded_when_a_secondary_eni_is_named_as_the_primary() {
        let leaf = |key: &str, body: &str| format!(r#""{INTERFACES}02:00:00:00:00:02/{key}": "{body}""#);
        let leaves = [leaf("interface-id", "eni-02"), leaf("device-number", "1")].join(", ");
        let text = format!(r#"{{"leaves": {{"mac": "02:00:00:00:00:02", {leaves}}}}}"#);
        let why = attached(&Tree::from_json(&text).unwrap()).unwrap_err().to_string();
        assert!(why.contains("names 02:00:00:00:00:02, but eni-02 is card and device number 0/1"), "{why}");
    }

    #[test]
    fn what_a_snapshot_lists_without_having_it_is_not_there_yet() {
        let snapshot = |listings: &str| {
            let eni = |n: u8, key: &str, body: &str| format!(r#""{INTERFACES}02:00:00:00:00:0{n}/{key}": "{body}""#);
            let leaves = [
                r#""mac": "02:00:00:00:00:01""#.into(),
                eni(1, "interface-id", "eni-01"),
                eni(2, "interface-id", "eni-02"),
                eni(2, "device-number", "1"),
            ];
            let text = format!(r#"{{"leaves": {{{}}}, "listings": {{{listings}}}}}"#, leaves.join(", "));
            attached(&Tree::from_json(&text).unwrap()).unwrap()
        };
        let macs = |separator| {
            let macs = [1, 2, 3].map(|n| format!("02:00:00:00:00:0{n}{separator}"));
            format!(r#""{INTERFACES}": "{}""#, macs.join("\\n"))
        };
        let second = format!(r#""{INTERFACES}02:00:00:00:00:02/": "device-number\ninterface-id\nlocal-ipv4s""#);
        let mac = |n: u8| MacAddr::from_bytes(&[2, 0, 0, 0, 0, n]).unwrap();

        assert!(snapshot("").is_complete());
        for separator in ["/", ""] {
            let attached = snapshot(&macs(separator));
            assert_eq!(attached.pending.keys().collect::<Vec<_>>(), [&mac(3)]);
            assert_eq!(attached.pending[&mac(3)].reason, Reason::NotThere { key: "interface-id" });
        }
        let reason = &snapshot(&second).pending[&mac(2)].reason;
        assert!(matches!(reason, Reason::Unknown { key, .. } if key == "local-ipv4s"), "{reason}");
    }

    #[test]
    fn the_routers_address_is_no_enis() {
        let leaf = |key: &str, body: &str| format!(r#""{INTERFACES}02:00:00:00:00:01/{key}": "{body}""#);
        let reason = |address: &str| {
            let keys =
                [("interface-id", "eni-01"), ("local-ipv4s", address), ("subnet-ipv4-cidr-block", "10.0.1.0/24")];
            let leaves = keys.map(|(key, body)| leaf(key, body)).join(", ");
            let text = format!(r#"{{"leaves": {{"mac": "02:00:00:00:00:01", {leaves}}}}}"#);
            let attached = attached(&Tree::from_json(&text).unwrap()).unwrap();
            attached.pending.values().map(|pending| pending.reason.to_string()).collect::<String>()
        };
        assert_eq!(reason("10.0.1.5"), "");
        assert_eq!(
            reason("10.0.1.5\\n10.0.1.1"),
            "its `local-ipv4s` cannot be used: 10.0.1.1 is the VPC router's address"
        );
    }
}

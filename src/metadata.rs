//! From a snapshot of instance metadata to the attached ENIs. The service's habits are written down here:
//! what its keys look like, which may be absent, and how a half-propagated ENI is told from a whole one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Bound;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::eni::{Attached, Claim, Dispute, Eni, Pending, Reason, Slot};
use crate::net::{Family, Link, MacAddr};

/// The key that names the primary ENI's MAC; there from launch.
pub const PRIMARY_MAC: &str = "mac";
/// The directory with one sub-directory for each attached ENI.
pub const INTERFACES: &str = "network/interfaces/macs/";

/// What routing needs of an ENI. Everything else is for people.
pub const ROUTING_KEYS: [&str; 9] = [
    "device-number",
    "interface-id",
    "ipv4-prefix",
    "ipv6-prefix",
    "ipv6s",
    "local-ipv4s",
    "network-card",
    "subnet-ipv4-cidr-block",
    "subnet-ipv6-cidr-blocks",
];

/// What `status` shows besides.
pub const DETAIL_KEYS: [&str; 8] = [
    "owner-id",
    "public-ipv4s",
    "security-group-ids",
    "security-groups",
    "subnet-id",
    "vpc-id",
    "vpc-ipv4-cidr-blocks",
    "vpc-ipv6-cidr-blocks",
];

/// What selectors of the configuration may ask of an ENI besides.
pub const SELECTOR_KEYS: [&str; 4] = ["security-group-ids", "security-groups", "subnet-id", "vpc-id"];

/// The directory with one key for each tag of the instance. It is not there unless that was switched on (EC2 User Guide,
/// "View tags for your EC2 instances using instance metadata").
pub const INSTANCE_TAGS: &str = "tags/instance/";

/// The directory below an ENI with one key for each public address, naming the private one behind it.
pub const ASSOCIATIONS: &str = "ipv4-associations/";

/// The service's answer for one path: three answers, never two.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Present(String),
    /// Not found; see [`Tree::get`] for what that means.
    Absent,
    /// It could not be read; says nothing of the value.
    Unknown(String),
}

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

/// One snapshot: path below `/latest/meta-data/` → answer. Directories are there by their path with the final slash.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tree {
    answers: BTreeMap<String, Answer>,
}

impl Tree {
    pub fn insert(&mut self, path: impl Into<String>, answer: Answer) {
        self.answers.insert(path.into(), answer);
    }

    /// Every path that was asked for.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.answers.keys().map(String::as_str)
    }

    /// Forgets one answer, so that it can be asked for anew.
    pub fn forget(&mut self, path: &str) {
        self.answers.remove(path);
    }

    /// Forgets a directory and everything below it.
    pub fn forget_below(&mut self, directory: &str) {
        self.answers.retain(|path, _| !path.starts_with(directory));
    }

    /// Whether something could not be read that an earlier tree knows.
    pub fn lacks_what_is_known_in(&self, earlier: &Tree) -> bool {
        self.lacks_what_is_known_below("", earlier)
    }

    /// The same, with everything below a directory as an earlier tree has it.
    pub fn with_directory_of(mut self, earlier: &Tree, directory: &str) -> Tree {
        self.forget_below(directory);
        let below = earlier.answers.iter().filter(|(path, _)| path.starts_with(directory));
        self.answers.extend(below.map(|(path, answer)| (path.clone(), answer.clone())));
        self
    }

    /// A key below a directory that could not be read, and why not.
    pub fn unknown_below(&self, directory: &str) -> Option<(&str, &str)> {
        self.answers.iter().find_map(|(path, answer)| match answer {
            Answer::Unknown(why) => Some((path.strip_prefix(directory)?, why.as_str())),
            Answer::Present(_) | Answer::Absent => None,
        })
    }

    /// Whether something below a directory could not be read that an earlier tree knows.
    pub fn lacks_what_is_known_below(&self, directory: &str, earlier: &Tree) -> bool {
        let is_unknown = |answer: Option<&Answer>| matches!(answer, Some(Answer::Unknown(_)));
        let known = earlier.answers.iter().filter(|(_, answer)| !is_unknown(Some(*answer)));
        let mut known = known.filter(|(path, _)| path.starts_with(directory));
        known.any(|(path, _)| is_unknown(self.answers.get(path)))
    }

    /// Whether all that was asked for below a directory was there.
    pub fn is_whole_below(&self, directory: &str) -> bool {
        let mut below = self.answers.iter().filter(|(path, _)| path.starts_with(directory));
        below.all(|(_, answer)| matches!(answer, Answer::Present(_)))
    }

    /// Forgets what was read of ENIs that the list of interfaces does not name.
    pub fn forget_unlisted(&mut self) {
        let Some(Answer::Present(listing)) = self.answers.get(INTERFACES) else { return };
        let directories: BTreeSet<String> = listed_macs(listing).0.into_iter().map(eni_directory).collect();
        let of_eni =
            |path: &str| Some(format!("{INTERFACES}{}", path.strip_prefix(INTERFACES)?.split_inclusive('/').next()?));
        self.answers.retain(|path, _| of_eni(path).is_none_or(|directory| directories.contains(&directory)));
    }

    /// What is not found counts as absent only when the listing of its directory was read and does not name it: the service
    /// lists keys before it has them. So does a path never asked for.
    pub fn get(&self, path: &str) -> Answer {
        let (directory, name) = split(path);
        match (self.answers.get(path), self.answers.get(directory)) {
            (Some(answer @ (Answer::Present(_) | Answer::Unknown(_))), _) => answer.clone(),
            // Nothing is above the top.
            (Some(Answer::Absent), None) => Answer::Absent,
            (_, Some(Answer::Present(listing))) if !lines(listing).any(|line| line == name) => Answer::Absent,
            (_, Some(Answer::Absent)) if self.has_something_below(directory) => {
                Answer::Unknown("its directory is not found, and other keys of it are".into())
            }
            (_, Some(Answer::Absent)) => Answer::Absent,
            (Some(Answer::Absent), Some(Answer::Present(_))) => {
                Answer::Unknown("it is listed but not there yet".into())
            }
            (None, Some(Answer::Present(_))) => Answer::Unknown("it is listed but was not read".into()),
            (_, Some(Answer::Unknown(why))) => Answer::Unknown(why.clone()),
            (None, None) => Answer::Unknown("it was not asked for".into()),
        }
    }

    fn has_something_below(&self, directory: &str) -> bool {
        self.present_below(directory).next().is_some()
    }

    fn present_below(&self, directory: &str) -> impl Iterator<Item = &str> {
        let below = self.answers.range::<str, _>((Bound::Excluded(directory), Bound::Unbounded));
        let below = below.take_while(move |(path, _)| path.starts_with(directory));
        below.filter(|(_, answer)| matches!(answer, Answer::Present(_))).map(|(path, _)| path.as_str())
    }

    /// A key that is there, though the listing that was read of its directory does not name it: such a listing is not whole.
    fn unlisted(&self, directory: &str) -> Option<&str> {
        let Some(Answer::Present(listing)) = self.answers.get(directory) else { return None };
        let listed: Vec<&str> = lines(listing).collect();
        let keys = self.present_below(directory).filter_map(|path| path.strip_prefix(directory));
        let mut keys = keys.filter(|key| !key.trim_end_matches('/').contains('/'));
        keys.find(|key| !listed.contains(key))
    }

    /// A saved snapshot: a JSON object with the keys of [`SavedTree`], others being ignored.
    ///
    /// # Errors
    /// Text that is not JSON, or not of that shape, with line and column.
    pub fn from_json(text: &str) -> Result<Tree> {
        let saved: SavedTree = serde_json::from_str(text)
            .context("expected a JSON object whose `leaves` maps metadata paths to their text")?;
        if saved.leaves.is_empty() {
            bail!("`leaves` is empty: a snapshot has at least `{PRIMARY_MAC}` and the keys of one network interface");
        }
        Ok(saved.tree())
    }

    /// Every answer, so that [`SavedTree::tree`] is the same tree again.
    pub fn save(&self) -> SavedTree {
        let mut saved = SavedTree::default();
        let absent = saved.absent.get_or_insert_default();
        for (path, answer) in &self.answers {
            let path = path.clone();
            match answer {
                Answer::Present(listing) if path.ends_with('/') => _ = saved.listings.insert(path, listing.clone()),
                Answer::Present(body) => _ = saved.leaves.insert(path, body.clone()),
                Answer::Absent => _ = absent.insert(path),
                Answer::Unknown(why) => _ = saved.unreadable.insert(path, why.clone()),
            }
        }
        saved
    }

    /// The listings that follow from the paths.
    fn from_leaves(leaves: BTreeMap<String, String>) -> Tree {
        let mut listings: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for path in leaves.keys() {
            let mut path = path.as_str();
            while !path.is_empty() {
                let (directory, name) = split(path);
                listings.entry(directory.to_string()).or_default().insert(name.to_string());
                path = directory;
            }
        }
        let mut tree = Tree::default();
        // A snapshot is all there is: what it does not have was not there.
        tree.insert(INTERFACES, Answer::Absent);
        tree.insert(INSTANCE_TAGS, Answer::Absent);
        for (directory, names) in listings {
            tree.insert(directory, Answer::Present(Vec::from_iter(names).join("\n")));
        }
        for (path, body) in leaves {
            tree.insert(path, Answer::Present(body));
        }
        tree
    }

    /// What the service listed counts for more than what follows from the paths: what is listed and not there was not found.
    fn list(&mut self, directory: &str, listing: &str) {
        self.insert(directory, Answer::Present(listing.into()));
        for name in lines(listing) {
            // The real service ends an interface with a slash; some imitations do not.
            let name = if directory == INTERFACES { format!("{}/", name.trim_end_matches('/')) } else { name.into() };
            self.answers.entry(format!("{directory}{name}")).or_insert(Answer::Absent);
        }
    }

    /// Some imitations of the service spell MAC addresses in upper case; paths are looked up in lower case.
    fn with_lower_case_macs(bodies: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let lower = |path: &String| match path.strip_prefix(INTERFACES).and_then(|rest| rest.split_once('/')) {
            Some((mac, key)) => format!("{INTERFACES}{}/{key}", mac.to_ascii_lowercase()),
            None => path.clone(),
        };
        bodies.iter().map(|(path, body)| (lower(path), body.clone())).collect()
    }
}

/// A tree as files have it. `leaves` alone will do: then the listings follow from the paths.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SavedTree {
    /// Path below `/latest/meta-data/` → body.
    pub leaves: BTreeMap<String, String>,
    /// Directory, with its final slash → what the service listed in it.
    #[serde(default)]
    pub listings: BTreeMap<String, String>,
    /// What was asked for and not found. Where the key is there, the file has every answer that was given, and nothing has
    /// to be inferred.
    #[serde(default)]
    pub absent: Option<BTreeSet<String>>,
    /// What could not be read, and why.
    #[serde(default)]
    pub unreadable: BTreeMap<String, String>,
}

impl SavedTree {
    pub fn tree(&self) -> Tree {
        let leaves = Tree::with_lower_case_macs(&self.leaves);
        let listings = Tree::with_lower_case_macs(&self.listings);
        let mut tree = match &self.absent {
            None => {
                let mut tree = Tree::from_leaves(leaves);
                listings.iter().for_each(|(directory, listing)| tree.list(directory, listing));
                tree
            }
            Some(absent) => {
                let present = leaves.into_iter().chain(listings).map(|(path, body)| (path, Answer::Present(body)));
                let absent = absent.iter().map(|path| (path.clone(), Answer::Absent));
                Tree { answers: present.chain(absent).collect() }
            }
        };
        let unreadable = self.unreadable.iter().map(|(path, why)| (path.clone(), Answer::Unknown(why.clone())));
        tree.answers.extend(unreadable);
        tree
    }
}

/// `a/b/c` → `a/b/`, `c`; `a/b/` → `a/`, `b/`.
fn split(path: &str) -> (&str, &str) {
    let end = path.strip_suffix('/').unwrap_or(path).rfind('/').map_or(0, |slash| slash + 1);
    path.split_at(end)
}

/// The lines of a list, without the blank ones and without blanks around them. Values may hold spaces, so nothing else
/// separates them.
pub fn lines(body: &str) -> impl Iterator<Item = &str> {
    body.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// The directory of an ENI, with its final slash. Metadata spells MAC addresses in lower case.
pub fn eni_directory(mac: MacAddr) -> String {
    format!("{INTERFACES}{mac}/")
}

/// The MAC addresses of a listing of [`INTERFACES`], and what is wrong with the lines that are none.
/// The real service ends each with a slash; some imitations do not.
pub fn listed_macs(listing: &str) -> (BTreeSet<MacAddr>, Vec<String>) {
    let mut macs = BTreeSet::new();
    let mut malformed = Vec::new();
    for line in lines(listing) {
        match eni_mac(line.trim_end_matches('/')) {
            Ok(mac) => _ = macs.insert(mac),
            Err(why) => {
                malformed.push(format!("`{INTERFACES}` lists an interface by a name that cannot be used: {why}"))
            }
        }
    }
    (macs, malformed)
}

/// All zeros is the loopback link's address, and a group address is no device's.
fn eni_mac(text: &str) -> Result<MacAddr, String> {
    let mac: MacAddr = text.parse()?;
    if mac.is_device() { Ok(mac) } else { Err(format!("{mac} cannot be the MAC address of an ENI")) }
}

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
        // 32 cards of 24 ENIs are the most that EC2 has; each card's ENIs need a table of their own within a hundred.
        if slot.network_card > 99 || slot.device_number > 99 {
            let key = if slot.network_card > 99 { "network-card" } else { "device-number" };
            return Err(Reason::Invalid { key: key.into(), why: format!("{slot} is out of range (0 to 99)") });
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

/// What people want to know of an ENI and routing does not: every value as metadata has it, nothing where it has none.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Details {
    pub subnet_id: Option<String>,
    pub vpc_id: Option<String>,
    pub vpc_cidrs: Vec<String>,
    pub security_groups: Vec<String>,
    pub security_group_ids: Vec<String>,
    /// Public or elastic address → private address behind it.
    pub associations: BTreeMap<Ipv4Addr, Ipv4Addr>,
}

/// As networks are written elsewhere: metadata often has `2600:1f16:67f:f200:0:0:0:0/56`.
fn shorten(cidr: String) -> String {
    cidr.parse::<IpNet>().map_or(cidr, |net| net.to_string())
}

/// The lines of one key of an ENI; none where metadata does not tell them, or not yet.
pub fn told(tree: &Tree, mac: MacAddr, key: &str) -> Option<BTreeSet<String>> {
    match (Reader { tree, mac }).get(key) {
        Answer::Present(body) => Some(lines(&body).map(String::from).collect()),
        Answer::Absent | Answer::Unknown(_) => None,
    }
}

/// The tags of the instance, each as `KEY=VALUE`; none where not all of them are known.
pub fn instance_tags(tree: &Tree) -> Option<BTreeSet<String>> {
    let Answer::Present(listing) = tree.get(INSTANCE_TAGS) else { return None };
    let tag = |key| match tree.get(&format!("{INSTANCE_TAGS}{key}")) {
        Answer::Present(value) => Some(format!("{key}={}", value.trim_end_matches(['\r', '\n']))),
        Answer::Absent | Answer::Unknown(_) => None,
    };
    lines(&listing).map(tag).collect()
}

/// Whether metadata was asked for tags of the instance and has none.
pub fn lacks_instance_tags(tree: &Tree) -> bool {
    tree.get(INSTANCE_TAGS) == Answer::Absent
}

/// The details of one ENI, as far as they could be read.
pub fn details(tree: &Tree, mac: MacAddr) -> Details {
    let reader = Reader { tree, mac };
    let text = |key: &str| match reader.get(key) {
        Answer::Present(body) => Some(body),
        Answer::Absent | Answer::Unknown(_) => None,
    };
    let one = |key: &str| text(key).map(|body| body.trim().to_string());
    let many = |key: &str| -> Vec<String> {
        text(key).map(|body| lines(&body).map(String::from).collect()).unwrap_or_default()
    };
    let mut associations = BTreeMap::new();
    for name in many(ASSOCIATIONS) {
        let private = one(&format!("{ASSOCIATIONS}{name}")).and_then(|body| body.parse().ok());
        if let (Ok(public), Some(private)) = (name.parse(), private) {
            associations.insert(public, private);
        }
    }
    Details {
        subnet_id: one("subnet-id"),
        vpc_id: one("vpc-id"),
        vpc_cidrs: ["vpc-ipv4-cidr-blocks", "vpc-ipv6-cidr-blocks"].into_iter().flat_map(many).map(shorten).collect(),
        security_groups: many("security-groups"),
        security_group_ids: many("security-group-ids"),
        associations,
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

    #[test]
    fn a_tree_that_is_saved_is_the_same_tree_again() {
        let mut tree = Tree::default();
        tree.insert("a/", Answer::Present("key\nother\nnever-asked".into()));
        tree.insert("a/key", Answer::Present("value".into()));
        tree.insert("a/other", Answer::Absent);
        tree.insert("b/", Answer::Absent);
        tree.insert("c/", Answer::Unknown("500".into()));
        let text = serde_json::to_string(&tree.save()).unwrap();
        assert_eq!(Tree::from_json(&text).unwrap(), tree);
    }

    #[test]
    fn not_found_is_absent_only_below_a_listing_that_does_not_name_it() {
        let answer = |listing: Option<Answer>| {
            let mut tree = Tree::default();
            tree.insert("a/key", Answer::Absent);
            listing.into_iter().for_each(|listing| tree.insert("a/", listing));
            tree.get("a/key")
        };
        assert_eq!(answer(Some(Answer::Present("other\nkey/".into()))), Answer::Absent);
        assert_eq!(answer(Some(Answer::Absent)), Answer::Absent);
        assert!(matches!(answer(Some(Answer::Present("other\nkey".into()))), Answer::Unknown(_)));
        assert_eq!(answer(Some(Answer::Unknown("500".into()))), Answer::Unknown("500".into()));
        assert_eq!(answer(None), Answer::Absent);
    }

    #[test]
    fn a_directory_that_is_not_found_proves_nothing_while_a_key_below_it_is() {
        let mut tree = Tree::default();
        tree.insert("a/", Answer::Absent);
        tree.insert("a/never", Answer::Absent);
        tree.insert("b/there", Answer::Present("1".into()));
        assert_eq!(tree.get("a/never"), Answer::Absent);
        assert_eq!(tree.get("a/not-asked-for"), Answer::Absent);
        tree.insert("a/there", Answer::Present("1".into()));
        assert!(matches!(tree.get("a/never"), Answer::Unknown(_)));
        assert!(matches!(tree.get("a/not-asked-for"), Answer::Unknown(_)));
        assert_eq!(tree.get("a/there"), Answer::Present("1".into()));
    }

    #[test]
    fn a_path_never_asked_for_is_absent_only_below_a_listing_that_does_not_name_it() {
        let mut tree = Tree::default();
        assert!(matches!(tree.get("a/key"), Answer::Unknown(_)));
        tree.insert("a/", Answer::Present("key".into()));
        assert!(matches!(tree.get("a/key"), Answer::Unknown(_)));
        assert_eq!(tree.get("a/other"), Answer::Absent);
    }

    #[test]
    fn what_is_not_listed_is_forgotten_and_nothing_else() {
        let mac = |n: u8| MacAddr::from_bytes(&[2, 0, 0, 0, 0, n]).unwrap();
        let mut tree = Tree::default();
        let paths = |tree: &Tree| tree.paths().map(String::from).collect::<Vec<_>>();
        tree.insert(PRIMARY_MAC, Answer::Present(mac(1).to_string()));
        for n in 1..=2 {
            tree.insert(eni_directory(mac(n)), Answer::Present("ipv6s".into()));
            tree.insert(format!("{}ipv6s", eni_directory(mac(n))), Answer::Absent);
        }
        let all = paths(&tree);
        tree.forget_unlisted();
        assert_eq!(paths(&tree), all, "without a list nothing is known to be gone");
        // Some imitations leave out the slash.
        tree.insert(INTERFACES, Answer::Present(mac(1).to_string()));
        tree.forget_unlisted();
        let expected =
            [PRIMARY_MAC.into(), INTERFACES.into(), eni_directory(mac(1)), format!("{}ipv6s", eni_directory(mac(1)))];
        assert_eq!(paths(&tree), expected);
    }
}

//! EC2's words: what instance metadata says of the attached network interfaces, parsed and checked.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;

use crate::config::choices::Choices;
use crate::net::{Family, HasFamily, MacAddr};

/// Where an ENI is plugged in. Device numbers repeat on every network card.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Slot {
    pub network_card: u32,
    pub device_number: u32,
}

impl Slot {
    /// Every instance is launched with an ENI here, which cannot be detached.
    pub const PRIMARY: Slot = Slot { network_card: 0, device_number: 0 };
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.network_card, self.device_number)
    }
}

/// An attached ENI of which metadata tells all that routing needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Eni {
    pub id: String,
    pub slot: Slot,
    /// The primary private address first. Empty on an IPv6-only or EFA-only ENI.
    pub ipv4s: Vec<Ipv4Addr>,
    pub ipv6s: Vec<Ipv6Addr>,
    pub ipv4_subnet: Option<Ipv4Net>,
    pub ipv6_subnets: Vec<Ipv6Net>,
    /// Delegated prefixes, /28 each; their addresses live in containers.
    pub ipv4_prefixes: Vec<Ipv4Net>,
    /// Delegated prefixes, /80 each.
    pub ipv6_prefixes: Vec<Ipv6Net>,
    /// Those of the above that metadata no longer tells of, without proof yet that they are gone: they stay as they are.
    pub unproven: BTreeSet<IpNet>,
    /// Those of the above that somebody else configures: they stay as they are, too.
    pub of_others: BTreeSet<IpNet>,
    /// Of the primary: the addresses that the distribution has put on its link or is to, one a family; none as long as the link was not
    /// looked at: then they are the first ones.
    pub distributions: Option<BTreeSet<IpAddr>>,
    /// The IPv6 address from which unbound sockets talk, when the kernel has one already; else it is the first. Metadata may name them
    /// in another order, or lack one for a moment.
    pub prefers: Option<Ipv6Addr>,
    /// Families whose default in `main` is by it and ours already, while the primary has none of them, or that is not proven.
    pub stands_in: BTreeSet<Family>,
}

impl Eni {
    /// The private addresses of a family, in metadata's order.
    pub fn addresses(&self, family: Family) -> Vec<IpAddr> {
        match family {
            Family::V4 => self.ipv4s.iter().map(|&address| address.into()).collect(),
            Family::V6 => self.ipv6s.iter().map(|&address| address.into()).collect(),
        }
    }

    /// Whether the address is left to the distribution, as that of the primary by which the machine is reached.
    pub fn is_distributions(&self, address: IpAddr) -> bool {
        match &self.distributions {
            Some(distributions) => distributions.contains(&address),
            None => Family::BOTH.into_iter().any(|family| self.addresses(family).first() == Some(&address)),
        }
    }

    /// Whether the kernel is never to choose this address for unbound sockets.
    pub fn is_deprecated(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(_) => false,
            IpAddr::V6(address) => self.prefers.or(self.ipv6s.first().copied()) != Some(address),
        }
    }

    /// The delegated prefixes of a family.
    pub fn prefixes(&self, family: Family) -> Vec<IpNet> {
        match family {
            Family::V4 => self.ipv4_prefixes.iter().map(|&prefix| prefix.into()).collect(),
            Family::V6 => self.ipv6_prefixes.iter().map(|&prefix| prefix.into()).collect(),
        }
    }

    /// The subnet's CIDRs of a family.
    pub fn subnets(&self, family: Family) -> Vec<IpNet> {
        match family {
            Family::V4 => self.ipv4_subnet.iter().map(|&subnet| subnet.into()).collect(),
            Family::V6 => self.ipv6_subnets.iter().map(|&subnet| subnet.into()).collect(),
        }
    }

    /// Everything that the VPC lets this ENI send from: addresses as whole-length prefixes, and delegated prefixes.
    pub fn sources(&self, family: Family) -> Vec<IpNet> {
        let addresses = self.addresses(family).into_iter().map(IpNet::from);
        addresses.chain(self.prefixes(family)).collect()
    }

    /// Both families' sources.
    pub fn all_sources(&self) -> Vec<IpNet> {
        Family::BOTH.into_iter().flat_map(|family| self.sources(family)).collect()
    }

    /// Both families' subnets.
    pub fn all_subnets(&self) -> Vec<IpNet> {
        Family::BOTH.into_iter().flat_map(|family| self.subnets(family)).collect()
    }

    /// What of it stays as it is.
    pub fn left_alone(&self) -> BTreeSet<IpNet> {
        self.unproven.union(&self.of_others).copied().collect()
    }

    /// Whether the ENI can send packets of this family.
    pub fn has_family(&self, family: Family) -> bool {
        !self.subnets(family).is_empty() && !self.sources(family).is_empty()
    }

    /// Whether exactly this is one of its addresses or delegated prefixes.
    pub fn has(&self, source: &IpNet) -> bool {
        self.sources(source.family()).contains(source)
    }

    /// Forgets these addresses and prefixes.
    pub fn leave_out(&mut self, sources: &[IpNet]) {
        self.ipv4s.retain(|address| !sources.contains(&IpAddr::from(*address).into()));
        self.ipv6s.retain(|address| !sources.contains(&IpAddr::from(*address).into()));
        self.ipv4_prefixes.retain(|prefix| !sources.contains(&(*prefix).into()));
        self.ipv6_prefixes.retain(|prefix| !sources.contains(&(*prefix).into()));
    }

    /// The VPC router as a next hop: subnet base + 1, or `fe80:ec2::1` for IPv6.
    pub fn router(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.ipv4_subnet.map(|subnet| Ipv4Addr::from(u32::from(subnet.network()) + 1).into()),
            // Answers in every subnet; used by the VPC CNI and Cilium too. Needs no router advertisement.
            Family::V6 => Some(Ipv6Addr::new(0xfe80, 0xec2, 0, 0, 0, 0, 0, 1).into()),
        }
    }
}

/// An ENI that is listed but cannot be used yet, or at all, from what metadata says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pending {
    /// The ENI's id, when that key was there.
    pub id: Option<String>,
    pub reason: Reason,
    /// What is known of its addresses and delegated prefixes; nothing when that is not known whole.
    pub sources: Option<Vec<IpNet>>,
    /// The CIDRs of its subnet, as far as known.
    pub subnets: Vec<IpNet>,
}

impl Pending {
    /// Whether all is known that it is given.
    pub fn is_known(&self) -> bool {
        self.sources.is_some() && !matches!(self.reason, Reason::Unknown { .. })
    }

    /// An ENI of which all is known, and which waits all the same.
    pub fn of(eni: Eni, reason: Reason) -> Pending {
        let (sources, subnets) = (Some(eni.all_sources()), eni.all_subnets());
        Pending { id: Some(eni.id), reason, sources, subnets }
    }
}

/// An address or prefix of which it is not clear whether the ENI that metadata gives it to is to have it now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dispute {
    pub source: IpNet,
    /// The other ENI's id.
    pub by: String,
    pub claim: Claim,
}

/// What another ENI has to do with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// Metadata gives it to that one as well, or a part of it, or what it is a part of.
    Given,
    /// That one has it, and metadata does not tell all of that one.
    Has,
    /// Rules of that one, of which metadata does not tell all, go before.
    Captures,
    /// Rules of ours go before that are that one's, which is left alone with all it has.
    LeftAlone,
    /// It was that one's a moment ago, and it is not proven that it is no more.
    Keeps,
    /// That one is the primary, and has it: by it people are connected.
    StandsOn,
    /// Metadata does not tell all of that one, and a route to a container leads to it: it may be that one's.
    Routes,
}

impl Dispute {
    /// What there is against it, by metadata alone.
    pub fn clash(&self) -> String {
        format!("{} overlaps what metadata gives to {}", show_source(&self.source), self.by)
    }
}

impl fmt::Display for Dispute {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Dispute { by, claim, .. } = self;
        let source = show_source(&self.source);
        match claim {
            Claim::Given => write!(f, "{}", self.clash())?,
            Claim::Has => write!(f, "{source} overlaps what {by} has, of which metadata does not tell all")?,
            Claim::Captures => write!(f, "rules of {by}, of which metadata does not tell all, go before {source}'s")?,
            Claim::LeftAlone => write!(
                f,
                "rules of {by}, which is left alone now, go before {source}'s; `eniup release --eni {by}` takes them away"
            )?,
            Claim::Keeps => {
                write!(f, "{source} overlaps what was {by}'s a moment ago, and that is not proven to be over")?
            }
            Claim::StandsOn => write!(f, "{source} overlaps what {by}, the primary, has on its link")?,
            Claim::Routes => write!(
                f,
                "a route in main leads to {source} as to a container's address, and metadata does not tell whether it is \
                 {by}'s"
            )?,
        }
        write!(f, "; it is left as it is until that is clear")
    }
}

/// Why an ENI is pending. All but `NoTags` and `Invalid` are expected to pass with time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    /// A key that must be there is not: metadata is eventually consistent.
    NotThere { key: &'static str },
    /// `device-number` reads 0, the placeholder before the real value has arrived.
    PlaceholderSlot,
    /// Another ENI has the same id.
    IdTaken { mac: MacAddr, by: MacAddr },
    /// Another ENI has the same card and device number, so both would get one table.
    SlotTaken { slot: Slot, by: String },
    /// Its first address is in dispute.
    Disputed(Dispute),
    /// It has no link, and clashes with another ENI in this: it may be listed still though it is detached.
    Gone { clash: String },
    /// It is not listed any more, and its link is still here.
    Unproven,
    /// What it has is not of the subnets that metadata names.
    Renumbered,
    /// A key could not be read; says nothing of its value.
    Unknown { key: String, why: String },
    /// The configuration tells ENIs apart by what metadata does not tell of this one.
    Undecided { by: String },
    /// The configuration tells ENIs apart by the instance's tags, which metadata does not have.
    NoTags { by: String },
    /// A value that is none; names the key, the value and what was expected.
    Invalid { key: String, why: String },
}

impl Reason {
    /// Whether waiting may help.
    pub fn may_pass(&self) -> bool {
        match self {
            Reason::NotThere { .. }
            | Reason::PlaceholderSlot
            | Reason::IdTaken { .. }
            | Reason::SlotTaken { .. }
            | Reason::Disputed(_)
            | Reason::Gone { .. }
            | Reason::Unproven
            | Reason::Renumbered
            | Reason::Undecided { .. }
            | Reason::Unknown { .. } => true,
            Reason::NoTags { .. } | Reason::Invalid { .. } => false,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Reason::NotThere { key } => write!(f, "metadata does not have its `{key}` yet"),
            Reason::PlaceholderSlot => {
                write!(f, "its `device-number` reads 0, metadata's placeholder until the real one has arrived")
            }
            Reason::IdTaken { mac, by } => write!(f, "metadata gives this id to {mac} and to {by}"),
            Reason::SlotTaken { slot, by } => write!(
                f,
                "it has network card and device number {slot}, and so has {by}: both would need the same routing table"
            ),
            Reason::Disputed(dispute) => write!(f, "its first address: {dispute}"),
            Reason::Gone { clash } => {
                write!(f, "no link here has its MAC, so others go before it, as it may be detached by now: {clash}")
            }
            Reason::Unproven => write!(f, "metadata does not list it any more, but its link is still here"),
            Reason::Renumbered => {
                write!(f, "what it has is of another subnet than metadata names, and that is not proven to be over")
            }
            Reason::Undecided { by } => {
                write!(f, "metadata does not tell yet what decides whether {by} means it")
            }
            Reason::NoTags { by } => write!(
                f,
                "metadata has no tags of the instance, so nobody can tell whether {by} means it; switch them on with \
                 `aws ec2 modify-instance-metadata-options --instance-id i-… --instance-metadata-tags enabled`"
            ),
            Reason::Unknown { key, why } => write!(f, "its `{key}` could not be read: {why}"),
            Reason::Invalid { key, why } => write!(f, "its `{key}` cannot be used: {why}"),
        }
    }
}

/// `10.0.1.5` for a single address, `10.0.1.96/28` for a prefix.
pub fn show_source(source: &IpNet) -> String {
    if source.prefix_len() == source.family().bits() { source.addr().to_string() } else { source.to_string() }
}

/// All that is attached, as one snapshot of metadata tells it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// The primary ENI: the one whose MAC is the top-level key `mac`.
    pub primary: MacAddr,
    pub ready: BTreeMap<MacAddr, Eni>,
    pub pending: BTreeMap<MacAddr, Pending>,
    /// Of ready ENIs: what they are left without until it is clear whose it is.
    pub disputes: BTreeMap<MacAddr, Vec<Dispute>>,
    /// Listed entries whose name is no MAC address, each with what is wrong.
    pub malformed: Vec<String>,
    /// ENIs that the configuration says to leave alone.
    pub ignored: BTreeMap<MacAddr, Ignored>,
    /// Pending ENIs of which it cannot be told yet whether they are to be left alone, and so they are.
    pub undecided: BTreeSet<MacAddr>,
    /// Of ready ENIs: why addresses of theirs are somebody else's.
    pub shared: BTreeMap<MacAddr, String>,
    /// What the configuration chooses for ENIs.
    pub choices: BTreeMap<MacAddr, Choices>,
    /// Addresses that links have and keep, whoever has put them there, each with the link's MAC: what is sent from them is no other
    /// ENI's, unless metadata says so.
    pub held: BTreeSet<(IpNet, Option<MacAddr>)>,
    /// Subnets from which our rules keep the primary's traffic, though metadata does not name them now: it may not tell all.
    pub earlier_subnets: BTreeSet<IpNet>,
    /// Whether `main` leads by another ENI than the primary: its best default, or what is said to be behind a pending one.
    pub is_main_anothers: bool,
    /// ENIs that were left alone, while it is not proven that they are not to be any more.
    pub still_left_alone: BTreeSet<MacAddr>,
    /// Entries of the configuration that mean none of these, and what that may come of.
    pub idle: Vec<String>,
}

/// An attached ENI that is somebody else's to configure. It counts where others must not be taken for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ignored {
    /// Which line of which file says so.
    pub by: String,
    pub eni: Known,
}

/// What metadata tells of an ENI, all or not all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Known {
    Ready(Eni),
    Pending(Pending),
}

impl Ignored {
    pub fn id(&self) -> Option<&str> {
        match &self.eni {
            Known::Ready(eni) => Some(&eni.id),
            Known::Pending(pending) => pending.id.as_deref(),
        }
    }

    pub fn ready(&self) -> Option<&Eni> {
        match &self.eni {
            Known::Ready(eni) => Some(eni),
            Known::Pending(_) => None,
        }
    }

    pub fn pending(&self) -> Option<&Pending> {
        match &self.eni {
            Known::Ready(_) => None,
            Known::Pending(pending) => Some(pending),
        }
    }

    /// What it sends from; nothing when that is not known whole.
    pub fn sources(&self) -> Option<Vec<IpNet>> {
        match &self.eni {
            Known::Ready(eni) => Some(eni.all_sources()),
            Known::Pending(pending) => pending.sources.clone(),
        }
    }

    /// The CIDRs of its subnet, as far as known.
    pub fn subnets(&self) -> Vec<IpNet> {
        match &self.eni {
            Known::Ready(eni) => eni.all_subnets(),
            Known::Pending(pending) => pending.subnets.clone(),
        }
    }
}

impl Attached {
    /// Whether the snapshot told all there is: only then does what it does not name not exist.
    pub fn is_complete(&self) -> bool {
        self.pending.is_empty() && self.disputes.is_empty() && self.malformed.is_empty()
    }

    /// The subnets of all that are ready or pending, as far as known.
    pub fn all_subnets(&self) -> impl Iterator<Item = IpNet> {
        let pending = self.pending.values().flat_map(|pending| pending.subnets.iter().copied());
        self.ready.values().flat_map(Eni::all_subnets).chain(pending)
    }

    /// Every ENI that is attached, as far as known.
    pub fn macs(&self) -> impl Iterator<Item = MacAddr> {
        self.ready.keys().chain(self.pending.keys()).chain(self.ignored.keys()).copied()
    }

    /// The ENIs of which metadata may tell something else a moment later.
    pub fn unsettled(&self) -> BTreeSet<MacAddr> {
        let is_clash = |pending: &Pending| matches!(pending.reason, Reason::Disputed(_));
        let is_disputed = !self.disputes.is_empty() || self.pending.values().any(is_clash);
        // The primary's first addresses are never in dispute, but it may be the one whose metadata is out of date.
        let primary = is_disputed.then_some(self.primary);
        let ignored = self.ignored.keys().filter(|_| is_disputed);
        // An ENI without any address is EFA-only, or its addresses are on their way: the kernel's links tell, not metadata.
        let is_bare = |eni: &Eni| !Family::BOTH.into_iter().any(|family| eni.has_family(family));
        let bare = self.ready.iter().filter(|(_, eni)| is_bare(eni)).map(|(mac, _)| mac);
        self.pending.keys().chain(self.disputes.keys()).chain(bare).chain(ignored).copied().chain(primary).collect()
    }

    /// Whether metadata tells something of one ENI that cannot be with what it tells of another.
    pub fn has_clashes(&self) -> bool {
        let is_clash =
            |reason: &Reason| matches!(reason, Reason::IdTaken { .. } | Reason::SlotTaken { .. } | Reason::Disputed(_));
        !self.disputes.is_empty() || self.pending.values().any(|pending| is_clash(&pending.reason))
    }

    /// What people call an ENI: its id, or its MAC address where that is not known.
    pub fn name_of(&self, mac: MacAddr) -> String {
        let ready = self.ready.get(&mac).map(|eni| eni.id.clone());
        let pending = || self.pending.get(&mac)?.id.clone();
        ready.or_else(pending).unwrap_or_else(|| format!("ENI {mac}"))
    }

    /// From ready to pending, with all that is known of it.
    pub fn set_aside(&mut self, mac: MacAddr, reason: Reason) {
        if let Some(eni) = self.ready.remove(&mac) {
            self.disputes.remove(&mac);
            self.pending.insert(mac, Pending::of(eni, reason));
        }
    }

    /// Leaves ready ENIs without what is disputed. One whose first address is waits as a whole; but the primary's first of each
    /// family are its own whatever happens: the machine stands on them, and metadata had them from launch.
    pub fn leave_disputed(&mut self, conflicts: Vec<(MacAddr, Dispute)>) {
        for (mac, dispute) in conflicts {
            let Some(eni) = self.ready.get(&mac) else { continue };
            let is_single = dispute.source.prefix_len() == dispute.source.family().bits();
            let is_first = eni.ipv4s.first().is_some_and(|first| dispute.source == IpAddr::from(*first).into());
            match mac == self.primary {
                true if is_single && eni.is_distributions(dispute.source.addr()) => continue,
                false if is_first => {
                    self.set_aside(mac, Reason::Disputed(dispute));
                    continue;
                }
                true | false => {}
            }
            let of_eni = self.disputes.entry(mac).or_default();
            if !of_eni.contains(&dispute) {
                of_eni.push(dispute);
            }
        }
        for (mac, disputes) in &self.disputes {
            let Some(eni) = self.ready.get_mut(mac) else { continue };
            eni.leave_out(&disputes.iter().map(|dispute| dispute.source).collect::<Vec<_>>());
        }
    }

    /// The ready ENI that is the primary.
    pub fn primary_eni(&self) -> Option<&Eni> {
        self.ready.get(&self.primary)
    }
}

//! Why a packet goes where it goes: rule by rule as the model has it, beside what the kernel says, with what the VPC makes
//! of it and where the reply comes in.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::config::Config;
use crate::eni::{Attached, Eni};
use crate::fib::{Outcome, Packet, Way, is_for_many, lookup};
use crate::net::{Family, HasFamily, MacAddr, Observed, Route, RouteKind, Rule};
use crate::operation::RuleText;
use crate::policy;

/// Raised when a key changes its meaning or goes away; keys may be added at any time.
const SCHEMA: u32 = 1;

/// The kernel's own answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Said {
    Way {
        way: Way,
        /// The source that it would give to a packet without one.
        source: Option<IpAddr>,
    },
    /// It was not asked, or its answer tells no way, for this reason.
    Nothing(String),
}

#[derive(Serialize, Debug)]
pub struct Explanation {
    pub schema: u32,
    pub packet: String,
    /// Those that match, in the order in which they are tried.
    pub rules: Vec<RuleTried>,
    pub not_matching: usize,
    pub way: String,
    /// Null when one of the two cannot tell.
    pub kernel_agrees: Option<bool>,
    pub kernel: String,
    /// Null when it cannot be told, or when the VPC does not see the packet.
    pub vpc_takes_it: Option<bool>,
    pub vpc: String,
    /// Null when there is no reply by an ENI.
    pub reply_comes_back_by_the_same_link: Option<bool>,
    pub reply: String,
}

#[derive(Serialize, Debug)]
pub struct RuleTried {
    pub rule: String,
    pub is_ours: bool,
    pub outcome: String,
    pub is_decisive: bool,
}

/// What is known of the machine. Metadata may be missing, with the reason.
pub struct Known<'a> {
    pub observed: &'a Observed,
    pub attached: Result<&'a Attached, String>,
    pub config: &'a Config,
}

/// Why the kernel cannot be asked for this packet, if it cannot.
pub fn unaskable(observed: &Observed, packet: &Packet) -> Option<String> {
    let source = packet.source.filter(|_| packet.input.is_none())?;
    let is_here = observed.addresses.iter().any(|(_, address)| address.net.addr() == source);
    match (source, packet.output) {
        (IpAddr::V4(_), _) if !is_here => Some(format!("no link has {source}, so it would make no such packet")),
        // Only a real socket makes the link a condition when there is a source address, too.
        (IpAddr::V6(_), Some(_)) => Some("it cannot be asked of IPv6 with both a source and a link".into()),
        _ => None,
    }
}

/// The whole story of one packet.
pub fn explain(known: &Known, packet: &Packet, said: &Said) -> Explanation {
    let answer = lookup(known.observed, packet);
    let (kernels_way, chosen) = match said {
        Said::Way { way, source } => (Some(*way), *source),
        Said::Nothing(_) => (None, None),
    };
    let kernel_agrees = kernels_way.filter(|_| !matches!(answer.way, Way::Unknown(_))).map(|way| way == answer.way);
    let kernel = match (said, kernel_agrees) {
        (Said::Nothing(why), _) => format!("The kernel does not tell: {why}."),
        (Said::Way { .. }, Some(true)) => "The kernel says the same.".into(),
        (Said::Way { way, .. }, Some(false)) => {
            format!("The kernel does NOT agree: {} Trust the kernel, and report this.", known.show_way(*way))
        }
        (Said::Way { way, .. }, None) => format!("The kernel says: {}", known.show_way(*way)),
    };
    let way = kernels_way.unwrap_or(answer.way);
    let source = packet.source.or(chosen);
    let (vpc_takes_it, vpc) = known.vpc(packet, way, source);
    let (reply_comes_back_by_the_same_link, reply) = known.reply(packet, way, source);
    let is_tried = |outcome: &Outcome| *outcome != Outcome::NotMatched;
    let rules = answer.trace.iter().filter(|(_, outcome)| is_tried(outcome)).map(|(rule, outcome)| RuleTried {
        rule: RuleText { rule }.to_string(),
        is_ours: policy::owns_rule(known.config, rule),
        outcome: known.show_outcome(rule, outcome),
        is_decisive: matches!(outcome, Outcome::Decided(..)),
    });
    Explanation {
        schema: SCHEMA,
        packet: known.show_packet(packet, chosen),
        rules: rules.collect(),
        not_matching: answer.trace.iter().filter(|(_, outcome)| !is_tried(outcome)).count(),
        way: known.show_way(answer.way),
        kernel_agrees,
        kernel,
        vpc_takes_it,
        vpc,
        reply_comes_back_by_the_same_link,
        reply,
    }
}

/// The ENI that has an address, as far as metadata tells.
struct Owner<'a> {
    mac: MacAddr,
    eni: &'a Eni,
}

impl Known<'_> {
    fn owner(&self, address: IpAddr) -> Option<Owner<'_>> {
        let mut enis = self.attached.as_ref().ok()?.ready.iter();
        let (mac, eni) =
            enis.find(|(_, eni)| eni.sources(address.family()).iter().any(|source| source.contains(&address)))?;
        Some(Owner { mac: *mac, eni })
    }

    /// Also where it is the broadcast address of an ENI's subnet.
    fn is_for_many(&self, destination: IpAddr) -> bool {
        let enis = self.attached.iter().flat_map(|attached| attached.ready.values());
        let mut subnets = enis.flat_map(|eni| eni.subnets(Family::V4));
        is_for_many(destination) || destination.is_ipv4() && subnets.any(|subnet| subnet.broadcast() == destination)
    }

    fn mac_of(&self, link: u32) -> Option<MacAddr> {
        self.observed.links.get(&link)?.mac
    }

    fn link_of(&self, mac: MacAddr) -> Option<u32> {
        crate::place::find_link(mac, self.observed).ok().flatten().map(|link| link.index)
    }

    /// The link's name, and whose it is.
    fn show_link(&self, index: u32) -> String {
        let name = self.observed.links.get(&index).map_or_else(|| format!("link {index}"), |link| link.name.clone());
        let Ok(attached) = &self.attached else { return name };
        let Some(mac) = self.mac_of(index).filter(|mac| self.link_of(*mac) == Some(index)) else { return name };
        let of_pending =
            || attached.pending.get(&mac).map(|pending| pending.id.clone().unwrap_or("a pending ENI".into()));
        match attached.ready.get(&mac).map(|eni| eni.id.clone()).or_else(of_pending) {
            Some(id) => format!("{name} ({id})"),
            None => name,
        }
    }

    fn show_address(&self, address: IpAddr) -> String {
        match self.owner(address) {
            Some(owner) => format!("{address} ({}'s)", owner.eni.id),
            None => address.to_string(),
        }
    }

    fn show_packet(&self, packet: &Packet, chosen: Option<IpAddr>) -> String {
        let from = match (packet.source, chosen) {
            (Some(source), _) => self.show_address(source),
            (None, Some(chosen)) => {
                format!("no address in particular, for which the kernel takes {}", self.show_address(chosen))
            }
            (None, None) => "no address in particular".into(),
        };
        let mut shown = format!("From {from} to {}", self.show_address(packet.destination));
        if let Some(input) = packet.input {
            shown += &format!(", forwarded, come in by {}", self.show_link(input));
        }
        if let Some(output) = packet.output {
            shown += &format!(", of a socket bound to {}", self.show_link(output));
        }
        if packet.mark != 0 {
            shown += &format!(", marked {:#x}", packet.mark);
        }
        shown
    }

    /// A sentence.
    fn show_way(&self, way: Way) -> String {
        match way {
            Way::Out { link, gateway: Some(gateway) } => {
                format!("It leaves by {}, to the gateway {gateway}.", self.show_link(link))
            }
            Way::Out { link, gateway: None } => {
                format!("It leaves by {}, straight to its destination.", self.show_link(link))
            }
            Way::Here => "It is for this machine itself.".into(),
            Way::Nowhere(refusal) => format!("It goes nowhere: {refusal}."),
            Way::Unknown(doubt) => format!("The model cannot tell its way: {doubt}."),
        }
    }

    fn show_outcome(&self, rule: &Rule, outcome: &Outcome) -> String {
        match outcome {
            Outcome::NotMatched => "does not match".into(),
            Outcome::NoRoute => "no route for it there".into(),
            Outcome::Thrown(route) => format!("{}: on to the next rule", self.show_route(rule, route)),
            Outcome::Suppressed(route) => format!("passed over: {}", self.show_route(rule, route)),
            Outcome::Jumped(priority) => format!("on to {priority}"),
            Outcome::NoTarget => "there is no rule to go on to".into(),
            Outcome::Decided(_, Some(route)) => self.show_route(rule, route),
            Outcome::Decided(way, None) => self.show_way(*way),
        }
    }

    fn show_route(&self, rule: &Rule, route: &Route) -> String {
        let kind = match route.kind {
            RouteKind::Unicast => "",
            RouteKind::Unreachable => "unreachable ",
            RouteKind::Other(policy::LOCAL_ROUTE) => "local ",
            RouteKind::Other(_) => "special ",
        };
        let to = if route.destination.prefix_len() == 0 { "default".into() } else { route.destination.to_string() };
        let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        // Of several by the same route, the one that was looked up.
        let links = self.observed.routes.iter().filter(|(_, other)| other == route && other.table == rule.table);
        let dev = links.filter_map(|(link, _)| *link).map(|link| format!(" dev {}", self.show_link(link))).next();
        format!("{kind}{to}{via}{}", dev.unwrap_or_default())
    }

    /// Whether a link that is no ENI's may send by one: by its kind, or because that is a port of it.
    fn may_be_over_eni(&self, link: u32, attached: &Attached) -> bool {
        let kind = self.observed.links.get(&link).and_then(|link| link.kind.as_deref());
        let mut ports =
            attached.macs().filter_map(|mac| self.link_of(mac)).filter_map(|index| self.observed.links.get(&index));
        kind.is_some_and(|kind| policy::STACKED_KINDS.contains(&kind))
            || ports.any(|port| port.controller == Some(link))
    }

    /// Whether the VPC takes the packet from the ENI by which it leaves.
    fn vpc(&self, packet: &Packet, way: Way, source: Option<IpAddr>) -> (Option<bool>, String) {
        let link = match way {
            Way::Out { link, .. } => link,
            Way::Here | Way::Nowhere(_) => return (None, "The VPC does not see it.".into()),
            Way::Unknown(_) => {
                return (None, "Whether the VPC takes it cannot be told: its way is not known.".into());
            }
        };
        let attached = match &self.attached {
            Ok(attached) => attached,
            Err(why) => return (None, format!("Whether the VPC takes it cannot be told: {why}.")),
        };
        let mac = self.mac_of(link).filter(|mac| self.link_of(*mac) == Some(link));
        let Some(mac) = mac.filter(|mac| attached.ready.contains_key(mac) || attached.pending.contains_key(mac)) else {
            let name = self.show_link(link);
            return match self.may_be_over_eni(link, attached) {
                true => {
                    (None, format!("Whether the VPC takes it cannot be told: {name} may be stacked on an ENI's link."))
                }
                false => (None, format!("The VPC does not see it: {name} is no ENI's link.")),
            };
        };
        let Some(eni) = attached.ready.get(&mac) else {
            return (None, "Whether the VPC takes it cannot be told: metadata is not complete for that ENI.".into());
        };
        // User Guide for VPC, "Subnet routing": "we do not support broadcast or multicast".
        if self.is_for_many(packet.destination) {
            let why =
                "The VPC delivers it to nobody: it carries no broadcast, and multicast only by a transit gateway.";
            return (Some(false), why.into());
        }
        let Some(source) = source else {
            return (None, "Whether the VPC takes it depends on the source that it gets.".into());
        };
        match self.owner(source) {
            Some(owner) if owner.mac == mac => {
                (Some(true), format!("The VPC takes it: {source} is an address of {}.", eni.id))
            }
            owner => {
                let whose = owner.map_or_else(|| "no ENI's here".into(), |owner| format!("{}'s", owner.eni.id));
                let unless = match packet.input {
                    Some(_) => ", or a firewall rule gives it another source",
                    None => "",
                };
                let why = format!(
                    "The VPC drops it: {source} is no address of {}, but {whose}. (Unless that ENI's source/destination \
                     check is off{unless}; metadata does not tell.)",
                    eni.id
                );
                (Some(false), why)
            }
        }
    }

    /// By which link an answer to the packet comes in, and what becomes of it.
    fn reply(&self, packet: &Packet, way: Way, source: Option<IpAddr>) -> (Option<bool>, String) {
        if let Way::Unknown(_) = way {
            return (None, "Whether a reply comes in by the same link cannot be told: its way is not known.".into());
        }
        let (Way::Out { link, .. }, Some(source)) = (way, source) else {
            return (None, "There is no reply to it.".into());
        };
        if self.is_for_many(packet.destination) {
            return (None, "Nobody there replies to it.".into());
        }
        if let Err(why) = &self.attached {
            return (None, format!("By which ENI a reply comes in cannot be told: {why}."));
        }
        let owner = self.owner(source);
        let Some((owner, input)) =
            owner.and_then(|owner| Some((self.link_of(owner.mac)?, owner)).map(|(link, owner)| (owner, link)))
        else {
            return (None, format!("A reply to {source} comes in by no ENI here."));
        };
        let is_eni = self
            .mac_of(link)
            .is_some_and(|mac| self.attached.as_ref().is_ok_and(|attached| attached.ready.contains_key(&mac)));
        if !is_eni {
            return (None, format!("A reply comes back by {}, if at all: no ENI's link.", self.show_link(link)));
        }
        let back =
            Packet { source: Some(packet.destination), destination: source, input: Some(input), output: None, mark: 0 };
        let on = match lookup(self.observed, &back).way {
            Way::Here => "and is for this machine itself".into(),
            Way::Out { link, .. } => format!("and is forwarded by {}", self.show_link(link)),
            Way::Nowhere(refusal) => format!("and goes nowhere: {refusal}"),
            Way::Unknown(doubt) => format!("and then the model cannot tell: {doubt}"),
        };
        let same = if input == link { "the way that this packet left," } else { "NOT the way that this packet left," };
        (
            Some(input == link),
            format!("A reply comes in by {} as {}'s, {same} {on}.", self.show_link(input), owner.eni.id),
        )
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{}\n", self.packet)?;
        let width = self.rules.iter().map(|tried| tried.rule.len()).max().unwrap_or(0).min(90);
        for RuleTried { rule, is_ours, outcome, is_decisive } in &self.rules {
            let arrow = if *is_decisive { "=>" } else { "->" };
            let whose = if *is_ours { "eniup" } else { "" };
            writeln!(f, "  {rule:width$}  {whose:5}  {arrow} {outcome}")?;
        }
        match self.not_matching {
            0 => writeln!(f)?,
            1 => writeln!(f, "  (one more rule before that does not match)\n")?,
            n => writeln!(f, "  ({n} more rules before that do not match)\n")?,
        }
        writeln!(f, "{}\n{}\n{}\n{}", self.way, self.kernel, self.vpc, self.reply)
    }
}

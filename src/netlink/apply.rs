//! From operations to netlink messages, phase by phase. What to do is for `plan`; whether it worked is found out by
//! planning again.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope, CacheInfo};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, Prop};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::socket::Request;
use super::{Error, Netlink};
use crate::net::{Address, Family, HasFamily, Mark, Route, RouteKind, Rule};
use crate::operation::{LinkChange, LinkRef, Operation};
use crate::plan::Step;

/// Lifetime of an address in seconds that never ends.
const FOREVER: u32 = u32::MAX;

/// What came of a step.
#[derive(Debug)]
pub enum Outcome {
    Done,
    /// It was as wanted already: something else was quicker.
    AlreadySo,
    /// An earlier step of the same ENI failed.
    Skipped,
    Failed(Error),
}

impl Netlink {
    /// Carries out the steps in their order; one outcome each. After a failed step the later stages of the same ENI are
    /// left out, and all others go on.
    ///
    /// # Errors
    /// The conversation with the kernel broke: what was done has to be observed anew.
    pub async fn apply(&mut self, steps: &[Step]) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(steps.len());
        let mut failed: BTreeSet<&str> = BTreeSet::new();
        for stage in steps.chunk_by(|a, b| stage(a) == stage(b)) {
            let runs = |step: &&Step| step.eni.as_deref().is_none_or(|eni| !failed.contains(eni));
            let running: Vec<&Step> = stage.iter().filter(runs).collect();
            let mut results = self.apply_stage(&running).await?.into_iter();
            let of_stage: Vec<Outcome> = stage
                .iter()
                .map(|step| if runs(&step) { results.next() } else { None }.unwrap_or(Outcome::Skipped))
                .collect();
            for (step, outcome) in stage.iter().zip(&of_stage) {
                if let (Some(eni), Outcome::Failed(_)) = (&step.eni, outcome) {
                    failed.insert(eni);
                }
            }
            outcomes.extend(of_stage);
        }
        Ok(outcomes)
    }

    async fn apply_stage(&mut self, steps: &[&Step]) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(steps.len());
        if steps.first().is_some_and(|step| is_sysctl(&step.operation)) {
            for step in steps {
                outcomes.push(self.set_sysctl(&step.operation).await);
            }
            return Ok(outcomes);
        }
        let requests: Vec<Request> = steps.iter().map(|step| request(&step.operation)).collect();
        let results = self.change(&requests).await.context("sending changes to the kernel")?;
        outcomes.extend(steps.iter().zip(results).map(|(step, result)| outcome(&step.operation, result)));
        Ok(outcomes)
    }

    /// `accept_ra` cannot be set by netlink. Its file goes by the link's name, which may have changed since it was
    /// observed, so the name is looked up here and once more afterwards.
    async fn set_sysctl(&mut self, operation: &Operation) -> Outcome {
        let (Operation::SetLink { link, change: LinkChange::AcceptRa(value) }
        | Operation::ResetLink { link, change: LinkChange::AcceptRa(value) }) = operation
        else {
            return Outcome::Skipped;
        };
        match self.write_accept_ra(link, *value).await {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Failed(error),
        }
    }

    async fn write_accept_ra(&mut self, link: &LinkRef, value: i32) -> Result<(), Error> {
        let name = self.link_name(link.index).await?;
        let path: PathBuf = ["/proc/sys/net/ipv6/conf", &name, "accept_ra"].iter().collect();
        fs::write(&path, value.to_string()).map_err(|error| {
            Error::Refused(io::Error::new(error.kind(), format!("writing {}: {error}", path.display())))
        })?;
        match self.link_name(link.index).await? == name {
            true => Ok(()),
            false => Err(Error::Garbled(format!("{name} was renamed meanwhile; the next run sees to it"))),
        }
    }
}

/// Steps of one stage go out together. A link whose router advertisements could not be turned off must not go up, so
/// that is a stage of its own within its phase.
fn stage(step: &Step) -> (u8, bool) {
    (step.operation.phase(), is_sysctl(&step.operation))
}

fn is_sysctl(operation: &Operation) -> bool {
    matches!(
        operation,
        Operation::SetLink { change: LinkChange::AcceptRa(_), .. }
            | Operation::ResetLink { change: LinkChange::AcceptRa(_), .. }
    )
}

/// An errno that means "already so" is named for each operation; any other is a failure.
fn outcome(operation: &Operation, result: Result<(), Error>) -> Outcome {
    let Err(error) = result else { return Outcome::Done };
    let is_so = match operation {
        // Exclusive adds: the same object is there already. Planning again tells if it only looks the same.
        Operation::AddRoute { .. } | Operation::AddRule { .. } | Operation::AddAddress { .. } => {
            error.errno() == Some(libc::EEXIST)
        }
        // The kernel says EADDRNOTAVAIL for an address, ESRCH for an IPv4 or IPv6 route and ENOENT for a rule that is
        // not there, and ENODEV when the link went first and took them along.
        Operation::DeleteAddress { .. } | Operation::DeleteRule { .. } | Operation::DeleteRoute { .. } => {
            matches!(error.errno(), Some(libc::EADDRNOTAVAIL | libc::ESRCH | libc::ENOENT | libc::ENODEV))
        }
        Operation::ResetLink { .. } => error.errno() == Some(libc::ENODEV),
        Operation::SetLink { .. } | Operation::ChangeAddress { .. } => false,
    };
    if is_so { Outcome::AlreadySo } else { Outcome::Failed(error) }
}

fn request(operation: &Operation) -> Request {
    const ADD: u16 = NLM_F_CREATE | NLM_F_EXCL;
    let (message, flags) = match operation {
        Operation::SetLink { link, change } | Operation::ResetLink { link, change } => {
            return link_request(link, change);
        }
        Operation::AddRoute { link, route } => (RouteNetlinkMessage::NewRoute(route_message(link, route)), ADD),
        Operation::DeleteRoute { link, route } => (RouteNetlinkMessage::DelRoute(route_message(link, route)), 0),
        Operation::AddRule { rule } => (RouteNetlinkMessage::NewRule(rule_message(rule)), ADD),
        Operation::DeleteRule { rule } => (RouteNetlinkMessage::DelRule(rule_message(rule)), 0),
        Operation::AddAddress { link, address } => {
            (RouteNetlinkMessage::NewAddress(address_message(link, address)), ADD)
        }
        Operation::ChangeAddress { link, address } => {
            (RouteNetlinkMessage::NewAddress(address_message(link, address)), NLM_F_REPLACE)
        }
        Operation::DeleteAddress { link, address } => {
            (RouteNetlinkMessage::DelAddress(address_message(link, address)), 0)
        }
    };
    Request { message, flags }
}

fn link_request(link: &LinkRef, change: &LinkChange) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    let name_list = |name: &str| LinkAttribute::PropList(vec![Prop::AltIfName(name.into())]);
    match change {
        LinkChange::Up | LinkChange::Down => {
            message.header.change_mask = LinkFlags::Up;
            if *change == LinkChange::Up {
                message.header.flags = LinkFlags::Up;
            }
        }
        LinkChange::Mtu(mtu) => message.attributes.push(LinkAttribute::Mtu(*mtu)),
        LinkChange::Group(group) => message.attributes.push(LinkAttribute::Group(*group)),
        LinkChange::AddAltname(name) => {
            message.attributes.push(name_list(name));
            let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_APPEND;
            return Request { message: RouteNetlinkMessage::NewLinkProp(message), flags };
        }
        LinkChange::DeleteAltname(name) => {
            message.attributes.push(name_list(name));
            return Request { message: RouteNetlinkMessage::DelLinkProp(message), flags: 0 };
        }
        // Set by sysctl, not by netlink: a message that changes nothing.
        LinkChange::AcceptRa(_) => {}
    }
    Request { message: RouteNetlinkMessage::SetLink(message), flags: 0 }
}

fn kernel_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn address_message(link: &LinkRef, address: &Address) -> AddressMessage {
    // Ours are never leased, and nobody else's are changed.
    let Address { net, is_deprecated, has_prefix_route, is_leased: _, protocol } = *address;
    let mut message = AddressMessage::default();
    message.header.family = kernel_family(net.family());
    message.header.prefix_len = net.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.index = link.index;
    // Without duplicate address detection: the VPC answers for what is not ours, and 2 s of waiting help nobody.
    let mut flags = if net.family() == Family::V6 { AddressFlags::Nodad } else { AddressFlags::empty() };
    flags.set(AddressFlags::Noprefixroute, !has_prefix_route);
    let mut lifetime = CacheInfo::default();
    lifetime.ifa_preferred = if is_deprecated { 0 } else { FOREVER };
    lifetime.ifa_valid = FOREVER;
    message.attributes = vec![
        AddressAttribute::Local(net.addr()),
        AddressAttribute::Address(net.addr()),
        AddressAttribute::Flags(flags),
        AddressAttribute::CacheInfo(lifetime),
        AddressAttribute::Protocol(protocol.into()),
    ];
    message
}

fn route_message(link: &Option<LinkRef>, route: &Route) -> RouteMessage {
    let Route { destination, kind, gateway, is_onlink, table, metric, protocol } = *route;
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = kernel_family(destination.family());
    header.destination_prefix_length = destination.prefix_len();
    header.protocol = protocol.into();
    header.kind = match kind {
        RouteKind::Unicast => RouteType::Unicast,
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Other(number) => number.into(),
    };
    // A route without a gateway reaches what is on the link itself; IPv6 knows no scopes.
    let is_direct = kind == RouteKind::Unicast && gateway.is_none() && destination.family() == Family::V4;
    header.scope = if is_direct { RouteScope::Link } else { RouteScope::Universe };
    header.flags.set(RouteFlags::Onlink, is_onlink);
    if destination.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(destination.addr().into()));
    }
    if let Some(gateway) = gateway {
        message.attributes.push(RouteAttribute::Gateway(gateway.into()));
    }
    if let Some(link) = link {
        message.attributes.push(RouteAttribute::Oif(link.index));
    }
    message.attributes.push(RouteAttribute::Table(table));
    if metric != 0 {
        message.attributes.push(RouteAttribute::Priority(metric));
    }
    message
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let Rule {
        priority,
        family,
        from,
        to,
        iif,
        oif,
        mark,
        is_inverted,
        table,
        goto,
        suppress_prefix_length,
        suppress_group,
        protocol,
        has_more: _,
    } = rule;
    let mut message = RuleMessage::default();
    message.header.family = kernel_family(*family);
    // Without an action the rule is installed dead.
    message.header.action = if goto.is_some() { RuleAction::Goto } else { RuleAction::ToTable };
    message.header.flags.set(RuleFlags::Invert, *is_inverted);
    if let Some(from) = from {
        message.header.src_len = from.prefix_len();
        message.attributes.push(RuleAttribute::Source(from.addr()));
    }
    if let Some(to) = to {
        message.header.dst_len = to.prefix_len();
        message.attributes.push(RuleAttribute::Destination(to.addr()));
    }
    message.attributes.push(RuleAttribute::Priority(*priority));
    message.attributes.push(RuleAttribute::Table(*table));
    // A delete without the protocol would remove the first rule that matches otherwise, whoever made it.
    message.attributes.push(RuleAttribute::Protocol((*protocol).into()));
    message.attributes.extend(iif.clone().map(RuleAttribute::Iifname));
    message.attributes.extend(oif.clone().map(RuleAttribute::Oifname));
    if let Some(Mark { value, mask }) = mark {
        message.attributes.extend([RuleAttribute::FwMark(*value), RuleAttribute::FwMask(*mask)]);
    }
    message.attributes.extend(goto.map(RuleAttribute::Goto));
    message.attributes.extend(suppress_prefix_length.map(RuleAttribute::SuppressPrefixLen));
    message.attributes.extend(suppress_group.map(RuleAttribute::SuppressIfGroup));
    message
}

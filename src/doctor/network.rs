//! Checks of what metadata and the kernel say.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::others::{keep_off_default, renew};
use super::{Facts, Finding, Findings, Placed};
use crate::eni::{Eni, Reason};
use crate::fib::{Packet, Way, lookup};
use crate::metadata::Fault;
use crate::net::{Address, Family, HasFamily, MacAddr, Route, RouteKind, Rule};
use crate::operation::{LinkChange, Operation};
use crate::place::TroubleKind;
use crate::policy;
use crate::snapshot::Snapshot;

pub fn imds(facts: &Facts) -> Findings {
    let mut findings = Vec::new();
    let Snapshot { metadata_error, metadata_fault, imds_endpoint, .. } = facts.snapshot;
    match (&facts.metadata, metadata_error, metadata_fault) {
        (Err(_), Some(why), Some(fault)) => findings.push(Finding::fail(why, remedy(*fault))),
        (Err(why), ..) => findings.push(Finding::fail(why, "look at what it answers: eniup snapshot")),
        (Ok(_), ..) => {}
    }
    if let Some(endpoint) = imds_endpoint {
        let evidence = format!("metadata is read at {endpoint}, as asked for, and not where EC2 has it");
        findings.push(Finding::warn(evidence, "unset AWS_EC2_METADATA_SERVICE_ENDPOINT (--imds-endpoint)"));
    }
    Ok(findings)
}

fn remedy(fault: Fault) -> &'static str {
    match fault {
        Fault::SwitchedOff => "unset AWS_EC2_METADATA_DISABLED",
        Fault::BadEndpoint => "unset AWS_EC2_METADATA_SERVICE_ENDPOINT (--imds-endpoint)",
        // systemd-imdsd(8), systemd 261.
        Fault::Locked => "boot with systemd.imds.network=unlocked on the kernel's command line",
        Fault::Forbidden => {
            "aws ec2 modify-instance-metadata-options --http-endpoint enabled --http-tokens required --instance-id ID"
        }
        Fault::Unauthorized => "find out who answers in its place: ip route get 169.254.169.254",
        Fault::Refused => "take the firewall rule away that rejects it: sudo nft list ruleset; sudo iptables -S OUTPUT",
        Fault::Unreachable => "give it a route by the primary ENI's link: ip route get 169.254.169.254",
        Fault::Overloaded => "wait a minute, and find out what asks it all the time: sudo ss -tnp dst 169.254.169.254",
        Fault::NotMetadata => "take the proxy or portal out of the way: ip route get 169.254.169.254",
        Fault::NoAnswer => {
            "run eniup in the host's own network namespace, or in a container raise the hop limit: \
             aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2 --instance-id ID"
        }
    }
}

pub fn hotplug(facts: &Facts) -> Findings {
    let metadata = facts.metadata()?;
    let mut findings = Vec::new();
    let wait = "sudo eniup reconcile --timeout 2m";
    for (mac, pending) in &metadata.attached.pending {
        let id = pending.id.clone().unwrap_or_else(|| format!("ENI {mac}"));
        let evidence = format!("{id} is not ready: {}", pending.reason);
        findings.push(match &pending.reason {
            Reason::Invalid { .. } => {
                let ask = format!("aws ec2 describe-network-interfaces --network-interface-ids {id}");
                Finding::fail(evidence, format!("compare with what EC2 says: {ask}"))
            }
            _ => Finding::warn(evidence, wait),
        });
    }
    for trouble in metadata.plan.troubles.values() {
        let evidence = format!("{}: {}", trouble.eni, trouble.kind);
        findings.push(match &trouble.kind {
            TroubleKind::NoLink { .. } => Finding::fail(evidence, "echo 1 | sudo tee /sys/bus/pci/rescan"),
            TroubleKind::NoAddress { .. } => Finding::warn(evidence, wait),
            TroubleKind::LinkTwice { links, .. } => {
                let other = links.last().cloned().unwrap_or_default();
                Finding::fail(evidence, format!("sudo ip link set {other} address 02:…   (one of its own)"))
            }
            TroubleKind::LinkTaken { link, .. } => Finding::fail(evidence, format!("sudo ip link set {link} nomaster")),
        });
    }
    for Placed { eni, link, .. } in facts.secondaries()?.into_iter().filter(|placed| !placed.link.is_up) {
        let evidence = format!("{}, the link of {}, is down", link.name, eni.id);
        findings.push(Finding::fail(evidence, facts.reconcile_or(format!("sudo ip link set {} up", link.name))));
    }
    Ok(findings)
}

pub fn missing_ip(facts: &Facts) -> Findings {
    let mut findings = Vec::new();
    let primary = facts.metadata()?.attached.primary;
    for Placed { mac, eni, link } in facts.placed()? {
        let there: BTreeSet<IpAddr> = facts.on_link(link.index).map(|address| address.net.addr()).collect();
        let has_family =
            |address: &IpAddr| address.is_ipv4() || link.ipv6.as_ref().is_some_and(|ipv6| !ipv6.is_disabled);
        let is_ours = |address: &IpAddr| !eni.of_others.contains(&IpNet::from(*address));
        let missing = all_addresses(eni).into_iter().filter(|address| !there.contains(address) && is_ours(address));
        let missing: Vec<IpAddr> = missing.filter(has_family).collect();
        let Some(first) = missing.first() else { continue };
        let elsewhere = facts.observed.addresses.iter().find(|(_, address)| address.net.addr() == *first);
        let elsewhere = elsewhere.map(|(index, _)| format!(", but on {}", facts.link_name(*index)));
        let evidence = format!(
            "{first}{} {} not on {}, the link of {}{}",
            more(missing.len() - 1),
            if missing.len() == 1 { "is" } else { "are" },
            link.name,
            eni.id,
            elsewhere.unwrap_or_default()
        );
        let is_added = |operation: &Operation| match operation {
            Operation::AddAddress { address, .. } => address.net.addr() == *first,
            _ => false,
        };
        let is_planned = facts.metadata()?.plan.steps.iter().any(|step| is_added(&step.operation));
        let fix = match (is_planned, mac == primary) {
            (true, _) => "sudo eniup reconcile".into(),
            (false, true) => renew(facts, link),
            (false, false) => "eniup -v plan".into(),
        };
        findings.push(Finding::fail(evidence, fix));
    }
    for (mac, disputes) in &facts.metadata()?.attached.disputes {
        let id = facts.metadata()?.attached.ready.get(mac).map_or_else(|| mac.to_string(), |eni| eni.id.clone());
        for dispute in disputes {
            let fix = format!("aws ec2 describe-network-interfaces --network-interface-ids {id} {}", dispute.by);
            findings.push(Finding::warn(format!("{id}: {dispute}"), fix));
        }
    }
    Ok(findings)
}

/// Something that leaves by another way than it should.
struct Stray {
    from: IpAddr,
    to: IpAddr,
    way: Way,
}

/// Priorities of the rules that the kernel begins with: of `local`, `main` and `default`.
const KERNELS: [u32; 3] = [0, policy::MAIN_PRIORITY, policy::MAIN_PRIORITY + 1];

impl Facts<'_> {
    fn on_link(&self, index: u32) -> impl Iterator<Item = &Address> {
        self.observed.addresses.iter().filter(move |(on, _)| *on == index).map(|(_, address)| address)
    }

    fn has(&self, address: IpAddr) -> bool {
        self.observed.addresses.iter().any(|(_, there)| there.net.addr() == address)
    }

    /// What the ENI's addresses that are here send to these destinations, and not by this link.
    fn strays(&self, eni: &Eni, link: u32, destinations: &[IpAddr]) -> Vec<Stray> {
        let sources = all_addresses(eni).into_iter().filter(|address| self.has(*address));
        let pairs = sources.flat_map(|from| {
            let fits = move |to: &&IpAddr| to.family() == from.family();
            destinations.iter().filter(fits).map(move |to| (from, *to))
        });
        let strays = pairs.filter_map(|(from, to)| {
            let way = self.way(&packet(Some(from), to));
            let is_right = matches!(way, Way::Out { link: by, .. } if by == link);
            (!is_right).then_some(Stray { from, to, way })
        });
        strays.collect()
    }

    /// One finding for all of one ENI's.
    fn stray_finding(&self, strays: &[Stray], owner: &str) -> Option<Finding> {
        let is_known = |stray: &&Stray| !matches!(stray.way, Way::Unknown(_));
        let Stray { from, to, way } = strays.iter().find(is_known).or(strays.first())?;
        let what = format!("what {from}{} sends to {to}", more(strays.len() - 1));
        let evidence = match way {
            Way::Out { link, .. } => format!("{what} leaves by {}, not by {owner}", self.link_name(*link)),
            Way::Here => format!("{what} stays on this machine"),
            Way::Nowhere(refusal) => format!("{what} goes nowhere: {refusal}"),
            Way::Unknown(doubt) => {
                let asks = strays.iter().map(|stray| packet(Some(stray.from), stray.to)).collect();
                return Some(Finding { asks, ..Finding::skip(format!("where {from} sends to {to}: {doubt}")) });
            }
        };
        Some(Finding::fail(evidence, self.reconcile_or(self.way_to_mend(&packet(Some(*from), *to)))))
    }

    /// What takes away somebody's rule that decides about the packet; where it is none, what shows how it is decided.
    fn way_to_mend(&self, packet: &Packet) -> String {
        let is_removable = |rule: &&Rule| !policy::owns_rule(self.config, rule) && !KERNELS.contains(&rule.priority);
        match lookup(&self.observed, packet).rule.filter(is_removable) {
            Some(rule) => {
                let rule = Operation::DeleteRule { rule: rule.clone() };
                format!("sudo {rule}\nand take it out of the configuration that added it")
            }
            None => {
                let from = packet.source.map(|from| format!("--from {from} ")).unwrap_or_default();
                format!("eniup explain {from}--to {}", packet.destination)
            }
        }
    }
}

fn packet(source: Option<IpAddr>, destination: IpAddr) -> Packet {
    Packet { source, destination, input: None, output: None, mark: 0 }
}

/// ` and n more`, if there are any.
fn more(n: usize) -> String {
    if n == 0 { String::new() } else { format!(" and {n} more") }
}

fn all_addresses(eni: &Eni) -> Vec<IpAddr> {
    Family::BOTH.into_iter().flat_map(|family| eni.addresses(family)).collect()
}

/// Of the addresses for documentation (RFC 5737, RFC 3849): they stand for any of the internet.
const ANYWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1))];

/// An address of the network that is not this machine's own.
fn somebody_in(net: IpNet, facts: &Facts) -> Option<IpAddr> {
    net.hosts().take(1 << 16).find(|address| !facts.has(*address))
}

pub fn asymmetry(facts: &Facts) -> Findings {
    let (placed, specifics) = (facts.placed()?, specific_routes(facts)?);
    let mut findings = Vec::new();
    for Placed { eni, link, .. } in facts.secondaries()? {
        let own = eni.all_subnets();
        let others = placed.iter().flat_map(|other| other.eni.all_subnets()).filter(|net| !own.contains(net));
        let others: BTreeSet<IpNet> = others.collect();
        let destinations = others.into_iter().filter_map(|net| somebody_in(net, facts)).chain(ANYWHERE);
        let destinations = destinations.filter(|to| !specifics.iter().any(|(_, route)| route.destination.contains(to)));
        let strays = facts.strays(eni, link.index, &destinations.collect::<Vec<_>>());
        findings.extend(facts.stray_finding(&strays, &format!("{} ({})", link.name, eni.id)));
    }
    Ok(findings)
}

pub fn same_subnet(facts: &Facts) -> Findings {
    let placed = facts.placed()?;
    let mut findings = Vec::new();
    for Placed { mac, eni, link } in &placed {
        let others = placed.iter().filter(|other| other.mac != *mac);
        let others: BTreeSet<IpNet> = others.flat_map(|other| other.eni.all_subnets()).collect();
        let shared = eni.all_subnets().into_iter().filter(|net| others.contains(net));
        let destinations: Vec<IpAddr> = shared.filter_map(|net| somebody_in(net, facts)).collect();
        let strays = facts.strays(eni, link.index, &destinations);
        findings.extend(facts.stray_finding(&strays, &format!("{} ({})", link.name, eni.id)));
    }
    Ok(findings)
}

/// Where a program that binds to no address reaches a network by a link that is no ENI's, an ENI's address has to as well.
pub fn containers(facts: &Facts) -> Findings {
    let placed = facts.placed()?;
    let mut findings = Vec::new();
    for (index, Route { destination, .. }) in specific_routes(facts)? {
        let Some(to) = somebody_in(*destination, facts) else { continue };
        let way = facts.way(&packet(None, to));
        let is_reached = matches!(way, Way::Out { link, .. } if link == index);
        let owner = format!("{}, which has {destination}", facts.link_name(index));
        for Placed { eni, .. } in placed.iter().filter(|_| is_reached) {
            findings.extend(facts.stray_finding(&facts.strays(eni, index, &[to]), &owner));
        }
    }
    Ok(findings)
}

/// What `main` has for certain destinations by links that are no ENI's: containers, bridges, tunnels.
fn specific_routes<'a>(facts: &'a Facts) -> Result<Vec<(u32, &'a Route)>, String> {
    let attached = &facts.metadata()?.attached;
    let is_listed = |mac: &MacAddr| {
        attached.ready.contains_key(mac) || attached.pending.contains_key(mac) || attached.ignored.contains_key(mac)
    };
    let is_eni = |index: &u32| {
        let link = facts.observed.links.get(index).filter(|link| policy::can_be_eni(link));
        link.and_then(|link| link.mac).is_some_and(|mac| is_listed(&mac))
    };
    let is_everybodys = |net: &IpNet| *net == policy::IPV6_LINK_LOCAL || net.addr().is_multicast();
    let is_specific = |net: &IpNet| u32::from(net.prefix_len()) > policy::GUARD_PREFIX_LENGTH && !is_everybodys(net);
    let routes = main_routes(facts).filter(|(index, route)| !is_eni(index) && is_specific(&route.destination));
    Ok(routes.collect())
}

/// Those that lead somewhere, each with the index of its link.
fn main_routes<'a>(facts: &'a Facts) -> impl Iterator<Item = (u32, &'a Route)> {
    let routes = facts.observed.routes.iter();
    let in_main = routes.filter(|(_, route)| route.table == policy::MAIN_TABLE && route.kind == RouteKind::Unicast);
    in_main.filter_map(|(index, route)| Some(((*index)?, route)))
}

pub fn default_route(facts: &Facts) -> Findings {
    let (Some(primary), placed) = (facts.primary()?, facts.placed()?) else { return Ok(Vec::new()) };
    let mut findings = Vec::new();
    for family in Family::BOTH.into_iter().filter(|family| primary.eni.has_family(*family)) {
        let is_default = |route: &Route| route.destination == family.everything();
        let defaults = main_routes(facts).filter(|(_, route)| is_default(route));
        let of_enis: Vec<_> = defaults
            .filter_map(|(index, route)| Some((placed.iter().find(|placed| placed.link.index == index)?, route)))
            .collect();
        let best = of_enis.iter().filter(|(at, _)| at.mac == primary.mac).map(|(_, route)| route.metric).min();
        for (at, route) in of_enis.iter().filter(|(at, _)| at.mac != primary.mac) {
            let shown = Operation::AddRoute {
                link: Some(crate::operation::LinkRef { index: at.link.index, name: at.link.name.clone() }),
                route: **route,
            };
            let shown = shown.to_string().replace(" route add ", " route del ");
            let evidence = format!(
                "main has a default route of {family} by {} ({}), metric {}; that of the primary, {}, has {}",
                at.link.name,
                at.eni.id,
                route.metric,
                primary.link.name,
                best.map_or("none".into(), |metric| format!("metric {metric}")),
            );
            let fix = format!("sudo {shown}\n{}", keep_off_default(facts, at.link));
            let is_first = best.is_none_or(|best| route.metric <= best);
            findings.push(if is_first { Finding::fail(evidence, fix) } else { Finding::warn(evidence, fix) });
        }
    }
    Ok(findings)
}

/// The kernel chooses among the addresses of a link that are as long as the subnet (IPv4) or not deprecated (IPv6).
pub fn source(facts: &Facts) -> Findings {
    let mut findings = Vec::new();
    for Placed { eni, link, .. } in facts.placed()? {
        for family in Family::BOTH {
            let wanted = eni.addresses(family);
            let Some((first, others)) = wanted.split_first() else { continue };
            let is_other = |address: &&Address| others.contains(&address.net.addr());
            let may_be_chosen = |address: &&Address| match family {
                Family::V4 => address.net.prefix_len() < family.bits(),
                Family::V6 => !address.is_deprecated,
            };
            let Some(other) = facts.on_link(link.index).filter(is_other).find(may_be_chosen) else { continue };
            let (net, name) = (other.net, &link.name);
            let evidence = format!(
                "{net} on {name} may be taken, instead of {first}, for what {} sends and no program binds",
                eni.id
            );
            let fix = match family {
                Family::V4 => {
                    format!("sudo ip addr add {}/32 dev {name} && sudo ip addr del {net} dev {name}", net.addr())
                }
                Family::V6 => format!("sudo ip addr change {net} dev {name} preferred_lft 0"),
            };
            findings.push(Finding::warn(evidence, fix));
        }
    }
    Ok(findings)
}

/// 1 is strict. The larger of the two settings counts (`ip-sysctl`, rp_filter).
const STRICT: i64 = 1;

pub fn reverse_path(facts: &Facts) -> Findings {
    let files = &facts.snapshot.files;
    let setting = |name: &str| files.number(&format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"));
    let all = setting("all").ok_or("rp_filter of this machine was not read")?;
    let placed = facts.placed()?;
    let strict: Vec<&Placed> =
        placed.iter().filter(|placed| setting(&placed.link.name).unwrap_or(0).max(all) == STRICT).collect();
    let mut findings = Vec::new();
    for Placed { eni, link, .. } in &strict {
        let strays = facts.strays(eni, link.index, &ANYWHERE[..1]);
        if let Some(Stray { from, way: Way::Out { link: by, .. }, .. }) = strays.first() {
            let evidence = format!(
                "rp_filter of {} is strict, and what {from} sends leaves by {}: the kernel drops what comes in for it",
                link.name,
                facts.link_name(*by)
            );
            findings.push(Finding::fail(evidence, facts.reconcile_or(loosen(&link.name))));
        }
    }
    let dropped = files.counter("TcpExt", "IPReversePathFilter").unwrap_or(0);
    if let (Some(first), true, true) = (strict.first(), dropped > 0, findings.is_empty()) {
        let names: Vec<&str> = strict.iter().map(|placed| placed.link.name.as_str()).collect();
        let evidence = format!(
            "rp_filter is strict on {}, and the kernel has dropped {dropped} packets for it (IPReversePathFilter)",
            names.join(", ")
        );
        findings.push(Finding::warn(evidence, loosen(&first.link.name)));
    }
    Ok(findings)
}

fn loosen(link: &str) -> String {
    format!("sudo sysctl -w net.ipv4.conf.{link}.rp_filter=2")
}

pub fn mtu(facts: &Facts) -> Findings {
    let Some(primary) = facts.primary()? else { return Ok(Vec::new()) };
    let metadata = facts.metadata()?;
    let mut findings = Vec::new();
    for Placed { mac, eni, link } in facts.secondaries()? {
        let is_chosen = metadata.attached.choices.get(&mac).is_some_and(|choices| choices.mtu == Some(link.mtu));
        if link.mtu == primary.link.mtu || is_chosen {
            continue;
        }
        let Placed { link: first, .. } = primary;
        let evidence = format!(
            "{} ({}) has an MTU of {}, the primary's {} of {}",
            link.name, eni.id, link.mtu, first.name, first.mtu
        );
        let is_planned = metadata.plan.steps.iter().any(|step| match &step.operation {
            Operation::SetLink { link: at, change: LinkChange::Mtu(_) } => at.index == link.index,
            _ => false,
        });
        let fix = match is_planned {
            true => "sudo eniup reconcile".into(),
            false => format!("sudo ip link set {} mtu {}", link.name, first.mtu),
        };
        findings.push(Finding::warn(evidence, fix));
    }
    Ok(findings)
}

pub fn forwarding(facts: &Facts) -> Findings {
    let files = &facts.snapshot.files;
    let is_on = |family: Family| {
        let path = match family {
            Family::V4 => "/proc/sys/net/ipv4/ip_forward",
            Family::V6 => "/proc/sys/net/ipv6/conf/all/forwarding",
        };
        files.number(path).map(|value| value != 0)
    };
    let mut findings = Vec::new();
    for Placed { eni, .. } in facts.placed()? {
        for (family, key) in [(Family::V4, "net.ipv4.ip_forward"), (Family::V6, "net.ipv6.conf.all.forwarding")] {
            if let (Some(prefix), Some(false)) = (eni.prefixes(family).first(), is_on(family)) {
                let evidence = format!(
                    "{prefix} is delegated to {}, but {key} is 0: no container with such an address gets packets",
                    eni.id
                );
                findings.push(Finding::warn(evidence, format!("sudo sysctl -w {key}=1")));
            }
        }
    }
    // The kernel ignores router advertisements on a router unless accept_ra is 2 (ip-sysctl).
    const BY_ADVERTISEMENT: u8 = 9;
    for (index, route) in main_routes(facts).filter(|(_, route)| route.protocol == BY_ADVERTISEMENT) {
        let link =
            facts.observed.links.get(&index).filter(|link| link.ipv6.as_ref().is_some_and(|ipv6| ipv6.accept_ra == 1));
        if let (Some(link), Some(true), 0) = (link, is_on(Family::V6), route.destination.prefix_len()) {
            let evidence = format!(
                "the IPv6 default by {} is from a router advertisement, and as IPv6 is forwarded the kernel takes no further one",
                link.name
            );
            findings.push(Finding::warn(evidence, format!("sudo sysctl -w net.ipv6.conf.{}.accept_ra=2", link.name)));
        }
    }
    Ok(findings)
}

pub fn drift(facts: &Facts) -> Findings {
    let steps = &facts.metadata()?.plan.steps;
    let first = steps.first().map(|step| {
        let evidence = format!("eniup plan has {} changes, the first `{}`", steps.len(), step.operation);
        Finding::warn(evidence, "sudo eniup reconcile")
    });
    Ok(first.into_iter().collect())
}

//! The promise as a property of the model: a packet whose source is an ENI's leaves by that ENI, and what does not use
//! a secondary ENI's addresses goes as before.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use eniup::config::{Config, Rules};
use eniup::desired::desired;
use eniup::eni::Attached;
use eniup::fib::{Answer, Doubt, Outcome, Packet, Refusal, Way, lookup};
use eniup::net::{Family, HasFamily, Observed, Route};
use eniup::netlink::Netlink;
use eniup::operation::Operation;
use eniup::plan::{Plan, plan};
use eniup::policy;
use proptest::prelude::*;

use crate::kernel::{ip, observe, on_a_machine, output_of_ip};
use crate::model::{Count, be_a_router, compare};
use crate::support::{apply, check};
use crate::vpc::{
    BRIDGE, Destination, Elsewhere, Host, Others, Split, TUNNEL, Vpc, link_of, local, mac, others, sources, vpc,
};

/// One run of eniup on the model; a second has nothing to do.
fn reconcile(attached: &Attached, observed: &mut Observed, config: &Config) -> Result<()> {
    let run = |observed: &Observed| plan(&desired(attached, config), observed, attached.primary, config);
    let first = run(observed);
    ensure!(first.troubles.is_empty(), "{:?}", first.troubles);
    apply(observed, &first);
    let second = run(observed);
    ensure!(second.steps.is_empty(), "left to do: {:#?}", second.steps);
    Ok(())
}

/// Packets from the ENIs' addresses (made here) and delegated prefixes (forwarded from a bridge) leave by that ENI,
/// unless they are for a container, bridge or tunnel, or for what an administrator made unreachable.
fn keeps_its_promise(attached: &Attached, observed: &Observed, destinations: &[Destination]) -> Result<()> {
    for (mac, eni) in attached.ready.iter().filter(|(mac, _)| **mac != attached.primary) {
        let own = link_of(observed, *mac);
        for family in Family::BOTH {
            for (source, is_delegated) in sources(eni, family) {
                for to in destinations.iter().filter(|to| to.address.family() == family) {
                    let input = is_delegated.then_some(BRIDGE);
                    let packet = Packet { input, ..local(Some(source), to.address) };
                    let answer = lookup(observed, &packet);
                    let is_kept = match (to.elsewhere_for(eni), answer.way) {
                        (Some(Elsewhere::Link(other)), Way::Out { link, .. }) => link == other,
                        (Some(Elsewhere::Unreachable), Way::Nowhere(Refusal::Unreachable)) => true,
                        (None, Way::Out { link, .. }) => link == own,
                        _ => false,
                    };
                    ensure!(is_kept, "{} (link {own}), {to:?}: {packet:?}: {answer:#?}", eni.id);
                }
            }
        }
    }
    Ok(())
}

/// The primary's traffic to other ENIs' subnets leaves by the primary: the narrow rules.
fn keeps_the_primarys_replies_symmetric(attached: &Attached, observed: &Observed, to: &[Destination]) -> Result<()> {
    let own = link_of(observed, attached.primary);
    let primary = attached.primary_eni().context("a primary")?;
    for family in Family::BOTH {
        for (source, is_delegated) in sources(primary, family) {
            for to in to.iter().filter(|to| is_in_a_secondarys_subnet(attached, to)) {
                // What went into a tunnel goes on doing so.
                if to.address.family() != family || to.split == Split::Taken {
                    continue;
                }
                let packet = Packet { input: is_delegated.then_some(BRIDGE), ..local(Some(source), to.address) };
                let answer = lookup(observed, &packet);
                ensure!(matches!(answer.way, Way::Out { link, .. } if link == own), "{source} → {to:?}: {answer:#?}");
            }
        }
    }
    Ok(())
}

fn is_in_a_secondarys_subnet(attached: &Attached, to: &Destination) -> bool {
    let secondaries = attached.ready.iter().filter(|(mac, _)| **mac != attached.primary);
    let mut subnets = secondaries.flat_map(|(_, eni)| eni.subnets(to.address.family()));
    subnets.any(|subnet| subnet.contains(&to.address))
}

/// A socket bound to a link talks to its neighbours' link-local addresses straight, as it would without eniup.
fn neighbours_stay_neighbours(attached: &Attached, observed: &Observed) -> Result<()> {
    for (mac, _) in attached.ready.iter().filter(|(_, eni)| eni.has_family(Family::V6)) {
        let link = link_of(observed, *mac);
        let packet = Packet { output: Some(link), ..local(None, "fe80::99".parse()?) };
        let answer = lookup(observed, &packet);
        ensure!(answer.way == Way::Out { link, gateway: None }, "{packet:?}: {answer:#?}");
    }
    Ok(())
}

/// Everything that uses no address of a secondary ENI goes as it went, but for three things that are meant:
/// - what looks for a default of a family that the primary has not, and that `main` had none for, finds the one by the
///   first secondary ENI that has it;
/// - the primary's addresses and delegated prefixes reach other ENIs' subnets by the primary;
/// - what those sent by `main`'s default and another ENI's link leaves by the primary.
fn changes_nothing_else(
    attached: &Attached,
    before: &Observed,
    after: &Observed,
    destinations: &[Destination],
    config: &Config,
) -> Result<()> {
    let primary = attached.primary_eni().context("a primary")?;
    for to in destinations {
        let family = to.address.family();
        for (packet, is_primarys) in unconcerned(attached, before, to) {
            if is_primarys && is_in_a_secondarys_subnet(attached, to) {
                continue;
            }
            let (was, is) = (lookup(before, &packet), lookup(after, &packet));
            if is_primarys && is_by_anothers_default(attached, before, &was) {
                let own = link_of(after, attached.primary);
                ensure!(matches!(is.way, Way::Out { link, .. } if link == own), "{packet:?}: was {was:#?}, is {is:#?}");
                continue;
            }
            let is_ours = |route: &Route| route.table == policy::MAIN_TABLE && policy::owns_route(config, route);
            let is_given_a_default = primary.addresses(family).is_empty() && is.route.is_some_and(is_ours);
            ensure!(was.way == is.way || is_given_a_default, "{packet:?}: was {was:#?}, is {is:#?}");
        }
    }
    Ok(())
}

/// Whether the packet leaves by a default route in `main` and the link of a secondary ENI, or may.
fn is_by_anothers_default(attached: &Attached, observed: &Observed, answer: &Answer) -> bool {
    let secondaries = attached.ready.keys().filter(|mac| **mac != attached.primary);
    let links: Vec<u32> = secondaries.map(|mac| link_of(observed, *mac)).collect();
    let is_default = |route: &Route| route.table == policy::MAIN_TABLE && route.destination.prefix_len() == 0;
    match answer.way {
        Way::Out { link, .. } => links.contains(&link) && answer.route.is_some_and(is_default),
        _ => false,
    }
}

/// Packets to a destination that use no address of a secondary ENI; whether their source is the primary's.
fn unconcerned(attached: &Attached, observed: &Observed, to: &Destination) -> Vec<(Packet, bool)> {
    let family = to.address.family();
    let unbound = local(None, to.address);
    let mut packets = Vec::new();
    for mark in [0, 51_820, 0x80000] {
        packets.push((Packet { mark, ..unbound }, false));
    }
    let primarys_link = link_of(observed, attached.primary);
    for output in [BRIDGE, TUNNEL, primarys_link] {
        packets.push((Packet { output: Some(output), ..unbound }, false));
    }
    for (mac, eni) in &attached.ready {
        for (source, is_delegated) in sources(eni, family) {
            let is_primarys = *mac == attached.primary;
            if is_primarys && !is_delegated {
                packets.push((Packet { source: Some(source), ..unbound }, true));
            }
            // Forwarded by a NAT box or a firewall, whoever's address it is; but a delegated prefix is its ENI's.
            if is_primarys || !is_delegated {
                let packet = Packet { source: Some(source), input: Some(primarys_link), ..unbound };
                packets.push((packet, is_primarys && is_delegated));
            }
        }
    }
    let strangers = if family == Family::V4 { ["172.17.0.5", "198.51.100.7"] } else { ["fd00:17::5", "2a00::7"] };
    for source in strangers {
        let source = Some(source.parse().unwrap());
        packets.extend([BRIDGE, primarys_link].map(|link| (Packet { source, input: Some(link), ..unbound }, false)));
        packets.push((Packet { source, ..unbound }, false));
    }
    packets
}

#[test]
fn a_packet_leaves_by_the_eni_of_its_source_and_nothing_else_changes() {
    let config = Config::default();
    check(60, (vpc(), others()), |(vpc, others)| {
        let host = Host::new(vpc, others);
        let mut observed = host.observed.clone();
        for time in [0, 1] {
            let attached = vpc.attached(time);
            reconcile(&attached, &mut observed, &config)?;
            keeps_its_promise(&attached, &observed, &host.destinations)?;
            keeps_the_primarys_replies_symmetric(&attached, &observed, &host.destinations)?;
            neighbours_stay_neighbours(&attached, &observed)?;
            changes_nothing_else(&attached, &host.observed, &observed, &host.destinations, &config)?;
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn both_forms_of_rules_send_every_address_the_same_way() {
    let per_address = Config { rules: Rules::PerAddress, ..Config::default() };
    check(40, (vpc(), others()), |(vpc, others)| {
        let attached = vpc.attached(0);
        let host = Host::new(vpc, others);
        let (mut few, mut many) = (host.observed.clone(), host.observed.clone());
        reconcile(&attached, &mut few, &Config::default())?;
        reconcile(&attached, &mut many, &per_address)?;
        ensure!(few.rules.len() <= many.rules.len(), "{} rules are not few", few.rules.len());
        keeps_its_promise(&attached, &many, &host.destinations)?;
        for eni in attached.ready.values() {
            for to in &host.destinations {
                for (source, is_delegated) in sources(eni, to.address.family()) {
                    let packet = Packet { input: is_delegated.then_some(BRIDGE), ..local(Some(source), to.address) };
                    let (by_few, by_many) = (lookup(&few, &packet), lookup(&many, &packet));
                    ensure!(by_few.way == by_many.way, "{packet:?}: {by_few:#?} or {by_many:#?}");
                }
            }
        }
        Ok(())
    })
    .unwrap();
}

/// The same on the kernel: what eniup makes of a machine is asked about packet by packet.
#[test]
fn the_kernel_keeps_the_promise_with_both_forms_of_rules() {
    vpc_lab::inside(|| {
        let mut count = Count::default();
        check(12, (vpc(), others()), |(vpc, others)| {
            let attached = vpc.attached(0);
            let host = Host::new(vpc, others);
            for rules in [Rules::Aggregated, Rules::PerAddress] {
                let config = Config { rules, ..Config::default() };
                on_a_machine(|| {
                    be_a_router()?;
                    ip(&host.lines(&attached))?;
                    reconcile_the_kernel(&attached, &config)?;
                    let observed = observe()?;
                    keeps_its_promise(&attached, &observed, &host.destinations)?;
                    keeps_the_primarys_replies_symmetric(&attached, &observed, &host.destinations)?;
                    let packets = host.destinations.iter().flat_map(|to| all_packets(&attached, &observed, to));
                    compare(&observed, &packets.collect::<Vec<_>>(), &mut count)
                })?;
            }
            Ok(())
        })?;
        eprintln!("{count:?}");
        ensure!(count.compared > 5_000 && count.unknown == 0, "{count:?}");
        Ok(())
    });
}

fn reconcile_the_kernel(attached: &Attached, config: &Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut netlink = Netlink::open()?;
        let desired = desired(attached, config);
        let first = plan(&desired, &netlink.observe().await?, attached.primary, config);
        netlink.apply(&first.steps).await?;
        let second = plan(&desired, &netlink.observe().await?, attached.primary, config);
        ensure!(second.steps.is_empty(), "left to do: {:#?}", second.steps);
        Ok(())
    })
}

/// From every ENI's address and delegated prefix, and what has nothing to do with them.
fn all_packets(attached: &Attached, observed: &Observed, to: &Destination) -> Vec<Packet> {
    let family = to.address.family();
    let own = attached.ready.values().flat_map(|eni| sources(eni, family)).map(|(source, is_delegated)| Packet {
        input: is_delegated.then_some(BRIDGE),
        ..local(Some(source), to.address)
    });
    // The kernel makes no IPv4 packet with a source that is not its own.
    let is_made = |packet: &Packet| {
        let source = packet.source.filter(|source| packet.input.is_none() && source.is_ipv4());
        source.is_none_or(|source| observed.addresses.iter().any(|(_, address)| address.net.addr() == source))
    };
    let others = unconcerned(attached, observed, to).into_iter().map(|(packet, _)| packet);
    own.chain(others).filter(is_made).collect()
}

/// IPv6 passes over a router that was silent when there is any other route in the table, and asks it again only after
/// a minute: the ENI's last resort must not be in the way.
#[test]
fn a_router_that_was_silent_is_asked_again_by_the_next_packet() {
    vpc_lab::inside(|| {
        let vpc = Vpc::in_subnets(&[0, 1]);
        let attached = vpc.attached(0);
        let host = Host::new(&vpc, &Others::default());
        on_a_machine(|| {
            ip(&host.lines(&attached))?;
            reconcile_the_kernel(&attached, &Config::default())?;
            let observed = observe()?;
            let link = link_of(&observed, mac(1));
            let source = attached.ready[&mac(1)].addresses(Family::V6)[0];
            let packet = local(Some(source), "2600::9".parse()?);
            let settings = format!("/proc/sys/net/ipv6/neigh/{}", observed.links[&link].name);
            fs::write(format!("{settings}/mcast_solicit"), "1")?;
            fs::write(format!("{settings}/retrans_time_ms"), "10")?;
            UdpSocket::bind((source, 0))?.send_to(b"anyone?", (packet.destination, 9))?;
            let deadline = Instant::now() + Duration::from_secs(10);
            while !output_of_ip("-6 neigh show nud failed")?.contains("fe80:ec2::1") {
                ensure!(Instant::now() < deadline, "the router answers: {}", output_of_ip("-6 neigh")?);
                std::thread::yield_now();
            }
            compare(&observed, &[packet], &mut Count::default())?;
            keeps_its_promise(&attached, &observed, &host.destinations)
        })
    });
}

/// When the link's routes are gone, what comes from the ENI's addresses goes nowhere: it fails closed.
#[test]
fn without_its_link_an_enis_traffic_goes_nowhere() {
    check(20, (vpc(), others()), |(vpc, others)| {
        let attached = vpc.attached(0);
        let host = Host::new(vpc, others);
        let mut observed = host.observed.clone();
        reconcile(&attached, &mut observed, &Config::default())?;
        for (mac, eni) in attached.ready.iter().filter(|(mac, _)| **mac != attached.primary) {
            let own = link_of(&observed, *mac);
            let mut down = observed.clone();
            down.routes.retain(|(link, _)| *link != Some(own));
            // What hid a wider network of a tunnel may be gone with the link.
            let is_closed = |to: &&Destination| match to.split {
                Split::Outside => to.elsewhere.is_none(),
                Split::Hidden | Split::Taken => to.is_in_subnet_of(eni),
            };
            for to in host.destinations.iter().filter(is_closed) {
                for (source, is_delegated) in sources(eni, to.address.family()) {
                    let packet = Packet { input: is_delegated.then_some(BRIDGE), ..local(Some(source), to.address) };
                    let answer = lookup(&down, &packet);
                    ensure!(answer.way == Way::Nowhere(Refusal::Unreachable), "{packet:?}: {answer:#?}");
                }
            }
        }
        Ok(())
    })
    .unwrap();
}

/// While ENIs, addresses and prefixes come and go, a packet over what stays goes at every moment as it went before, or as it
/// will go after, or by the ENI that has its source: no step of a plan leads it astray.
#[test]
fn no_step_on_the_way_leads_a_packet_astray() {
    let here = || prop::collection::vec(prop::bool::weighted(0.7), 6);
    // The rules that a link in a foreign group needs may tie with each other.
    let others = others().prop_map(Others::without_groups);
    check(20, (vpc(), others, here(), here(), any::<bool>()), |(vpc, others, first, second, is_link_gone)| {
        let (was, is) = (only(vpc.attached(0), first), only(vpc.attached(1), second));
        nothing_goes_astray(&Host::new(vpc, others), &was, &is, *is_link_gone)
    })
    .unwrap();
}

/// An ENI that shared its subnet has it for itself: its rules become few, and the other way round.
#[test]
fn no_step_leads_a_packet_astray_when_a_subnet_becomes_one_enis() {
    let vpc = Vpc::in_subnets(&[0, 1, 1]);
    let host = Host::new(&vpc, &Others::default());
    let (two, one) = (vpc.attached(0), only(vpc.attached(0), &[true, true, false]));
    for is_link_gone in [false, true] {
        nothing_goes_astray(&host, &two, &one, is_link_gone).unwrap();
        nothing_goes_astray(&host, &one, &two, is_link_gone).unwrap();
    }
}

/// Plans what becomes of a machine with the first ENIs that has the second ones, and asks after each step.
fn nothing_goes_astray(host: &Host, was: &Attached, is: &Attached, is_link_gone: bool) -> Result<()> {
    let config = Config::default();
    let mut observed = host.observed.clone();
    reconcile(was, &mut observed, &config)?;
    for mac in was.ready.keys().filter(|mac| is_link_gone && !is.ready.contains_key(*mac)) {
        let gone = link_of(&observed, *mac);
        observed.links.remove(&gone);
        observed.addresses.retain(|(link, _)| *link != gone);
        observed.routes.retain(|(link, _)| *link != Some(gone));
    }
    let mut after = observed.clone();
    reconcile(is, &mut after, &config)?;
    let packets = host.destinations.iter().flat_map(|to| staying(was, is, &observed, to));
    // A default in `main` that eniup gives moves from one ENI to another as two steps.
    let is_given = |packet: &Packet| [&observed, &after].iter().any(|end| is_by_a_given_default(end, packet, &config));
    let ends = |packet: Packet| (packet, [&observed, &after].map(|end| lookup(end, &packet).way));
    let packets: Vec<(Packet, [Way; 2])> = packets.filter(|packet| !is_given(packet)).map(ends).collect();
    for step in plan(&desired(is, &config), &observed, is.primary, &config).steps {
        apply(&mut observed, &Plan { steps: vec![step.clone()], ..Plan::default() });
        let family = family_of(&step.operation);
        let is_asked = |packet: &Packet| family.is_none_or(|family| packet.destination.family() == family);
        for (packet, ends) in packets.iter().filter(|(packet, _)| is_asked(packet)) {
            let answer = lookup(&observed, packet);
            let is_right = |way: &Way| {
                let is_kept = matches!(way, Way::Out { link, .. } if has_source(is, &observed, *link, packet));
                ends.contains(way) || is_kept
            };
            let ways = possible_ways(&answer);
            ensure!(ways.iter().all(is_right), "{packet:?} goes {ends:?}, but after {step}: {answer:#?}");
        }
    }
    Ok(())
}

/// The ways of an answer. Of rules with one priority the kernel tries first the one that was there first; of two equal
/// defaults in `main`, which no ENI's source comes to, the model says nothing.
fn possible_ways(answer: &Answer) -> Vec<Way> {
    let priority = match answer.way {
        Way::Unknown(Doubt::OrderOfRules { priority }) => priority,
        Way::Unknown(Doubt::EqualRoutes) => return Vec::new(),
        way => return vec![way],
    };
    let tied = answer.trace.iter().filter(|(rule, _)| rule.priority == priority);
    tied.filter_map(|(_, outcome)| if let Outcome::Decided(way, _) = outcome { Some(*way) } else { None }).collect()
}

fn is_by_a_given_default(observed: &Observed, packet: &Packet, config: &Config) -> bool {
    let is_ours = |route: &Route| route.table == policy::MAIN_TABLE && policy::owns_route(config, route);
    lookup(observed, packet).route.is_some_and(is_ours)
}

/// The only family whose packets may go another way by this.
fn family_of(operation: &Operation) -> Option<Family> {
    match operation {
        Operation::AddRule { rule } | Operation::DeleteRule { rule } => Some(rule.family),
        Operation::AddRoute { route, .. } | Operation::DeleteRoute { route, .. } => Some(route.destination.family()),
        _ => None,
    }
}

/// The primary, and those of the others that are here.
fn only(mut attached: Attached, here: &[bool]) -> Attached {
    let primary = attached.primary;
    let mut here = here.iter().copied().chain(std::iter::repeat(true));
    attached.ready.retain(|mac, _| here.next() == Some(true) || *mac == primary);
    attached
}

/// Packets over what each ENI has at both times, and those that have nothing to do with secondary ENIs.
fn staying(was: &Attached, is: &Attached, observed: &Observed, to: &Destination) -> Vec<Packet> {
    let family = to.address.family();
    let both = is.ready.iter().filter_map(|(mac, eni)| Some((was.ready.get(mac)?, eni)));
    let own = both.flat_map(|(then, now)| {
        let then = sources(then, family);
        sources(now, family).into_iter().filter(move |source| then.contains(source))
    });
    let own = own.map(|(source, is_delegated)| Packet {
        input: is_delegated.then_some(BRIDGE),
        ..local(Some(source), to.address)
    });
    let strangers = unconcerned(was, observed, to).into_iter();
    let strangers = strangers.filter(|(packet, _)| packet.source.is_none_or(|source| !is_of_an_eni(is, source)));
    own.chain(strangers.map(|(packet, _)| packet)).collect()
}

/// Whether the link is that of the ENI to which the packet's source belongs.
fn has_source(attached: &Attached, observed: &Observed, link: u32, packet: &Packet) -> bool {
    let family = packet.destination.family();
    let owner = attached.ready.iter().find(|(_, eni)| {
        packet.source.is_some_and(|source| sources(eni, family).iter().any(|(own, _)| *own == source))
    });
    owner.is_some_and(|(mac, _)| observed.links.values().any(|found| found.index == link && found.mac == Some(*mac)))
}

fn is_of_an_eni(attached: &Attached, source: IpAddr) -> bool {
    attached.ready.values().any(|eni| eni.all_subnets().iter().any(|subnet| subnet.contains(&source)))
}

//! What others have configured on the machine, and which way packets go beside it.

mod support;

use anyhow::{Context, Result, ensure};
use support::machine::{Machine, difference, inside, ip, read_leaves, scenario, with_scenario};
use support::moments::settled_dump;

const SHARED: &str = "three-enis-of-which-two-share";

/// Each of these packets, as `ip route get` asks for it, leaves by this link.
fn ensure_ways(ways: &[(&str, &str)]) -> Result<()> {
    for (packet, link) in ways {
        let way = ip(&format!("route get {packet}")).unwrap_or_else(|error| format!("{error:#}"));
        ensure!(way.contains(&format!(" dev {link} ")), "{packet} not by {link}: {way}{}", ip("rule show")?);
    }
    Ok(())
}

/// A link that is no ENI's, up.
fn tunnel() -> Result<()> {
    for command in ["link add tun7 type veth peer name peer7", "link set peer7 up", "link set tun7 up"] {
        ip(command)?;
    }
    Ok(())
}

fn reconcile(machine: &Machine) -> Result<()> {
    machine.reconcile(0)?;
    machine.assert_settled()
}

/// `main` has no route to it that would be the longest match.
#[test]
fn a_wider_network_of_a_tunnel_does_not_take_what_an_eni_sends_to_its_own_subnet() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            reconcile(machine)?;
            tunnel()?;
            ip("route add 10.0.0.0/8 dev tun7")?;
            // A container's, which goes first as everywhere.
            ip("route add 10.0.1.64/28 dev tun7")?;
            reconcile(machine)?;
            ensure_ways(&[
                ("10.0.1.99 from 10.0.1.20", "eth02"),
                ("10.0.1.99 from 10.0.1.22", "eth03"),
                ("10.0.1.65 from 10.0.1.20", "tun7"),
                ("10.9.9.9 from 10.0.1.20", "tun7"),
                // As before there were ENIs.
                ("10.0.1.99 from 10.0.0.10", "tun7"),
            ])?;
            // What is as long as the subnet is a container's, too.
            ip("route add 10.0.1.0/24 dev tun7")?;
            reconcile(machine)?;
            ensure_ways(&[("10.0.1.99 from 10.0.1.20", "tun7")])?;
            ip("route del 10.0.1.0/24 dev tun7")?;
            ip("route del 10.0.0.0/8")?;
            ip("route add unreachable 10.0.0.0/8")?;
            reconcile(machine)?;
            ensure_ways(&[("10.0.1.99 from 10.0.1.20", "eth02")])?;
            ip("route del unreachable 10.0.0.0/8")?;
            reconcile(machine)?;
            ensure!(!ip("rule show")?.contains(" to 10.0.1.64/28 "), "{}", ip("rule show")?);
            Ok(())
        })
    });
}

/// Another manager has its subnet in `main`, where the guard rule would find it for all others if the link were in no group.
#[test]
fn releasing_one_eni_sends_nothing_of_others_by_it() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            ip("link set eth03 up")?;
            ip("addr add 10.0.1.22/24 dev eth03")?;
            let found = settled_dump()?;
            let told = read_leaves(&scenario(SHARED)?.folder.join("metadata.json"))?;
            // An id that can be typed.
            machine.publish(told.into_iter().map(|(key, body)| (key, body.replace("eni-0", "eni-0000000"))).collect());
            reconcile(machine)?;
            let ways = [("10.0.1.99 from 10.0.0.10", "eth01"), ("10.0.1.99 from 10.0.1.20", "eth02")];
            ensure_ways(&ways)?;
            let released = machine.eniup("release --eni eni-00000003")?;
            ensure!(released.exit == 0 && !ip("rule show")?.contains(" 20002 "), "{}", released.stderr);
            ensure_ways(&ways)?;
            machine.configure("[[ignore]]\nmac = '02:00:00:00:00:03'\n")?;
            reconcile(machine)?;
            ensure_ways(&ways)?;
            ensure!(machine.eniup("release")?.exit == 0);
            let difference = difference(&found, &settled_dump()?);
            ensure!(difference.is_empty(), "{difference}");
            Ok(())
        })
    });
}

/// Who asks DHCP on it has that subnet in `main` twice.
#[test]
fn an_isolated_eni_does_not_take_what_the_primary_sends_to_its_own_subnet() {
    inside(|| {
        with_scenario("isolated-eni-captures-nothing-of-others", |machine| {
            machine.configure("[[eni]]\nvpc_id = 'vpc-02'\nisolate = true\n")?;
            ip("link set eth02 up")?;
            ip("addr add 10.0.0.20/24 dev eth02 noprefixroute")?;
            ip("route prepend 10.0.0.0/24 dev eth02 proto kernel")?;
            ip("route add 10.0.0.128/25 via 10.0.0.9 dev eth01")?;
            reconcile(machine)?;
            ensure_ways(&[
                ("10.0.0.99 from 10.0.0.10", "eth01"),
                ("10.0.0.99 from 10.0.0.20", "eth02"),
                ("10.0.0.200 from 10.0.0.10", "eth01"),
            ])?;
            ensure!(ip("route get 10.0.0.200 from 10.0.0.10")?.contains(" via 10.0.0.9 "), "{}", ip("rule show")?);
            Ok(())
        })
    });
}

/// The kernel then names no link in the route.
#[test]
fn a_default_by_a_next_hop_of_its_own_may_be_another_enis() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            std::fs::write("/proc/sys/net/ipv4/nexthop_compat_mode", "0").context("nexthop_compat_mode")?;
            ip("link set eth02 up")?;
            ip("addr add 10.0.1.20/24 dev eth02")?;
            ip("route del default")?;
            ip("nexthop add id 7 via 10.0.1.1 dev eth02")?;
            ip("route add default nhid 7")?;
            reconcile(machine)?;
            ensure_ways(&[("198.51.100.7 from 10.0.0.10", "eth01"), ("198.51.100.7 from 10.0.1.20", "eth02")])
        })
    });
}

/// It is in the place of the one by which the VPC router is found.
#[test]
fn a_chosen_route_to_an_enis_own_subnet_leaves_it_its_default() {
    inside(|| {
        for chosen in ["{ to = '10.0.1.0/24', via = '10.0.1.7' }", "{ to = '10.0.1.0/24' }"] {
            with_scenario(SHARED, |machine| {
                machine.configure(&format!("[[eni]]\nid = 'eni-02'\nroutes = [{chosen}]\n"))?;
                let via = if chosen.contains(".7") { "10.0.1.7" } else { "10.0.1.1" };
                let is_chosen = || -> Result<()> {
                    let way = ip("route get 10.0.1.99 from 10.0.1.20")?;
                    ensure!(way.contains(&format!("via {via} dev eth02")), "{way}");
                    ensure_ways(&[("198.51.100.7 from 10.0.1.20", "eth02"), ("10.0.1.99 from 10.0.1.22", "eth03")])
                };
                reconcile(machine)?;
                is_chosen()?;
                ip("link set eth02 down")?;
                ip("link set eth02 up")?;
                reconcile(machine)?;
                is_chosen()?;
                machine.configure("")?;
                reconcile(machine)?;
                ensure!(ip("route get 10.0.1.99 from 10.0.1.20")?.contains("10.0.1.99 from 10.0.1.20 dev eth02"));
                // On a machine that worked without it, too.
                machine.configure(&format!("[[eni]]\nid = 'eni-02'\nroutes = [{chosen}]\n"))?;
                reconcile(machine)?;
                is_chosen()
            })
            .with_context(|| chosen.to_string())?;
        }
        Ok(())
    });
}

/// The VPC sees what leaves by it.
#[test]
fn a_link_that_is_stacked_on_an_enis_is_not_called_a_containers() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            for command in ["link add mv7 link eth01 type macvlan mode bridge", "link set mv7 up"] {
                ip(command)?;
            }
            tunnel()?;
            ip("route add 192.0.2.0/24 dev mv7")?;
            ip("route add 203.0.113.0/24 dev tun7")?;
            for (to, words) in [
                ("192.0.2.1", "cannot be told: mv7 may be stacked on an ENI's link"),
                ("203.0.113.1", "The VPC does not see it: tun7 is no ENI's link"),
            ] {
                let told = machine.eniup(&format!("explain --to {to}"))?.stdout;
                ensure!(told.contains(words), "{told}");
            }
            Ok(())
        })
    });
}

//! Defaults of other ENIs in `main`, as a manager makes them that asks DHCP and router advertisements on every ENI: what the
//! primary's addresses send leaves by the primary all the same.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::probe::{Bound, Kind, Probe};
use vpc_lab::vpc::CreateEni;

/// Of each kind: which of several ways a packet takes depends on its ports.
const EXCHANGES: usize = 24;

/// An instance `web` with two dual-stack ENIs, its first addresses, and a client in a third subnet.
fn web() -> Result<(Lab, [IpAddr; 2])> {
    let mut lab = Lab::new(Path::new(env!("CARGO_BIN_EXE_eniup")))?;
    let subnets = lab.fabric.world(|world| -> Result<Vec<_>> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
        let subnet = |n: u8| {
            let ipv6 = format!("2600:1f16:67f:f20{n}::/64").parse()?;
            world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &[ipv6])
        };
        (0..3).map(subnet).collect()
    })?;
    let eni = |lab: &mut Lab, n: usize| {
        lab.create_network_interface(CreateEni {
            subnet: subnets[n].clone(),
            ipv4s: vec![Ipv4Addr::new(10, 0, n as u8, 10)],
            ipv6s: vec![format!("2600:1f16:67f:f20{n}::10").parse()?],
            ..CreateEni::default()
        })
    };
    let enis = [eni(&mut lab, 0)?, eni(&mut lab, 1)?];
    lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
    let client = eni(&mut lab, 2)?;
    lab.run_instance("client", &[client], "t3.micro", Distribution::Primary)?;
    Ok((lab, ["10.0.0.10".parse()?, "2600:1f16:67f:f200::10".parse()?]))
}

fn ip(lab: &Lab, arguments: &str) -> Result<String> {
    let output = lab.command("web", "ip")?.args(arguments.split_whitespace()).output()?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn reconcile(lab: &Lab) -> Result<()> {
    let run = lab.eniup("web", &["reconcile"])?;
    ensure!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let left = lab.eniup("web", &["plan", "--detailed-exitcode"])?;
    ensure!(left.status.success(), "left to do: {}", String::from_utf8_lossy(&left.stdout));
    Ok(())
}

/// How many exchanges of the client with this address are answered, of all.
fn answered(lab: &Lab, to: IpAddr) -> Result<usize> {
    let probe = |kind| Probe { from: "client".into(), bound: Bound::Nothing, to, kind };
    let probes: Vec<Probe> = (0..EXCHANGES).flat_map(|_| [probe(Kind::Udp), probe(Kind::Tcp)]).collect();
    let outcomes = lab.probe(&probes, Duration::from_millis(700))?;
    Ok(outcomes.iter().filter(|outcome| outcome.is_answer_of(to)).count())
}

/// Makes `main` wrong for one of the primary's addresses, sees that it is, and that a run mends it and a later one cleans up.
fn is_mended((lab, primary): (Lab, [IpAddr; 2]), wrong: &[&str], right_again: &[&str], family: usize) -> Result<()> {
    let to = primary[family];
    reconcile(&lab)?;
    ensure!(answered(&lab, to)? == 2 * EXCHANGES, "{to} does not answer from the beginning");
    wrong.iter().try_for_each(|line| ip(&lab, line).map(drop))?;
    let unmended = answered(&lab, to)?;
    ensure!(unmended < 2 * EXCHANGES, "nothing is wrong: {}", ip(&lab, "-6 route")? + &ip(&lab, "route")?);

    reconcile(&lab)?;
    lab.fabric.forget_drops();
    for to in primary {
        let answered = answered(&lab, to)?;
        let state = || Ok::<_, anyhow::Error>(ip(&lab, "rule")? + &ip(&lab, "-6 rule")? + &ip(&lab, "-6 route")?);
        ensure!(answered == 2 * EXCHANGES, "{to} answers {answered} times ({unmended} before):\n{}", state()?);
    }
    ensure!(lab.fabric.source_drops() == 0, "{:#?}", lab.fabric.last_drops());

    right_again.iter().try_for_each(|line| ip(&lab, line).map(drop))?;
    reconcile(&lab)?;
    let rules = ip(&lab, "rule")? + &ip(&lab, "-6 rule")?;
    ensure!(!rules.contains("32765"), "not cleaned up:\n{rules}");
    Ok(())
}

#[test]
fn of_two_defaults_with_one_metric_the_primary_has_its_own() {
    vpc_lab::inside(|| {
        let add = "route prepend default via 10.0.1.1 dev ens6 onlink proto dhcp metric 100";
        is_mended(web()?, &[add], &["route del default dev ens6"], 0).context("IPv4")
    });
}

#[test]
fn where_main_has_no_default_but_another_enis_the_primary_has_its_own() {
    vpc_lab::inside(|| {
        let wrong = [
            "route add default via 10.0.1.1 dev ens6 onlink proto dhcp metric 50",
            "route del default via 10.0.0.1 dev ens5",
        ];
        let right = ["route add default via 10.0.0.1 dev ens5 proto dhcp metric 40"];
        is_mended(web()?, &wrong, &right, 0).context("IPv4")
    });
}

/// The kernel makes one route of two advertised defaults and takes either, by what the packet is.
#[test]
fn of_two_advertised_defaults_the_primary_has_its_own() {
    vpc_lab::inside(|| {
        let lab = web()?;
        // By ports, too: which one it takes by two addresses alone is drawn when the machine boots.
        let policy = "echo 1 >/proc/sys/net/ipv6/fib_multipath_hash_policy";
        ensure!(lab.0.command("web", "sh")?.args(["-c", policy]).status()?.success(), "{policy}");
        let shown = "-6 route append default via fe80:ec2::1 dev ens6 proto ra metric 100";
        is_mended(lab, &[shown], &["-6 route del default via fe80:ec2::1 dev ens6 metric 100"], 1).context("IPv6")
    });
}

/// Containers send from it, so nothing but its rules says that it is the primary's.
#[test]
fn a_prefix_of_the_primary_leaves_by_it_whatever_main_says() {
    vpc_lab::inside(|| {
        let mut lab = Lab::new(Path::new(env!("CARGO_BIN_EXE_eniup")))?;
        let subnets = lab.fabric.world(|world| -> Result<Vec<_>> {
            let vpc = world.create_vpc(&["10.0.0.0/16".parse()?]);
            let subnet = |n: u8| world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &[]);
            (0..2).map(subnet).collect()
        })?;
        let mut enis = Vec::new();
        for (n, subnet) in subnets.into_iter().enumerate() {
            let ipv4_prefixes = if n == 0 { vec!["10.0.0.176/28".parse()?] } else { Vec::new() };
            let ipv4s = vec![Ipv4Addr::new(10, 0, n as u8, 10)];
            enis.push(lab.create_network_interface(CreateEni {
                subnet,
                ipv4s,
                ipv4_prefixes,
                ..CreateEni::default()
            })?);
        }
        lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
        let container = [
            "link add cbr0 type veth peer name pod0",
            "link set cbr0 up",
            "link set pod0 up",
            "addr add 10.0.0.177/28 dev cbr0",
            // As DHCP does for the other ENI.
            "link set ens6 up",
            "addr add 10.0.1.10/24 dev ens6",
            "route prepend default via 10.0.1.1 dev ens6 proto dhcp metric 100",
        ];
        container.iter().try_for_each(|line| ip(&lab, line).map(drop))?;
        let forward = "echo 1 >/proc/sys/net/ipv4/ip_forward";
        ensure!(lab.command("web", "sh")?.args(["-c", forward]).status()?.success(), "{forward}");
        let ways = || -> Result<Vec<String>> {
            let to = ["198.51.100.7", "10.0.1.201", "10.0.0.201", "10.0.0.178"];
            let way = |to| ip(&lab, &format!("route get {to} from 10.0.0.181 iif cbr0"));
            let link = |way: String| way.split_whitespace().skip_while(|word| *word != "dev").nth(1).map(String::from);
            to.iter().map(|to| link(way(to)?).context("no way")).collect()
        };
        ensure!(ways()? == ["ens6", "ens6", "ens5", "cbr0"], "{:?}", ways()?);
        reconcile(&lab)?;
        ensure!(ways()? == ["ens5", "ens5", "ens5", "cbr0"], "{:?}", ways()?);
        Ok(())
    });
}

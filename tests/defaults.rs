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

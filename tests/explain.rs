//! `eniup explain` beside what really becomes of the packet: the kernel's answer, the VPC's verdict, the reply.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::probe::{Bound, Kind, Probe};
use vpc_lab::vpc::CreateEni;

const PATIENCE: Duration = Duration::from_secs(3);

/// An instance `web` with two ENIs in two subnets, both families, and a client in a third one.
fn lab() -> Result<Lab> {
    let mut lab = Lab::new(Path::new(env!("CARGO_BIN_EXE_eniup")))?;
    let subnets = lab.fabric.world(|world| -> Result<Vec<_>> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
        let subnet = |n: u8| -> Result<_> {
            world.create_subnet(
                &vpc,
                Some(format!("10.0.{n}.0/24").parse()?),
                &[format!("2600:1f16:67f:f20{n}::/64").parse()?],
            )
        };
        (0..3).map(subnet).collect()
    })?;
    let eni = |n: usize, host: u8| -> Result<CreateEni> {
        Ok(CreateEni {
            subnet: subnets[n].clone(),
            ipv4s: vec![Ipv4Addr::new(10, 0, n as u8, host)],
            ipv6s: vec![format!("2600:1f16:67f:f20{n}::{host}").parse()?],
            ..CreateEni::default()
        })
    };
    let enis = [lab.create_network_interface(eni(0, 10)?)?, lab.create_network_interface(eni(1, 20)?)?];
    lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
    let client = lab.create_network_interface(eni(2, 30)?)?;
    lab.run_instance("client", &[client], "t3.micro", Distribution::Primary)?;
    Ok(lab)
}

fn explain(lab: &Lab, arguments: &str) -> Result<Value> {
    let arguments: Vec<&str> = ["explain", "--json"].into_iter().chain(arguments.split_whitespace()).collect();
    let output = lab.eniup("web", &arguments)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "eniup {arguments:?} ({}): {stderr}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn text<'a>(explanation: &'a Value, key: &str) -> Result<&'a str> {
    explanation[key].as_str().with_context(|| format!("no {key} in {explanation:#}"))
}

/// Whether the client answers, and how many packets the source check dropped meanwhile.
fn try_it(lab: &Lab, bound: Bound, to: &str) -> Result<(bool, u64)> {
    let before = lab.fabric.source_drops();
    let to: IpAddr = to.parse()?;
    let outcomes = lab.probe(&[Probe { from: "web".into(), bound, to, kind: Kind::Udp }], PATIENCE)?;
    Ok((outcomes.iter().all(|outcome| outcome.is_answer_of(to)), lab.fabric.source_drops() - before))
}

#[test]
fn what_is_explained_is_what_happens() {
    vpc_lab::inside(|| {
        let lab = lab()?;
        ensure!(lab.eniup("web", &["reconcile"])?.status.success());
        let cases = [
            ("10.0.1.20", "10.0.2.30", "ens6"),
            ("10.0.0.10", "10.0.2.30", "ens5"),
            ("2600:1f16:67f:f201::20", "2600:1f16:67f:f202::30", "ens6"),
            ("2600:1f16:67f:f200::10", "2600:1f16:67f:f202::30", "ens5"),
        ];
        for (from, to, link) in cases {
            let story = explain(&lab, &format!("--from {from} --to {to}"))?;
            ensure!(text(&story, "way")?.starts_with(&format!("It leaves by {link} (eni-")), "{story:#}");
            ensure!(story["kernel_agrees"] == true && story["vpc_takes_it"] == true, "{story:#}");
            ensure!(story["reply_comes_back_by_the_same_link"] == true, "{story:#}");
            let happened = try_it(&lab, Bound::Address(from.parse()?), to)?;
            ensure!(happened == (true, 0), "{happened:?}: {story:#}");
        }
        let unbound = explain(&lab, "--to 10.0.2.30")?;
        ensure!(text(&unbound, "packet")?.contains("takes 10.0.0.10 (eni-"), "{unbound:#}");
        ensure!(unbound["vpc_takes_it"] == true, "{unbound:#}");
        let bound = explain(&lab, "--oif ens6 --to 10.0.2.30")?;
        ensure!(text(&bound, "packet")?.contains("takes 10.0.1.20"), "{bound:#}");
        let own = explain(&lab, "--to 10.0.1.20")?;
        ensure!(text(&own, "way")?.contains("for this machine itself") && own["vpc_takes_it"].is_null(), "{own:#}");
        Ok(())
    });
}

#[test]
fn what_the_vpc_would_drop_is_told() {
    vpc_lab::inside(|| {
        let lab = lab()?;
        // The address is there, and no rule: by the primary, as on a machine without eniup.
        lab.node("web")?.enter(|| {
            vpc_lab::kernel::set_up("ens6")?;
            vpc_lab::kernel::add_address("ens6", "10.0.1.20/32".parse()?, None)
        })?;
        let story = explain(&lab, "--from 10.0.1.20 --to 10.0.2.30")?;
        ensure!(story["vpc_takes_it"] == false && story["kernel_agrees"] == true, "{story:#}");
        ensure!(story["reply_comes_back_by_the_same_link"] == false, "{story:#}");
        let happened = try_it(&lab, Bound::Address("10.0.1.20".parse()?), "10.0.2.30")?;
        ensure!(!happened.0 && happened.1 > 0, "{happened:?}: {story:#}");
        Ok(())
    });
}

#[test]
fn without_metadata_the_way_is_told_all_the_same() {
    vpc_lab::inside(|| {
        let lab = lab()?;
        let arguments =
            ["explain", "--from", "10.0.0.10", "--imds-endpoint", "http://127.0.0.1:1", "--timeout", "200ms", "--json"];
        let output = lab.eniup("web", &arguments)?;
        ensure!(output.status.success(), "{output:?}");
        let story: Value = serde_json::from_slice(&output.stdout)?;
        ensure!(text(&story, "way")?.starts_with("It leaves by ens5"), "{story:#}");
        ensure!(story["vpc_takes_it"].is_null() && text(&story, "vpc")?.contains("cannot be told"), "{story:#}");
        Ok(())
    });
}

#[test]
fn what_makes_no_packet_is_refused() {
    vpc_lab::inside(|| {
        let lab = lab()?;
        for (arguments, exit, says) in [
            (&["explain"][..], 64, "required"),
            (&["explain", "--from", "10.0.0.10", "--to", "::1"], 64, "two families"),
            (&["explain", "--oif", "eth9", "--to", "10.0.0.1"], 1, "there is no link eth9; there are"),
            (&["explain", "--iif", "ens5", "--oif", "ens6", "--to", "10.0.0.1"], 64, "cannot be used with"),
            (&["explain", "--from", "10.0.0"], 64, "invalid"),
            (&["explain", "--to", "0.0.0.0"], 64, "0.0.0.0 is nobody's address"),
            (&["explain", "::"], 64, ":: is nobody's address"),
            (&["explain", "--from", "224.0.0.1"], 64, "224.0.0.1 is for many"),
            (&["explain", "--from", "255.255.255.255"], 64, "is for many"),
            (&["explain", "--to", "10.0.0.1", "10.0.0.2"], 64, "cannot be used with"),
        ] {
            let output = lab.eniup("web", arguments)?;
            let stderr = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(exit) && stderr.contains(says), "{arguments:?}: {output:?}");
        }
        Ok(())
    });
}

#[test]
fn of_what_is_for_many_the_model_says_what_the_kernel_says_and_that_nobody_gets_it() {
    vpc_lab::inside(|| {
        let lab = lab()?;
        ensure!(lab.eniup("web", &["reconcile"])?.status.success());
        for (arguments, link) in [
            ("--to 255.255.255.255", "ens5"),
            ("--from 10.0.1.20 --to 255.255.255.255", "ens6"),
            ("--oif ens6 --to 255.255.255.255", "ens6"),
            ("--to 224.0.0.1", "ens5"),
            ("--from 10.0.1.20 --to 239.1.2.3", "ens6"),
            ("--oif ens6 --to 224.0.0.1", "ens6"),
            ("--to 10.0.0.255", "ens5"),
            ("--oif ens6 --to ff02::1", "ens6"),
        ] {
            let story = explain(&lab, arguments)?;
            let way = text(&story, "way")?;
            ensure!(
                way.starts_with(&format!("It leaves by {link} (eni-")) && way.contains("straight"),
                "{arguments}: {story:#}"
            );
            ensure!(story["kernel_agrees"] == true, "{arguments}: {story:#}");
            let vpc = text(&story, "vpc")?;
            ensure!(story["vpc_takes_it"] == false && vpc.contains("delivers it to nobody"), "{arguments}: {story:#}");
        }
        // Both links have a route for it, and only the kernel knows which comes first.
        let story = explain(&lab, "--to ff02::1")?;
        ensure!(text(&story, "way")?.contains("cannot tell") && story["kernel_agrees"].is_null(), "{story:#}");
        ensure!(text(&story, "kernel")?.starts_with("The kernel says: It leaves by ens"), "{story:#}");
        // Come in for many: for whoever has joined.
        let story = explain(&lab, "--iif ens6 --from 10.0.1.9 --to 224.0.0.1")?;
        ensure!(text(&story, "vpc")?.contains("cannot be told") && story["vpc_takes_it"].is_null(), "{story:#}");
        ensure!(text(&story, "reply")?.contains("cannot be told"), "{story:#}");
        Ok(())
    });
}

#[test]
fn the_unspecified_address_is_no_source_and_the_destination_needs_no_option() {
    vpc_lab::inside(|| {
        let lab = lab()?;
        let plain = explain(&lab, "--to 10.0.2.30")?;
        ensure!(explain(&lab, "--from 0.0.0.0 --to 10.0.2.30")? == plain && explain(&lab, "10.0.2.30")? == plain);
        let ipv6 = explain(&lab, "--from ::")?;
        ensure!(text(&ipv6, "packet")?.contains("to 2001:db8:ffff::1"), "{ipv6:#}");
        Ok(())
    });
}

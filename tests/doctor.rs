//! Every check of `eniup doctor`, where it finds something and where it does not.

mod support;

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use eniup::config::{self, Config};
use eniup::doctor;
use eniup::machine_files;
use eniup::markers::Found;
use eniup::snapshot::Snapshot;
use serde_json::Value;
use support::machine::{Machine, inside, ip, read_leaves, scenario, with_scenario, with_two_enis};
use tempfile::TempDir;
use vpc_lab::imds::{Action, Faults, Method, Occurrences, Rule};
use vpc_lab::kernel::sysctl;
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::probe::{Bound, Kind, Probe};
use vpc_lab::vpc::CreateEni;

const ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";

const SHARED: &str = "three-enis-of-which-two-share";

fn parse(text: &str) -> Result<Vec<Value>> {
    let diagnosis: Value = serde_json::from_str(text)?;
    diagnosis["checks"].as_array().cloned().context("no checks")
}

/// What the check of this id comes to on the machine.
fn look(machine: &Machine, id: &str) -> Result<Value> {
    look_for(machine, id, "")
}

fn look_for(machine: &Machine, id: &str, arguments: &str) -> Result<Value> {
    let run = machine.eniup(&format!("doctor --json {arguments}"))?;
    let checks = parse(&run.stdout).with_context(|| run.stderr)?;
    let failed = checks.iter().any(|check| check["verdict"] == "fail");
    ensure!(run.exit == i32::from(failed), "exit {}", run.exit);
    checks.into_iter().find(|check| check["id"] == id).with_context(|| format!("no check {id}"))
}

/// The check comes to this, and its first finding has these words in its evidence and in what to do.
fn assert_finds(check: &Value, verdict: &str, evidence: &[&str], fix: &str) -> Result<()> {
    ensure!(check["verdict"] == verdict, "not {verdict}: {check:#}");
    let has = |finding: &Value, key: &str, word: &str| finding[key].as_str().is_some_and(|text| text.contains(word));
    let first = &check["findings"][0];
    for word in evidence {
        ensure!(has(first, "evidence", word), "`{word}` is missing: {check:#}");
    }
    ensure!(has(first, "fix", fix), "`{fix}` is not what to do: {check:#}");
    Ok(())
}

fn assert_passes(machine: &Machine, id: &str) -> Result<()> {
    let check = look(machine, id)?;
    ensure!(check["verdict"] == "pass" && check["findings"][0]["fix"].is_null(), "{check:#}");
    Ok(())
}

/// On a machine that eniup has run on the check passes; what these `ip` commands do, it finds.
fn finds(scenario: &str, id: &str, commands: &[&str], verdict: &str, evidence: &[&str], fix: &str) -> Result<()> {
    let tried = with_scenario(scenario, |machine| {
        machine.reconcile(0)?;
        assert_passes(machine, id)?;
        commands.iter().try_for_each(|command| ip(command).map(drop))?;
        assert_finds(&look(machine, id)?, verdict, evidence, fix)
    });
    tried.with_context(|| format!("{id}: {commands:?}"))
}

#[test]
fn a_machine_that_eniup_has_run_on_has_nothing_to_find() {
    inside(|| {
        let lab = lab()?;
        let output = lab.eniup("web", &["reconcile"])?;
        ensure!(output.status.success(), "{output:?}");
        let output = lab.eniup("web", &["doctor", "--json"])?;
        for check in parse(&String::from_utf8(output.stdout)?)? {
            // These look at files of the system that the test runs on; they have folders of their own below.
            if !["D-MANAGER", "D-RIVAL", "D-CNI"].contains(&check["id"].as_str().unwrap_or_default()) {
                ensure!(check["verdict"] == "pass", "{check:#}");
            }
        }
        Ok(())
    });
}

#[test]
fn what_is_wrong_with_links_addresses_and_ways_is_found() {
    inside(|| {
        let two = "two-subnets-dual-stack";
        finds(
            two,
            "D-HOTPLUG",
            &["link set eth02 down"],
            "fail",
            &["eth02", "eni-02", "down"],
            "sudo eniup reconcile",
        )?;
        finds(two, "D-HOTPLUG", &["link del eth02"], "fail", &["eni-02", "02:00:00:00:00:02"], "/sys/bus/pci/rescan")?;
        let bridge = ["link add br0 type bridge", "link set eth02 master br0"];
        finds(two, "D-HOTPLUG", &bridge, "fail", &["eth02", "br0"], "ip link set eth02 nomaster")?;
        let bare = ["rule del priority 24001"];
        let leaves = ["10.0.1.20", "leaves by eth01", "eth02 (eni-02)"];
        finds(two, "D-ASYM", &bare, "fail", &leaves, "sudo eniup reconcile")?;
        finds(two, "D-DRIFT", &bare, "warn", &["1 change", "rule add priority 24001"], "sudo eniup reconcile")?;
        let somebody = ["rule add priority 50 from 10.0.1.20 lookup main"];
        finds(two, "D-ASYM", &somebody, "fail", &leaves, "sudo ip -4 rule del priority 50 from 10.0.1.20/32")?;
        let to_a_subnet = ["rule add priority 50 from 10.0.1.20 to 10.0.0.0/24 lookup main"];
        finds(
            two,
            "D-ASYM",
            &to_a_subnet,
            "fail",
            &["to 10.0.0.", "leaves by eth01"],
            "sudo ip -4 rule del priority 50 from 10.0.1.20/32 to 10.0.0.0/24 lookup main",
        )?;
        let nowhere = ["route del default via 10.0.1.1 dev eth02 table 20001"];
        finds(two, "D-ASYM", &nowhere, "fail", &["10.0.1.20", "goes nowhere"], "sudo eniup reconcile")?;
        let exact = ["rule del priority 20001 from 10.0.1.20/31"];
        finds(
            SHARED,
            "D-SAMESUBNET",
            &exact,
            "fail",
            &["10.0.1.20 and 1 more", "eth02 (eni-02)"],
            "sudo eniup reconcile",
        )?;
        let lower = ["link set eth02 mtu 1400"];
        finds(two, "D-MTU", &lower, "warn", &["eth02", "1400", "9001"], "sudo eniup reconcile")?;
        let default = "route add default via 10.0.1.1 dev eth02 onlink metric";
        let delete = "sudo ip -4 route del default via 10.0.1.1";
        finds(
            two,
            "D-DEFAULT",
            &[&format!("{default} 50")],
            "fail",
            &["eth02 (eni-02)", "metric 50", "metric 100"],
            delete,
        )?;
        let equal = format!("{default} 100").replace("add", "append");
        finds(two, "D-DEFAULT", &[&equal], "fail", &["eth02 (eni-02)", "metric 100"], delete)?;
        finds(two, "D-DEFAULT", &[&format!("{default} 500")], "warn", &["eth02 (eni-02)", "metric 500"], delete)
    });
}

#[test]
fn what_cannot_be_told_is_not_called_right_and_hides_nothing() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            ip("rule add priority 50 from 10.0.1.20 to 10.0.0.0/24 unreachable")?;
            let check = look(machine, "D-ASYM")?;
            let evidence = check["findings"][0]["evidence"].as_str().context("no evidence")?;
            ensure!(check["verdict"] == "skip" && evidence.contains("10.0.1.20"), "{check:#}");
            ip("rule add priority 60 from 10.0.1.20 to 192.0.2.0/24 lookup main")?;
            assert_finds(&look(machine, "D-ASYM")?, "fail", &["192.0.2.1", "leaves by eth01"], "sudo ip -4 rule del")
        })
    });
}

#[test]
fn an_address_that_is_missing_or_may_be_taken_for_the_first_is_found() {
    inside(|| {
        with_scenario("one-eni-gets-its-secondary-addresses", |machine| {
            // As by DHCPv6.
            ip("addr add 2600:1f16:67f:f200::a/128 dev eth01")?;
            let before = look(machine, "D-MISSING-IP")?;
            assert_finds(&before, "fail", &["not on eth01, the link of eni-01"], "sudo eniup reconcile")?;
            machine.reconcile(0)?;
            assert_passes(machine, "D-MISSING-IP")?;
            ip("addr del 10.0.0.10/24 dev eth01")?;
            let first = look(machine, "D-MISSING-IP")?;
            assert_finds(&first, "fail", &["10.0.0.10 is not on eth01"], "DHCP client")
        })?;
        with_scenario("address-moves-between-two-enis", |machine| {
            machine.reconcile(0)?;
            assert_passes(machine, "D-MISSING-IP")?;
            ip("addr del 10.0.1.21/32 dev eth03")?;
            ip("addr add 10.0.1.21/32 dev eth02")?;
            let words = ["10.0.1.21 is not on eth03", "but on eth02"];
            assert_finds(&look(machine, "D-MISSING-IP")?, "fail", &words, "sudo eniup reconcile")
        })?;
        with_scenario("disputed-address-is-left-out", |machine| {
            machine.eniup("reconcile --timeout 100ms")?;
            let check = look(machine, "D-MISSING-IP")?;
            let is_it = |finding: &Value| finding["evidence"].as_str().is_some_and(|text| text.contains("overlaps"));
            ensure!(check["findings"].as_array().is_some_and(|findings| findings.iter().any(is_it)), "{check:#}");
            Ok(())
        })?;
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            // Not the ENI's first: the others are /32, and of IPv6 deprecated.
            let other = |arguments: &str, length: &str| -> Result<String> {
                let shown = ip(&format!("{arguments} dev eth02 scope global"))?;
                let net = shown.split_whitespace().find(|word| word.ends_with(length));
                Ok(net.with_context(|| shown.clone())?.to_string())
            };
            assert_passes(machine, "D-SRC")?;
            let net = other("-6 -o addr show deprecated", "/128")?;
            ip(&format!("addr change {net} dev eth02 preferred_lft forever"))?;
            assert_finds(
                &look(machine, "D-SRC")?,
                "warn",
                &[&net, "eth02"],
                &format!("change {net} dev eth02 preferred_lft 0"),
            )?;
            ip(&format!("addr change {net} dev eth02 preferred_lft 0"))?;
            assert_passes(machine, "D-SRC")?;
            let net = other("-4 -o addr show", "/32")?.replace("/32", "/24");
            ip(&format!("addr add {net} dev eth02 noprefixroute"))?;
            let delete = format!("ip addr del {net} dev eth02");
            assert_finds(&look(machine, "D-SRC")?, "warn", &[&net, "instead of 10.0.1.20"], &delete)
        })
    });
}

#[test]
fn an_eni_that_is_not_all_there_is_found_with_its_reason() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            machine.reconcile(0)?;
            assert_passes(machine, "D-HOTPLUG")?;
            let whole = read_leaves(&scenario(SHARED)?.folder.join("metadata.json"))?;
            let key = |name: &str| format!("network/interfaces/macs/02:00:00:00:00:03/{name}");
            let mut leaves = whole.clone();
            leaves.insert(key("device-number"), "0".into());
            machine.publish(leaves);
            let words = ["eni-03 is not ready", "`device-number`"];
            assert_finds(&look(machine, "D-HOTPLUG")?, "warn", &words, "sudo eniup reconcile --timeout")?;
            let mut leaves = whole;
            leaves.insert(key("local-ipv4s"), "10.0.9.9".into());
            machine.publish(leaves);
            let words = ["eni-03 is not ready", "10.0.9.9 is outside"];
            assert_finds(&look(machine, "D-HOTPLUG")?, "fail", &words, "describe-network-interfaces")
        })
    });
}

#[test]
fn a_container_that_enis_addresses_do_not_reach_is_found() {
    inside(|| {
        with_two_enis(|machine| {
            for command in ["link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up"]
            {
                ip(command)?;
            }
            machine.reconcile(0)?;
            assert_passes(machine, "D-CONTAINER")?;
            ip("rule del priority 19900")?;
            let words = ["10.0.1.20", "leaves by eth02", "docker0", "172.17.0.0/16"];
            assert_finds(&look(machine, "D-CONTAINER")?, "fail", &words, "sudo eniup reconcile")?;
            machine.reconcile(0)?;
            ip("rule add priority 50 from 10.0.0.10 lookup 20001")?;
            let words = ["10.0.0.10", "leaves by eth02", "docker0"];
            assert_finds(&look(machine, "D-CONTAINER")?, "fail", &words, "sudo ip -4 rule del priority 50")
        })
    });
}

#[test]
fn networks_that_are_not_the_enis_are_left_out() {
    inside(|| {
        with_scenario(SHARED, |machine| {
            for command in [
                // A container with an address of its own, a full tunnel in OpenVPN's manner, and a network behind a tunnel that
                // has the address by which the internet is asked for.
                "link add cni0 type veth peer name pod",
                "link set cni0 up",
                "route add 10.0.3.7/32 dev cni0",
                "link add tun0 type veth peer name far",
                "link set tun0 up",
                "route add 0.0.0.0/1 dev tun0",
                "route add 128.0.0.0/1 dev tun0",
                "route add 192.0.2.0/24 dev tun0",
            ] {
                ip(command)?;
            }
            machine.reconcile(0)?;
            for id in ["D-CONTAINER", "D-ASYM", "D-SAMESUBNET"] {
                assert_passes(machine, id)?;
            }
            // The link of an ENI that is not ready is no container's.
            ip("route add 10.0.1.0/24 dev eth03")?;
            let mut leaves = read_leaves(&scenario(SHARED)?.folder.join("metadata.json"))?;
            leaves.insert("network/interfaces/macs/02:00:00:00:00:03/device-number".into(), "0".into());
            machine.publish(leaves);
            assert_passes(machine, "D-CONTAINER")?;
            ip("rule del priority 19900")?;
            let words = ["sends to 10.0.3.7", "cni0, which has 10.0.3.7/32"];
            assert_finds(&look(machine, "D-CONTAINER")?, "fail", &words, "eniup")
        })
    });
}

#[test]
fn each_trouble_with_metadata_has_its_own_remedy() {
    inside(|| {
        with_two_enis(|machine| {
            let always = |path: &str, action: Action| Rule::new(path, Occurrences::Always, action);
            for (rule, evidence, fix) in [
                (always("*", Action::Status(403)), "403", "modify-instance-metadata-options --http-endpoint enabled"),
                (always("*", Action::Status(401)).only(Method::Get), "401", "ip route get 169.254.169.254"),
                (always("*", Action::Hang), "no answer", "--http-put-response-hop-limit 2"),
                (always("/latest/api/token", Action::Status(404)), "404", "ip route get 169.254.169.254"),
                (always("mac", Action::Status(404)), "no key `mac`", "eniup snapshot"),
                (always("*", Action::Status(503)), "503", "ss -tnp dst 169.254.169.254"),
                (always("*", Action::Status(429)), "429", "ss -tnp dst 169.254.169.254"),
                (always("mac", Action::Body("<html>".into())), "a page", "take the proxy or portal out of the way"),
            ] {
                machine.service.set_faults(Faults { rules: vec![rule.clone()], ..Faults::default() });
                let check = look_for(machine, "D-IMDS", "--timeout 1s")?;
                assert_finds(&check, "fail", &[evidence], fix).with_context(|| format!("{rule:?}"))?;
            }
            // What builds on it is not called right.
            let checks = parse(&machine.eniup("doctor --json --timeout 500ms")?.stdout)?;
            for check in &checks[1..] {
                let needs_none = ["D-RIVAL", "D-CNI"].contains(&check["id"].as_str().unwrap_or_default());
                ensure!(needs_none || check["verdict"] == "skip", "{check:#}");
            }
            machine.service.set_faults(Faults::default());
            let own = look(machine, "D-IMDS")?;
            assert_finds(&own, "warn", &[&machine.endpoint], "unset AWS_EC2_METADATA_SERVICE_ENDPOINT")?;

            let disabled = machine.command("doctor --json").env("AWS_EC2_METADATA_DISABLED", "true").output()?;
            let checks = parse(&String::from_utf8(disabled.stdout)?)?;
            assert_finds(&checks[0], "fail", &["AWS_EC2_METADATA_DISABLED"], "unset AWS_EC2_METADATA_DISABLED")?;
            let without = |endpoint: &str| -> Result<Value> {
                let asked = machine.command("doctor --json --timeout 500ms").env(ENDPOINT, endpoint).output()?;
                Ok(parse(&String::from_utf8(asked.stdout)?)?[0].clone())
            };
            assert_finds(&without("http://127.0.0.1:1")?, "fail", &["Connection refused"], "sudo nft list ruleset")?;
            // Without an endpoint the well-known ones, to which nothing leads.
            ip("route add unreachable 169.254.169.254/32")?;
            ip("-6 route add unreachable fd00:ec2::254/128")?;
            assert_finds(&without("")?, "fail", &["unreachable"], "give it a route")?;
            ip("route del unreachable 169.254.169.254/32")?;
            ip("-6 route del unreachable fd00:ec2::254/128")?;
            ip("route add prohibit 169.254.169.254/32")?;
            ip("-6 route add prohibit fd00:ec2::254/128")?;
            let mut locked = machine.command("doctor --json --timeout 500ms");
            let locked = locked.env_remove(ENDPOINT).output()?;
            let checks = parse(&String::from_utf8(locked.stdout)?)?;
            assert_finds(&checks[0], "fail", &["prohibited"], "systemd.imds.network=unlocked")
        })
    });
}

/// An instance `web` with two ENIs in two subnets, and a client in a third one.
fn lab() -> Result<Lab> {
    let mut lab = Lab::new(env!("CARGO_BIN_EXE_eniup"))?;
    let subnets = lab.fabric.world(|world| -> Result<Vec<_>> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?]);
        let subnet = |n: u8| world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &[]);
        (0..3).map(subnet).collect()
    })?;
    let mut eni = |n: usize, host: u8| -> Result<String> {
        let ipv4s = vec![Ipv4Addr::new(10, 0, n as u8, host)];
        lab.create_network_interface(CreateEni { subnet: subnets[n].clone(), ipv4s, ..CreateEni::default() })
    };
    let (web, client) = ([eni(0, 10)?, eni(1, 20)?], eni(2, 30)?);
    lab.run_instance("web", &web, "m7i.large", Distribution::Primary)?;
    lab.run_instance("client", &[client], "t3.micro", Distribution::Primary)?;
    Ok(lab)
}

#[test]
fn two_enis_of_one_subnet_are_told_apart_by_who_leaves_by_what_though_main_has_equal_routes() {
    inside(|| {
        let mut lab = Lab::new(env!("CARGO_BIN_EXE_eniup"))?;
        let subnet = lab.fabric.world(|world| {
            let vpc = world.create_vpc(&["10.0.0.0/16".parse()?]);
            world.create_subnet(&vpc, Some("10.0.0.0/24".parse()?), &[])
        })?;
        let mut enis = Vec::new();
        for host in [10, 20] {
            let ipv4s = vec![Ipv4Addr::new(10, 0, 0, host)];
            enis.push(lab.create_network_interface(CreateEni {
                subnet: subnet.clone(),
                ipv4s,
                ..CreateEni::default()
            })?);
        }
        // Each link has the kernel's route to the subnet, of metric 0.
        lab.run_instance("web", &enis, "m7i.large", Distribution::AtLaunch)?;
        let check = |id: &str| -> Result<Value> {
            let output = lab.eniup("web", &["doctor", "--json"])?;
            let checks = parse(&String::from_utf8(output.stdout)?)?;
            checks.into_iter().find(|check| check["id"] == id).with_context(|| format!("no check {id}"))
        };
        let strays = ["10.0.0.20 sends to", "leaves by ens5, not by ens6"];
        for id in ["D-ASYM", "D-SAMESUBNET"] {
            assert_finds(&check(id)?, "fail", &strays, "sudo eniup reconcile")?;
        }
        ensure!(lab.eniup("web", &["reconcile"])?.status.success());
        for id in ["D-ASYM", "D-SAMESUBNET"] {
            ensure!(check(id)?["verdict"] == "pass", "{:#}", check(id)?);
        }
        let rule = "rule add priority 100 from 10.0.0.20 to 10.0.0.0/24 lookup main";
        lab.node("web")?.enter(|| ip(rule))?;
        assert_finds(&check("D-SAMESUBNET")?, "fail", &strays, "sudo ip -4 rule del priority 100")?;
        ensure!(check("D-ASYM")?["verdict"] == "pass", "{:#}", check("D-ASYM")?);
        Ok(())
    });
}

#[test]
fn a_reverse_path_filter_that_drops_what_comes_in_is_found() {
    inside(|| {
        let lab = lab()?;
        let check = || -> Result<Value> {
            let output = lab.eniup("web", &["doctor", "--json"])?;
            let checks = parse(&String::from_utf8(output.stdout)?)?;
            checks.into_iter().find(|check| check["id"] == "D-RPF").context("no D-RPF")
        };
        let web = lab.node("web")?;
        // The larger one of a link and of all counts.
        for (link, value) in [("all", "0"), ("ens5", "0"), ("ens6", "0"), ("all", "1")] {
            web.sysctl(&format!("ipv4/conf/{link}/rp_filter"), value)?;
        }
        // As DHCP on every link and nothing else leaves it.
        web.enter(|| {
            vpc_lab::kernel::set_up("ens6")?;
            vpc_lab::kernel::add_address("ens6", "10.0.1.20/24".parse()?, None)
        })?;
        let words = ["rp_filter of ens6 is strict", "10.0.1.20 sends leaves by ens5"];
        assert_finds(&check()?, "fail", &words, "sudo eniup reconcile")?;
        let ping = Probe { from: "client".into(), bound: Bound::Nothing, to: "10.0.1.20".parse()?, kind: Kind::Udp };
        let outcomes = lab.probe(&[ping], std::time::Duration::from_millis(500))?;
        ensure!(!outcomes[0].is_answer_of("10.0.1.20".parse()?), "the kernel lets it in");

        // The kernel counted it, and strict is right from here on.
        ensure!(lab.eniup("web", &["reconcile"])?.status.success());
        let words = ["strict on ens5, ens6", "has dropped 1 packet"];
        assert_finds(&check()?, "warn", &words, "sysctl -w net.ipv4.conf.ens5.rp_filter=2")?;
        for link in ["ens5", "ens6"] {
            web.sysctl(&format!("ipv4/conf/{link}/rp_filter"), "2")?;
        }
        ensure!(check()?["verdict"] == "pass", "{:#}", check()?);
        Ok(())
    });
}

#[test]
fn an_mtu_that_is_configured_is_no_finding() {
    inside(|| {
        with_two_enis(|machine| {
            let file = machine.directory.join("config.toml");
            fs::create_dir_all(&machine.directory)?;
            fs::write(&file, "[[eni]]\nid = \"eni-02\"\nmtu = 1400\n")?;
            let configured = format!("--config {}", file.display());
            ensure!(machine.eniup(&format!("reconcile {configured}"))?.exit == 0);
            let mtu = |arguments: &str| look_for(machine, "D-MTU", arguments);
            ensure!(mtu(&configured)?["verdict"] == "pass" && mtu("")?["verdict"] == "warn");
            Ok(())
        })
    });
}

#[test]
fn forwarding_that_does_not_fit_is_found() {
    inside(|| {
        with_scenario("delegated-prefixes", |machine| {
            for (path, key, prefix) in [
                ("ipv4/ip_forward", "net.ipv4.ip_forward", "/28 is delegated"),
                ("ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding", "/80 is delegated"),
            ] {
                sysctl("ipv4/ip_forward", "1")?;
                sysctl("ipv6/conf/all/forwarding", "1")?;
                assert_passes(machine, "D-FORWARD")?;
                sysctl(path, "0")?;
                assert_finds(&look(machine, "D-FORWARD")?, "warn", &[prefix], &format!("sysctl -w {key}=1"))?;
            }
            Ok(())
        })?;
        with_two_enis(|machine| {
            sysctl("ipv6/conf/eth01/accept_ra", "1")?;
            ip("-6 route add default via fe80::1 dev eth01 proto ra metric 100")?;
            sysctl("ipv6/conf/all/forwarding", "0")?;
            assert_passes(machine, "D-FORWARD")?;
            sysctl("ipv6/conf/all/forwarding", "1")?;
            let fix = "sysctl -w net.ipv6.conf.eth01.accept_ra=2";
            assert_finds(&look(machine, "D-FORWARD")?, "warn", &["eth01", "advertisement"], fix)?;
            sysctl("ipv6/conf/eth01/accept_ra", "2")?;
            assert_passes(machine, "D-FORWARD")
        })
    });
}

/// A machine's snapshot, of which the files are those of a folder.
struct Elsewhere {
    snapshot: Snapshot,
    root: TempDir,
    config: Config,
}

impl Elsewhere {
    fn new(machine: &Machine) -> Result<Elsewhere> {
        let snapshot = Snapshot::from_json(&machine.eniup("snapshot")?.stdout)?;
        Ok(Elsewhere { snapshot, root: TempDir::new()?, config: Config::default() })
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.root.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("no folder")?)?;
        Ok(fs::write(path, text)?)
    }

    fn mask(&self, path: &str) -> Result<()> {
        let path = self.root.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("no folder")?)?;
        Ok(std::os::unix::fs::symlink("/dev/null", path)?)
    }

    fn check(&self, id: &str) -> Result<Value> {
        let snapshot = Snapshot { files: machine_files::read(self.root.path()), ..self.snapshot.clone() };
        let checks = parse(&serde_json::to_string(&doctor::examine(&snapshot, &self.config, &doctor::Told::new()))?)?;
        checks.into_iter().find(|check| check["id"] == id).with_context(|| format!("no check {id}"))
    }

    fn assert_passes(&self, id: &str) -> Result<()> {
        let check = self.check(id)?;
        ensure!(check["verdict"] == "pass", "{check:#}");
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        self.root = TempDir::new()?;
        Ok(())
    }

    fn index_of(&self, name: &str) -> Result<u32> {
        let link = self.snapshot.observed.links.values().find(|link| link.name == name);
        Ok(link.with_context(|| format!("no link {name}"))?.index)
    }
}

fn elsewhere<T: Send>(test: impl FnOnce(&mut Elsewhere) -> Result<T> + Send) -> Result<T> {
    with_two_enis(|machine| {
        machine.reconcile(0)?;
        test(&mut Elsewhere::new(machine)?)
    })
}

#[test]
fn a_network_manager_is_named_with_the_line_that_keeps_it_off() {
    inside(|| {
        elsewhere(|machine| {
            let (first, second) = (machine.index_of("eth01")?, machine.index_of("eth02")?);
            machine.assert_passes("D-MANAGER")?;
            let networkd = |index: u32| format!("/run/systemd/netif/links/{index}");
            machine.write(&networkd(second), "ADMIN_STATE=unmanaged\n")?;
            machine.assert_passes("D-MANAGER")?;
            machine.write(&networkd(first), "DNS=private\nADMIN_STATE=configured\n")?;
            let kept = machine_files::read(machine.root.path()).0.remove(&networkd(first));
            ensure!(kept == Some(Found::Text("ADMIN_STATE=configured\n".into())), "{kept:?}");
            assert_finds(
                &machine.check("D-MANAGER")?,
                "warn",
                &["systemd-networkd", "eth01", "rules"],
                "ManageForeignRoutes=no",
            )?;
            // The administrator's drop-in wins over the packager's of the same name, and both settings are needed.
            let both = "[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules = false\n";
            machine.write("/usr/lib/systemd/networkd.conf.d/50-a.conf", both)?;
            machine.assert_passes("D-MANAGER")?;
            machine.mask("/etc/systemd/networkd.conf.d/50-a.conf")?;
            ensure!(machine.check("D-MANAGER")?["verdict"] == "warn");
            machine.write(
                "/etc/systemd/networkd.conf.d/60-b.conf",
                "[Network]\nManageForeignRoutes=no\n#ManageForeignRoutingPolicyRules=no\n",
            )?;
            ensure!(machine.check("D-MANAGER")?["verdict"] == "warn");
            machine.write("/etc/systemd/networkd.conf.d/60-b.conf", both)?;
            machine.assert_passes("D-MANAGER")?;
            machine.write(&networkd(second), "ADMIN_STATE=configuring\n")?;
            let words = ["systemd-networkd manages eth02", "eni-02"];
            assert_finds(&machine.check("D-MANAGER")?, "warn", &words, "MACAddress=02:00:00:00:00:02")?;

            machine.clear()?;
            let state = |index: u32| format!("/run/NetworkManager/devices/{index}");
            machine.write(&state(first), "[device]\nmanaged=true\n")?;
            machine.write(&state(second), "[device]\nmanaged=unknown\n")?;
            machine.assert_passes("D-MANAGER")?;
            machine.write(&state(second), "[device]\nmanaged=true\n")?;
            let fix = "unmanaged-devices+=mac:02:00:00:00:00:02\\n' | \
                       sudo tee /etc/NetworkManager/conf.d/eniup-eth02.conf && \
                       sudo systemctl reload NetworkManager && sudo nmcli device set eth02 managed no";
            assert_finds(&machine.check("D-MANAGER")?, "warn", &["NetworkManager manages eth02"], fix)?;

            for (path, text, name, fix) in [
                ("/run/network/ifstate", "lo=lo\neth02=eth02\n", "ifupdown", "/etc/network/interfaces"),
                ("/run/ifstate", "lo\neth02\n", "ifupdown", "/etc/network/interfaces"),
                ("/run/dhcpcd/pid", "7", "dhcpcd", "denyinterfaces eth02"),
                ("/run/dhcpcd/eth02.pid", "7", "dhcpcd", "denyinterfaces eth02"),
                ("/run/dhcpcd-eth02.pid", "7", "dhcpcd", "denyinterfaces eth02"),
            ] {
                machine.clear()?;
                machine.write(&path.replace("eth02", "eth01"), &text.replace("eth02", "eth01"))?;
                if path.contains("eth02") || text.contains("eth02") {
                    machine.assert_passes("D-MANAGER")?;
                }
                machine.write(path, text)?;
                let check = machine.check("D-MANAGER")?;
                assert_finds(&check, "warn", &[&format!("{name} manages eth02")], fix).context(path)?;
            }
            Ok(())
        })
    });
}

#[test]
fn a_machine_with_one_eni_has_nothing_that_networkd_could_delete() {
    inside(|| {
        with_scenario("one-eni-gets-its-secondary-addresses", |machine| {
            machine.reconcile(0)?;
            let machine = Elsewhere::new(machine)?;
            machine.write(
                &format!("/run/systemd/netif/links/{}", machine.index_of("eth01")?),
                "ADMIN_STATE=configured\n",
            )?;
            machine.assert_passes("D-MANAGER")
        })
    });
}

#[test]
fn a_tool_with_the_same_job_is_named_with_the_line_that_turns_it_off() {
    inside(|| {
        elsewhere(|machine| {
            machine.assert_passes("D-RIVAL")?;
            let rules = "99-vpc-policy-routes.rules";
            machine.write(&format!("/usr/lib/udev/rules.d/{rules}"), "")?;
            let fix = &format!("ln -sf /dev/null /etc/udev/rules.d/{rules}");
            assert_finds(&machine.check("D-RIVAL")?, "fail", &["amazon-ec2-net-utils", rules], fix)?;
            machine.mask(&format!("/etc/udev/rules.d/{rules}"))?;
            machine.assert_passes("D-RIVAL")?;

            machine.clear()?;
            let enabled = "/etc/systemd/system/timers.target.wants/nm-cloud-setup.timer";
            machine.write(enabled, "")?;
            machine.write(
                "/etc/systemd/system/nm-cloud-setup.service.d/a.conf",
                "#Environment=NM_CLOUD_SETUP_EC2=yes\n",
            )?;
            machine.assert_passes("D-RIVAL")?;
            machine.write(
                "/usr/lib/systemd/system/nm-cloud-setup.service.d/b.conf",
                "[Service]\nEnvironment=NM_CLOUD_SETUP_EC2=yes\n",
            )?;
            let fix = "systemctl disable --now nm-cloud-setup.timer";
            assert_finds(&machine.check("D-RIVAL")?, "fail", &["nm-cloud-setup", enabled], fix)?;
            machine.mask("/etc/systemd/system/nm-cloud-setup.timer")?;
            machine.assert_passes("D-RIVAL")?;

            for (path, name, fix) in [
                ("/etc/udev/rules.d/90-cloud-init-hook-hotplug.rules", "cloud-init", "updates: {network: {when: []}}"),
                ("/etc/udev/rules.d/10-cloud-init-hook-hotplug.rules", "cloud-init", "updates: {network: {when: []}}"),
                (
                    "/usr/lib/udev/rules.d/51-cloud-netconfig-hotplug.rules",
                    "cloud-netconfig",
                    "disable --now cloud-netconfig.timer",
                ),
                (
                    "/etc/systemd/system/timers.target.wants/cloud-netconfig.timer",
                    "cloud-netconfig",
                    "cloud-netconfig.timer",
                ),
                ("/etc/udev/rules.d/53-ec2-network-interfaces.rules", "amazon-ec2-net-utils", "refresh-policy-routes"),
            ] {
                machine.clear()?;
                machine.write(path, "")?;
                assert_finds(&machine.check("D-RIVAL")?, "fail", &[name, path], fix).context(path)?;
            }
            Ok(())
        })
    });
}

#[test]
fn rules_that_a_former_tool_left_are_found_and_deleted_by_the_line_that_is_told() {
    inside(|| {
        for (table, priority, name) in [
            (10_001, 10_001, "amazon-ec2-net-utils"),
            (30_200, 30_200, "nm-cloud-setup"),
            (101, 1000, "cloud-init"),
            (101, 10_100, "cloud-netconfig"),
        ] {
            with_two_enis(|machine| {
                machine.reconcile(0)?;
                let look = |machine: &Machine| -> Result<Value> { Elsewhere::new(machine)?.check("D-RIVAL") };
                ip(&format!("rule add priority {priority} from 10.0.1.20 lookup {table}"))?;
                ip(&format!("-6 rule add priority {priority} from 2600:1f16:67f:f201::14 lookup {table}"))?;
                let check = look(machine)?;
                assert_finds(&check, "warn", &["2 rules left", name, &table.to_string()], "sudo ip -4 rule del")?;
                let fix = check["findings"][0]["fix"].as_str().context("no fix")?;
                for line in fix.lines() {
                    ip(line.strip_prefix("sudo ip ").context("no ip command")?)?;
                }
                ensure!(look(machine)?["verdict"] == "pass", "{:#}", look(machine)?);
                // What is for all is no such tool's.
                ip(&format!("rule add priority {priority} from all lookup {table}"))?;
                ensure!(look(machine)?["verdict"] == "pass", "{:#}", look(machine)?);
                Ok(())
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_container_network_with_enis_of_its_own_is_found_unless_it_is_configured() {
    inside(|| {
        elsewhere(|machine| {
            machine.assert_passes("D-CNI")?;
            for (path, name) in [
                ("/etc/cni/net.d/10-aws.conflist", "VPC CNI"),
                ("/etc/cni/net.d/05-cilium.conflist", "Cilium"),
                ("/etc/ecs/ecs.config", "ECS"),
                ("/opt/cni/bin/aws-cni", "VPC CNI"),
                ("/etc/eks/nodeadm", "EKS"),
            ] {
                machine.clear()?;
                machine.write(path, "secret")?;
                let sign = path.trim_end_matches("/nodeadm");
                let words = [name, sign, "leaves all but eni-01 alone"];
                assert_finds(&machine.check("D-CNI")?, "warn", &words, "id = \"eni-01\"").context(path)?;
                let files = machine_files::read(machine.root.path());
                ensure!(files.0.values().all(|found| *found == Found::There), "a text is in the snapshot: {files:?}");
            }
            let text = "[[manage]]\nid = \"eni-01\"\n".to_string();
            machine.config = config::read(&[config::File { name: "config.toml".into(), text: Ok(text) }])?.config;
            machine.assert_passes("D-CNI")
        })?;
        with_two_enis(|machine| {
            ip("rule add priority 1024 fwmark 0x80/0x80 lookup main")?;
            ip("rule add priority 1536 from 10.0.1.20 lookup 10001")?;
            let machine = Elsewhere::new(machine)?;
            assert_finds(&machine.check("D-CNI")?, "warn", &["VPC CNI", "priority 1024"], "[[manage]]")?;
            // Its rules are not another tool's.
            machine.assert_passes("D-RIVAL")
        })
    });
}

#[test]
fn of_a_snapshot_the_same_is_said_as_of_the_machine() {
    inside(|| {
        with_two_enis(|machine| {
            let file = machine.directory.join("snapshot.json");
            fs::create_dir_all(&machine.directory)?;
            ensure!(machine.eniup(&format!("snapshot -o {}", file.display()))?.exit == 0);
            for form in ["doctor", "doctor --json"] {
                let here = machine.eniup(form)?;
                let there = machine
                    .eniup(&format!("{form} --imds-endpoint http://127.0.0.1:1 --snapshot {}", file.display()))?;
                ensure!(here.exit == 1 && there.exit == 1 && here.stdout == there.stdout, "{}", there.stdout);
            }
            let text = machine.eniup("doctor")?.stdout;
            ensure!(text.contains("FAIL  D-HOTPLUG") && text.contains("      fix: sudo eniup reconcile\n"), "{text}");
            Ok(())
        })
    });
}

#[test]
fn every_check_is_in_the_guide_for_troubles() -> Result<()> {
    let guide = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/troubleshooting.md"))?;
    let ids = doctor::ids();
    let missing: Vec<&&str> = ids.iter().filter(|id| !guide.contains(&format!("`{id}`"))).collect();
    ensure!(missing.is_empty(), "{missing:?}");
    Ok(())
}

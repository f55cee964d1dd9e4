//! `eniup snapshot`, and the commands that look at one instead of at a machine.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use eniup::snapshot::Snapshot;
use serde_json::Value;
use support::machine::{Run, drop_capabilities, inside, on_a_machine, run, with_scenario, with_two_enis};
use tempfile::TempDir;
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::vpc::CreateEni;

/// An instance `web` with two dual-stack ENIs, of which the second has secondary addresses, a delegated prefix and an
/// elastic address.
fn lab() -> Result<(Lab, Ipv4Addr)> {
    let mut lab = Lab::new(env!("CARGO_BIN_EXE_eniup"))?;
    let subnets = lab.fabric.world(|world| -> Result<Vec<_>> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
        let ipv6 = |n: u8| -> Result<_> { Ok([format!("2600:1f16:67f:f20{n}::/64").parse()?]) };
        let subnet = |n: u8| world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &ipv6(n)?);
        (0..2).map(subnet).collect()
    })?;
    let eni = |n: usize, hosts: &[u8]| -> Result<CreateEni> {
        Ok(CreateEni {
            subnet: subnets[n].clone(),
            ipv4s: hosts.iter().map(|host| Ipv4Addr::new(10, 0, n as u8, *host)).collect(),
            ipv6s: vec![format!("2600:1f16:67f:f20{n}::{}", hosts[0]).parse()?],
            ..CreateEni::default()
        })
    };
    let first = lab.create_network_interface(eni(0, &[10, 11])?)?;
    let second = lab.create_network_interface(eni(1, &[20, 21, 22])?)?;
    let third = lab.create_network_interface(eni(1, &[30])?)?;
    lab.run_instance("web", &[first, second.clone(), third], "m7i.large", Distribution::Primary)?;
    lab.assign(&second, &["10.0.1.96/28".parse()?], false)?;
    let public = lab.elastic_ip(&second, None)?;
    Ok((lab, public))
}

fn on_web(lab: &Lab, arguments: &str) -> Result<Run> {
    let mut command = lab.command("web", env!("CARGO_BIN_EXE_eniup"))?;
    command.args(arguments.split_whitespace()).env_remove("AWS_EC2_METADATA_SERVICE_ENDPOINT");
    run(command.env_remove("RUNTIME_DIRECTORY"))
}

/// Where there is no link, no metadata and no privilege.
fn elsewhere(arguments: &str) -> Result<Run> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_eniup"));
    command.args(arguments.split_whitespace()).env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1");
    drop_capabilities(&mut command);
    on_a_machine(|_| run(&mut command))
}

struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Result<Place> {
        Ok(Place { directory: TempDir::new()? })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// What the kernel says is not in a snapshot.
fn without_the_kernels_word(mut explanation: Value) -> Value {
    for key in ["kernel", "kernel_agrees"] {
        explanation[key].take();
    }
    explanation
}

/// The snapshot is older.
fn without_time(text: &str) -> String {
    text.split_inclusive('\n').filter(|line| !line.contains("\"taken_at\": ")).collect()
}

/// Every command that looks says the same of the snapshot as of the machine.
fn assert_alike(lab: &Lab, file: &Path) -> Result<()> {
    let saved = format!("--snapshot {}", file.display());
    for command in ["plan", "plan --json", "plan --detailed-exitcode", "status", "status --json"] {
        let (mut here, mut there) = (on_web(lab, command)?, elsewhere(&format!("{command} {saved}"))?);
        [&mut here, &mut there].into_iter().for_each(|run| run.stdout = without_time(&run.stdout));
        ensure!(!here.stdout.is_empty() || command.starts_with("plan"), "{command} says nothing");
        ensure!(here.stdout == there.stdout, "{command}:\n{}\ninstead of\n{}", there.stdout, here.stdout);
        ensure!((here.exit, &here.stderr) == (there.exit, &there.stderr), "{command}: {}", there.stderr);
    }
    for question in
        ["--from 10.0.1.20", "--from 10.0.0.10 --to 10.0.1.9", "--from 2600:1f16:67f:f201::20", "--oif ens6"]
    {
        let command = format!("explain --json {question}");
        let here: Value = serde_json::from_str(&on_web(lab, &command)?.stdout)?;
        let there = elsewhere(&format!("{command} {saved}"))?;
        let there: Value = serde_json::from_str(&there.stdout).with_context(|| there.stderr)?;
        ensure!(
            there["kernel_agrees"].is_null()
                && there["kernel"].as_str().is_some_and(|text| text.contains("the model alone"))
        );
        if question.contains("--from") {
            ensure!(without_the_kernels_word(here) == without_the_kernels_word(there), "{question}");
        } else {
            // Which source the kernel takes is its word, too.
            ensure!(here["rules"] == there["rules"] && here["way"] == there["way"], "{question}: {there:#}");
        }
    }
    Ok(())
}

#[test]
fn a_snapshot_says_what_its_machine_says() {
    inside(|| {
        let (lab, _) = lab()?;
        let place = Place::new()?;
        let take = |name: &str| -> Result<PathBuf> {
            let file = place.file(name);
            let run = on_web(&lab, &format!("snapshot -o {}", file.display()))?;
            ensure!(run.exit == 0 && run.stdout.is_empty() && run.stderr.is_empty(), "{}: {}", run.exit, run.stderr);
            Ok(file)
        };
        let fresh = take("fresh.json")?;
        ensure!(on_web(&lab, "plan --detailed-exitcode")?.exit == 2, "there is nothing to plan");
        assert_alike(&lab, &fresh)?;

        ensure!(on_web(&lab, "reconcile")?.exit == 0);
        let settled = take("settled.json")?;
        ensure!(elsewhere(&format!("plan --detailed-exitcode --snapshot {}", settled.display()))?.exit == 0);
        assert_alike(&lab, &settled)?;
        // The earlier one is what it was.
        ensure!(elsewhere(&format!("plan --detailed-exitcode --snapshot {}", fresh.display()))?.exit == 2);

        // One key of the last ENI is on its way.
        lab.published("web")?.hold("*/ipv6s");
        lab.node("web")?.enter(|| vpc_lab::kernel::set_down("ens7"))?;
        let pending = take("pending.json")?;
        ensure!(elsewhere(&format!("plan --snapshot {}", pending.display()))?.exit == on_web(&lab, "plan")?.exit);
        assert_alike(&lab, &pending)
    });
}

#[test]
fn plan_takes_the_metadata_of_a_snapshot() {
    inside(|| {
        let (lab, _) = lab()?;
        let place = Place::new()?;
        let file = place.file("snapshot.json");
        let fresh = |file: &Path| elsewhere(&format!("plan --metadata {}", file.display()));
        ensure!(on_web(&lab, &format!("snapshot -o {}", file.display()))?.exit == 0);
        let plan = fresh(&file)?;
        ensure!(plan.exit == 0 && plan.stdout.contains("ip addr add 10.0.1.21/32 dev eth1"), "{}", plan.stderr);
        // The listings say what the leaves cannot: that something is on its way.
        let mut snapshot = Snapshot::from_json(&fs::read_to_string(&file)?)?;
        let key = snapshot.metadata.leaves.keys().rfind(|path| path.ends_with("/local-ipv4s")).cloned();
        snapshot.metadata.leaves.remove(&key.context("no addresses")?);
        fs::write(&file, snapshot.to_json()?)?;
        let plan = fresh(&file)?;
        ensure!(plan.exit == 3 && plan.stderr.contains("`local-ipv4s` could not be read"), "{}", plan.stderr);
        Ok(())
    });
}

#[test]
fn without_metadata_there_is_a_snapshot_that_says_so() {
    inside(|| {
        let (lab, _) = lab()?;
        let place = Place::new()?;
        let file = place.file("dead.json");
        lab.service("web")?.set_disabled(true);
        let taken = on_web(&lab, &format!("snapshot --timeout 1s -o {}", file.display()))?;
        ensure!(taken.exit == 69 && taken.stderr.contains("403"), "{}: {}", taken.exit, taken.stderr);
        let snapshot: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
        ensure!(snapshot["metadata_error"].as_str().is_some_and(|why| why.contains("403")), "{snapshot:#}");
        let saved = format!("--snapshot {}", file.display());
        for command in ["plan", "status"] {
            let run = elsewhere(&format!("{command} {saved}"))?;
            ensure!(run.exit == 69 && run.stdout.is_empty() && run.stderr.contains("403"), "{}", run.stderr);
        }
        let explained = elsewhere(&format!("explain --from 10.0.0.10 {saved}"))?;
        ensure!(explained.exit == 0 && explained.stdout.contains("It leaves by ens5"), "{}", explained.stdout);
        ensure!(
            explained.stdout.contains("cannot be told") && explained.stdout.contains("403"),
            "{}",
            explained.stdout
        );
        Ok(())
    });
}

#[test]
fn a_snapshot_holds_a_bad_configuration_and_the_one_in_it_counts() {
    inside(|| {
        with_two_enis(|machine| {
            let place = Place::new()?;
            let (file, config) = (place.file("snapshot.json"), place.file("config.toml"));
            fs::write(&config, "rules = \"per-adress\"\n")?;
            let take = format!("snapshot --config {} -o {}", config.display(), file.display());
            let taken = machine.eniup(&take)?;
            ensure!(taken.exit == 78 && taken.stderr.contains("per-adress"), "{}: {}", taken.exit, taken.stderr);
            let plan = format!("plan --snapshot {}", file.display());
            let offline = elsewhere(&plan)?;
            ensure!(offline.exit == 78 && offline.stderr.contains("config.toml"), "{}", offline.stderr);

            fs::write(&config, "[numbers]\nmark = 77\n")?;
            ensure!(machine.eniup(&take)?.exit == 0);
            ensure!(elsewhere(&plan)?.stdout.contains("proto 77"));
            // Unless another one is to be tried.
            ensure!(elsewhere(&format!("{plan} --config /dev/null"))?.stdout.contains("proto 176"));
            Ok(())
        })
    });
}

#[test]
fn a_snapshot_is_for_its_owners_eyes_and_replaces_files_alone() {
    inside(|| {
        with_two_enis(|machine| {
            let place = Place::new()?;
            let file = place.file("snapshot.json");
            fs::write(&file, "an old one")?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
            ensure!(machine.eniup(&format!("snapshot -o {}", file.display()))?.exit == 0);
            let mode = fs::metadata(&file)?.permissions().mode() & 0o777;
            ensure!(mode == 0o600, "mode {mode:o}");
            let names = fs::read_dir(place.directory.path())?.count();
            ensure!(names == 1, "{names} files are left");
            let text = fs::read_to_string(&file)?;
            // As the lab's service begins every token.
            ensure!(!text.contains("AQAEAL"), "{text}");

            let link = place.file("link.json");
            std::os::unix::fs::symlink(&file, &link)?;
            for (path, says) in [("/dev/null", "is no file"), ("/proc", "is no file"), ("/nowhere/a", "No such file")] {
                let run = machine.eniup(&format!("snapshot -o {path}"))?;
                ensure!(
                    run.exit == 1 && run.stderr.contains(path) && run.stderr.contains(says),
                    "{path}: {}",
                    run.stderr
                );
            }
            ensure!(machine.eniup(&format!("snapshot -o {}", link.display()))?.exit == 1, "a link was followed");
            ensure!(fs::read_to_string(&file)? == text, "a failed run has changed the file");

            let shown = machine.eniup("snapshot")?;
            let shown = Snapshot::from_json(&shown.stdout)?;
            let saved = Snapshot::from_json(&text)?;
            ensure!(shown.metadata == saved.metadata && shown.observed == saved.observed);
            ensure!(saved.to_json()? == text, "it is not written as it is read");
            Ok(())
        })
    });
}

#[test]
fn what_is_no_snapshot_is_named_with_what_is_wrong() {
    inside(|| {
        let place = Place::new()?;
        let file = place.file("snapshot.json");
        for (text, says) in [
            ("", "JSON"),
            ("{}", "missing field `schema`"),
            (r#"{"schema": 2}"#, "it is of schema 2"),
            (r#"{"schema": 1}"#, "missing field"),
            (r#"{"leaves": {"mac": "02:00:00:00:00:01"}}"#, "eniup snapshot"),
        ] {
            fs::write(&file, text)?;
            let run = elsewhere(&format!("status --snapshot {}", file.display()))?;
            let says_it = run.stderr.contains(says) && run.stderr.contains("snapshot.json");
            ensure!(run.exit == 1 && (says_it || text.is_empty()), "{text}: {}: {}", run.exit, run.stderr);
        }
        let both = elsewhere("plan --snapshot a --metadata b")?;
        ensure!(both.exit == 64 && both.stderr.contains("cannot be used with"), "{}", both.stderr);
        Ok(())
    });
}

/// Before Linux 5.18 the kernel forgets our mark on addresses, and the ledger has it.
#[test]
fn a_snapshot_of_an_old_kernel_knows_our_addresses_by_its_ledger() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let keeps = |whether: bool| format!("\"keeps_marks\": {whether}");
            let text = machine.eniup("snapshot")?.stdout;
            ensure!(text.contains(&keeps(true)), "{text}");
            // An old kernel has never shown one.
            let mut snapshot = Snapshot::from_json(&text.replace(&keeps(true), &keeps(false)))?;
            let forget = |(index, address)| (index, eniup::net::Address { protocol: 0, ..address });
            let known = std::mem::take(&mut snapshot.observed.addresses);
            let ours: BTreeSet<_> = known.iter().filter(|(_, address)| address.protocol == 176).copied().collect();
            ensure!(!ours.is_empty(), "{known:?}");
            snapshot.observed.addresses = known.into_iter().map(forget).collect();
            let place = Place::new()?;
            let file = place.file("old.json");
            fs::write(&file, snapshot.to_json()?)?;
            let recalled = Snapshot::from_json(&fs::read_to_string(&file)?)?.observed(176).addresses;
            ensure!(recalled.into_iter().filter(|(_, address)| address.protocol == 176).eq(ours));
            let plan = elsewhere(&format!("plan --detailed-exitcode --snapshot {}", file.display()))?;
            ensure!(plan.exit == 0 && plan.stdout.is_empty(), "{}", plan.stdout);
            Ok(())
        })
    });
}

/// The addresses of a text that are anybody's on the internet.
fn public_addresses(text: &str) -> BTreeSet<IpAddr> {
    let words = text.split(|c: char| !(c.is_ascii_hexdigit() || c == '.' || c == ':'));
    let addresses = words.filter_map(|word| word.parse().ok());
    let is_public = |address: &IpAddr| match address {
        IpAddr::V4(address) => {
            !(address.is_private() || address.is_loopback() || address.is_link_local())
                && (1..224).contains(&address.octets()[0])
        }
        IpAddr::V6(address) => address.segments()[0] >> 13 == 1,
    };
    addresses.filter(is_public).collect()
}

#[test]
fn a_redacted_snapshot_names_nobody_and_plans_the_same() {
    inside(|| {
        let (lab, public) = lab()?;
        let place = Place::new()?;
        let (plain, redacted) = (place.file("plain.json"), place.file("redacted.json"));
        ensure!(on_web(&lab, &format!("snapshot -o {}", plain.display()))?.exit == 0);
        ensure!(on_web(&lab, &format!("snapshot --redact -o {}", redacted.display()))?.exit == 0);
        let before = fs::read_to_string(&plain)?;
        let after = fs::read_to_string(&redacted)?;
        let owner =
            Snapshot::from_json(&before)?.metadata.leaves.into_iter().find(|(path, _)| path.ends_with("/owner-id"));
        let owner = owner.context("there is no account in the plain one")?.1;
        ensure!(before.contains(&public.to_string()) && before.contains("2600:1f16"), "nothing to redact: {before}");
        ensure!(!after.contains("2600:1f16") && !after.contains(&owner), "{after}");
        let named = &public_addresses(&before) & &public_addresses(&after);
        // A placeholder may be what another address was: the lab's are for documentation, too.
        let is_placeholder = |address: &IpAddr| matches!(address, IpAddr::V4(address) if address.is_documentation());
        ensure!(named.iter().all(is_placeholder), "{named:?}");
        ensure!(public_addresses(&before).len() == public_addresses(&after).len());

        let plan = |file: &Path| -> Result<Vec<String>> {
            let run = elsewhere(&format!("plan --snapshot {}", file.display()))?;
            ensure!(run.exit == 0, "{}", run.stderr);
            Ok(run.stdout.lines().map(String::from).collect())
        };
        let (first, second) = (plan(&plain)?, plan(&redacted)?);
        ensure!(first.len() > 20, "{first:#?}");
        ensure!(first.iter().map(|line| placeholders(line)).eq(second.iter().cloned()), "{first:#?}\n{second:#?}");
        Ok(())
    });
}

/// The line with the VPC's IPv6 network replaced as `--redact` does it. It has no other public address.
fn placeholders(line: &str) -> String {
    let word = |word: &str| {
        let (address, length) = word.split_once('/').map_or((word, None), |(address, length)| (address, Some(length)));
        match address.replace("2600:1f16:67f:", "3fff:0:0:").parse::<IpAddr>() {
            Ok(address) => length.map_or(address.to_string(), |length| format!("{address}/{length}")),
            Err(_) => word.to_string(),
        }
    };
    line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_half_propagated_eni_is_half_propagated_in_its_snapshot() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            let place = Place::new()?;
            let file = place.file("snapshot.json");
            machine.tree.lock().unwrap().hold("*:02/device-number");
            let rule = vpc_lab::imds::Rule::new(
                "*:03/local-ipv4s",
                vpc_lab::imds::Occurrences::Always,
                vpc_lab::imds::Action::Status(500),
            );
            let faults = vpc_lab::imds::Faults { rules: vec![rule], ..Default::default() };
            machine.service.set_faults(faults);
            ensure!(machine.eniup(&format!("snapshot --timeout 2s -o {}", file.display()))?.exit == 0);
            let snapshot = Snapshot::from_json(&fs::read_to_string(&file)?)?;
            let unreadable: Vec<&String> = snapshot.metadata.unreadable.keys().collect();
            ensure!(unreadable.len() == 1 && unreadable[0].ends_with(":03/local-ipv4s"), "{unreadable:?}");
            for way in ["--snapshot", "--metadata"] {
                let plan = elsewhere(&format!("plan {way} {}", file.display()))?;
                ensure!(plan.exit == 3 && plan.stderr.contains("eni-03 is pending"), "{way}: {}", plan.stderr);
                ensure!(plan.stderr.contains("500"), "{way}: {}", plan.stderr);
            }
            Ok(())
        })
    });
}

#[test]
fn what_runs_have_told_is_in_it_and_what_is_no_line_is_not() {
    inside(|| {
        with_two_enis(|machine| {
            let history = |arguments: &str| -> Result<Vec<Value>> {
                let run = machine.eniup(&format!("snapshot {arguments}"))?;
                ensure!(run.exit == 0, "exit {}: {}", run.exit, run.stderr);
                let snapshot: Value = serde_json::from_str(&run.stdout)?;
                Ok(snapshot["history"].as_array().context("no history")?.clone())
            };
            ensure!(history("")?.is_empty() && machine.eniup("plan")?.exit == 0);
            ensure!(!machine.directory.join("history").exists(), "a command that changes nothing has written");
            machine.eniup("reconcile -vv")?;
            let told = history("")?;
            let is_change =
                |line: &Value| line["action"] == "add-address" && line["eni"] == "eni-02" && line["level"] == "info";
            ensure!(told.iter().any(is_change), "{told:#?}");
            ensure!(!told.iter().any(|line| line["level"] == "debug" || line["level"] == "trace"), "{told:#?}");
            machine.reconcile(0)?;
            ensure!(history("")? == told, "a run that had nothing to do has told something");
            // An error is the last word of a run.
            ensure!(machine.eniup("reconcile --imds-endpoint http://127.0.0.1:1 --timeout 100ms")?.exit == 69);
            let last = history("")?.pop().context("no line")?;
            ensure!(last["level"] == "error" && last["message"].to_string().contains("no answer"), "{last:#}");
            let path = machine.directory.join("history");
            let mut text = fs::read_to_string(&path)?;
            text += "{\"time\": \"t\", \"level\": \"info\", \"message\": \"54.1.2.3 of 123456789012\"}\n{\"torn";
            fs::write(&path, text)?;
            let redacted = history("--redact")?.pop().context("no line")?;
            ensure!(redacted["message"].to_string().contains(" of 000000000001"), "{redacted:#}");
            ensure!(!redacted["message"].to_string().contains("54.1.2.3"), "{redacted:#}");
            fs::write(&path, [0xff, 0, b'{'])?;
            ensure!(history("")?.is_empty());
            Ok(())
        })
    });
}

//! `eniup status`: how each ENI stands, since when and why, as text and as JSON.

mod support;

use std::fs;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::machine::{Machine, inside, ip, read_leaves, scenario, with_scenario, with_two_enis};

fn status(machine: &Machine, arguments: &str, exit: i32) -> Result<Value> {
    let run = machine.eniup(&format!("status --json {arguments}"))?;
    ensure!(run.exit == exit, "exit {} instead of {exit}: {}", run.exit, run.stderr);
    Ok(serde_json::from_str(&run.stdout)?)
}

fn text(machine: &Machine, arguments: &str) -> Result<String> {
    Ok(machine.eniup(&format!("status {arguments}"))?.stdout)
}

/// The ENI that is in this state.
fn eni<'a>(status: &'a Value, state: &str) -> Result<&'a Value> {
    let mut enis = status["enis"].as_array().into_iter().flatten();
    enis.find(|eni| eni["state"] == state).with_context(|| format!("none is {state}: {status:#}"))
}

fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs())
}

/// Lets all that is noted have been so for longer.
fn age(machine: &Machine, seconds: u64) -> Result<()> {
    let path = machine.directory.join("ledger.json");
    let mut ledger: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    for noted in ledger["troubles"].as_object_mut().context("no troubles")?.values_mut() {
        noted["since"] = (noted["since"].as_u64().context("no time")? - seconds).into();
    }
    Ok(fs::write(path, ledger.to_string())?)
}

#[test]
fn a_pending_eni_is_as_old_as_what_is_missing() {
    inside(|| {
        with_scenario("placeholder-device-number-is-pending", |machine| {
            ensure!(eni(&status(machine, "", 3)?, "pending")?["since"].is_null(), "no run has seen it yet");
            let begun = now();
            machine.reconcile(3)?;
            let first = status(machine, "", 3)?;
            let pending = eni(&first, "pending")?;
            let since = pending["since"].as_u64().context("since when is not told")?;
            ensure!((begun..=now()).contains(&since), "{since} is not after {begun}");
            ensure!(pending["why"].as_str().is_some_and(|why| why.contains("`device-number`")), "{pending:#}");
            ensure!((begun..=now()).contains(&first["taken_at"].as_u64().unwrap_or(0)), "{first:#}");
            age(machine, 3700)?;
            machine.reconcile(3)?;
            let again = status(machine, "", 3)?;
            ensure!(eni(&again, "pending")?["since"] == since - 3700, "the next run began anew: {again:#}");
            let text = text(machine, "")?;
            ensure!(text.contains(" secondary ENI, pending for 1h 1m "), "{text}");
            Ok(())
        })
    });
}

#[test]
fn what_the_last_run_could_not_do_is_a_failure_until_it_is_done() {
    inside(|| {
        with_two_enis(|machine| {
            // By a router that no route leads to.
            fs::create_dir_all(&machine.directory)?;
            let file = machine.directory.join("config.toml");
            let route = "routes = [{ to = '2600:9::/32', via = '2600:ffff::1' }]";
            fs::write(&file, format!("[[eni]]\ndevice_number = 1\n{route}\n"))?;
            let file = format!("--config {}", file.display());
            let before = status(machine, &file, 0)?;
            ensure!(!eni(&before, "drifted")?["why"].to_string().contains("the last run"), "nobody has tried yet");
            ensure!(machine.eniup(&format!("reconcile {file}"))?.exit == 3);
            let told = status(machine, &file, 3)?;
            let failed = eni(&told, "failed")?;
            let why = failed["why"].as_str().unwrap_or_default();
            for words in ["the last run could not bring it about", "2600:9::/32", "No route to host"] {
                ensure!(why.contains(words), "`{words}` is missing: {failed:#}");
            }
            ensure!(failed["since"].as_u64().is_some_and(|since| since <= now()), "{failed:#}");
            let drift = failed["drift"].as_array().context("no drift")?;
            let is_left = |line: &Value| line.as_str().is_some_and(|line| line.contains("2600:9::/32"));
            ensure!(drift.iter().any(is_left), "{drift:?}");
            // Without that route it can be done, and is a failure until it is.
            ensure!(eni(&status(machine, "", 3)?, "failed").is_ok());
            let ledger = machine.directory.join("ledger.json");
            let failed = fs::read_to_string(&ledger)?;
            machine.reconcile(0)?;
            ensure!(eni(&status(machine, "", 0)?, "failed").is_err());
            let done = fs::read_to_string(&ledger)?;
            ensure!(!done.contains("troubles"), "{done}");
            // Nor when somebody else has done it.
            fs::write(&ledger, failed)?;
            ensure!(eni(&status(machine, "", 0)?, "failed").is_err());
            Ok(())
        })
    });
}

#[test]
fn a_trial_is_told_of_until_it_is_decided() {
    inside(|| {
        with_two_enis(|machine| {
            ensure!(status(machine, "", 0)?["trial"].is_null());
            let run = machine.eniup("reconcile --confirm 1s")?;
            ensure!(run.exit == 1, "exit {}: {}", run.exit, run.stderr);
            let trial = status(machine, "", 0)?["trial"].clone();
            ensure!(trial["state"] == "rolled-back" && trial["seconds_left"].is_null(), "{trial:#}");
            ensure!(trial["why"].as_str().is_some_and(|why| why.contains("nobody confirmed")), "{trial:#}");
            ensure!(text(machine, "")?.contains("nothing is done by itself until you run `eniup reconcile`"));
            let path = machine.directory.join("trial.json");
            let mut note: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
            let rewrite = |note: &Value| fs::write(&path, note.to_string());
            (note["state"], note["until"]) = ("open".into(), u64::MAX.into());
            rewrite(&note)?;
            ensure!(status(machine, "", 0)?["trial"]["state"] == "waits");
            ensure!(text(machine, "")?.contains("unless you run `eniup confirm`"));
            note["until"] = 1.into();
            rewrite(&note)?;
            ensure!(status(machine, "", 0)?["trial"]["state"] == "overdue");
            note["state"] = "confirmed".into();
            rewrite(&note)?;
            ensure!(status(machine, "", 0)?["trial"].is_null());
            Ok(())
        })
    });
}

#[test]
fn a_snapshot_tells_the_same_later() {
    inside(|| {
        with_scenario("placeholder-device-number-is-pending", |machine| {
            machine.reconcile(3)?;
            let file = machine.directory.join("snapshot.json").display().to_string();
            ensure!(machine.eniup(&format!("snapshot -o {file}"))?.exit == 0);
            let (mut here, there) = (status(machine, "", 3)?, status(machine, &format!("--snapshot {file}"), 3)?);
            here["taken_at"] = there["taken_at"].clone();
            ensure!(here == there, "{there:#}");
            Ok(())
        })
    });
}

#[test]
fn a_ready_eni_that_differs_has_drifted_and_the_object_is_named() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let settled = status(machine, "", 0)?;
            ensure!(eni(&settled, "drifted").is_err(), "{settled:#}");
            ip("rule del priority 24001")?;
            let told = status(machine, "", 0)?;
            let drifted = eni(&told, "drifted")?;
            ensure!(drifted["id"] == "eni-02" && eni(&told, "ready")?["id"] == "eni-01", "{told:#}");
            let why = drifted["why"].as_str().unwrap_or_default();
            ensure!(why.contains("rule add priority 24001"), "{why}");
            let text = text(machine, "")?;
            ensure!(
                text.contains("eni-02  secondary ENI, drifted\n") && text.contains("rule add priority 24001"),
                "{text}"
            );
            Ok(())
        })
    });
}

#[test]
fn the_link_the_vpc_and_the_security_groups_are_told_whole() {
    inside(|| {
        with_two_enis(|machine| {
            let key = |name: &str| format!("network/interfaces/macs/02:00:00:00:00:02/{name}");
            let mut leaves = read_leaves(&scenario("two-subnets-dual-stack")?.folder.join("metadata.json"))?;
            for (name, body) in [
                ("vpc-ipv4-cidr-blocks", "10.0.0.0/16\n10.1.0.0/16"),
                ("vpc-ipv6-cidr-blocks", "2600:1f16:67f:f200::/56"),
                ("security-groups", "web servers\ndb"),
                ("security-group-ids", "sg-0b\nsg-0a"),
            ] {
                leaves.insert(key(name), body.into());
            }
            machine.publish(leaves);
            machine.reconcile(0)?;
            let second = |status: &Value| status["enis"][1].clone();
            let eni = second(&status(machine, "", 0)?);
            ensure!(eni["vpc_cidrs"] == json!(["10.0.0.0/16", "10.1.0.0/16", "2600:1f16:67f:f200::/56"]), "{eni:#}");
            ensure!(eni["security_groups"] == json!(["web servers", "db"]), "{eni:#}");
            ensure!(eni["security_group_ids"] == json!(["sg-0b", "sg-0a"]), "{eni:#}");
            ensure!(eni["link"]["has_carrier"] == true, "{eni:#}");
            let shown = text(machine, "")?;
            for words in
                ["10.0.0.0/16 10.1.0.0/16 2600:1f16:67f:f200::/56", "web servers, db", "sg-0b sg-0a", ", up, MTU"]
            {
                ensure!(shown.contains(words), "`{words}` is missing: {shown}");
            }
            // The other end of the cable.
            ip("link set peer02 down")?;
            ensure!(second(&status(machine, "", 0)?)["link"]["has_carrier"] == false);
            ensure!(text(machine, "")?.contains("eth02, up, no carrier, MTU"));
            ip("link set eth02 down")?;
            ensure!(second(&status(machine, "", 0)?)["link"]["has_carrier"].is_null());
            Ok(())
        })
    });
}

#[test]
fn an_entry_that_means_no_eni_is_told() {
    inside(|| {
        with_two_enis(|machine| {
            fs::create_dir_all(&machine.directory)?;
            let file = machine.directory.join("config.toml");
            fs::write(&file, "[[ignore]]\nid = \"eni-99\"\n[[manage]]\nlink = \"eth*\"\n")?;
            let config = format!("--config {}", file.display());
            let note = "[[ignore]] at ";
            let told = status(machine, &config, 0)?["notes"].to_string();
            ensure!(told.contains(note) && told.contains("config.toml:1 means no ENI that is attached now"), "{told}");
            ensure!(!told.contains("[[manage]]"), "{told}");
            let plan = machine.eniup(&format!("plan {config}"))?;
            ensure!(plan.stderr.contains("means no ENI that is attached now"), "{}", plan.stderr);
            fs::write(&file, "[[ignore]]\nid = \"eni-02\"\n")?;
            ensure!(!status(machine, &config, 0)?["notes"].to_string().contains(note));
            Ok(())
        })
    });
}

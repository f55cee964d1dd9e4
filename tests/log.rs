//! What is told while a command is at work: to people, to programs, and to systemd's journal.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use support::machine::{Machine, inside, run, with_two_enis};

/// The journal's end of its socket, and a thread that takes out what comes.
struct Journal {
    come: mpsc::Receiver<Vec<u8>>,
}

const SOCKET: &str = "/run/systemd/journal/socket";

fn bind() -> Result<UnixDatagram> {
    fs::create_dir_all("/run/systemd/journal")?;
    Ok(UnixDatagram::bind(SOCKET)?)
}

type Entry = BTreeMap<String, String>;

impl Journal {
    fn listen() -> Result<Journal> {
        let socket = bind()?;
        let (sender, come) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 18];
            while let Ok(length) = socket.recv(&mut bytes) {
                if sender.send(bytes[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Journal { come })
    }

    /// Everything that has come.
    fn entries(&self) -> Result<Vec<Entry>> {
        UnixDatagram::unbound()?.send_to(b"", SOCKET)?;
        let come = self.come.iter().take_while(|bytes| !bytes.is_empty());
        come.map(|bytes| parse(&bytes)).collect()
    }
}

/// As systemd's specification has it, written from that alone.
fn parse(mut bytes: &[u8]) -> Result<Entry> {
    let mut entry = Entry::new();
    while !bytes.is_empty() {
        let end = bytes.iter().position(|byte| *byte == b'\n').context("a field does not end")?;
        let line = std::str::from_utf8(&bytes[..end])?;
        bytes = &bytes[end + 1..];
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name, value.to_string()),
            None => {
                let (length, rest) = bytes.split_at_checked(8).context("no length")?;
                let length = u64::from_le_bytes(length.try_into()?) as usize;
                let (value, rest) = rest.split_at_checked(length).context("shorter than it says")?;
                bytes = rest.strip_prefix(b"\n").context("a value does not end")?;
                (line, String::from_utf8(value.to_vec())?)
            }
        };
        let is_name = |letter: char| letter.is_ascii_uppercase() || letter.is_ascii_digit() || letter == '_';
        ensure!(!name.is_empty() && name.chars().all(is_name), "`{name}` is no field");
        ensure!(entry.insert(name.into(), value).is_none(), "{name} twice");
    }
    Ok(entry)
}

/// The same command, with stderr in a file and what systemd says of it in `$JOURNAL_STREAM`.
fn under_systemd(machine: &Machine, arguments: &str) -> Result<(Option<i32>, String)> {
    let path = machine.directory.with_extension("stderr");
    let file = File::create(&path)?;
    let it = file.metadata()?;
    let mut command = machine.command(arguments);
    command.env("JOURNAL_STREAM", format!("{}:{}", it.st_dev(), it.st_ino()));
    let status = command.stderr(file.as_fd().try_clone_to_owned()?).stdout(Stdio::null()).status()?;
    Ok((status.code(), fs::read_to_string(path)?))
}

#[test]
fn the_journal_has_one_entry_with_fields_for_each_change() {
    inside(|| {
        with_two_enis(|machine| {
            let journal = Journal::listen()?;
            let plan: Value = serde_json::from_str(&machine.eniup("plan --json")?.stdout)?;
            let (exit, stderr) = under_systemd(machine, "reconcile")?;
            ensure!(exit == Some(0) && stderr.is_empty(), "exit {exit:?}: {stderr}");
            let entries = journal.entries()?;
            let steps = plan["steps"].as_array().context("no steps")?;
            ensure!(entries.len() == steps.len(), "{} entries for {} changes", entries.len(), steps.len());
            for (entry, step) in entries.iter().zip(steps) {
                let text = |key: &str| step[key].as_str().map(String::from);
                ensure!(entry.get("ENI_ID").cloned() == text("eni"), "{entry:?}: {step}");
                ensure!(entry.get("ACTION").cloned() == text("action"), "{entry:?}: {step}");
                ensure!(entry.get("REASON").cloned() == text("reason"), "{entry:?}: {step}");
                let message =
                    format!("{}  # {}", text("command").unwrap_or_default(), text("reason").unwrap_or_default());
                ensure!(entry["MESSAGE"] == message, "{entry:?}: {step}");
                ensure!(entry["PRIORITY"] == "5" && entry["SYSLOG_IDENTIFIER"] == "eniup", "{entry:?}");
            }
            let is_address = |entry: &&Entry| entry["ACTION"] == "add-address";
            let address = entries.iter().find(is_address).context("no address")?;
            ensure!(address["IFNAME"] == "eth02" && address["ENI_ID"] == "eni-02", "{address:?}");

            // Nothing to do is silence.
            ensure!(under_systemd(machine, "reconcile")? == (Some(0), String::new()));
            ensure!(journal.entries()?.is_empty());
            Ok(())
        })
    });
}

#[test]
fn the_journal_is_told_of_trouble_and_of_failure_also_in_several_lines() {
    inside(|| {
        with_two_enis(|machine| {
            let journal = Journal::listen()?;
            let mut leaves = support::machine::read_leaves(
                &support::machine::scenario("two-subnets-dual-stack")?.folder.join("metadata.json"),
            )?;
            leaves.remove("network/interfaces/macs/02:00:00:00:00:02/device-number");
            machine.publish(leaves);
            let (exit, stderr) = under_systemd(machine, "reconcile --timeout 300ms")?;
            ensure!(exit == Some(3) && stderr.is_empty(), "exit {exit:?}: {stderr}");
            let entries = journal.entries()?;
            let last = entries.last().context("nothing was told")?;
            ensure!(last["ENI_ID"] == "eni-02" && last["STATE"] == "pending" && last["PRIORITY"] == "4", "{last:?}");
            ensure!(last["REASON"].contains("device-number") && last["MESSAGE"].contains(&last["REASON"]), "{last:?}");

            let config = machine.directory.with_extension("toml");
            fs::write(&config, "tineout = 3\nmtu = \"\u{1b}[2J\"\n")?;
            let (exit, stderr) = under_systemd(machine, &format!("reconcile --config {}", config.display()))?;
            ensure!(exit == Some(78) && stderr.is_empty(), "exit {exit:?}: {stderr}");
            let entries = journal.entries()?;
            ensure!(entries.len() == 1 && entries[0]["PRIORITY"] == "3", "{entries:?}");
            ensure!(entries[0]["MESSAGE"].contains("tineout") && entries[0]["MESSAGE"].contains('\n'), "{entries:?}");
            // A terminal gets no commands out of a file.
            let plain = machine.eniup(&format!("reconcile --config {}", config.display()))?;
            ensure!(plain.stderr.starts_with("eniup: ") && !plain.stderr.contains('\u{1b}'), "{:?}", plain.stderr);
            Ok(())
        })
    });
}

#[test]
fn without_the_journal_or_when_stderr_is_redirected_lines_are_plain() {
    inside(|| {
        with_two_enis(|machine| {
            // Nobody listens.
            let (exit, stderr) = under_systemd(machine, "reconcile")?;
            ensure!(exit == Some(0) && stderr.contains(" INFO ip addr add"), "exit {exit:?}: {stderr}");
            machine.eniup("release")?;

            let journal = Journal::listen()?;
            let run_here = run(machine.command("reconcile").env("JOURNAL_STREAM", "8:1234"))?;
            ensure!(run_here.exit == 0 && run_here.stderr.contains(" INFO ip addr add"), "{}", run_here.stderr);
            ensure!(journal.entries()?.is_empty(), "it was told to the journal");
            machine.eniup("release")?;

            let forced = machine.eniup("reconcile --log-format journal")?;
            ensure!(forced.exit == 0 && forced.stderr.is_empty(), "{}", forced.stderr);
            ensure!(!journal.entries()?.is_empty(), "it was not told to the journal");
            machine.eniup("release")?;

            let (_, stderr) = under_systemd(machine, "reconcile --log-format plain")?;
            ensure!(stderr.contains(" INFO ip addr add") && journal.entries()?.is_empty(), "{stderr}");
            Ok(())
        })
    });
}

#[test]
fn a_journal_that_takes_nothing_does_not_keep_the_network_waiting_for_long() {
    inside(|| {
        with_two_enis(|machine| {
            let _journal = bind()?;
            // Nobody takes anything out: the kernel queues a few datagrams.
            let started = Instant::now();
            let (exit, stderr) = under_systemd(machine, "reconcile")?;
            let taken = started.elapsed();
            ensure!(exit == Some(0) && stderr.contains(" INFO ip addr add"), "exit {exit:?}: {stderr}");
            ensure!(taken < Duration::from_secs(5), "{taken:?}");
            Ok(())
        })
    });
}

#[test]
fn json_lines_have_the_documented_keys() {
    inside(|| {
        with_two_enis(|machine| {
            let text = include_str!("../docs/json.md");
            let section = text.split("\n## a line of --log-format json\n").nth(1).context("not documented")?;
            let documented: Vec<&str> =
                section.lines().filter_map(|line| line.strip_prefix("- `")?.split('`').next()).collect();
            let reconciled = machine.eniup("reconcile --log-format json")?;
            let failed =
                machine.eniup("status --imds-endpoint http://127.0.0.1:1 --timeout 300ms --log-format=json")?;
            ensure!(reconciled.exit == 0 && failed.exit == 69, "{}", failed.stderr);
            let lines = reconciled.stderr.lines().chain(failed.stderr.lines());
            let lines: Vec<Value> = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
            for line in &lines {
                let mut keys: Vec<&str> = line.as_object().context("no object")?.keys().map(String::as_str).collect();
                let mut documented = documented.clone();
                keys.sort_unstable();
                documented.sort_unstable();
                ensure!(keys == documented, "{line}");
            }
            let address = lines.iter().find(|line| line["action"] == "add-address").context("no address")?;
            ensure!(
                address["eni"] == "eni-02" && address["link"] == "eth02" && address["level"] == "info",
                "{address}"
            );
            let last = lines.last().context("nothing was told")?;
            ensure!(last["level"] == "error" && last["eni"].is_null(), "{last}");
            Ok(())
        })
    });
}

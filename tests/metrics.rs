//! Metrics for node_exporter's textfile collector: true, in the format, and going on from run to run.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use support::machine::{Machine, inside, ip, read_leaves, scenario, with_scenario, with_two_enis};

type Samples = BTreeMap<String, f64>;

/// Reads a file as strictly as Prometheus' `promtool check metrics` does, format and lint; written from its documentation and
/// `prometheus/util/promlint`, and sharing nothing with what writes.
fn check(text: &str) -> Result<Samples> {
    ensure!(text.ends_with('\n') && !text.contains("\n\n") && text.is_ascii(), "not whole lines:\n{text}");
    let (mut samples, mut helped, mut typed) = (Samples::new(), BTreeSet::new(), BTreeMap::new());
    let mut last_family = String::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (family, words) = help.split_once(' ').context("no help")?;
            ensure!(helped.insert(family) && words.ends_with('.') && words.trim() == words, "{line}");
        } else if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (family, kind) = declared.split_once(' ').context("no type")?;
            ensure!(["counter", "gauge", "summary"].contains(&kind), "{line}");
            ensure!(helped.contains(family) && typed.insert(family.to_string(), kind).is_none(), "{line}");
            check_name(family, kind).with_context(|| line.to_string())?;
            last_family = family.into();
        } else {
            let (series, value) = line.rsplit_once(' ').with_context(|| line.to_string())?;
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            check_labels(labels.strip_suffix('}').with_context(|| line.to_string())?).context(line.to_string())?;
            let part = name.strip_prefix(last_family.as_str());
            let is_in_place = match typed.get(&last_family).context("no type before it")? {
                &"summary" => part.is_some_and(|part| ["_sum", "_count"].contains(&part)),
                _ => part == Some(""),
            };
            ensure!(is_in_place, "{line} stands below {last_family}");
            ensure!(samples.insert(series.into(), value.parse()?).is_none(), "{series} twice");
        }
    }
    Ok(samples)
}

fn check_name(family: &str, kind: &str) -> Result<()> {
    ensure!(family.starts_with("eniup_") && family.chars().all(|c| c.is_ascii_lowercase() || c == '_'));
    ensure!(family.ends_with("_total") == (kind == "counter"), "only counters end in _total, and all of them");
    let words: Vec<&str> = family.split('_').collect();
    let wrong =
        ["ms", "sec", "s", "us", "ns", "milliseconds", "minutes", "gauge", "counter", "summary", "count", "sum"];
    ensure!(!words.iter().any(|word| wrong.contains(word)), "a unit that is no base unit, or a type in the name");
    Ok(())
}

/// `name="value",…` with every quotation mark, backslash and newline in a value escaped.
fn check_labels(mut rest: &str) -> Result<()> {
    let mut names = BTreeSet::new();
    while !rest.is_empty() {
        let (name, opened) = rest.split_once("=\"").context("no value")?;
        ensure!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_') && names.insert(name), "label {name}");
        let mut letters = opened.char_indices();
        let end = loop {
            match letters.next().context("the value does not end")? {
                (at, '"') => break at,
                (_, '\\') => ensure!(letters.next().is_some_and(|(_, c)| "\\\"n".contains(c)), "no escape"),
                _ => {}
            }
        };
        rest = &opened[end + 1..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    Ok(())
}

fn path(machine: &Machine) -> PathBuf {
    machine.directory.join("eniup.prom")
}

fn read(path: &Path) -> Result<Samples> {
    check(&fs::read_to_string(path).with_context(|| path.display().to_string())?)
}

/// Reconciles with metrics and reads them.
fn run(machine: &Machine, arguments: &str, exit: i32) -> Result<Samples> {
    let run = machine.eniup(&format!("reconcile {arguments} --metrics {}", path(machine).display()))?;
    ensure!(run.exit == exit, "exit {}: {}", run.exit, run.stderr);
    read(&path(machine))
}

fn now() -> f64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64()
}

#[test]
fn metrics_tell_what_was_done_and_how_it_is() {
    inside(|| {
        with_two_enis(|machine| {
            let before = now();
            let plan = machine.eniup("plan")?.stdout;
            let metrics = run(machine, "", 0)?;
            for (series, value) in [
                ("eniup_eni_ready{eni=\"eni-01\"}", 1.0),
                ("eniup_eni_ready{eni=\"eni-02\"}", 1.0),
                ("eniup_enis{state=\"ready\"}", 2.0),
                ("eniup_enis{state=\"pending\"}", 0.0),
                ("eniup_drift", 0.0),
                ("eniup_runs_total{result=\"ok\"}", 1.0),
                ("eniup_run_duration_seconds_count", 1.0),
                (concat!("eniup_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0),
            ] {
                ensure!(metrics.get(series) == Some(&value), "{series} is not {value}: {metrics:#?}");
            }
            let sum = |name: &str| -> f64 {
                metrics.iter().filter(|(series, _)| series.starts_with(name)).map(|(_, value)| value).sum()
            };
            ensure!(sum("eniup_changes_total") == plan.lines().count() as f64, "{plan}\n{metrics:#?}");
            ensure!(metrics["eniup_changes_total{op=\"add-address\"}"] >= 2.0, "{metrics:#?}");
            ensure!(metrics["eniup_imds_requests_total{status=\"200\"}"] > 10.0, "{metrics:#?}");
            let success = metrics["eniup_last_success_timestamp_seconds"];
            ensure!(before - 1.0 <= success && success <= now(), "{success}");
            ensure!(metrics["eniup_run_duration_seconds_sum"] < now() - before + 1.0);
            let mode = fs::metadata(path(machine))?.permissions().mode() & 0o777;
            ensure!(mode == 0o644, "mode {mode:o}: the collector is another user");
            let others = fs::read_dir(&machine.directory)?.filter_map(|entry| Some(entry.ok()?.file_name()));
            let others: Vec<_> = others.filter(|name| name.to_string_lossy().ends_with(".prom")).collect();
            ensure!(others == ["eniup.prom"], "the collector would read {others:?}");
            Ok(())
        })
    });
}

/// The judge itself, on what three sorts of run write.
#[test]
#[ignore = "needs promtool: tests/judges/run"]
fn promtool_finds_nothing_wrong() {
    inside(|| {
        with_two_enis(|machine| {
            for (arguments, exit) in [("", 0), ("", 0), ("--timeout 1s", 69)] {
                if exit == 69 {
                    machine.service.set_disabled(true);
                }
                run(machine, arguments, exit)?;
                let judge = |file: &Path| -> Result<std::process::Output> {
                    let mut promtool = support::machine::command("promtool");
                    Ok(promtool.args(["check", "metrics"]).stdin(fs::File::open(file)?).output()?)
                };
                let said = judge(&path(machine))?;
                let words = [said.stdout.as_slice(), &said.stderr].concat();
                ensure!(said.status.success() && words.is_empty(), "{}", String::from_utf8_lossy(&words));
                let wrong = machine.directory.join("wrong.prom");
                fs::write(&wrong, fs::read_to_string(path(machine))?.replace("# HELP", "# HLEP"))?;
                ensure!(!judge(&wrong)?.status.success(), "promtool takes anything");
            }
            Ok(())
        })
    });
}

#[test]
fn counters_go_on_also_over_a_run_that_fails_and_that_one_tells_of_no_eni() {
    inside(|| {
        with_two_enis(|machine| {
            let first = run(machine, "", 0)?;
            let failed = run(machine, "--imds-endpoint http://127.0.0.1:1 --timeout 300ms", 69)?;
            ensure!(failed["eniup_runs_total{result=\"metadata-unavailable\"}"] == 1.0, "{failed:#?}");
            ensure!(failed["eniup_runs_total{result=\"ok\"}"] == 1.0, "{failed:#?}");
            ensure!(failed["eniup_imds_requests_total{status=\"none\"}"] >= 1.0, "{failed:#?}");
            ensure!(
                !failed.keys().any(|series| series.contains("eni_ready") || series == "eniup_drift"),
                "{failed:#?}"
            );
            let success = "eniup_last_success_timestamp_seconds";
            ensure!(failed[success] == first[success] && failed["eniup_last_run_timestamp_seconds"] >= first[success]);
            ip("addr del 10.0.1.21/32 dev eth02")?;
            let repaired = run(machine, "", 0)?;
            let (adds, requests) =
                ("eniup_changes_total{op=\"add-address\"}", "eniup_imds_requests_total{status=\"200\"}");
            ensure!(repaired[adds] == first[adds] + 1.0 && repaired[requests] > first[requests], "{repaired:#?}");
            ensure!(repaired["eniup_run_duration_seconds_count"] == 3.0 && repaired[success] > first[success]);
            // A bad configuration, too, is a run that has failed.
            let config = machine.directory.join("bad.toml");
            fs::write(&config, "tineout = 1\n")?;
            let bad = run(machine, &format!("--config {}", config.display()), 78)?;
            ensure!(bad["eniup_runs_total{result=\"bad-configuration\"}"] == 1.0, "{bad:#?}");
            Ok(())
        })
    });
}

#[test]
fn pending_and_ignored_enis_are_told_apart() {
    inside(|| {
        with_scenario("three-enis-of-which-two-share", |machine| {
            let mut leaves = read_leaves(&scenario("three-enis-of-which-two-share")?.folder.join("metadata.json"))?;
            leaves.insert("network/interfaces/macs/02:00:00:00:00:02/device-number".into(), "0".into());
            machine.publish(leaves);
            fs::create_dir_all(&machine.directory)?;
            let config = machine.directory.join("config.toml");
            fs::write(&config, "[[ignore]]\nmac = \"02:00:00:00:00:03\"\n")?;
            let metrics = run(machine, &format!("--timeout 500ms --config {}", config.display()), 3)?;
            ensure!(metrics["eniup_eni_ready{eni=\"eni-01\"}"] == 1.0, "{metrics:#?}");
            ensure!(metrics["eniup_eni_ready{eni=\"eni-02\"}"] == 0.0, "{metrics:#?}");
            ensure!(!metrics.contains_key("eniup_eni_ready{eni=\"eni-03\"}"), "{metrics:#?}");
            ensure!(metrics["eniup_enis{state=\"pending\"}"] == 1.0 && metrics["eniup_enis{state=\"ignored\"}"] == 1.0);
            ensure!(metrics["eniup_runs_total{result=\"degraded\"}"] == 1.0, "{metrics:#?}");
            ensure!(!metrics.contains_key("eniup_last_success_timestamp_seconds"), "{metrics:#?}");
            Ok(())
        })
    });
}

#[test]
fn a_file_that_cannot_be_used_costs_one_line_and_nothing_else() {
    inside(|| {
        with_two_enis(|machine| {
            run(machine, "", 0)?;
            for content in
                [&b"\xff\xfe"[..], b"<html>", b"eniup_runs_total{result=\"ok\"} 1", b"node_load1 1\n", b"eniup_drift"]
            {
                fs::write(path(machine), content)?;
                let again = machine.eniup(&format!("reconcile --metrics {}", path(machine).display()))?;
                let is_ours = content.starts_with(b"eniup_runs");
                let lines = if is_ours { 0 } else { 1 };
                ensure!(again.exit == 0 && again.stderr.lines().count() == lines, "{content:?}: {}", again.stderr);
                ensure!(is_ours || again.stderr.contains("eniup.prom"), "{}", again.stderr);
                let runs = read(&path(machine))?["eniup_runs_total{result=\"ok\"}"];
                ensure!(runs == if is_ours { 2.0 } else { 1.0 }, "{content:?}: {runs}");
            }
            for nowhere in ["/nowhere/eniup.prom", "/dev/null", "/"] {
                let again = machine.eniup(&format!("reconcile --metrics {nowhere}"))?;
                let is_said = again.stderr.lines().count() == 1 && again.stderr.contains(nowhere);
                ensure!(again.exit == 0 && is_said, "{nowhere}: exit {}: {}", again.exit, again.stderr);
            }
            Ok(())
        })
    });
}

#[test]
fn two_runs_at_once_lose_no_count() {
    inside(|| {
        with_two_enis(|machine| {
            run(machine, "", 0)?;
            let arguments = format!("reconcile --metrics {}", path(machine).display());
            let start = || machine.command(&arguments).stderr(Stdio::null()).spawn();
            let children: Vec<Child> = (0..8).map(|_| start()).collect::<std::io::Result<_>>()?;
            for mut child in children {
                ensure!(child.wait()?.success());
            }
            let metrics = read(&path(machine))?;
            ensure!(metrics["eniup_runs_total{result=\"ok\"}"] == 9.0, "{metrics:#?}");
            Ok(())
        })
    });
}

#[test]
fn whoever_stays_writes_what_it_repairs_and_that_metadata_is_away() {
    inside(|| {
        with_two_enis(|machine| {
            let arguments = format!("watch --interval 200ms --timeout 500ms --metrics {}", path(machine).display());
            let mut child = machine.command(&arguments).stderr(Stdio::null()).spawn()?;
            let outcome = watched(machine);
            child.kill()?;
            child.wait()?;
            outcome
        })
    });
}

fn watched(machine: &Machine) -> Result<()> {
    let adds = "eniup_changes_total{op=\"add-address\"}";
    let first = until(machine, |metrics| metrics.contains_key("eniup_last_success_timestamp_seconds"))?;
    ip("addr del 10.0.1.21/32 dev eth02")?;
    let repaired = until(machine, |metrics| metrics[adds] > first[adds])?;
    ensure!(repaired["eniup_eni_ready{eni=\"eni-02\"}"] == 1.0, "{repaired:#?}");
    machine.service.set_disabled(true);
    let away = |metrics: &Samples| metrics.contains_key("eniup_runs_total{result=\"metadata-unavailable\"}");
    let away = until(machine, away)?;
    // What metadata said last is kept up, and told of.
    ensure!(away["eniup_eni_ready{eni=\"eni-02\"}"] == 1.0, "{away:#?}");
    Ok(())
}

fn until(machine: &Machine, is_so: impl Fn(&Samples) -> bool) -> Result<Samples> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match read(&path(machine)) {
            Ok(metrics) if is_so(&metrics) => return Ok(metrics),
            last if Instant::now() > deadline => bail!("not in time: {last:#?}"),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

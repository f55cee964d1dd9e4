//! `eniup watch` in a VPC: what comes is configured, what others undo is repaired, who undoes it again and again is given way
//! to, and systemd is told how it is.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vpc_lab::imds::{Action, Faults, Occurrences, Rule};
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::metadata::Propagation;
use vpc_lab::probe::{Bound, Kind, Probe};
use vpc_lab::vpc::{CreateEni, EniId, SubnetId};

/// For what should happen at once, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

struct Watched {
    lab: Lab,
    subnets: Vec<SubnetId>,
    second: EniId,
}

/// An instance `web` with two ENIs in two subnets, and a client in a third one.
fn watched() -> Result<Watched> {
    let mut lab = Lab::new(Path::new(env!("CARGO_BIN_EXE_eniup")))?;
    let subnets = lab.fabric.world(|world| -> Result<Vec<_>> {
        let vpc = world.create_vpc(&["10.0.0.0/16".parse()?]);
        (0..3).map(|n| world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &[])).collect()
    })?;
    let eni = |n: usize, host: u8| CreateEni {
        subnet: subnets[n].clone(),
        ipv4s: vec![Ipv4Addr::new(10, 0, n as u8, host)],
        ..CreateEni::default()
    };
    let enis = [lab.create_network_interface(eni(0, 10))?, lab.create_network_interface(eni(1, 20))?];
    lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
    let client = lab.create_network_interface(eni(2, 30))?;
    lab.run_instance("client", &[client], "t3.micro", Distribution::Primary)?;
    let [_, second] = enis;
    Ok(Watched { lab, subnets, second })
}

/// A running `eniup watch`, killed when the test is over.
struct Watch {
    child: Child,
    lines: Receiver<String>,
    heard: Vec<String>,
}

impl Watch {
    fn start(command: &mut Command) -> Result<Watch> {
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let stderr = BufReader::new(child.stderr.take().context("stderr")?);
        let (sender, lines) = channel();
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Ok(Watch { child, lines, heard: Vec::new() })
    }

    fn of(lab: &Lab, arguments: &[&str]) -> Result<Watch> {
        Watch::start(lab.command("web", env!("CARGO_BIN_EXE_eniup"))?.arg("watch").args(arguments))
    }

    /// Until a line says this.
    fn hears(&mut self, what: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.heard.iter().any(|line| line.contains(what)) {
            let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                bail!("it does not say `{what}`, but {:#?}", self.heard);
            };
            self.heard.push(line);
        }
        Ok(())
    }

    /// Until it has slept for longer than it does before anything that it has begun, so that what comes next is a case of its own.
    fn rests(&self) -> Result<()> {
        let status = || -> Result<Vec<String>> {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
            let is_meant = |line: &&str| line.starts_with("State:") || line.contains("ctxt_switches");
            Ok(status.lines().filter(is_meant).map(String::from).collect())
        };
        until("it rests", || {
            let before = status()?;
            std::thread::sleep(Duration::from_millis(100));
            Ok(before[0].contains('S') && before == status()?)
        })?;
        Ok(())
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the child is ours, and not waited for yet.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    fn ends(mut self) -> Result<Option<i32>> {
        self.signal(libc::SIGTERM);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            ensure!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn until(what: &str, holds: impl FnMut() -> Result<bool>) -> Result<Duration> {
    within(PATIENCE, what, holds)
}

fn within(patience: Duration, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let begun = Instant::now();
    while !holds()? {
        ensure!(begun.elapsed() < patience, "not so in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(begun.elapsed())
}

impl Watched {
    /// For longer than it takes to put an address back.
    fn stays_without(&self, address: &str) -> Result<()> {
        let gone = Instant::now();
        while gone.elapsed() < Duration::from_millis(1500) {
            let shown = self.ip(&format!("-o addr show to {address}"))?;
            ensure!(shown.is_empty(), "{:?} after it has gone:\n{shown}", gone.elapsed());
        }
        Ok(())
    }

    fn ip(&self, arguments: &str) -> Result<String> {
        let output = self.lab.command("web", "ip")?.args(arguments.split_whitespace()).output()?;
        ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    fn answers(&self, to: &str) -> Result<bool> {
        let to: IpAddr = to.parse()?;
        let probe = Probe { from: "client".into(), bound: Bound::Nothing, to, kind: Kind::Udp };
        let outcomes = self.lab.probe(&[probe], Duration::from_millis(500))?;
        Ok(outcomes.iter().all(|outcome| outcome.is_answer_of(to)))
    }
}

#[test]
fn what_comes_is_configured_and_what_goes_is_taken_away() {
    vpc_lab::inside(|| {
        let mut web = watched()?;
        let watch = Watch::of(&web.lab, &["--interval", "200ms"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        web.lab.assign(&web.second.clone(), &["10.0.1.77/32".parse()?], false)?;
        until("an assigned address answers", || web.answers("10.0.1.77"))?;
        let create = CreateEni { subnet: web.subnets[2].clone(), ..CreateEni::default() };
        let third = web.lab.create_network_interface(create)?;
        let address = web.lab.world().eni(&third)?.ipv4s[0].to_string();
        web.lab.attach_network_interface(&third, "web", 0, 2)?;
        until("an attached ENI answers", || web.answers(&address))?;
        web.lab.detach_network_interface(&third)?;
        until("nothing is left of a detached ENI", || Ok(!web.ip("rule")?.contains("lookup 20002")))?;
        ensure!(web.lab.fabric.source_drops() == 0, "{:?}", web.lab.fabric.last_drops());
        ensure!(watch.ends()? == Some(0), "it does not end well");
        ensure!(web.answers("10.0.1.20")?, "what was configured went with the watch");
        Ok(())
    });
}

/// Metadata is asked once an hour, unless a link tells that there is something to ask for.
/// Proof takes 10 s, and needs metadata to be read as a whole once more by then.
#[test]
fn an_address_that_metadata_no_longer_has_is_gone_as_soon_as_that_is_proven() {
    vpc_lab::inside(|| {
        let mut web = watched()?;
        web.lab.assign(&web.second.clone(), &["10.0.1.77/32".parse()?], false)?;
        let _watch = Watch::of(&web.lab, &["--interval", "500ms"])?;
        until("the assigned address answers", || web.answers("10.0.1.77"))?;
        web.lab.unassign(&web.second.clone(), &["10.0.1.77/32".parse()?])?;
        let patience = Duration::from_secs(30);
        within(patience, "the address is gone", || Ok(!web.ip("address")?.contains("10.0.1.77/")))?;
        ensure!(web.answers("10.0.1.20")?, "the ENI's first address went, too");
        Ok(())
    });
}

#[test]
fn an_eni_whose_link_comes_is_asked_for_until_metadata_tells_of_it() {
    vpc_lab::inside(|| {
        let mut web = watched()?;
        let _watch = Watch::of(&web.lab, &["--interval", "1h"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        let late = Duration::from_millis(700);
        let keys = [("local-ipv4s".to_string(), 2 * late)].into();
        web.lab
            .set_propagation("web", Propagation { listing_entry: late, overrides: keys, ..Propagation::default() })?;
        let third =
            web.lab.create_network_interface(CreateEni { subnet: web.subnets[2].clone(), ..CreateEni::default() })?;
        let address = web.lab.world().eni(&third)?.ipv4s[0].to_string();
        web.lab.attach_network_interface(&third, "web", 0, 2)?;
        let took = until("an attached ENI answers", || web.answers(&address))?;
        ensure!(took > late, "metadata told of it at once: {took:?}");
        Ok(())
    });
}

/// Between two looks it is detached and attached as another device, which a few requests do not tell.
#[test]
fn an_eni_that_comes_back_as_another_device_is_read_as_a_whole() {
    vpc_lab::inside(|| {
        let mut web = watched()?;
        let watch = Watch::of(&web.lab, &["--interval", "500ms"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        let third =
            web.lab.create_network_interface(CreateEni { subnet: web.subnets[2].clone(), ..CreateEni::default() })?;
        web.lab.attach_network_interface(&third, "web", 0, 2)?;
        until("it is configured", || Ok(web.ip("rule")?.contains("lookup 20002")))?;
        // It is told by glances from now on.
        std::thread::sleep(Duration::from_secs(2));
        watch.signal(libc::SIGSTOP);
        web.lab.detach_network_interface(&third)?;
        web.lab.attach_network_interface(&third, "web", 0, 3)?;
        watch.signal(libc::SIGCONT);
        until("it is another device", || Ok(web.ip("rule")?.contains("lookup 20003")))?;
        until("nothing is left of what it was", || Ok(!web.ip("rule")?.contains("lookup 20002")))?;
        Ok(())
    });
}

/// Metadata is asked once an hour, so it is the kernel that tells.
#[test]
fn what_others_undo_is_repaired_when_the_kernel_tells() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let watch = Watch::of(&web.lab, &["--interval", "1h"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        web.lab.service("web")?.reset_counters();
        for (broken, whole) in [
            ("rule del priority 24001", "rule"),
            ("route flush table 20001", "route show table 20001"),
            // IPv6 is busy with its own link-local address for a second or two.
            ("addr del 10.0.1.20/24 dev ens6", "-4 addr show dev ens6"),
            ("link set ens6 down", "link show dev ens6"),
        ] {
            watch.rests()?;
            let before = web.ip(whole)?;
            web.ip(broken)?;
            let took = until(broken, || Ok(web.ip(whole)? == before && web.answers("10.0.1.20")?));
            let took = took.with_context(|| format!("{before}became\n{}", web.ip(whole).unwrap_or_default()))?;
            eprintln!("{broken}: repaired after {took:?}");
        }
        // Whether metadata says something else by now takes a glance.
        let gets = web.lab.service("web")?.requests().gets_by_path;
        let count = |key: &str| gets.iter().filter(|(path, _)| path.ends_with(key)).map(|(_, n)| n).sum::<u64>();
        ensure!(count("/macs/") >= 4 && count("device-number") == 0, "{gets:#?}");
        Ok(())
    });
}

/// Somebody holds the lock: it is tried again though the kernel tells of nothing more, and signals are heard meanwhile.
#[test]
fn what_could_not_be_repaired_for_want_of_a_turn_is_repaired_soon() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let mut watch = Watch::of(&web.lab, &["--interval", "1h", "--timeout", "15s"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        watch.rests()?;
        let lock = format!("/proc/{}/root/run/eniup/lock", watch.child.id());
        let lock = std::fs::File::options().write(true).open(lock)?;
        lock.lock()?;
        web.ip("addr del 10.0.1.20/24 dev ens6")?;
        watch.hears("another eniup run held")?;
        // Whatever it has begun because of that is over.
        watch.rests()?;
        lock.unlock()?;
        until("it is repaired", || web.answers("10.0.1.20"))?;

        lock.lock()?;
        web.ip("addr del 10.0.1.20/24 dev ens6")?;
        until("it is gone", || Ok(!web.answers("10.0.1.20")?))?;
        // Less than it would wait for metadata.
        let asked_to_end = Instant::now();
        watch.ends()?;
        ensure!(asked_to_end.elapsed() < Duration::from_secs(5), "it ended after {:?}", asked_to_end.elapsed());
        Ok(())
    });
}

/// Metadata is slower than the patience with it, and was asked last before an address has moved.
#[test]
fn what_another_run_has_done_by_newer_metadata_is_not_undone() {
    vpc_lab::inside(|| {
        let mut web = watched()?;
        let (second, subnet) = (web.second.clone(), web.subnets[1].clone());
        let eni = CreateEni { subnet, ipv4s: vec![Ipv4Addr::new(10, 0, 1, 30)], ..CreateEni::default() };
        let third = web.lab.create_network_interface(eni)?;
        web.lab.attach_network_interface(&third, "web", 0, 2)?;
        let wanderer = ["10.0.1.40/32".parse()?];
        web.lab.assign(&second, &wanderer, false)?;
        let _watch = Watch::of(&web.lab, &["--interval", "1h"])?;
        until("all is configured", || Ok(web.answers("10.0.1.30")? && web.answers("10.0.1.40")?))?;

        web.lab.service("web")?.set_latency(Duration::from_millis(100));
        web.lab.assign(&third, &wanderer, true)?;
        let run = web.lab.eniup("web", &["reconcile"])?;
        ensure!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let moved = Instant::now();
        while moved.elapsed() < Duration::from_millis(1500) {
            let shown = web.ip("-o addr show to 10.0.1.40")?;
            let is_there = shown.lines().count() == 1 && shown.contains("ens7");
            ensure!(is_there, "{:?} after it has moved:\n{shown}", moved.elapsed());
        }
        Ok(())
    });
}

/// Nor is what it has only taken away put back: metadata was asked last before the address has gone, and perhaps did not answer since.
#[test]
fn what_another_run_has_taken_away_by_newer_metadata_is_not_put_back() {
    vpc_lab::inside(|| {
        for has_failed in [false, true] {
            let mut web = watched()?;
            let (second, leaving) = (web.second.clone(), ["10.0.1.40/32".parse()?]);
            web.lab.assign(&second, &leaving, false)?;
            let mut watch = Watch::of(&web.lab, &["--interval", "1h"])?;
            until("all is configured", || Ok(web.answers("10.0.1.20")? && web.answers("10.0.1.40")?))?;

            if has_failed {
                web.lab.service("web")?.set_disabled(true);
                web.ip("rule del priority 24001")?;
                watch.hears("403")?;
                web.lab.service("web")?.set_disabled(false);
            }
            web.lab.service("web")?.set_latency(Duration::from_millis(100));
            web.lab.unassign(&second, &leaving)?;
            let run = web.lab.eniup("web", &["reconcile"])?;
            ensure!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            web.stays_without("10.0.1.40").with_context(|| format!("failed before: {has_failed}"))?;
        }
        Ok(())
    });
}

/// The first answer that is asked for is the last to come, and what else was read with it is older than what the run has read.
#[test]
fn what_another_run_has_taken_away_while_metadata_was_asked_is_not_put_back() {
    vpc_lab::inside(|| {
        let mut web = watched()?;
        let (second, leaving) = (web.second.clone(), ["10.0.1.40/32".parse()?]);
        web.lab.assign(&second, &leaving, false)?;
        let watch = Watch::of(&web.lab, &["--interval", "1h"])?;
        until("all is configured", || Ok(web.answers("10.0.1.20")? && web.answers("10.0.1.40")?))?;

        let late = Rule::new("*/local-ipv4s", Occurrences::FirstN(1), Action::Delay(Duration::from_millis(700)));
        web.lab.service("web")?.set_faults(Faults { rules: vec![late], ..Faults::default() });
        web.lab.service("web")?.reset_counters();
        watch.signal(libc::SIGHUP);
        let gets = || Ok::<_, anyhow::Error>(web.lab.service("web")?.requests().gets_by_path);
        until("both lists are asked for", || {
            Ok(gets()?.iter().filter(|(path, _)| path.ends_with("/local-ipv4s")).count() == 2)
        })?;
        web.lab.unassign(&second, &leaving)?;
        let run = web.lab.eniup("web", &["reconcile"])?;
        ensure!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        web.stays_without("10.0.1.40")
    });
}

/// Else it would not be asked for an hour.
#[test]
fn a_metadata_service_that_did_not_answer_is_asked_again_soon() {
    vpc_lab::inside(|| {
        let mut web = watched()?;
        let mut watch = Watch::of(&web.lab, &["--interval", "1h"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        web.lab.service("web")?.set_disabled(true);
        web.ip("rule del priority 24001")?;
        watch.hears("403")?;
        web.lab.service("web")?.set_disabled(false);
        web.lab.assign(&web.second.clone(), &["10.0.1.77/32".parse()?], false)?;
        until("the assigned address answers", || web.answers("10.0.1.77"))?;
        Ok(())
    });
}

#[test]
fn who_undoes_a_change_again_and_again_is_named_and_given_way_to() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let mut watch = Watch::of(&web.lab, &["--interval", "1h"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        let has_rule = || Ok(web.ip("rule")?.contains("24001:"));
        for _ in 0..3 {
            web.ip("rule del priority 24001")?;
            until("the rule is there again", has_rule)?;
        }
        watch.hears("somebody undoes this again and again")?;
        web.ip("rule del priority 24001")?;
        let took = until("the rule is there again", has_rule)?;
        ensure!(took > Duration::from_millis(500), "it goes on fighting: {took:?}");
        Ok(())
    });
}

/// One that stays, as managers do: of one that has ended nothing is to be learned.
#[test]
fn the_process_that_undoes_a_change_again_and_again_is_named() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let watch = Watch::of(&web.lab, &["--interval", "1h"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        let mut rival = web.lab.command("web", "ip")?;
        let mut rival = rival.args(["-force", "-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut commands = rival.stdin.take().context("stdin")?;
        let name = format!("the last to take something of eniup's away: ip (process {})", rival.id());
        let named = until("it is named", || {
            commands.write_all(b"rule del priority 24001\n")?;
            Ok(watch.lines.try_iter().any(|line| line.contains(&name)))
        });
        drop(commands);
        rival.wait()?;
        named.map(drop)
    });
}

/// Somebody who takes away what is not eniup's, and stays; and commands that undo and are gone at once.
#[test]
fn who_takes_away_what_is_not_ours_is_not_named() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let watch = Watch::of(&web.lab, &["--interval", "1h"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        let mut other = web.lab.command("web", "ip")?;
        let mut other = other.args(["-force", "-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut commands = other.stdin.take().context("stdin")?;
        let mut said = String::new();
        until("it gives way", || {
            commands.write_all(b"route add 10.99.0.0/24 dev lo\nroute del 10.99.0.0/24 dev lo\n")?;
            // Perhaps not there at this moment.
            let _ = web.ip("rule del priority 24001");
            said.extend(watch.lines.try_iter());
            Ok(said.contains("somebody undoes this again and again"))
        })?;
        let name = format!("process {}", other.id());
        drop(commands);
        other.wait()?;
        ensure!(!said.contains(&name), "{said}");
        Ok(())
    });
}

/// A glance at two ENIs is their list, and each one's keys and addresses; all of them would be three times that.
#[test]
fn where_nothing_changes_metadata_is_asked_little() {
    vpc_lab::inside(|| {
        let mut web = watched()?;
        let _watch = Watch::of(&web.lab, &["--interval", "200ms"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        let count = |web: &Watched, key: &str| -> Result<u64> {
            let gets = web.lab.service("web")?.requests().gets_by_path;
            Ok(gets.iter().filter(|(path, _)| path.ends_with(key)).map(|(_, count)| count).sum())
        };
        until("only what changes is asked for", || {
            web.lab.service("web")?.reset_counters();
            until("some glances", || Ok(count(&web, "/macs/")? >= 5))?;
            Ok(count(&web, "device-number")? == 0 && count(&web, "local-ipv4s")? >= 8)
        })?;
        web.lab.assign(&web.second.clone(), &["10.0.1.77/32".parse()?], false)?;
        until("an assigned address answers", || web.answers("10.0.1.77"))?;
        Ok(())
    });
}

#[test]
fn a_run_directory_that_cannot_be_written_is_told_once() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let folder = tempfile::tempdir()?;
        mount_read_only(folder.path())?;
        for command in ["reconcile", "release"] {
            let mut eniup = web.lab.command("web", env!("CARGO_BIN_EXE_eniup"))?;
            let output = eniup.args([command, "--timeout", "5s"]).env("RUNTIME_DIRECTORY", folder.path()).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(1) && said.lines().count() == 1, "{command}: {said}");
            ensure!(said.contains("cannot open the lock") && said.contains("Read-only file system"), "{said}");
        }
        let mut command = web.lab.command("web", env!("CARGO_BIN_EXE_eniup"))?;
        command.args(["watch", "--interval", "100ms"]).env("RUNTIME_DIRECTORY", folder.path());
        let mut watch = Watch::start(&mut command)?;
        watch.hears("cannot open the lock")?;
        web.lab.service("web")?.reset_counters();
        until(
            "it goes on asking",
            || Ok(web.lab.service("web")?.requests().gets_by_status.values().sum::<u64>() > 50),
        )?;
        ensure!(watch.lines.try_iter().count() == 0, "it says it again");
        ensure!(watch.ends()? == Some(0));
        Ok(())
    });
}

fn mount_read_only(folder: &Path) -> Result<()> {
    let output = Command::new("mount").args(["-t", "tmpfs", "-o", "ro", "tmpfs"]).arg(folder).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn a_metadata_service_that_is_gone_does_not_keep_repairs_waiting() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let _watch = Watch::of(&web.lab, &["--interval", "200ms", "--timeout", "60s"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        let hang = Rule::new("*", Occurrences::Always, Action::Hang);
        web.lab.service("web")?.set_faults(Faults { rules: vec![hang], ..Faults::default() });
        web.ip("rule del priority 24001")?;
        until("the rule is there again", || Ok(web.ip("rule")?.contains("24001:")))?;
        Ok(())
    });
}

#[test]
fn systemd_is_told_how_it_is() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("notify");
        let systemd = UnixDatagram::bind(&path)?;
        systemd.set_read_timeout(Some(PATIENCE))?;
        let mut command = web.lab.command("web", env!("CARGO_BIN_EXE_eniup"))?;
        command.args(["watch", "--interval", "1h"]).env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000");
        let watch = Watch::start(&mut command)?;
        let mut told: Vec<String> = Vec::new();
        let mut tells = |what: &str| -> Result<()> {
            loop {
                if let Some(n) = told.iter().position(|told| told.contains(what)) {
                    told.drain(..=n);
                    return Ok(());
                }
                let mut datagram = [0; 4096];
                match systemd.recv(&mut datagram) {
                    Ok(length) => told.push(String::from_utf8_lossy(&datagram[..length]).into_owned()),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("no {what}, but {told:?}"),
                    Err(error) => return Err(error.into()),
                }
            }
        };
        tells("STATUS=the kernel agrees with metadata")?;
        tells("READY=1")?;
        tells("WATCHDOG=1")?;
        watch.signal(libc::SIGHUP);
        tells("RELOADING=1")?;
        tells("READY=1")?;
        watch.signal(libc::SIGTERM);
        tells("STOPPING=1")?;
        ensure!(watch.ends()? == Some(0));
        Ok(())
    });
}

#[test]
fn a_configuration_is_read_anew_on_sighup_and_a_bad_one_changes_nothing() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let mut watch = Watch::of(&web.lab, &["--interval", "1h"])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        let folder = web.lab.node("web")?.run_directory().join("eniup/config.d");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("50.toml"), "rules = \"per-\"\n")?;
        watch.signal(libc::SIGHUP);
        watch.hears("the configuration has 1 error; going on with the configuration from before")?;
        ensure!(web.ip("rule")?.contains("24001:"), "a bad configuration changed something");
        std::fs::write(folder.join("50.toml"), "rules = \"per-address\"\n")?;
        watch.signal(libc::SIGHUP);
        until("a rule for the address", || Ok(web.ip("rule")?.contains("from 10.0.1.20 iif lo lookup 20001")))?;
        Ok(())
    });
}

/// A request that is under way is not waited for: it was begun by what the configuration said before.
#[test]
fn how_often_and_how_long_metadata_is_asked_is_read_anew_too() {
    vpc_lab::inside(|| {
        let web = watched()?;
        let folder = web.lab.node("web")?.run_directory().join("eniup/config.d");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("50.toml"), "timeout = \"1h\"\n[watch]\ninterval = \"1h\"\n")?;
        let mut watch = Watch::of(&web.lab, &[])?;
        until("the second ENI answers", || web.answers("10.0.1.20"))?;
        std::fs::write(folder.join("50.toml"), "timeout = \"1h\"\n[watch]\ninterval = \"100ms\"\n")?;
        watch.signal(libc::SIGHUP);
        let count = || -> Result<u64> { Ok(web.lab.service("web")?.requests().gets_by_status.values().sum()) };
        let before = count()?;
        until("it asks again and again", || Ok(count()? > before + 50))?;
        let hang = Rule::new("*", Occurrences::Always, Action::Hang);
        web.lab.service("web")?.set_faults(Faults { rules: vec![hang], ..Faults::default() });
        // One is under way by then, with an hour's patience.
        std::thread::sleep(Duration::from_secs(1));
        std::fs::write(folder.join("50.toml"), "timeout = \"1s\"\n[watch]\ninterval = \"100ms\"\n")?;
        watch.signal(libc::SIGHUP);
        watch.hears("metadata")?;
        ensure!(watch.ends()? == Some(0));
        Ok(())
    });
}

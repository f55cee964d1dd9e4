//! One run acts at a time, and nobody is kept out by one that only waits, that a terminal wants to stop, or by what is in the
//! place of its files.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use support::machine::{
    Machine, age_arrivals, difference, inside, ip, read_leaves, run, scenario, with_scenario, with_two_enis,
};
use support::moments::settled_dump;
use vpc_lab::imds::{Action, Faults, Occurrences, Rule};

const TWO: &str = "two-subnets-dual-stack";
const THREE: &str = "three-enis-of-which-two-share";
const SECONDS_LIST: &str = "network/interfaces/macs/02:00:00:00:00:02/local-ipv4s";

/// For what has to happen soon, on a machine that is busy with other things.
const SOON: Duration = Duration::from_secs(20);

fn until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A run that goes on meanwhile.
struct Meanwhile(Child);

impl Meanwhile {
    fn start(machine: &Machine, arguments: &str) -> Result<Meanwhile> {
        let command: &mut Command = &mut machine.command(arguments);
        Ok(Meanwhile(command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn()?))
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: the process is this one's child and has not been waited for, so the number is still its own.
        unsafe { libc::kill(self.0.id() as libc::pid_t, signal) };
    }

    /// A line of proc_pid_status(5).
    fn status(&self, name: &str) -> Result<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(line.with_context(|| format!("no {name}"))?.trim().into())
    }

    /// Sent to a process whose group is orphaned, as a test's may be, these stop nobody, so sending them would show nothing.
    fn ignores_stops(&self) -> Result<bool> {
        let ignored = u64::from_str_radix(&self.status("SigIgn")?, 16)?;
        Ok([libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].iter().all(|signal| ignored & 1 << (signal - 1) != 0))
    }

    /// While it acts it cannot be stopped by its terminal, and by SIGSTOP it is not meant to be.
    fn is_stopped_while_it_waits(&self) -> Result<()> {
        until("it is stopped while it waits", || {
            self.signal(libc::SIGSTOP);
            until("it is stopped", || Ok(self.status("State")?.starts_with('T')))?;
            let is_waiting = !self.ignores_stops()?;
            if !is_waiting {
                self.signal(libc::SIGCONT);
            }
            Ok(is_waiting)
        })
    }

    /// It ends with this exit code and says this.
    fn ends(mut self, exit: i32, words: &str) -> Result<()> {
        until("the run's end", || Ok(self.0.try_wait()?.is_some()))?;
        let output = self.0.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(exit) && said.contains(words),
            "{}, not {exit}, `{words}`: {said}",
            output.status
        );
        Ok(())
    }
}

type Leaves = BTreeMap<String, String>;

/// All that metadata tells of the machine.
fn told(scenario_name: &str) -> Result<Leaves> {
    read_leaves(&scenario(scenario_name)?.folder.join("metadata.json"))
}

/// The same while the second ENI's MAC is listed, and nothing of it is told yet.
fn without_the_second(mut leaves: Leaves) -> Leaves {
    const SECOND: &str = "network/interfaces/macs/02:00:00:00:00:02/";
    leaves.retain(|key, _| !key.starts_with(SECOND));
    leaves.insert(format!("{SECOND}mac"), "02:00:00:00:00:02".into());
    leaves
}

/// Whether somebody acts.
fn is_held(machine: &Machine) -> bool {
    let lock = fs::File::options().write(true).open(machine.directory.join("lock"));
    lock.is_ok_and(|lock| lock.try_lock().is_err())
}

/// How often changes were made, as the lock's file has it.
fn changes(machine: &Machine) -> Result<u64> {
    Ok(eniup::lock::deeds(&machine.directory)?.changes)
}

/// Starts a run that has acted and waits for the second ENI.
fn waiting(machine: &Machine) -> Result<Meanwhile> {
    machine.publish(without_the_second(told(TWO)?));
    waiting_for(machine, "reconcile --timeout 15s")
}

/// Starts a run that has acted and waits for what is pending.
fn waiting_for(machine: &Machine, verb: &str) -> Result<Meanwhile> {
    machine.service.reset_counters();
    let waits = Meanwhile::start(machine, verb)?;
    until_noted(machine, "")?;
    Ok(waits)
}

/// A run has found this trouble by now, and lets others act.
fn until_noted(machine: &Machine, why: &str) -> Result<()> {
    until("a trouble that is noted", || {
        let troubles = eniup::ledger::load(&machine.directory).troubles;
        Ok(troubles.values().any(|noted| noted.why.contains(why)) && !is_held(machine))
    })
}

#[test]
fn a_run_that_waits_keeps_nobody_out() {
    inside(|| {
        with_two_enis(|machine| {
            let waits = waiting(machine)?;
            let started = Instant::now();
            let other = machine.eniup("reconcile --timeout 300ms")?;
            ensure!(other.exit == 3, "{}: {}", other.exit, other.stderr);
            ensure!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
            machine.publish(told(TWO)?);
            waits.ends(0, "")?;
            machine.assert_settled()
        })
    });
}

#[test]
fn it_does_not_undo_what_another_has_done_on_newer_metadata() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            // The primary's list is what changes; the second ENI is what is waited for.
            let waits = waiting(machine)?;
            let key = "network/interfaces/macs/02:00:00:00:00:01/local-ipv4s";
            let more = format!("{}\n10.0.0.77", told(TWO)?[key]);
            let mut leaves = told(TWO)?;
            leaves.insert(key.into(), more);
            machine.publish(without_the_second(leaves.clone()));
            let other = machine.eniup("reconcile --timeout 300ms")?;
            ensure!(other.exit == 3 && ip("addr show eth01")?.contains("10.0.0.77"), "{}", other.stderr);
            machine.publish(leaves);
            waits.ends(0, "")?;
            ensure!(ip("addr show eth01")?.contains("10.0.0.77"), "the address is gone");
            machine.assert_settled()
        })
    });
}

#[test]
fn it_does_not_bring_back_what_was_released_meanwhile() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let waits = waiting(machine)?;
            let release = machine.eniup("release")?;
            ensure!(release.exit == 0, "{}", release.stderr);
            machine.publish(told(TWO)?);
            waits.ends(3, "meanwhile somebody has released what was done")?;
            ensure!(!ip("rule show")?.contains("proto 176") && !ip("addr show eth02")?.contains("10.0.1.20"));
            Ok(())
        })
    });
}

/// Nor does a run that waits for metadata keep anybody out, or undo what was decided meanwhile.
#[test]
fn a_run_that_reads_metadata_keeps_nobody_out() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let slow = Rule::new("*", Occurrences::Always, Action::Delay(Duration::from_secs(2)));
            machine.service.set_faults(Faults { rules: vec![slow], ..Faults::default() });
            machine.service.reset_counters();
            let reads = Meanwhile::start(machine, "reconcile --automatic --timeout 20s")?;
            until("it asks", || Ok(machine.service.requests().faults > 0))?;
            let release = machine.eniup("release --timeout 1s")?;
            ensure!(release.exit == 0, "{}: {}", release.exit, release.stderr);
            machine.service.set_faults(Faults::default());
            reads.ends(75, "meanwhile somebody has released what was done")?;
            ensure!(!ip("rule show")?.contains("proto 176"), "{}", ip("rule show")?);
            Ok(())
        })
    });
}

/// Starts a run that has read the second ENI's addresses and is kept from the rest for two seconds.
fn reading_the_rest(machine: &Machine, verb: &str) -> Result<Meanwhile> {
    let slow =
        Rule::new("*/02:00:00:00:00:02/device-number", Occurrences::FirstN(1), Action::Delay(Duration::from_secs(2)));
    machine.service.set_faults(Faults { rules: vec![slow], ..Faults::default() });
    machine.service.reset_counters();
    let reads = Meanwhile::start(machine, verb)?;
    until("it has read the list", || {
        let gets = machine.service.requests().gets_by_path;
        let has_list = gets.keys().any(|path| path.ends_with(SECONDS_LIST));
        Ok(has_list && machine.service.requests().faults > 0)
    })?;
    Ok(reads)
}

/// What another run has done while metadata was read may follow from what is newer.
#[test]
fn what_another_run_has_done_while_metadata_was_read_is_not_undone() {
    inside(|| {
        with_two_enis(|machine| {
            let mut leaves = told(TWO)?;
            machine.publish(leaves.clone());
            machine.reconcile(0)?;
            let reads = reading_the_rest(machine, "reconcile --timeout 20s")?;
            *leaves.get_mut(SECONDS_LIST).context("no list")? += "\n10.0.1.77";
            machine.publish(leaves);
            machine.reconcile(0)?;
            ensure!(ip("addr show eth02")?.contains("10.0.1.77/32"), "it is not there");
            reads.ends(0, "")?;
            ensure!(ip("addr show eth02")?.contains("10.0.1.77/32"), "it was taken away by what was older");
            machine.assert_settled()
        })
    });
}

/// Nor is what another run has only noted: that metadata lacked an address is not disproven by what was read before.
#[test]
fn what_another_run_has_noted_while_metadata_was_read_is_not_forgotten() {
    inside(|| {
        with_two_enis(|machine| {
            let mut leaves = told(TWO)?;
            let without = leaves.clone();
            *leaves.get_mut(SECONDS_LIST).context("no list")? += "\n10.0.1.77";
            machine.publish(leaves);
            machine.reconcile(0)?;
            let sightings = || eniup::ledger::load(&machine.directory).notes.sightings;
            let reads = reading_the_rest(machine, "reconcile --automatic --timeout 20s")?;
            machine.publish(without);
            let (done, other) = (changes(machine)?, machine.eniup("reconcile --automatic")?);
            ensure!(other.exit == 0 && changes(machine)? == done, "{}: {}", other.exit, other.stderr);
            let noted = sightings();
            ensure!(noted.len() == 1, "{noted:?}");
            reads.ends(0, "")?;
            ensure!(sightings() == noted, "{noted:?} became {:?}", sightings());
            Ok(())
        })
    });
}

/// What the second ENI has is told by the older run's reading alone to be gone.
fn with_one_more(mut leaves: Leaves) -> Result<Leaves> {
    *leaves.get_mut(SECONDS_LIST).context("no list")? += "\n10.0.1.77";
    Ok(leaves)
}

fn ensure_is_there() -> Result<()> {
    ensure!(ip("addr show eth02")?.contains("10.0.1.77/32"), "it was taken away by what was older");
    Ok(())
}

/// Also where the other one had nothing to do by what it has read.
#[test]
fn what_another_run_has_read_meanwhile_is_not_undone() {
    inside(|| {
        with_two_enis(|machine| {
            machine.publish(with_one_more(told(TWO)?)?);
            machine.reconcile(0)?;
            machine.publish(told(TWO)?);
            let older = reading_the_rest(machine, "reconcile --timeout 20s")?;
            machine.publish(with_one_more(told(TWO)?)?);
            let done = changes(machine)?;
            machine.reconcile(0)?;
            ensure!(changes(machine)? == done, "there was something to do");
            older.ends(0, "")?;
            ensure_is_there()
        })
    });
}

/// Whoever holds the lock that long need not have done anything: a run that was stopped.
#[test]
fn what_was_read_long_before_the_turn_is_read_again() {
    inside(|| {
        with_two_enis(|machine| {
            machine.publish(with_one_more(told(TWO)?)?);
            machine.reconcile(0)?;
            let lock = fs::File::options().write(true).open(machine.directory.join("lock"))?;
            lock.lock()?;
            machine.publish(told(TWO)?);
            machine.service.reset_counters();
            let waits = Meanwhile::start(machine, "reconcile --timeout 20s")?;
            let asked = || machine.service.requests().gets_by_path.values().sum::<u64>();
            until("it has begun to read", || Ok(asked() > 0))?;
            sleep(Duration::from_millis(1500));
            machine.publish(with_one_more(told(TWO)?)?);
            let before = asked();
            drop(lock);
            waits.ends(0, "")?;
            ensure!(asked() > before, "nothing was read again");
            ensure_is_there()
        })
    });
}

/// A run that has to read again what another one has overtaken does not keep others out for as long as there is no answer.
#[test]
fn a_run_that_reads_metadata_again_keeps_nobody_out() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let reads = reading_the_rest(machine, "reconcile --timeout 20s")?;
            ip("addr del 10.0.1.21/32 dev eth02")?;
            machine.reconcile(0)?;
            let silent = Rule::new("*", Occurrences::Always, Action::Hang);
            machine.service.set_faults(Faults { rules: vec![silent], ..Faults::default() });
            machine.service.reset_counters();
            until("it reads again", || Ok(machine.service.requests().faults > 0))?;
            let started = Instant::now();
            let release = machine.eniup("release --timeout 5s")?;
            ensure!(release.exit == 0, "{}: {}", release.exit, release.stderr);
            ensure!(started.elapsed() < Duration::from_secs(3), "it was kept out for {:?}", started.elapsed());
            machine.service.set_faults(Faults::default());
            reads.ends(75, "meanwhile somebody has released what was done")
        })
    });
}

/// Nor do many of them together.
#[test]
fn runs_that_have_to_read_metadata_again_keep_nobody_out_together() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let lock = fs::File::options().write(true).open(machine.directory.join("lock"))?;
            lock.lock()?;
            let asked = |machine: &Machine| machine.service.requests().gets_by_path.values().sum::<u64>();
            let waits = |_| -> Result<Meanwhile> {
                let before = asked(machine);
                let waits = Meanwhile::start(machine, "reconcile --automatic --timeout 12s")?;
                until("it reads", || Ok(asked(machine) > before))?;
                Ok(waits)
            };
            let waiting = (0..8).map(waits).collect::<Result<Vec<Meanwhile>>>()?;
            sleep(Duration::from_millis(1500));
            let silent = Rule::new("*", Occurrences::Always, Action::Hang);
            machine.service.set_faults(Faults { rules: vec![silent], ..Faults::default() });
            drop(lock);
            let started = Instant::now();
            let release = machine.eniup("release --timeout 5s")?;
            ensure!(release.exit == 0, "{}: {}", release.exit, release.stderr);
            ensure!(started.elapsed() < Duration::from_secs(3), "it was kept out for {:?}", started.elapsed());
            machine.service.set_faults(Faults::default());
            waiting.into_iter().try_for_each(|run| run.ends(75, "meanwhile somebody has released"))
        })
    });
}

/// Then it is metadata that is not to be had.
#[test]
fn a_run_that_cannot_read_metadata_again_says_so() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            ip("addr del 10.0.1.21/32 dev eth02")?;
            let lock = fs::File::options().write(true).open(machine.directory.join("lock"))?;
            lock.lock()?;
            machine.service.reset_counters();
            let waits = Meanwhile::start(machine, "reconcile --timeout 4s")?;
            until("it reads", || Ok(machine.service.requests().gets_by_path.values().sum::<u64>() > 0))?;
            sleep(Duration::from_millis(1500));
            let silent = Rule::new("*", Occurrences::Always, Action::Hang);
            machine.service.set_faults(Faults { rules: vec![silent], ..Faults::default() });
            drop(lock);
            waits.ends(69, "instance metadata")?;
            ensure!(!ip("addr show eth02")?.contains("10.0.1.21"), "it was done by what was older");
            Ok(())
        })
    });
}

/// One ENI that cannot be read any more is pending, as for a run that waits.
#[test]
fn what_cannot_be_read_again_keeps_no_other_from_being_done() {
    inside(|| {
        with_scenario(THREE, |machine| {
            machine.reconcile(0)?;
            let mut leaves = told(THREE)?;
            let list = "network/interfaces/macs/02:00:00:00:00:03/local-ipv4s";
            *leaves.get_mut(list).context("no list")? += "\n10.0.1.77";
            machine.publish(leaves);
            let reads = reading_the_rest(machine, "reconcile --timeout 6s")?;
            eniup::lock::count_change(&machine.directory);
            let refused = Rule::new("*/02:00:00:00:00:02/local-ipv4s", Occurrences::Always, Action::Status(503));
            machine.service.set_faults(Faults { rules: vec![refused], ..Faults::default() });
            reads.ends(3, "eni-02 is pending")?;
            ensure!(ip("addr show eth03")?.contains("10.0.1.77"), "the other ENI was not done");
            Ok(())
        })
    });
}

/// Whoever stays goes by nothing that is older than what another run has read meanwhile, either.
#[test]
fn watch_does_nothing_by_what_is_older_than_another_runs_reading() {
    inside(|| {
        with_scenario(THREE, |machine| {
            let with_one_more_on = |eni: u8| -> Result<Leaves> {
                let mut leaves = told(THREE)?;
                let list = format!("network/interfaces/macs/02:00:00:00:00:0{eni}/local-ipv4s");
                *leaves.get_mut(&list).context("no list")? += "\n10.0.1.77";
                Ok(leaves)
            };
            machine.publish(with_one_more_on(2)?);
            machine.reconcile(0)?;
            age_arrivals(machine, 120_000)?;
            let watch = Meanwhile::start(machine, "watch --interval 500ms")?;
            sleep(Duration::from_secs(2));
            let slow = Rule::new(
                "*/02:00:00:00:00:03/device-number",
                Occurrences::FirstN(1),
                Action::Delay(Duration::from_millis(1800)),
            );
            machine.service.set_faults(Faults { rules: vec![slow], ..Faults::default() });
            machine.service.reset_counters();
            machine.publish(with_one_more_on(3)?);
            until("both lists are read", || {
                let requests = machine.service.requests();
                let is_read = |eni: u8| {
                    let end = format!("02:00:00:00:00:0{eni}/local-ipv4s");
                    requests.gets_by_path.keys().any(|path| path.ends_with(&end))
                };
                Ok(requests.faults > 0 && is_read(2) && is_read(3))
            })?;
            machine.publish(with_one_more_on(2)?);
            let younger = machine.eniup("reconcile --automatic --timeout 1s")?;
            ensure!(younger.exit == 0, "{}: {}", younger.exit, younger.stderr);
            let seen = Instant::now();
            while seen.elapsed() < Duration::from_secs(4) {
                ensure!(ip("addr show eth02")?.contains("10.0.1.77"), "watch has moved it by what was older");
                sleep(Duration::from_millis(10));
            }
            watch.signal(libc::SIGTERM);
            watch.ends(0, "")
        })
    });
}

/// What cannot be noted is no reason to take one's own work for another run's.
#[test]
fn a_run_that_can_note_nothing_reads_no_more_than_another() {
    inside(|| {
        with_two_enis(|machine| {
            fs::create_dir_all(machine.directory.join("ledger.json"))?;
            machine.publish(without_the_second(told(TWO)?));
            machine.service.reset_counters();
            let run = machine.eniup("reconcile --timeout 2s")?;
            ensure!(run.exit == 3, "{}: {}", run.exit, run.stderr);
            let gets = machine.service.requests().gets_by_path;
            let of_first = gets.iter().filter(|(path, _)| path.ends_with("02:00:00:00:00:01/device-number"));
            ensure!(of_first.map(|(_, count)| count).sum::<u64>() == 1, "{gets:?}");
            Ok(())
        })
    });
}

/// What cut somebody off a moment ago must not be made again by a run that happens to wait.
#[test]
fn it_does_not_make_again_what_was_rolled_back_meanwhile() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let waits = waiting(machine)?;
            let mut leaves = without_the_second(told(TWO)?);
            let list = leaves.get_mut("network/interfaces/macs/02:00:00:00:00:01/local-ipv4s").context("no list")?;
            *list += "\n10.0.0.77";
            machine.publish(leaves);
            // Or it would see the trial itself.
            waits.is_stopped_while_it_waits()?;
            let trial = machine.eniup("reconcile --confirm 1 --timeout 5s")?;
            ensure!(trial.stderr.contains("rolled back"), "{}: {}", trial.exit, trial.stderr);
            waits.signal(libc::SIGCONT);
            waits.ends(3, "no longer waiting: meanwhile somebody has")?;
            // Nor by one that comes by itself.
            let automatic = machine.eniup("reconcile --automatic --timeout 300ms")?;
            ensure!(automatic.exit == 75, "{}: {}", automatic.exit, automatic.stderr);
            ensure!(!ip("addr show eth01")?.contains("10.0.0.77"), "it was made again");
            Ok(())
        })
    });
}

/// The second ENI is half there, then whole while one key, or the list of keys, cannot be read: what the halves together would say
/// was never so.
#[test]
fn what_fails_while_a_run_waits_is_not_completed_by_what_was_read_before() {
    inside(|| {
        for verb in ["reconcile --timeout 2s", "reconcile --automatic --timeout 2s"] {
            for failing in ["*/02:00:00:00:00:02/", "*/02:00:00:00:00:02/local-ipv4s"] {
                with_two_enis(|machine| {
                    let list = "network/interfaces/macs/02:00:00:00:00:02/";
                    let mut whole = told(TWO)?;
                    whole.insert(format!("{list}ipv4-prefix"), "10.0.1.96/28".into());
                    machine.publish(whole.clone());
                    machine.reconcile(0)?;
                    let before = settled_dump()?;
                    let mut half = whole.clone();
                    half.retain(|key, _| {
                        !["device-number", "ipv4-prefix", "ipv6s"].iter().any(|gone| *key == format!("{list}{gone}"))
                    });
                    half.insert(format!("{list}local-ipv4s"), "10.0.1.20".into());
                    machine.publish(half);
                    let waits = waiting_for(machine, verb)?;
                    let rules = vec![Rule::new(failing, Occurrences::Always, Action::Status(503))];
                    machine.service.set_faults(Faults { rules, ..Faults::default() });
                    machine.publish(whole);
                    waits.ends(3, "eni-02 is pending")?;
                    let ledger: serde_json::Value =
                        serde_json::from_str(&fs::read_to_string(machine.directory.join("ledger.json"))?)?;
                    ensure!(ledger["sightings"].as_array().is_none_or(Vec::is_empty), "{ledger}");
                    let difference = difference(&before, &settled_dump()?);
                    ensure!(difference.is_empty(), "changed:\n{difference}");
                    Ok(())
                })
                .with_context(|| format!("{verb}: {failing}"))?;
            }
        }
        Ok(())
    });
}

/// An address that metadata gives to two ENIs is nobody's, also when later only one of them can be read, and whether or not another
/// run's change makes the waiting one read all of metadata again.
#[test]
fn what_fails_while_a_run_waits_makes_nothing_less_known() {
    const DISPUTED: &str = "disputed-address-is-left-out";
    inside(|| {
        let dump_after = |failing: Option<&str>, is_other_run: bool| {
            with_scenario(DISPUTED, |machine| {
                let waits = waiting_for(machine, "reconcile --timeout 2s")?;
                let rule = |path| Rule::new(path, Occurrences::Always, Action::Status(503));
                let rules = failing.into_iter().map(rule).collect();
                machine.service.set_faults(Faults { rules, ..Faults::default() });
                if is_other_run {
                    eniup::lock::count_change(&machine.directory);
                }
                waits.ends(3, "10.0.1.21 overlaps what")?;
                ensure!(failing.is_none() || machine.service.requests().faults > 0, "it was not asked for again");
                settled_dump()
            })
        };
        let whole = dump_after(None, false)?;
        for failing in ["*/02:00:00:00:00:02/local-ipv4s", "*/02:00:00:00:00:02/"] {
            for is_other_run in [false, true] {
                let difference = difference(&whole, &dump_after(Some(failing), is_other_run)?);
                ensure!(difference.is_empty(), "{failing}, other run: {is_other_run}: another end:\n{difference}");
            }
        }
        Ok(())
    });
}

/// Of an ENI that cannot be read any more all is as it was read before, and the others are read on.
#[test]
fn an_eni_that_cannot_be_read_any_more_keeps_no_other_from_being_done() {
    inside(|| {
        with_scenario(THREE, |machine| {
            let key = |n: u8, key: &str| format!("network/interfaces/macs/02:00:00:00:00:0{n}/{key}");
            let mut half = told(THREE)?;
            half.remove(&key(2, "device-number"));
            machine.publish(half.clone());
            let mut none = half.clone();
            none.remove(&key(3, "device-number"));
            machine.publish(none);
            let waits = waiting_for(machine, "reconcile --timeout 3s")?;
            let rules = vec![Rule::new("*/02:00:00:00:00:02/local-ipv4s", Occurrences::Always, Action::Status(503))];
            machine.service.set_faults(Faults { rules, ..Faults::default() });
            machine.publish(half);
            waits.ends(3, "eni-02 is pending: its `local-ipv4s` could not be read")?;
            ensure!(machine.service.requests().faults > 0, "it was not asked for again");
            ensure!(ip("addr show eth03")?.contains("10.0.1.40/"), "the other one is not done");
            Ok(())
        })
    });
}

/// When all is read anew, the one to which an address has gone is not read: it has it from nobody yet, and nobody loses it.
#[test]
fn what_goes_to_an_eni_that_cannot_be_read_any_more_stays_where_it_was() {
    inside(|| {
        for verb in ["reconcile --timeout 3s", "reconcile --automatic --timeout 3s"] {
            with_scenario(THREE, |machine| {
                let key = |n: u8, key: &str| format!("network/interfaces/macs/02:00:00:00:00:0{n}/{key}");
                let on = |n: u8| -> Result<Leaves> {
                    let mut leaves = told(THREE)?;
                    *leaves.get_mut(&key(n, "local-ipv4s")).context("no list")? += "\n10.0.1.77";
                    Ok(leaves)
                };
                machine.publish(on(2)?);
                machine.reconcile(0)?;
                let mut half = on(2)?;
                half.insert(key(4, "mac"), "02:00:00:00:00:04".into());
                machine.publish(half);
                let waits = waiting_for(machine, verb)?;
                let rules =
                    vec![Rule::new("*/02:00:00:00:00:03/device-number", Occurrences::Always, Action::Status(503))];
                machine.service.set_faults(Faults { rules, ..Faults::default() });
                // Without the fourth, all is settled and read anew.
                machine.publish(on(3)?);
                waits.ends(3, "eni-03 is pending: its `device-number` could not be read")?;
                ensure!(machine.service.requests().faults > 0, "it was not asked for again");
                ensure!(ip("addr show eth02")?.contains("10.0.1.77/"), "nobody has it");
                machine.service.set_faults(Faults::default());
                machine.reconcile(0)?;
                ensure!(ip("addr show eth03")?.contains("10.0.1.77/"), "it is not moved");
                machine.assert_settled()
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

/// An ENI that could not be read for a while is read again, and by then an address of its has gone to one that was read before.
#[test]
fn what_moves_while_an_eni_cannot_be_read_is_seen_on_both_sides() {
    inside(|| {
        with_scenario(THREE, |machine| {
            let key = |n: u8, key: &str| format!("network/interfaces/macs/02:00:00:00:00:0{n}/{key}");
            let on = |n: u8, coming: &[u8]| -> Result<Leaves> {
                let mut leaves = told(THREE)?;
                *leaves.get_mut(&key(n, "local-ipv4s")).context("no list")? += "\n10.0.1.77";
                leaves.extend(coming.iter().map(|n| (key(*n, "mac"), format!("02:00:00:00:00:0{n}"))));
                Ok(leaves)
            };
            machine.publish(on(2, &[])?);
            machine.reconcile(0)?;
            machine.publish(on(2, &[4, 5])?);
            let waits = waiting_for(machine, "reconcile --timeout 6s")?;
            let rules = vec![Rule::new("*/02:00:00:00:00:02/local-ipv4s", Occurrences::Always, Action::Status(503))];
            machine.service.set_faults(Faults { rules, ..Faults::default() });
            // Without the fifth, something is settled, and all is read anew.
            machine.publish(on(2, &[4])?);
            until_noted(machine, "could not be read")?;
            machine.publish(on(3, &[4])?);
            machine.service.set_faults(Faults::default());
            waits.ends(3, "02:00:00:00:00:04 is pending")?;
            let (second, third) = (ip("addr show eth02")?, ip("addr show eth03")?);
            ensure!(third.contains("10.0.1.77/") && !second.contains("10.0.1.77/"), "{second}{third}");
            Ok(())
        })
    });
}

/// A service that stalls when the time is nearly over says nothing of any ENI.
#[test]
fn what_is_not_read_for_want_of_time_is_not_told_as_unread() {
    inside(|| {
        with_two_enis(|machine| {
            let mut half = told(TWO)?;
            half.remove("network/interfaces/macs/02:00:00:00:00:02/device-number");
            machine.publish(half);
            let waits = waiting_for(machine, "reconcile --timeout 2s")?;
            let rules = vec![Rule::new("*/02:00:00:00:00:02/*", Occurrences::Always, Action::Hang)];
            machine.service.set_faults(Faults { rules, ..Faults::default() });
            waits.ends(3, "eni-02 is pending: metadata does not have its `device-number` yet")
        })
    });
}

/// `wait` looks again and again, too.
#[test]
fn what_fails_while_wait_waits_makes_nothing_less_known() {
    inside(|| {
        const DISPUTED: &str = "disputed-address-is-left-out";
        with_scenario(DISPUTED, |machine| {
            let mut leaves = told(DISPUTED)?;
            leaves.insert("network/interfaces/macs/02:00:00:00:00:03/interface-id".into(), "eni-0000000c".into());
            machine.publish(leaves);
            machine.service.reset_counters();
            let waits = Meanwhile::start(machine, "wait --eni eni-0000000c --timeout 3s")?;
            let lists = || {
                let gets = machine.service.requests().gets_by_path;
                gets.iter().filter(|(path, _)| path.ends_with("/macs/")).map(|(_, count)| count).sum::<u64>()
            };
            until("a second look", || Ok(lists() > 1))?;
            let rules = vec![Rule::new("*/02:00:00:00:00:02/local-ipv4s", Occurrences::Always, Action::Status(503))];
            machine.service.set_faults(Faults { rules, ..Faults::default() });
            waits.ends(3, "after 3.0 s: 10.0.1.21 overlaps what metadata gives to eni-02")?;
            ensure!(machine.service.requests().faults > 0, "it was not asked for again");
            Ok(())
        })
    });
}

/// From the ENI that is waited for to one of which all was read before.
#[test]
fn what_moves_while_a_run_waits_is_seen_on_both_sides() {
    inside(|| {
        with_scenario(THREE, |machine| {
            let list = |n: u8| format!("network/interfaces/macs/02:00:00:00:00:0{n}/local-ipv4s");
            let on = |n: u8| -> Result<Leaves> {
                let mut leaves = told(THREE)?;
                *leaves.get_mut(&list(n)).context("no list")? += "\n10.0.1.77";
                Ok(leaves)
            };
            machine.publish(on(2)?);
            machine.reconcile(0)?;
            let mut pending = on(2)?;
            pending.remove("network/interfaces/macs/02:00:00:00:00:02/device-number");
            machine.publish(pending);
            let waits = waiting_for(machine, "reconcile --timeout 15s")?;
            machine.publish(on(3)?);
            waits.ends(0, "")?;
            ensure!(ip("addr show eth03")?.contains("10.0.1.77") && !ip("addr show eth02")?.contains("10.0.1.77"));
            machine.assert_settled()
        })
    });
}

/// Otherwise each one's look would make the other read all of metadata, again and again.
#[test]
fn runs_that_wait_beside_each_other_read_no_more_than_one_alone() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let key = "02:00:00:00:00:01/device-number";
            let first = waiting(machine)?;
            let second = Meanwhile::start(machine, "reconcile --timeout 4s")?;
            let asked = || -> u64 {
                let gets = machine.service.requests().gets_by_path;
                gets.iter().filter(|(path, _)| path.ends_with(key)).map(|(_, count)| count).sum()
            };
            second.ends(3, "")?;
            // Once by each, when it began, and once more by the first, since the second has read what is younger.
            ensure!(asked() <= 3, "what is settled was asked for {} times", asked());
            machine.publish(told(TWO)?);
            first.ends(0, "")
        })
    });
}

#[test]
fn a_run_on_trial_that_has_changed_anything_waits_for_no_eni() {
    inside(|| {
        with_scenario(THREE, |machine| {
            let mut leaves = told(THREE)?;
            leaves.remove("network/interfaces/macs/02:00:00:00:00:03/local-ipv4s");
            machine.publish(leaves);
            let started = Instant::now();
            let trial = Meanwhile::start(machine, "reconcile --confirm 10 --timeout 15s")?;
            let path = machine.directory.join("trial.json");
            until("the trial", || Ok(path.exists() && machine.eniup("confirm --timeout 100ms")?.exit == 0))?;
            trial.ends(3, "")?;
            ensure!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
            Ok(())
        })
    });
}

/// A service that takes its time for every answer, so that a run holds the lock meanwhile.
#[test]
fn a_terminal_cannot_stop_a_run_that_holds_the_lock_and_one_that_waits_keeps_nobody_out() {
    inside(|| {
        with_two_enis(|machine| {
            machine.service.set_latency(Duration::from_millis(700));
            let acts = Meanwhile::start(machine, "reconcile --timeout 15s")?;
            until("it asks", || Ok(!machine.service.requests().gets_by_path.is_empty()))?;
            // Another run has come between, so it reads all of metadata once more, in its turn.
            eniup::lock::count_change(&machine.directory);
            until("its turn", || Ok(is_held(machine)))?;
            ensure!(acts.ignores_stops()?, "it can be stopped");
            acts.ends(0, "")?;
            machine.service.set_latency(Duration::ZERO);
            let waits = waiting(machine)?;
            waits.is_stopped_while_it_waits()?;
            let other = machine.eniup("reconcile --timeout 300ms")?;
            ensure!(other.exit == 3, "{}: {}", other.exit, other.stderr);
            machine.publish(told(TWO)?);
            waits.signal(libc::SIGCONT);
            waits.ends(0, "")
        })
    });
}

/// `mkfifo` in the place of each file: nobody will ever write to it, and nobody reads.
#[test]
fn what_is_no_file_keeps_no_run_waiting() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            for (name, exit) in [("ledger.json", 0), ("trial.json", 0), ("history", 0), ("lock", 1)] {
                let path = machine.directory.join(name);
                let _ = fs::remove_file(&path);
                let mkfifo = run(Command::new("mkfifo").arg(&path))?;
                ensure!(mkfifo.exit == 0, "{}", mkfifo.stderr);
                for verb in ["reconcile --timeout 1s", "reconcile --automatic --timeout 1s"] {
                    let mut child = Meanwhile::start(machine, verb)?;
                    until(&format!("{verb} beside a FIFO as {name}"), || Ok(child.0.try_wait()?.is_some()))?;
                    child.ends(exit, if exit == 0 { "" } else { "it is there and is no file" })?;
                }
                let status = machine.eniup("status --timeout 1s")?;
                ensure!(status.exit == 0, "status beside a FIFO as {name}: {}", status.stderr);
                // A trial that cannot be read is taken away by the first run.
                let _ = fs::remove_file(&path);
            }
            machine.reconcile(0)?;
            machine.assert_settled()
        })
    });
}

/// Whoever waits for a lock that was taken away does not act beside whoever has the one in its place.
#[test]
fn a_lock_that_is_taken_away_is_no_reason_to_act_beside_another() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let path = machine.directory.join("lock");
            let before = fs::File::options().write(true).open(&path)?;
            before.try_lock()?;
            let waits = Meanwhile::start(machine, "reconcile --timeout 15s")?;
            // It has read metadata by then, and waits for its turn.
            sleep(Duration::from_millis(500));
            fs::remove_file(&path)?;
            let held = fs::File::options().create_new(true).write(true).open(&path)?;
            held.try_lock()?;
            drop(before);
            ip("addr del 10.0.1.21/32 dev eth02")?;
            sleep(Duration::from_millis(500));
            ensure!(!ip("addr show eth02")?.contains("10.0.1.21"), "it acts by the lock that is gone");
            drop(held);
            waits.ends(0, "")?;
            ensure!(changes(machine)? > 0 && ip("addr show eth02")?.contains("10.0.1.21"), "it has not acted");
            Ok(())
        })
    });
}

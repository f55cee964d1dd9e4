//! Runs on trial: what is not confirmed is rolled back to what was, whatever becomes of whoever started it.

#[allow(dead_code)] // The generated machines are made for other tests, too.
#[path = "fib/vpc.rs"]
mod generated;
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use eniup::config::Config;
use eniup::desired::desired;
use eniup::imds::{Surroundings, Watch};
use eniup::ledger;
use eniup::net::Observed;
use eniup::netlink::apply::Outcome;
use eniup::operation::Operation;
use eniup::plan::{Plan, Step, plan};
use eniup::reading::since_boot;
use eniup::rollback::{Before, rollback};
use eniup::trial::Trial;
use generated::{Host, others, vpc};
use support::machine::{
    Kernel, Machine, difference, inside, ip, on_a_machine, read_leaves, scenario, with_scenario, with_two_enis,
};
use support::moments::{arrange, observe, settled_dump, with_netlink};
use support::{Scenario, apply, check, plan_for, scenarios};
use vpc_lab::imds::{Action, Faults, Occurrences, Rule};
use vpc_lab::interposer::{Datagram, messages};
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::vpc::{CreateEni, Port};

/// What the run on trial says when it waits.
const WAITS: &str = "unless you run `eniup confirm`";

const THREE: &str = "three-enis-of-which-two-share";

/// The addresses of the second ENI.
const SECOND_LIST: &str = "network/interfaces/macs/02:00:00:00:00:02/local-ipv4s";

/// For what has to happen soon, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(20);

fn until(what: &str, is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    until_within(PATIENCE, what, is_so)
}

fn until_within(patience: Duration, what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A run on trial as a process of its own.
struct Guard {
    child: Child,
    /// Reads what it says further.
    reader: JoinHandle<String>,
    /// What it said until it waited, or ended.
    said: String,
    is_waiting: bool,
}

impl Guard {
    /// Starts a run and waits until it waits for its confirmation, or has nothing to wait for.
    fn start(machine: &Machine, arguments: &str) -> Result<Guard> {
        Guard::of(&mut machine.command(&format!("reconcile {arguments}")))
    }

    fn of(command: &mut Command) -> Result<Guard> {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let mut stderr = BufReader::new(child.stderr.take().context("no stderr")?);
        let mut said = String::new();
        let mut is_waiting = false;
        while !is_waiting && stderr.read_line(&mut said)? > 0 {
            is_waiting = said.contains(WAITS);
        }
        let reader = std::thread::spawn(move || {
            let mut rest = String::new();
            let _ = stderr.read_to_string(&mut rest);
            rest
        });
        Ok(Guard { child, reader, said, is_waiting })
    }

    /// The same, which has to wait.
    fn waiting(machine: &Machine, arguments: &str) -> Result<Guard> {
        let guard = Guard::start(machine, arguments)?;
        ensure!(guard.is_waiting, "it waits for nothing: {}", guard.said);
        Ok(guard)
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: the process is this one's child and has not been waited for, so the number is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }

    /// Its exit status, and what it said since it waited.
    fn end(mut self) -> Result<(ExitStatus, String)> {
        until("the run's end", || Ok(self.child.try_wait()?.is_some()))?;
        Ok((self.child.wait()?, self.reader.join().expect("the reader panicked")))
    }

    /// It ends with this exit code and says this.
    fn ends(self, exit: i32, words: &str) -> Result<()> {
        let (status, said) = self.end()?;
        ensure!(status.code() == Some(exit) && said.contains(words), "{status}, not {exit} and `{words}`: {said}");
        Ok(())
    }

    fn killed(self) -> Result<()> {
        self.signal(libc::SIGKILL);
        let (status, _) = self.end()?;
        ensure!(status.code().is_none(), "it was not killed: {status}");
        Ok(())
    }
}

/// A run that ends with this exit code and says this.
fn says(machine: &Machine, arguments: &str, exit: i32, words: &str) -> Result<()> {
    let run = machine.eniup(arguments)?;
    let said = run.stdout + &run.stderr;
    ensure!(
        run.exit == exit && said.contains(words),
        "{arguments}: exit {}, not {exit} and `{words}`: {said}",
        run.exit
    );
    Ok(())
}

fn assert_same(before: &[String], what: &str) -> Result<()> {
    let difference = difference(before, &settled_dump()?);
    ensure!(difference.is_empty(), "{what}:\n{difference}");
    Ok(())
}

/// Changes the note of the trial as if something else had come to pass.
fn edit_trial(machine: &Machine, edit: impl FnOnce(&mut serde_json::Value)) -> Result<()> {
    let path = machine.directory.join("trial.json");
    let mut trial: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    edit(&mut trial);
    Ok(fs::write(path, trial.to_string())?)
}

fn let_it_be_overdue(machine: &Machine) -> Result<()> {
    edit_trial(machine, |trial| trial["until"] = 1.into())
}

#[test]
fn what_is_confirmed_in_time_stays() {
    inside(|| {
        with_two_enis(|machine| {
            let guard = Guard::waiting(machine, "--confirm 60")?;
            ensure!(guard.said.contains("rolled back in 1m unless"), "{}", guard.said);
            says(machine, "confirm", 0, "confirmed")?;
            guard.ends(0, "confirmed")?;
            machine.assert_settled()?;
            says(machine, "confirm", 1, "confirmed already")
        })
    });
}

#[test]
fn what_nobody_confirms_is_rolled_back_and_done_again_by_hand_only() {
    inside(|| {
        with_two_enis(|machine| {
            let before = settled_dump()?;
            Guard::waiting(machine, "--confirm 1")?.ends(1, "nobody confirmed it within 1s")?;
            assert_same(&before, "after the rollback")?;
            says(machine, "confirm", 1, "was rolled back (nobody confirmed it within 1s)")?;
            for _ in 0..2 {
                says(machine, "reconcile --automatic", 75, "nobody confirmed it within 1s")?;
                assert_same(&before, "after an automatic run")?;
            }
            machine.reconcile(0)?;
            machine.assert_settled()?;
            says(machine, "reconcile --automatic", 0, "")?;
            says(machine, "confirm", 1, "nothing to confirm")
        })
    });
}

#[test]
fn where_nothing_is_to_be_done_there_is_nothing_to_confirm() {
    inside(|| {
        with_two_enis(|machine| {
            says(machine, "confirm", 1, "nothing to confirm")?;
            machine.reconcile(0)?;
            says(machine, "reconcile --confirm 60", 0, "nothing to confirm")?;
            ensure!(!machine.directory.join("trial.json").exists(), "there is a trial of nothing");
            says(machine, "confirm", 1, "nothing to confirm")
        })
    });
}

/// The service counts packets by the second, whichever run sends them.
#[test]
fn it_reads_metadata_no_oftener_than_any_other_run() {
    inside(|| {
        let reads = |machine: &Machine| machine.service.requests().gets_by_path.values().sum::<u64>();
        let plain = with_two_enis(|machine| {
            machine.reconcile(0)?;
            Ok(reads(machine))
        })?;
        let on_trial = with_two_enis(|machine| {
            let guard = Guard::waiting(machine, "--confirm 60")?;
            let on_trial = reads(machine);
            guard.killed()?;
            Ok(on_trial)
        })?;
        // The first request is for the primary alone, so that its way can be watched.
        ensure!(plain > 10 && on_trial <= plain + 1, "{on_trial} requests on trial, {plain} else");
        Ok(())
    });
}

#[test]
fn its_help_says_how_to_use_it() {
    inside(|| {
        with_two_enis(|machine| {
            says(machine, "--help", 0, "eniup reconcile --confirm 60")?;
            says(machine, "reconcile --help", 0, "--confirm <SECONDS>")?;
            says(machine, "confirm --help", 0, "eniup reconcile --confirm")
        })
    });
}

#[test]
fn a_time_that_is_none_is_a_usage_error() {
    inside(|| {
        with_two_enis(|machine| {
            for (arguments, words) in [
                ("--confirm 0", "1s to 1h"),
                ("--confirm 3601", "1s to 1h"),
                ("--confirm 2h", "1s to 1h"),
                ("--confirm 10ms", "1s to 1h"),
                ("--confirm soon", "as 60, 90s or 5m"),
                ("--confirm", "--confirm"),
                ("--confirm 60 --automatic", "--automatic"),
                ("--confirm 60 --dry-run", "--dry-run"),
            ] {
                says(machine, &format!("reconcile {arguments}"), 64, words)?;
            }
            ensure!(!machine.directory.exists(), "something was done");
            Ok(())
        })
    });
}

/// Whether the scenario's run does anything; whatever it does is undone. Ended by a signal, so that no time has to pass.
fn is_rolled_back(machine: &mut Machine, scenario: &Scenario) -> Result<bool> {
    arrange(machine, scenario)?;
    // Whoever has routes by a link has an address there: the kernel takes all of the link's along with its last address.
    for mac in scenario.machine.main.keys() {
        ip(&format!("addr add 192.0.2.1/32 dev {}", machine.links[mac]))?;
    }
    let before = settled_dump()?;
    let guard = Guard::start(machine, "--confirm 60 --timeout 1s")?;
    if !guard.is_waiting {
        guard.end()?;
        assert_same(&before, "without a trial")?;
        return Ok(false);
    }
    ensure!(!difference(&before, &settled_dump()?).is_empty(), "on trial for nothing: {}", guard.said);
    guard.signal(libc::SIGTERM);
    guard.ends(1, "ended by SIGTERM")?;
    assert_same(&before, "after the rollback")?;
    // Nothing of the try is in the way of a later run.
    machine.eniup("reconcile --timeout 500ms")?;
    let plan = machine.eniup("plan")?;
    ensure!(plan.stdout.is_empty(), "left to do:\n{}", plan.stdout);
    Ok(true)
}

#[test]
fn every_scenario_is_as_it_was_after_its_run_was_rolled_back() {
    inside(|| {
        let mut rolled_back = 0;
        for scenario in scenarios()? {
            let is_one = on_a_machine(|machine| is_rolled_back(machine, &scenario));
            rolled_back += usize::from(is_one.with_context(|| scenario.name.clone())?);
        }
        ensure!(rolled_back > 30, "only {rolled_back} scenarios were rolled back");
        Ok(())
    });
}

/// Both ends of a new terminal.
fn terminal() -> Result<(File, OwnedFd)> {
    let (mut ours, mut theirs) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: openpty writes two descriptors, which are ours from here on.
    unsafe {
        ensure!(libc::openpty(&mut ours, &mut theirs, none, none.cast(), none.cast()) == 0);
        let (ours, theirs) = (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs));
        // A copy that no child inherits: or the terminal would live as long as that does.
        Ok((ours.try_clone()?, theirs))
    }
}

/// A shell in a session of its own on this terminal, as a login over SSH has it, and the run on trial in that shell.
fn log_in(machine: &Machine, terminal: OwnedFd) -> Result<Child> {
    let eniup = machine.command("");
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "\"$0\" reconcile --confirm 2; exit $?", env!("CARGO_BIN_EXE_eniup")]);
    shell.envs(eniup.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
    // SAFETY: system calls alone.
    unsafe {
        shell.pre_exec(|| {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            // Whoever started the tests may ignore it (nohup).
            libc::signal(libc::SIGHUP, libc::SIG_DFL);
            Ok(())
        })
    };
    Ok(shell.spawn()?)
}

#[test]
fn the_death_of_its_session_and_terminal_does_not_keep_it_from_rolling_back() {
    inside(|| {
        with_two_enis(|machine| {
            let before = settled_dump()?;
            let (ours, theirs) = terminal()?;
            let mut shell = log_in(machine, theirs)?;
            let mut said = String::new();
            let mut reader = BufReader::new(ours);
            while !said.contains(WAITS) {
                ensure!(reader.read_line(&mut said)? > 0, "it ended: {said}");
            }
            // The other end of the line is gone: SIGHUP to the shell and to what it runs, and the terminal is no more.
            drop(reader);
            let status = shell.wait()?;
            ensure!(status.code().is_none(), "the shell has survived its terminal: {status}");
            ensure!(!difference(&before, &settled_dump()?).is_empty(), "rolled back at once");
            until("the rollback", || Ok(difference(&before, &settled_dump()?).is_empty()))?;
            says(machine, "confirm", 1, "nobody confirmed it within 2s")
        })
    });
}

/// What a connection that was cut off leaves: a reader that takes no more, and whoever writes to it waits.
#[test]
fn a_reader_that_takes_no_more_does_not_keep_it_from_rolling_back() {
    inside(|| {
        with_two_enis(|machine| {
            let before = settled_dump()?;
            for (reader, writer) in full()? {
                let _ = fs::remove_file(machine.directory.join("trial.json"));
                let mut run = machine.command("reconcile --confirm 1").stderr(writer).stdout(Stdio::null()).spawn()?;
                until("the rollback", || {
                    let trial = fs::read_to_string(machine.directory.join("trial.json"));
                    Ok(trial.is_ok_and(|trial| trial.contains("rolled_back")))
                })?;
                assert_same(&before, "after the rollback")?;
                drop(reader);
                ensure!(run.wait()?.code() == Some(1));
            }
            Ok(())
        })
    });
}

/// Else the next run would wait for its lock.
#[test]
fn a_reader_that_takes_no_more_keeps_no_run_from_its_end() {
    inside(|| {
        with_two_enis(|machine| {
            for arguments in ["reconcile", "release", "reconcile -vv", "release -vv --log-format json"] {
                for (_reader, writer) in full()? {
                    let mut run = machine.command(arguments).stderr(writer).stdout(Stdio::null()).spawn()?;
                    until(arguments, || Ok(run.try_wait()?.is_some()))?;
                    ensure!(run.wait()?.code() == Some(0), "{arguments}");
                }
            }
            Ok(())
        })
    });
}

/// A pipe and a socket that take no more, each with its reader.
fn full() -> Result<[(OwnedFd, OwnedFd); 2]> {
    let pipe = std::io::pipe()?;
    let socket = std::os::unix::net::UnixStream::pair()?;
    let ends: [(OwnedFd, OwnedFd); 2] = [(pipe.0.into(), pipe.1.into()), (socket.0.into(), socket.1.into())];
    for (_, writer) in &ends {
        let set_flags = |flags: libc::c_int| {
            // SAFETY: the descriptor is open as long as the writer is.
            ensure!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, flags) } == 0);
            Ok(())
        };
        set_flags(libc::O_NONBLOCK)?;
        let mut file = File::from(writer.try_clone()?);
        while file.write(&[b'.'; 4096]).is_ok() {}
        while file.write(b".").is_ok() {}
        set_flags(0)?;
    }
    Ok(ends)
}

#[test]
fn signals_of_a_terminal_neither_end_nor_stop_it_and_an_interrupt_rolls_back_at_once() {
    inside(|| {
        with_two_enis(|machine| {
            let before = settled_dump()?;
            let guard = Guard::waiting(machine, "--confirm 60")?;
            for signal in [libc::SIGHUP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU] {
                guard.signal(signal);
            }
            guard.signal(libc::SIGINT);
            guard.ends(1, "ended by SIGINT")?;
            assert_same(&before, "after the rollback")
        })
    });
}

/// Whichever run comes first after the guard was killed: while it can be confirmed nothing is done, then it is undone.
#[test]
fn what_a_killed_run_has_left_is_rolled_back_by_the_next_once_it_is_overdue() {
    inside(|| {
        for (arguments, words) in [
            ("reconcile --automatic", "was not confirmed in time"),
            ("reconcile", "was not confirmed in time"),
            ("reconcile --confirm 60", "was not confirmed in time"),
            ("confirm", "too late"),
        ] {
            with_two_enis(|machine| {
                let before = settled_dump()?;
                Guard::waiting(machine, "--confirm 60")?.killed()?;
                let on_trial = settled_dump()?;
                says(machine, "reconcile --automatic", 75, "waits for its confirmation")?;
                says(machine, "reconcile", 75, "waits for its confirmation")?;
                assert_same(&on_trial, "while it can be confirmed")?;
                let_it_be_overdue(machine)?;
                says(machine, arguments, 1, words)?;
                assert_same(&before, "after the rollback")?;
                says(machine, "reconcile --automatic", 75, "was rolled back")?;
                machine.reconcile(0)?;
                machine.assert_settled()
            })
            .with_context(|| arguments.to_string())?;
        }
        Ok(())
    });
}

#[test]
fn what_a_killed_run_has_left_can_be_confirmed_and_released() {
    inside(|| {
        with_two_enis(|machine| {
            Guard::waiting(machine, "--confirm 60")?.killed()?;
            says(machine, "confirm", 0, "confirmed")?;
            let_it_be_overdue(machine)?;
            machine.assert_settled()
        })?;
        with_two_enis(|machine| {
            let found = settled_dump()?;
            Guard::waiting(machine, "--confirm 60")?.killed()?;
            let_it_be_overdue(machine)?;
            says(machine, "release", 0, "")?;
            assert_same(&found, "after release")?;
            says(machine, "reconcile --automatic", 0, "")?;
            machine.assert_settled()
        })
    });
}

#[test]
fn nobody_overtakes_a_run_on_trial_but_release_ends_it() {
    inside(|| {
        with_two_enis(|machine| {
            let found = settled_dump()?;
            let guard = Guard::waiting(machine, "--confirm 60")?;
            let on_trial = settled_dump()?;
            for arguments in ["reconcile --automatic", "reconcile", "reconcile --confirm 10"] {
                says(machine, arguments, 75, "`eniup confirm` keeps what it did")?;
            }
            says(machine, "plan --detailed-exitcode", 0, "")?;
            assert_same(&on_trial, "by other runs")?;
            says(machine, "release", 0, "")?;
            guard.ends(1, "another run by hand has come since")?;
            assert_same(&found, "after release")?;
            says(machine, "reconcile --automatic", 0, "")
        })
    });
}

/// Of no link, and of a link that has nothing of ours.
#[test]
fn a_release_that_takes_nothing_away_does_not_end_a_run_on_trial() {
    inside(|| {
        with_two_enis(|machine| {
            ip("link add other type bridge")?;
            ip("link property add dev other altname eni-00000000000000077")?;
            let found = settled_dump()?;
            let guard = Guard::waiting(machine, "--confirm 60")?;
            says(machine, "release --eni eni-0000000000000dead", 1, "no link is called eni-0000000000000dead")?;
            says(machine, "release --eni eni-00000000000000077", 0, "")?;
            says(machine, "reconcile", 75, "waits for its confirmation")?;
            guard.signal(libc::SIGTERM);
            guard.ends(1, "ended by SIGTERM")?;
            assert_same(&found, "after the rollback")
        })
    });
}

/// Metadata in which the second ENI can be named.
fn with_a_long_id() -> Result<BTreeMap<String, String>> {
    let mut told = read_leaves(&scenario("two-subnets-dual-stack")?.folder.join("metadata.json"))?;
    told.insert("network/interfaces/macs/02:00:00:00:00:02/interface-id".into(), "eni-0000000b".into());
    Ok(told)
}

/// Of another ENI, which has nothing to do with it: what is one ENI's decides nothing about the rest.
#[test]
fn a_release_of_one_eni_does_not_end_a_run_on_trial() {
    inside(|| {
        with_two_enis(|machine| {
            let mut told = with_a_long_id()?;
            machine.publish(told.clone());
            machine.reconcile(0)?;
            let list = "network/interfaces/macs/02:00:00:00:00:01/local-ipv4s";
            *told.get_mut(list).context("no list")? += "\n10.0.0.77";
            machine.publish(told);
            let found = settled_dump()?;
            let guard = Guard::waiting(machine, "--confirm 60")?;
            says(machine, "release --eni eni-0000000b", 75, "waits for its confirmation")?;
            guard.signal(libc::SIGTERM);
            guard.ends(1, "ended by SIGTERM")?;
            assert_same(&found, "after the rollback")?;
            // Nor does it what was rolled back.
            says(machine, "release --eni eni-0000000b", 0, "")?;
            says(machine, "reconcile --automatic", 75, "was rolled back")
        })
    });
}

/// One that was not confirmed in time, and whose process is gone, is rolled back before.
#[test]
fn a_release_of_one_eni_rolls_back_what_is_overdue() {
    inside(|| {
        with_two_enis(|machine| {
            machine.publish(with_a_long_id()?);
            machine.reconcile(0)?;
            ip("addr del 10.0.1.21/32 dev eth02")?;
            let guard = Guard::waiting(machine, "--confirm 60")?;
            guard.signal(libc::SIGKILL);
            let_it_be_overdue(machine)?;
            says(machine, "release --eni eni-0000dead", 1, "no link is called")?;
            says(machine, "release --eni eni-0000000b", 0, "")?;
            ensure!(!ip("addr show eth02")?.contains("10.0.1.2"), "it is not released");
            says(machine, "confirm", 1, "nothing to confirm: the run was rolled back")
        })
    });
}

/// The kernel's answers cannot be used for a while in the moment of the rollback.
#[test]
fn a_rollback_that_fails_is_tried_again() {
    inside(|| {
        with_two_enis(|machine| {
            let found = settled_dump()?;
            let trial = machine.directory.join("trial.json");
            let mut begun: Option<Instant> = None;
            let between = |datagram: Datagram| {
                if begun.is_none() && trial.exists() {
                    begun = Some(Instant::now());
                }
                let since = begun.map_or(Duration::ZERO, |begun| begun.elapsed());
                if let Datagram::Told(bytes) = datagram
                    && (Duration::from_millis(1500)..Duration::from_millis(4000)).contains(&since)
                {
                    for mut message in messages(bytes) {
                        let flags = message.flags();
                        message.set_flags(flags | libc::NLM_F_DUMP_INTR as u16);
                    }
                }
                Ok(())
            };
            let run = machine.eniup_with(between, "reconcile --confirm 2 --timeout 5s")?;
            ensure!(run.exit == 1 && run.stderr.contains("is tried again"), "{}: {}", run.exit, run.stderr);
            assert_same(&found, "after the rollback")
        })
    });
}

/// What a link is like after a rollback is nobody's doing but its administrator's.
#[test]
fn what_is_set_after_a_rollback_stays_after_a_release() {
    inside(|| {
        for kernel in [Kernel::Own, Kernel::Old] {
            with_two_enis(|machine| {
                machine.kernel = kernel;
                says(machine, "reconcile --confirm 1 --timeout 5s", 1, "rolled back")?;
                ip("link set eth02 mtu 1400 up")?;
                ip("link property add dev eth02 altname device-number-1")?;
                ip("addr add 10.0.1.21/32 dev eth02 noprefixroute")?;
                let set = settled_dump()?;
                says(machine, "release", 0, "")?;
                assert_same(&set, "after a release")
            })?;
        }
        Ok(())
    });
}

/// Nor what is set while a run is on trial, and so stays after the rollback.
#[test]
fn what_is_set_during_a_trial_stays_after_a_release() {
    inside(|| {
        with_two_enis(|machine| {
            let guard = Guard::waiting(machine, "--confirm 60")?;
            ip("link set eth02 mtu 4000")?;
            ip("addr add 10.77.0.1/24 dev eth02")?;
            guard.signal(libc::SIGTERM);
            guard.ends(1, "ended by SIGTERM")?;
            let set = settled_dump()?;
            ensure!(ip("link show eth02")?.contains("mtu 4000"), "the rollback has taken it back");
            says(machine, "release", 0, "")?;
            assert_same(&set, "after a release")?;
            ip("addr del 10.77.0.1/24 dev eth02")?;
            let set = settled_dump()?;
            says(machine, "release", 0, "")?;
            assert_same(&set, "after another release")
        })
    });
}

/// What a run on trial has found was made by the run before, and a release puts back what that one has found.
#[test]
fn what_an_earlier_run_has_set_is_put_back_by_a_release_after_a_rollback() {
    type Happens = fn(&mut Machine) -> Result<()>;
    let happens: [Happens; 3] = [
        |machine| {
            let mut told = with_a_long_id()?;
            told.retain(|key, _| !key.contains("macs/02:00:00:00:00:02/"));
            machine.publish(told);
            Ok(())
        },
        |machine| machine.configure("[[eni]]\nmac = '02:00:00:00:00:02'\nmtu = 1400\n"),
        |_| {
            ip("link set eth02 mtu 1500")?;
            ip("addr flush dev eth02")?;
            ip("link set eth02 down").map(|_| ())
        },
    ];
    inside(|| {
        for kernel in [Kernel::Own, Kernel::Old] {
            for happens in happens {
                with_two_enis(|machine| {
                    machine.kernel = kernel;
                    let found = settled_dump()?;
                    machine.reconcile(0)?;
                    happens(machine)?;
                    says(machine, "reconcile --confirm 1 --timeout 5s", 1, "rolled back")?;
                    machine.configure("")?;
                    says(machine, "release", 0, "")?;
                    assert_same(&found, "after a release")
                })?;
            }
        }
        Ok(())
    });
}

#[test]
fn what_was_rolled_back_is_not_done_by_itself_after_a_run_by_hand_that_came_to_nothing() {
    inside(|| {
        with_two_enis(|machine| {
            let before = settled_dump()?;
            Guard::waiting(machine, "--confirm 1")?.ends(1, "nobody confirmed it within 1s")?;
            let is_held = |what: &str| {
                says(machine, "reconcile --automatic", 75, "nobody confirmed it within 1s")
                    .context(what.to_string())?;
                assert_same(&before, what)
            };
            let fault = |path: &str, action| {
                let rules = vec![Rule::new(path, Occurrences::Always, action)];
                machine.service.set_faults(Faults { rules, ..Faults::default() });
            };
            fault("*", Action::Status(503));
            says(machine, "reconcile --timeout 300ms", 69, "")?;
            machine.service.set_faults(Faults::default());
            is_held("after a run without metadata")?;

            // It is asked for after the run's turn has come.
            fault("*/macs/", Action::Hang);
            machine.service.reset_counters();
            let mut run = machine.command("reconcile --confirm 60").stderr(Stdio::null()).spawn()?;
            until("the list is asked for", || Ok(machine.service.requests().faults > 0))?;
            // SAFETY: the process is this one's child and has not been waited for.
            unsafe { libc::kill(run.id() as libc::pid_t, libc::SIGINT) };
            ensure!(run.wait()?.code() == Some(1));
            machine.service.set_faults(Faults::default());
            is_held("after a run on trial that was interrupted")?;

            says(machine, "release", 0, "")?;
            is_held("after a release")?;
            let guard = Guard::waiting(machine, "--confirm 60")?;
            says(machine, "confirm", 0, "confirmed")?;
            guard.ends(0, "confirmed")?;
            says(machine, "reconcile --automatic", 0, "")
        })
    });
}

/// It has done what it can by its own time.
#[test]
fn a_run_by_hand_that_has_changed_something_lets_automatic_runs_go_on_though_an_eni_is_pending() {
    inside(|| {
        with_scenario(THREE, |machine| {
            Guard::waiting(machine, "--confirm 1")?.ends(1, "nobody confirmed it within 1s")?;
            let mut half = read_leaves(&scenario(THREE)?.folder.join("metadata.json"))?;
            half.remove("network/interfaces/macs/02:00:00:00:00:03/device-number").context("no number")?;
            machine.publish(half);
            says(machine, "reconcile --timeout 300ms", 3, "ip addr add 10.0.1.20/24 dev eth02")?;
            says(machine, "reconcile --automatic --timeout 300ms", 3, "")
        })
    });
}

#[test]
fn a_run_by_hand_that_finds_all_as_it_should_be_lets_automatic_runs_go_on() {
    inside(|| {
        for verb in ["reconcile", "reconcile --confirm 60"] {
            with_two_enis(|machine| {
                machine.reconcile(0)?;
                let told = read_leaves(&scenario("two-subnets-dual-stack")?.folder.join("metadata.json"))?;
                let mut more = told.clone();
                *more.get_mut(SECOND_LIST).context("no list")? += "\n10.0.1.77";
                machine.publish(more);
                Guard::waiting(machine, "--confirm 1")?.ends(1, "nobody confirmed it within 1s")?;
                machine.publish(told);
                says(machine, "reconcile --automatic", 75, "")?;
                says(machine, verb, 0, "")?;
                says(machine, "reconcile --automatic", 0, "")
            })
            .with_context(|| verb)?;
        }
        Ok(())
    });
}

/// It was due to be rolled back, and waited for its turn.
#[test]
fn what_is_confirmed_before_the_rollback_has_its_turn_stays() {
    inside(|| {
        with_two_enis(|machine| {
            let guard = Guard::waiting(machine, "--confirm 1")?;
            let on_trial = settled_dump()?;
            let lock = File::options().write(true).open(machine.directory.join("lock"))?;
            lock.lock()?;
            let path = machine.directory.join("trial.json");
            let trial: serde_json::Value = serde_json::from_str(&fs::read_to_string(path)?)?;
            let due = trial["until"].as_u64().context("no time")?;
            until("the end of its time, and a little more", || Ok(since_boot()? > due + 500))?;
            edit_trial(machine, |trial| trial["state"] = "confirmed".into())?;
            drop(lock);
            guard.ends(0, "confirmed")?;
            assert_same(&on_trial, "after it was confirmed")
        })
    });
}

/// Whoever holds the lock may have been stopped, and somebody may be cut off.
#[test]
fn a_rollback_does_not_wait_for_its_turn_without_end() {
    inside(|| {
        with_two_enis(|machine| {
            let before = settled_dump()?;
            let guard = Guard::waiting(machine, "--confirm 1")?;
            let lock = File::options().write(true).open(machine.directory.join("lock"))?;
            lock.lock()?;
            let held = Instant::now();
            until_within(Duration::from_secs(50), "the rollback", || {
                Ok(difference(&before, &settled_dump()?).is_empty())
            })?;
            ensure!(held.elapsed() > Duration::from_secs(25), "it did not wait: {:?}", held.elapsed());
            guard.ends(1, "rolling back all the same")
        })
    });
}

#[test]
fn a_note_that_is_lost_or_broken_is_no_confirmation() {
    inside(|| {
        for content in [None, Some(""), Some("{\"version\": 1, \"state\": \"confirmed\"}")] {
            with_two_enis(|machine| {
                let before = settled_dump()?;
                let guard = Guard::waiting(machine, "--confirm 1")?;
                let path = machine.directory.join("trial.json");
                match content {
                    Some(content) => fs::write(path, content)?,
                    None => fs::remove_file(path)?,
                }
                guard.ends(1, "nobody confirmed it within 1s")?;
                assert_same(&before, "after the rollback")
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_note_that_cannot_be_read_or_is_another_machines_is_in_nobodys_way() {
    inside(|| {
        with_two_enis(|machine| {
            Guard::waiting(machine, "--confirm 60")?.killed()?;
            let noted = fs::read_to_string(machine.directory.join("trial.json"))?;
            let other = [("version", 99.into()), ("boot", "another".into()), ("primary", "02:00:00:00:00:99".into())];
            for (field, value) in other {
                fs::write(machine.directory.join("trial.json"), &noted)?;
                says(machine, "reconcile --automatic", 75, "")?;
                edit_trial(machine, |trial| trial[field] = value)?;
                let_it_be_overdue(machine)?;
                says(machine, "reconcile --automatic", 0, "").context(field)?;
                machine.assert_settled().context(field)?;
            }
            fs::write(machine.directory.join("trial.json"), &noted[..noted.len() / 2])?;
            says(machine, "reconcile --automatic", 0, "trial.json")?;
            let again = machine.eniup("reconcile --automatic")?;
            ensure!(again.exit == 0 && again.stderr.is_empty(), "a second run says: {}", again.stderr);
            Ok(())
        })
    });
}

#[test]
fn a_run_that_cannot_note_what_it_finds_does_nothing() {
    inside(|| {
        with_two_enis(|machine| {
            let before = settled_dump()?;
            fs::create_dir_all(machine.directory.join("trial.json/in the way"))?;
            let run = machine.eniup("reconcile --confirm 60")?;
            ensure!(run.exit == 1 && run.stderr.contains("trial.json"), "exit {}: {}", run.exit, run.stderr);
            ensure!(!run.stderr.contains("ip addr add"), "it did something: {}", run.stderr);
            assert_same(&before, "without a note")
        })
    });
}

#[test]
fn what_others_do_meanwhile_stays() {
    inside(|| {
        with_two_enis(|machine| {
            let before = settled_dump()?;
            let guard = Guard::waiting(machine, "--confirm 60")?;
            for change in [
                "addr add 10.77.0.1/24 dev eth02",
                "route add 10.99.0.0/24 dev eth02 table 20001 proto static",
                "rule add from 10.77.0.1 lookup 20001 priority 19000 protocol static",
                "link set eth02 mtu 4000",
                "link property add dev eth02 altname theirs",
                // One of ours, which somebody takes over.
                "addr del 10.0.1.21/32 dev eth02",
                "addr add 10.0.1.21/32 dev eth02",
            ] {
                ip(change)?;
            }
            guard.signal(libc::SIGTERM);
            guard.ends(1, "ended by SIGTERM")?;
            let after = settled_dump()?;
            for theirs in ["10.77.0.1/24", "10.99.0.0/24", "priority 19000", "mtu 4000", "theirs", "10.0.1.21/32"] {
                let theirs = theirs.trim_start_matches("priority ");
                ensure!(after.iter().any(|line| line.contains(theirs)), "{theirs} is gone:\n{}", after.join("\n"));
            }
            let ours = after.iter().filter(|line| line.contains("proto 176") && !before.contains(line));
            ensure!(ours.clone().count() == 0, "ours is left: {:#?}", ours.collect::<Vec<_>>());
            ensure!(after.iter().any(|line| line.contains("eth02") && line.contains(",UP")), "their link went down");
            Ok(())
        })
    });
}

/// Two refusals, and one answer that takes its time: whoever then goes on trial is watched all the same.
#[test]
fn a_hiccup_before_a_run_on_trial_does_not_keep_metadata_from_being_watched() {
    inside(|| {
        with_two_enis(|machine| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            for (times, action) in [(2, Action::Status(503)), (2, Action::Delay(Duration::from_millis(700)))] {
                let rules = vec![Rule::new("/latest/api/token", Occurrences::FirstN(times), action.clone())];
                machine.service.set_faults(Faults { rules, ..Faults::default() });
                let deadline = runtime.block_on(async { tokio::time::Instant::now() }) + PATIENCE;
                let surroundings = Surroundings::default();
                let find = Watch::find(Some(&machine.endpoint), &surroundings, "eth01", deadline);
                ensure!(runtime.block_on(find)?.is_some(), "{action:?}: not found");
            }
            Ok(())
        })
    });
}

/// By the primary's link a service on loopback is not reached, and that takes half a second to find out where there is time.
#[test]
fn a_short_time_is_not_used_up_by_looking_for_a_way_to_watch() {
    inside(|| {
        with_two_enis(|machine| {
            let guard = Guard::waiting(machine, "--confirm 60 --timeout 500ms")?;
            ensure!(!guard.said.contains("it is not watched"), "{}", guard.said);
            guard.signal(libc::SIGTERM);
            guard.ends(1, "ended by SIGTERM")
        })
    });
}

/// The service answers all the same: the network is not to blame, and the first answer that does not come neither.
#[test]
fn a_service_in_trouble_is_not_one_that_is_out_of_reach() {
    inside(|| {
        with_two_enis(|machine| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let deadline = tokio::time::Instant::now() + PATIENCE;
                let watch = Watch::find(Some(&machine.endpoint), &Surroundings::default(), "eth01", deadline).await?;
                let watch = watch.context("the service is not found")?;
                let pause = Duration::from_millis(30);
                let lost = async |patience| tokio::time::timeout(patience, watch.lost(pause, 3)).await;
                for action in [Action::Status(403), Action::Status(500), Action::Garbage] {
                    machine.service.set_faults(Faults {
                        rules: vec![Rule::new("*", Occurrences::Always, action.clone())],
                        ..Faults::default()
                    });
                    ensure!(lost(20 * pause).await.is_err(), "{action:?}");
                }
                let hang = Rule::new("*", Occurrences::FirstN(2), Action::Hang);
                machine.service.set_faults(Faults { rules: vec![hang], ..Faults::default() });
                ensure!(lost(20 * pause).await.is_err(), "two in a row are not three");
                let hang = Rule::new("*", Occurrences::Always, Action::Hang);
                machine.service.set_faults(Faults { rules: vec![hang], ..Faults::default() });
                let why = lost(PATIENCE).await.context("a service that answers nothing is not missed")?;
                ensure!(why.contains("metadata is not reached any more at http://127.0.0.1"), "{why}");
                Ok(())
            })
        })
    });
}

/// A service that only the VPC leads to, by the primary ENI.
#[test]
fn it_is_rolled_back_early_when_metadata_is_not_reached_any_more_by_the_primary() {
    inside(|| {
        let mut lab = Lab::new(env!("CARGO_BIN_EXE_eniup"))?;
        let subnets = lab.fabric.world(|world| -> Result<Vec<String>> {
            let vpc = world.create_vpc(&["10.0.0.0/16".parse()?]);
            (0..2).map(|n| world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &[])).collect()
        })?;
        let mut enis = Vec::new();
        for subnet in subnets {
            enis.push(lab.create_network_interface(CreateEni { subnet, ..CreateEni::default() })?);
        }
        lab.run_instance("web", &enis, "m7i.large", Distribution::Primary)?;
        let instance = lab.instances().map(|(_, instance)| instance.to_string()).next().context("no instance")?;
        // Without the time that is left to what DHCP gave.
        let ageless = |line: &str| line.split("valid_lft").next().unwrap_or_default().to_string();
        let dump =
            || lab.node("web")?.enter(|| Ok(settled_dump()?.iter().map(|line| ageless(line)).collect::<Vec<_>>()));
        let before = dump()?;
        let mut command = lab.command("web", env!("CARGO_BIN_EXE_eniup"))?;
        command.args(["reconcile", "--confirm", "1h"]).env_remove("AWS_EC2_METADATA_SERVICE_ENDPOINT");
        let guard = Guard::of(&mut command)?;
        ensure!(guard.is_waiting, "it waits for nothing: {}", guard.said);
        ensure!(!difference(&before, &dump()?).is_empty(), "on trial for nothing");
        lab.fabric.unplug(&Port::Metadata(instance));
        guard.ends(1, "metadata is not reached any more at http://169.254.169.254 by ens5")?;
        let difference = difference(&before, &dump()?);
        ensure!(difference.is_empty(), "after the rollback:\n{difference}");
        Ok(())
    });
}

/// Scenarios with additions, with removals, and with both.
const MIXED: [&str; 5] = [
    "three-enis-of-which-two-share",
    "two-subnets-dual-stack",
    "secondary-address-goes",
    STILL_HERE,
    "address-moves-between-two-enis",
];

/// The one in which all of an ENI goes.
const STILL_HERE: &str = "detached-eni-whose-link-is-still-here-goes";

/// As [`arrange`], and that link is still here.
fn stand(machine: &mut Machine, scenario: &Scenario) -> Result<()> {
    match &scenario.before {
        Some(before) if scenario.name == STILL_HERE => {
            machine.become_attached(&scenario.folder.join("before.json"), before)?;
            machine.reconcile(0)?;
            machine.publish(read_leaves(&scenario.folder.join("metadata.json"))?);
            Ok(())
        }
        Some(_) | None => arrange(machine, scenario),
    }
}

/// Takes all of an ENI away on trial, lets something happen, and rolls back.
fn take_away(
    happens: impl FnOnce() -> Result<()> + Send,
    look: impl FnOnce(&[String]) -> Result<()> + Send,
) -> Result<()> {
    let scenario = scenario(STILL_HERE)?;
    on_a_machine(|machine| {
        stand(machine, &scenario)?;
        let (before, addresses) = (settled_dump()?, ip("-4 -o addr show dev eth02")?);
        ensure!(addresses.lines().count() == 2, "not two addresses: {addresses}");
        let guard = Guard::waiting(machine, "--confirm 60 -v")?;
        ensure!(ip("addr show dev eth02")?.matches("10.0.1.").count() == 0, "nothing was taken away: {}", guard.said);
        happens()?;
        guard.signal(libc::SIGTERM);
        let (status, said) = guard.end()?;
        ensure!(status.code() == Some(1) && !said.contains("failed ("), "{status}: {said}");
        look(&before)
    })
}

/// Each operation works at the first attempt, and the ENI's first address is its first again.
#[test]
fn what_a_run_has_taken_away_comes_back_in_its_order() {
    inside(|| {
        take_away(
            || Ok(()),
            |before| {
                let addresses = ip("-4 -o addr show dev eth02")?;
                let nets: Vec<&str> = addresses.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
                ensure!(nets == ["10.0.1.20/24", "10.0.1.21/32"], "{nets:?}");
                assert_same(before, "after the rollback")
            },
        )
    });
}

#[test]
fn an_address_that_somebody_has_given_to_the_link_meanwhile_is_not_put_beside_theirs() {
    inside(|| {
        take_away(
            || ip("addr add 10.0.1.21/24 dev eth02").map(drop),
            |_| {
                let addresses = ip("-4 -o addr show dev eth02")?;
                ensure!(addresses.contains("10.0.1.20/24") && addresses.contains("10.0.1.21/24"), "{addresses}");
                ensure!(!addresses.contains("10.0.1.21/32"), "{addresses}");
                Ok(())
            },
        )
    });
}

/// As in `tests/crash.rs`: a run's first operations by eniup's own netlink.
fn carry_out(steps: &[Step]) -> Result<()> {
    let outcomes = with_netlink(async |netlink| netlink.apply(steps).await)?;
    for (step, outcome) in steps.iter().zip(outcomes) {
        // A link that goes takes its routes along.
        ensure!(matches!(outcome, Outcome::Done | Outcome::AlreadySo), "{step}: {outcome:?}");
    }
    Ok(())
}

/// The machine as a run on trial leaves it that is killed after its k-th operation, and how many it would make.
fn die_after(k: usize, machine: &Machine, scenario: &Scenario) -> Result<(Trial, usize)> {
    let observed = observe()?;
    let steps = plan_for(&scenario.attached, &observed).steps;
    fs::create_dir_all(&machine.directory)?;
    let mut trial = Trial::new(scenario.attached.primary, Duration::from_secs(60), 0, 0);
    trial.until = 1;
    let ledger = ledger::load(&machine.directory);
    trial.note(&steps, &observed, &ledger, &machine.directory)?;
    ledger::save(&ledger.noting(&steps, &observed), &machine.directory);
    carry_out(&steps[..k.min(steps.len())])?;
    Ok((trial, steps.len()))
}

#[test]
fn a_run_that_is_killed_after_any_of_its_operations_is_rolled_back_by_the_next() {
    inside(|| {
        let mut points = 0;
        for name in MIXED {
            let scenario = scenario(name)?;
            let mut k = 0;
            while on_a_machine(|machine| {
                stand(machine, &scenario)?;
                let before = settled_dump()?;
                let (_, all) = die_after(k, machine, &scenario)?;
                says(machine, "reconcile --automatic", 1, "rolled back")?;
                assert_same(&before, "after the rollback")?;
                Ok(k < all)
            })
            .with_context(|| format!("{name}, killed after operation {k}"))?
            {
                k += 1;
            }
            points += k + 1;
        }
        ensure!(points > 60, "only {points} crash points");
        Ok(())
    });
}

/// The built binary, killed from outside: it has noted what it finds before it changes anything.
#[test]
fn a_run_that_is_killed_at_any_instant_is_rolled_back_by_the_next() {
    inside(|| {
        let mut usual = Duration::ZERO;
        let mut killed_on_trial = 0;
        for n in 0..40 {
            with_two_enis(|machine| {
                let before = settled_dump()?;
                // The way to watch is looked for until half a second has passed; after that it works.
                let mut command = machine.command("reconcile --confirm 60");
                let mut run = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn()?;
                let started = Instant::now();
                let note = machine.directory.join("trial.json");
                if n == 0 {
                    until("a trial", || Ok(note.exists()))?;
                    usual = started.elapsed();
                }
                // Each time a little later, around the moment at which its work begins; the instant is what is tried.
                std::thread::sleep((usual * (80 + n)) / 100);
                run.kill()?;
                run.wait()?;
                if note.exists() {
                    killed_on_trial += 1;
                    let_it_be_overdue(machine)?;
                    says(machine, "reconcile --automatic", 1, "rolled back")?;
                }
                assert_same(&before, "after it was killed")
            })
            .with_context(|| format!("killed at the {n}th instant"))?;
        }
        ensure!(killed_on_trial > 4, "only {killed_on_trial} runs were killed on trial");
        Ok(())
    });
}

#[test]
fn a_rollback_that_is_killed_after_any_of_its_operations_is_finished_by_the_next() {
    inside(|| {
        for name in MIXED {
            let scenario = scenario(name)?;
            let mut k = 0;
            while on_a_machine(|machine| {
                stand(machine, &scenario)?;
                let before = settled_dump()?;
                let (trial, _) = die_after(usize::MAX, machine, &scenario)?;
                let steps = rollback(&trial.before, &observe()?, &Config::default()).steps;
                carry_out(&steps[..k])?;
                says(machine, "confirm", 1, "too late")?;
                assert_same(&before, "after the rollback")?;
                Ok(k < steps.len())
            })
            .with_context(|| format!("{name}, killed after operation {k} of the rollback"))?
            {
                k += 1;
            }
        }
        Ok(())
    });
}

/// A generated machine with what others did to it. A link that has routes is up.
fn generated_machine(vpc: &generated::Vpc, others: &generated::Others) -> Observed {
    let mut observed = Host::new(vpc, others).observed;
    let used: Vec<u32> = observed.routes.iter().filter_map(|(link, _)| *link).collect();
    observed.links.values_mut().filter(|link| used.contains(&link.index)).for_each(|link| link.is_up = true);
    observed
}

fn undo(now: &mut Observed, noted: &Before) {
    let back = rollback(noted, now, &Config::default());
    apply(now, &back);
}

/// One run from before to after and what it noted; the rollback of it.
fn there_and_back(before: &Observed, run: &Plan) -> Result<()> {
    let noted = Before::default().noting(&run.steps, before);
    let mut now = before.clone();
    apply(&mut now, run);
    undo(&mut now, &noted);
    ensure!(now == *before, "another machine than before: {}", different(before, &now));
    ensure!(rollback(&noted, &now, &Config::default()).steps.is_empty(), "something is left to roll back");
    // Half of it is as well undone as all.
    let mut now = before.clone();
    apply(&mut now, &Plan { steps: run.steps[..run.steps.len() / 2].to_vec(), ..Plan::default() });
    undo(&mut now, &noted);
    ensure!(now == *before, "after half a run: {}", different(before, &now));
    Ok(())
}

fn different(before: &Observed, after: &Observed) -> String {
    let lines = |observed: &Observed| -> Vec<String> { format!("{observed:#?}").lines().map(String::from).collect() };
    difference(&lines(before), &lines(after))
}

#[test]
fn whatever_a_run_does_to_a_generated_machine_is_undone() -> Result<()> {
    let mut removals = 0;
    check(256, (vpc(), others()), |(vpc, others)| {
        let config = Config::default();
        let to = |time: usize, observed: &Observed| {
            let attached = vpc.attached(time);
            plan(&desired(&attached, &config), observed, attached.primary, &config)
        };
        let fresh = generated_machine(vpc, others);
        let first = to(0, &fresh);
        there_and_back(&fresh, &first).context("a first run")?;
        let mut configured = fresh.clone();
        apply(&mut configured, &first);
        let second = to(1, &configured);
        removals +=
            second.steps.iter().filter(|step| matches!(step.operation, Operation::DeleteAddress { .. })).count();
        there_and_back(&configured, &second).context("a second run")?;
        // Both as one: what the first has changed is not what was found.
        let noted = Before::default().noting(&first.steps, &fresh).noting(&second.steps, &configured);
        let mut now = configured;
        apply(&mut now, &second);
        undo(&mut now, &noted);
        ensure!(now == fresh, "two runs as one: {}", different(&fresh, &now));
        Ok(())
    })?;
    ensure!(removals > 100, "only {removals} addresses were taken away");
    Ok(())
}

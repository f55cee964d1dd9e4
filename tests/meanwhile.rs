//! What happens to the machine between the look at it and the changes, and what the kernel refuses: a plan that is stale by
//! then touches no wrong object, what fails is tried again or reported, and the next look puts right what is left.

mod support;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use eniup::net::Observed;
use eniup::netlink::apply::Outcome;
use eniup::plan::Step;
use support::machine::{Machine, Run, command, difference, inside, ip, on_a_machine, scenario, with_two_enis};
use support::moments::{arrange, observe, settled_dump, with_netlink};
use support::plan_for;
use vpc_lab::imds::{Action, Faults, Occurrences, Rule};
use vpc_lab::interposer::{Datagram, Message, messages};

/// Plans, lets something happen, and carries out what was planned; the outcomes, and what the kernel had in between.
fn after(machine: &mut Machine, what_happens: &[&str]) -> Result<(Vec<(Step, Outcome)>, Observed)> {
    let scenario = scenario(THREE_ENIS)?;
    arrange(machine, &scenario)?;
    let steps = plan_for(&scenario.attached, &observe()?).steps;
    for command in what_happens {
        ip(command)?;
    }
    let between = observe()?;
    let outcomes = with_netlink(async |netlink| netlink.apply(&steps).await)?;
    Ok((steps.into_iter().zip(outcomes).collect(), between))
}

/// Link and addresses of the link of this name are as they were.
fn assert_untouched(name: &str, between: &Observed) -> Result<()> {
    let now = observe()?;
    let find = |observed: &Observed| {
        let link = observed.links.values().find(|link| link.name == name).cloned();
        let addresses = link.iter().flat_map(|link| {
            let on_link = observed.addresses.iter().filter(|(index, _)| *index == link.index);
            on_link.filter(|(_, address)| address.protocol == 176).collect::<Vec<_>>()
        });
        (link.clone(), addresses.count())
    };
    ensure!(find(between).0.is_some(), "there is no {name}");
    ensure!(find(&now) == find(between), "{name}: {:?} → {:?}", find(between), find(&now));
    Ok(())
}

#[test]
fn a_link_that_is_renamed_meanwhile_is_configured_and_the_one_that_has_its_name_is_not() {
    inside(|| {
        on_a_machine(|machine| {
            let happens = [
                "link set eth02 name ens6",
                "link add eth02 address 02:77:00:00:00:01 type veth peer name eth02p address 02:77:00:00:00:02",
            ];
            let (outcomes, between) = after(machine, &happens)?;
            let refused = outcomes.iter().find(|(_, outcome)| matches!(outcome, Outcome::Failed(_)));
            ensure!(refused.is_none(), "{refused:?}");
            assert_untouched("eth02", &between)?;
            ensure!(ip("addr show ens6")?.contains("10.0.1.20/24"), "the ENI's own link was not configured");
            machine.reconcile(0)?;
            machine.assert_settled()?;
            assert_untouched("eth02", &between)?;
            let rules = ip("rule")?;
            ensure!(rules.contains("oif ens6") && !rules.contains("oif eth02"), "{rules}");
            Ok(())
        })
    });
}

#[test]
fn a_link_that_is_gone_meanwhile_fails_its_eni_alone_and_nothing_goes_to_another_of_its_name() {
    inside(|| {
        on_a_machine(|machine| {
            let happens = [
                "link del eth02",
                "link add eth02 address 02:77:00:00:00:01 type veth peer name eth02p address 02:77:00:00:00:02",
            ];
            let (outcomes, between) = after(machine, &happens)?;
            let is_of = |step: &Step, eni: &str| step.eni.as_deref() == Some(eni);
            ensure!(
                outcomes.iter().any(|(step, outcome)| is_of(step, "eni-02") && matches!(outcome, Outcome::Failed(_))),
                "a link that is gone was configured"
            );
            let other =
                outcomes.iter().find(|(step, outcome)| is_of(step, "eni-03") && !matches!(outcome, Outcome::Done));
            ensure!(other.is_none(), "{other:?}");
            assert_untouched("eth02", &between)?;
            let run = machine.reconcile(3)?;
            ensure!(run.stderr.contains("eni-02 is pending: no link with its MAC"), "{}", run.stderr);
            assert_untouched("eth02", &between)
        })
    });
}

#[test]
fn a_link_that_is_moved_to_another_namespace_meanwhile_is_reported() {
    inside(|| {
        on_a_machine(|machine| {
            let mut holder =
                Command::new("unshare").args(["-n", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
            let own = std::fs::read_link("/proc/thread-self/ns/net")?;
            let namespace = format!("/proc/{}/ns/net", holder.id());
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while std::fs::read_link(&namespace)? == own {
                ensure!(std::time::Instant::now() < deadline, "no other namespace was made");
                std::thread::yield_now();
            }
            let (outcomes, _) = after(machine, &[&format!("link set eth02 netns {}", holder.id())])?;
            ensure!(outcomes.iter().any(|(_, outcome)| matches!(outcome, Outcome::Failed(_))), "nothing failed");
            let run = machine.reconcile(3)?;
            ensure!(run.stderr.contains("moved to another namespace"), "{}", run.stderr);
            ensure!(ip("addr show eth03")?.contains("10.0.1.22/24"), "the other ENI was not done");
            drop(holder.stdin.take());
            holder.wait()?;
            Ok(())
        })
    });
}

/// Addresses that come and go all the time interrupt dumps. A run then looks again, or says that it could not see; it never
/// acts on half of what is there.
#[test]
fn dumps_that_changes_interrupt_are_repeated_or_reported() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            ip("link add busy0 type veth peer name busy1")?;
            let whole: Vec<String> = settled_dump()?.into_iter().filter(|line| !line.contains("busy")).collect();
            let mut churn = command("sh");
            churn.args(["-c", CHURN]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut churn = churn.spawn().context("starting the churn")?;
            let mut seen = 0;
            let result = (0..60).try_for_each(|_| {
                let run = machine.eniup("reconcile")?;
                seen += usize::from(run.exit == 0);
                let is_told = run.exit == 1 && run.stderr.contains("interrupted by a change");
                ensure!(run.exit == 0 && run.stderr.is_empty() || is_told, "exit {}: {}", run.exit, run.stderr);
                Ok(())
            });
            churn.kill()?;
            churn.wait()?;
            result?;
            ensure!(seen > 0, "no run ever saw the machine");
            ip("link del busy0")?;
            let difference = difference(&whole, &settled_dump()?);
            ensure!(difference.is_empty(), "after all:\n{difference}");
            machine.assert_settled()
        })
    });
}

/// Until it is killed, 250 addresses come and go.
const CHURN: &str = "
for n in $(seq 1 250); do echo addr add 10.88.$((n / 100)).$((n % 100 + 1))/32 dev busy0; done > /run/add
sed 's/ add / del /' /run/add > /run/del
while true; do ip -batch /run/add; ip -batch /run/del; done
";

/// Two secondary ENIs, of which one is alone in its subnet.
const THREE_ENIS: &str = "three-enis-of-which-two-share";

fn error(errno: i32) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(errno))
}

/// For a dump or for one object: rtnetlink numbers its messages new, delete, get, set.
fn is_question(message: &Message) -> bool {
    message.kind() >= libc::RTM_NEWLINK && message.kind() % 4 == libc::RTM_GETLINK % 4
}

/// The changes that a program asks for; the kernel never hears of those that are meant, and the program is told that it refuses
/// them.
fn refusing(errno: i32, mut is_meant: impl FnMut(&Message) -> bool) -> impl FnMut(Datagram) -> io::Result<()> {
    let mut refused = BTreeSet::new();
    move |datagram| {
        match datagram {
            Datagram::Said(datagram) => {
                for mut message in messages(datagram).into_iter().filter(|message| !is_question(message)) {
                    if is_meant(&message) {
                        refused.insert(message.sequence());
                        // The kernel acknowledges it and does nothing.
                        message.set_kind(libc::NLMSG_NOOP as u16);
                    }
                }
            }
            Datagram::Told(datagram) => {
                let is_answer = |message: &Message| i32::from(message.kind()) == libc::NLMSG_ERROR;
                for mut message in messages(datagram).into_iter().filter(is_answer) {
                    if refused.contains(&message.sequence()) {
                        message.set_errno(errno);
                    }
                }
            }
            Datagram::Awaited => {}
        }
        Ok(())
    }
}

/// The same run on a machine of its own, and what the kernel has after an undisturbed one.
fn on_three_enis<T: Send>(act: impl FnOnce(&mut Machine) -> Result<T> + Send) -> Result<T> {
    on_a_machine(|machine| {
        arrange(machine, &scenario(THREE_ENIS)?)?;
        act(machine)
    })
}

fn undisturbed() -> Result<Vec<String>> {
    on_three_enis(|machine| {
        machine.reconcile(0)?;
        settled_dump()
    })
}

/// The next run puts right what is left.
fn assert_mended(machine: &Machine, whole: &[String]) -> Result<()> {
    machine.reconcile(0)?;
    machine.assert_settled()?;
    let difference = difference(whole, &settled_dump()?);
    ensure!(difference.is_empty(), "another end than undisturbed:\n{difference}");
    Ok(())
}

/// Which of a run's moments is meant, from 0.
struct Moment {
    left: Cell<usize>,
    took_place: Cell<bool>,
    /// What the program said last was a question.
    is_asking: Cell<bool>,
}

impl Moment {
    fn is_now(&self) -> bool {
        let is_now = self.left.get() == 0 && !self.took_place.replace(self.left.get() == 0);
        self.left.set(self.left.get().saturating_sub(1));
        is_now
    }

    fn listen(&self, datagram: &mut Datagram) {
        if let Datagram::Said(said) = datagram {
            self.is_asking.set(messages(said).first().is_some_and(is_question));
        }
    }
}

type Between<'a> = Box<dyn FnMut(Datagram) -> io::Result<()> + 'a>;

/// Disturbs one moment of a run after the other, each time on a fresh machine, until there is no such moment any more; how
/// many there were. Whatever came of it, the next run mends it.
fn at_each_moment(
    disturb: impl for<'a> Fn(&'a Moment) -> Between<'a> + Sync,
    check: impl Fn(&Run) -> Result<()> + Sync,
) -> Result<usize> {
    let whole = undisturbed()?;
    for n in 0.. {
        let took_place = on_three_enis(|machine| {
            let moment = Moment { left: Cell::new(n), took_place: Cell::new(false), is_asking: Cell::new(false) };
            let mut disturb = disturb(&moment);
            let between = |mut datagram: Datagram| {
                moment.listen(&mut datagram);
                disturb(datagram)
            };
            let run = machine.eniup_with(between, "reconcile")?;
            if moment.took_place.get() {
                check(&run).with_context(|| format!("exit {}: {}", run.exit, run.stderr))?;
            }
            assert_mended(machine, &whole)?;
            Ok(moment.took_place.get())
        })
        .with_context(|| format!("moment {n}"))?;
        if !took_place {
            return Ok(n);
        }
    }
    unreachable!("a run ends")
}

fn assert_done(run: &Run) -> Result<()> {
    ensure!(run.exit == 0, "it was not tried again");
    Ok(())
}

#[test]
fn a_dump_for_which_the_kernel_lacks_buffers_is_repeated() {
    inside(|| {
        let before_it_is_told = at_each_moment(
            |moment| {
                Box::new(|datagram| match datagram {
                    Datagram::Awaited if moment.is_asking.get() && moment.is_now() => error(libc::ENOBUFS),
                    _ => Ok(()),
                })
            },
            assert_done,
        )?;
        let and_loses_a_part = at_each_moment(
            |moment| {
                Box::new(|datagram| match datagram {
                    Datagram::Told(_) if moment.is_asking.get() && moment.is_now() => error(libc::ENOBUFS),
                    _ => Ok(()),
                })
            },
            assert_done,
        )?;
        ensure!(before_it_is_told > 12 && and_loses_a_part > 12, "{before_it_is_told} and {and_loses_a_part} dumps");
        Ok(())
    });
}

/// Which of the changes were made is not known then.
#[test]
fn an_acknowledgement_that_is_lost_for_lack_of_buffers_is_reported() {
    inside(|| {
        let moments = at_each_moment(
            |moment| {
                Box::new(|datagram| match datagram {
                    Datagram::Told(_) if !moment.is_asking.get() && moment.is_now() => error(libc::ENOBUFS),
                    _ => Ok(()),
                })
            },
            |run| {
                ensure!(run.exit == 1 && run.stderr.contains("No buffer space available"), "it was not reported");
                Ok(())
            },
        )?;
        ensure!(moments >= 5, "only {moments} acknowledgements");
        Ok(())
    });
}

fn interrupt(datagram: &mut [u8]) {
    for mut message in messages(datagram) {
        message.set_flags(message.flags() | libc::NLM_F_DUMP_INTR as u16);
    }
}

/// Asks this process's child with this argument to end.
fn end_child(argument: &str) -> Result<()> {
    let parent = format!("\nPPid:\t{}\n", std::process::id());
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(number) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else { continue };
        let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
        if read("status").contains(&parent) && read("cmdline").split('\0').any(|word| word == argument) {
            // SAFETY: it is this process's child, and nobody has waited for it as long as it is listed.
            unsafe { libc::kill(number, libc::SIGTERM) };
            return Ok(());
        }
    }
    bail!("it has ended by itself")
}

/// While metadata does not answer either: `watch` looks for the way to it in what the kernel has.
#[test]
fn watch_stays_though_no_dump_can_be_used_for_a_while() {
    inside(|| {
        with_two_enis(|machine| {
            let silent = Rule::new("*", Occurrences::Always, Action::Status(503));
            machine.service.set_faults(Faults { rules: vec![silent], ..Faults::default() });
            let begun = Instant::now();
            let mut interrupted = 0;
            let between = |datagram: Datagram| {
                if let Datagram::Told(told) = datagram {
                    if begun.elapsed() < Duration::from_secs(3) {
                        interrupt(told);
                        interrupted += 1;
                    } else {
                        machine.service.set_faults(Faults::default());
                    }
                }
                Ok(())
            };
            let ends_it = thread::spawn(|| {
                thread::sleep(Duration::from_secs(8));
                end_child("watch")
            });
            let run = machine.eniup_with(between, "watch --interval 100ms --timeout 300ms")?;
            ends_it.join().expect("it has not panicked")?;
            ensure!(run.exit == 0 && run.stderr.contains("were each interrupted"), "{}: {}", run.exit, run.stderr);
            ensure!(interrupted > 50, "only {interrupted} datagrams were interrupted");
            machine.assert_settled()
        })
    });
}

/// The kernel tells of a change once, so a look that fails is not the last one.
#[test]
fn watch_repairs_what_was_undone_while_no_dump_could_be_used() {
    inside(|| {
        with_two_enis(|machine| {
            machine.reconcile(0)?;
            let begun = Instant::now();
            let is_disturbed = || (Duration::from_secs(2)..Duration::from_secs(4)).contains(&begun.elapsed());
            let between = |datagram: Datagram| {
                if let Datagram::Told(told) = datagram
                    && is_disturbed()
                {
                    interrupt(told);
                }
                Ok(())
            };
            thread::scope(|scope| {
                let undoes = scope.spawn(|| -> Result<()> {
                    thread::sleep(Duration::from_secs(3).saturating_sub(begun.elapsed()));
                    ensure!(is_disturbed(), "too late");
                    ip("addr del 10.0.1.21/32 dev eth02")?;
                    let is_back = || Ok::<_, anyhow::Error>(ip("addr show eth02")?.contains("10.0.1.21"));
                    while begun.elapsed() < Duration::from_secs(15) && !is_back()? {
                        thread::sleep(Duration::from_millis(20));
                    }
                    end_child("watch")?;
                    ensure!(is_back()?, "it is not back");
                    Ok(())
                });
                let run = machine.eniup_with(between, "watch --interval 1h")?;
                undoes.join().expect("it has not panicked").with_context(|| run.stderr)
            })
        })
    });
}

#[test]
fn a_dump_that_a_change_interrupts_is_repeated() {
    inside(|| {
        let moments = at_each_moment(
            |moment| {
                Box::new(|datagram| {
                    if let Datagram::Told(told) = datagram
                        && moment.is_asking.get()
                        && moment.is_now()
                    {
                        interrupt(told);
                    }
                    Ok(())
                })
            },
            assert_done,
        )?;
        ensure!(moments > 12, "only {moments} dumps");
        Ok(())
    });
}

#[test]
fn dumps_that_are_never_whole_are_reported_and_nothing_is_changed() {
    inside(|| {
        on_three_enis(|machine| {
            let found = settled_dump()?;
            let always_interrupted = |datagram: Datagram| {
                if let Datagram::Told(told) = datagram {
                    interrupt(told);
                }
                Ok(())
            };
            let always_lacking = |datagram: Datagram| match datagram {
                Datagram::Awaited => error(libc::ENOBUFS),
                Datagram::Said(_) | Datagram::Told(_) => Ok(()),
            };
            for run in
                [machine.eniup_with(always_interrupted, "reconcile")?, machine.eniup_with(always_lacking, "reconcile")?]
            {
                ensure!(
                    run.exit == 1 && run.stderr.contains("interrupted by a change"),
                    "{}: {}",
                    run.exit,
                    run.stderr
                );
                let difference = difference(&found, &settled_dump()?);
                ensure!(difference.is_empty(), "{difference}");
            }
            assert_mended(machine, &undisturbed()?)
        })
    });
}

#[test]
fn a_change_that_the_kernel_is_too_busy_for_is_made_in_the_next_round() {
    inside(|| {
        let moments = at_each_moment(|moment| Box::new(refusing(libc::EBUSY, |_| moment.is_now())), assert_done)?;
        ensure!(moments > 30, "only {moments} changes");
        Ok(())
    });
}

#[test]
fn one_that_it_is_always_too_busy_for_fails_its_eni_alone() {
    inside(|| {
        let whole = undisturbed()?;
        on_three_enis(|machine| {
            let is_meant = |message: &Message| {
                let is_first_address = |bytes: &[u8]| bytes == [10, 0, 1, 20];
                message.kind() == libc::RTM_NEWADDR && message.0.windows(4).any(is_first_address)
            };
            let run = machine.eniup_with(refusing(libc::EBUSY, is_meant), "reconcile --timeout 1s")?;
            ensure!(run.exit == 3, "exit {}: {}", run.exit, run.stderr);
            let told =
                "eni-02 is failed: ip addr add 10.0.1.20/24 dev eth02 noprefixroute proto 176 (Device or resource busy";
            ensure!(run.stderr.contains(told), "{}", run.stderr);
            ensure!(ip("addr show eth03")?.contains("10.0.1.22/24"), "the other ENI was not done");
            assert_mended(machine, &whole)
        })
    });
}

#[test]
fn a_permission_that_is_lost_in_the_middle_ends_the_run_with_77() {
    inside(|| {
        let moments = at_each_moment(
            |moment| Box::new(refusing(libc::EPERM, |_| moment.is_now())),
            |run| {
                ensure!(run.exit == 77 && run.stderr.contains("CAP_NET_ADMIN"), "it was not told");
                Ok(())
            },
        )?;
        ensure!(moments > 30, "only {moments} changes");
        Ok(())
    });
}

/// A link of somebody else's that has the name of an ENI's.
const STRANGER: &str = "link add eth02 address 02:77:00:00:00:01 type veth peer name eth02p address 02:77:00:00:00:02";

/// Something happens to the link eth02 of an ENI when a run has looked and is about to send its first changes, or any later
/// ones, each time on a fresh machine. `INDEX` is the link's.
fn before_each_send(happens: &[&str], check: impl Fn(&Run, &Observed) -> Result<()> + Sync) -> Result<()> {
    let sends = at_each_send(|machine, n| {
        let index = observe()?.links.values().find(|link| link.name == "eth02").context("no eth02")?.index;
        let lines: Vec<String> = happens.iter().map(|line| line.replace("INDEX", &index.to_string())).collect();
        let (mut sends, mut between) = (0, None);
        let watch = |datagram: Datagram| {
            if let Datagram::Said(said) = datagram
                && messages(said).first().is_some_and(|message| !is_question(message))
            {
                if sends == n {
                    between = Some(lines.iter().try_for_each(|line| ip(line).map(drop)).and_then(|()| observe()));
                }
                sends += 1;
            }
            Ok(())
        };
        let run = machine.eniup_with(watch, "reconcile --timeout 500ms")?;
        let Some(between) = between.transpose()? else { return Ok(false) };
        let check = || {
            check(&run, &between)?;
            machine.eniup("reconcile --timeout 500ms")?;
            ensure!(ip("addr show eth03")?.contains("10.0.1.22/24"), "the other ENI is not done");
            check(&run, &between).context("after another run")
        };
        check().with_context(|| format!("exit {}: {}", run.exit, run.stderr))?;
        Ok(true)
    })?;
    ensure!(sends > 4, "only {sends} sends");
    Ok(())
}

/// How many sends there are for which something could happen.
fn at_each_send(happen: impl Fn(&Machine, usize) -> Result<bool> + Sync) -> Result<usize> {
    let mut n = 0;
    while on_three_enis(|machine| happen(machine, n)).with_context(|| format!("before send {n}"))? {
        n += 1;
    }
    Ok(n)
}

#[test]
fn a_link_that_is_renamed_before_any_send_is_configured_under_its_new_name() {
    inside(|| {
        before_each_send(&["link set eth02 down", "link set eth02 name ens6", STRANGER], |run, between| {
            ensure!(run.exit == 0, "it did not converge");
            assert_untouched("eth02", between)?;
            ensure!(ip("addr show ens6")?.contains("10.0.1.20/24"), "the ENI's own link was not configured");
            let rules = ip("rule")?;
            ensure!(rules.contains("oif ens6") && !rules.contains("oif eth02"), "{rules}");
            Ok(())
        })
    });
}

fn assert_waits(run: &Run) -> Result<()> {
    ensure!(run.exit == 3 && run.stderr.contains("eni-02 is pending: no link with its MAC"), "it was not reported");
    Ok(())
}

#[test]
fn a_link_that_is_gone_before_any_send_is_waited_for_and_one_of_its_name_is_untouched() {
    inside(|| {
        before_each_send(&["link del eth02", STRANGER], |run, between| {
            assert_waits(run)?;
            assert_untouched("eth02", between)
        })
    });
}

/// The kernel gives an index anew only to somebody who asks for it. That link can have been set as an ENI's is; it keeps
/// nothing by which packets would take another way.
#[test]
fn a_link_that_takes_the_index_of_one_that_is_gone_before_any_send_keeps_no_address_route_or_rule() {
    inside(|| {
        let stranger = STRANGER.replace("link add eth02", "link add eth02 index INDEX");
        before_each_send(&["link del eth02", &stranger], |run, _| {
            assert_waits(run)?;
            let link = observe()?.links.into_values().find(|link| link.name == "eth02").context("no eth02")?;
            ensure!(link.mac == "02:77:00:00:00:01".parse().ok(), "it is not the stranger's link: {link:?}");
            let now = settled_dump()?;
            let is_ours =
                |line: &&String| line.contains("eth02") && line.contains("proto 176") || line.contains("oif eth02");
            let left: Vec<&String> = now.iter().filter(is_ours).collect();
            ensure!(left.is_empty(), "{left:#?}");
            ensure!(
                observe()?.addresses.iter().all(|(index, address)| *index != link.index || address.protocol != 176)
            );
            Ok(())
        })
    });
}

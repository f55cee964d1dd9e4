//! What happens to the machine between the look at it and the changes: a plan that is stale by then touches no wrong
//! object, and the next look puts right what it could not do.

mod support;

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use eniup::net::Observed;
use eniup::netlink::apply::Outcome;
use eniup::plan::Step;
use support::machine::{Machine, command, difference, inside, ip, on_a_machine, scenario, with_two_enis};
use support::moments::{arrange, observe, settled_dump, with_netlink};
use support::plan_for;

/// Plans, lets something happen, and carries out what was planned; the outcomes, and what the kernel had in between.
fn after(machine: &mut Machine, what_happens: &[&str]) -> Result<(Vec<(Step, Outcome)>, Observed)> {
    let scenario = scenario("three-enis-of-which-two-share")?;
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

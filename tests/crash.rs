//! A run that is killed between any two of its operations. A kill from outside lands between batches only, so here the
//! plan's first k operations are carried out by eniup's own netlink code, for every k of every scenario: exactly what the
//! kernel has when a run dies after its k-th operation, with the ledger as it is at that moment.

mod support;

use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use eniup::config::Config;
use eniup::ledger;
use eniup::netlink::apply::Outcome;
use eniup::operation::Operation;
use eniup::plan::Step;
use eniup::release::release;
use support::machine::{self, Kernel, Machine, Run, difference, inside, on_a_machine};
use support::moments::{arrange, observe, reconcile, settled_dump, ways, with_netlink};
use support::{Scenario, scenarios};

/// The plan that a run would carry out first, noted in the ledger as that run notes it before its first operation.
fn begin(machine: &Machine, scenario: &Scenario) -> Result<Vec<Step>> {
    let observed = machine.believed()?;
    let steps = scenario.plan_without_files(&observed).steps;
    std::fs::create_dir_all(&machine.directory)?;
    ledger::save(&ledger::load(&machine.directory).noting(&steps, &observed), &machine.directory);
    Ok(steps)
}

/// A run on a machine that is arranged.
fn run(machine: &Machine, scenario: &Scenario) -> Result<Run> {
    machine.eniup(reconcile(&scenario.selected_without_files(&machine.believed()?)))
}

/// Each of these operations has to work: the machine is as it was when they were planned. (The kernel takes away a link's
/// routes itself when its last IPv4 address goes.)
fn carry_out(steps: &[Step]) -> Result<()> {
    let outcomes = with_netlink(async |netlink| netlink.apply(steps).await)?;
    for (step, outcome) in steps.iter().zip(outcomes) {
        let is_right = match outcome {
            Outcome::Done => true,
            Outcome::AlreadySo => matches!(step.operation, Operation::DeleteRoute { .. }),
            Outcome::Skipped | Outcome::Failed(_) => false,
        };
        ensure!(is_right, "{step}: {outcome:?}");
    }
    Ok(())
}

/// Addresses that were there and are wanted further lose nothing on the way: at each moment the kernel sends what they
/// say where it went before or where it goes in the end.
#[test]
fn at_no_moment_of_a_run_does_an_address_that_stays_lose_its_way() {
    inside(|| {
        for scenario in scenarios()? {
            on_a_machine(|machine| {
                arrange(machine, &scenario)?;
                let steps = begin(machine, &scenario)?;
                let mut moments = vec![ways(&observe()?)?];
                for step in &steps {
                    carry_out(std::slice::from_ref(step))?;
                    moments.push(ways(&observe()?)?);
                }
                let (first, last) = (&moments[0], &moments[steps.len()]);
                for (pair, before) in first {
                    let Some(after) = last.get(pair) else { continue };
                    for (moment, done) in moments.iter().zip(0..) {
                        let way =
                            moment.get(pair).with_context(|| format!("{pair:?} is gone after {done} operations"))?;
                        ensure!(
                            way == before || way == after,
                            "{}: {pair:?} goes by {way:?} after {done} operations, by {before:?} before and {after:?} in \
                             the end",
                            scenario.name
                        );
                    }
                }
                Ok(())
            })
            .with_context(|| scenario.name.clone())?;
        }
        Ok(())
    });
}

/// The same end as without a kill, and so no orphan, whichever operation was the last. How many there were.
fn converges_from_every_crash_point(kernel: Kernel, scenario: &Scenario) -> Result<usize> {
    let whole = on_a_machine(|machine| {
        arrange(machine, scenario)?;
        run(machine, scenario)?;
        settled_dump()
    })?;
    let mut k = 0;
    while on_a_machine(|machine| {
        machine.kernel = kernel;
        arrange(machine, scenario)?;
        let steps = begin(machine, scenario)?;
        carry_out(&steps[..k])?;
        let run = run(machine, scenario)?;
        ensure!([0, 3].contains(&run.exit), "exit {}: {}", run.exit, run.stderr);
        let plan = machine.eniup("plan")?;
        ensure!(plan.stdout.is_empty(), "left to do:\n{}", plan.stdout);
        let difference = difference(&whole, &settled_dump()?);
        ensure!(difference.is_empty(), "another end than without a kill:\n{difference}");
        Ok(k < steps.len())
    })
    .with_context(|| format!("{}, killed after operation {k}", scenario.name))?
    {
        k += 1;
    }
    Ok(k + 1)
}

/// Side by side, as most of the time is spent waiting for what is pending.
fn every_scenario_converges_from_every_crash_point(kernel: Kernel) {
    inside(|| {
        let waiting = Mutex::new(scenarios()?.into_iter());
        let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || -> Result<usize> {
            let mut points = 0;
            while let Some(scenario) = next() {
                points += converges_from_every_crash_point(kernel, &scenario)?;
            }
            Ok(points)
        };
        let points = thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().expect("a worker gives its error back"))
                .sum::<Result<usize>>()
        })?;
        eprintln!("killed after {points} operations");
        ensure!(points > 500, "only {points} crash points");
        Ok(())
    });
}

#[test]
fn killed_after_any_operation_the_next_run_converges() {
    every_scenario_converges_from_every_crash_point(Kernel::Own);
}

#[test]
fn killed_on_a_kernel_that_forgets_the_mark_of_addresses_the_next_run_converges() {
    every_scenario_converges_from_every_crash_point(Kernel::Old);
}

/// Scenarios in which a fresh machine is configured whole.
const WHOLE: [&str; 2] = ["two-subnets-dual-stack", "three-enis-of-which-two-share"];

#[test]
fn release_after_a_kill_leaves_the_machine_as_it_was_found() {
    release_after_a_kill(Kernel::Own);
}

#[test]
fn release_after_a_kill_on_a_kernel_that_forgets_the_mark_of_addresses_does_too() {
    release_after_a_kill(Kernel::Old);
}

/// The ledger is written before the first operation, so it knows whatever was done.
fn release_after_a_kill(kernel: Kernel) {
    inside(|| {
        for name in WHOLE {
            let scenario = machine::scenario(name)?;
            let mut k = 0;
            while on_a_machine(|machine| {
                machine.kernel = kernel;
                arrange(machine, &scenario)?;
                let found = settled_dump()?;
                let steps = begin(machine, &scenario)?;
                carry_out(&steps[..k])?;
                let release = machine.eniup("release")?;
                ensure!(release.exit == 0, "release: {}", release.stderr);
                let difference = difference(&found, &settled_dump()?);
                ensure!(difference.is_empty(), "{name}, killed after operation {k}:\n{difference}");
                Ok(k < steps.len())
            })? {
                k += 1;
            }
            ensure!(k > 15, "{name} has only {k} operations");
        }
        Ok(())
    });
}

#[test]
fn a_killed_release_is_finished_by_the_next_and_undone_by_a_reconcile() {
    inside(|| {
        for name in WHOLE {
            let scenario = machine::scenario(name)?;
            on_a_machine(|machine| {
                arrange(machine, &scenario)?;
                let found = settled_dump()?;
                machine.reconcile(0)?;
                let whole = settled_dump()?;
                let mut k = 0;
                loop {
                    let steps = release(&observe()?, None, &ledger::load(&machine.directory), &Config::default()).steps;
                    carry_out(&steps[..k])?;
                    // In turn, so that each leaves the next a machine as it should be.
                    let (arguments, wanted) = if k % 2 == 0 { ("reconcile", &whole) } else { ("release", &found) };
                    let run = machine.eniup(arguments)?;
                    ensure!(run.exit == 0, "{arguments}: {}", run.stderr);
                    let difference = difference(wanted, &settled_dump()?);
                    ensure!(
                        difference.is_empty(),
                        "{name}, {arguments} after {k} operations of release:\n{difference}"
                    );
                    machine.reconcile(0)?;
                    if k == steps.len() {
                        return Ok(());
                    }
                    k += 1;
                }
            })?;
        }
        Ok(())
    });
}

/// The built binary, killed from outside: what it does to a link it has noted before.
#[test]
fn release_after_a_kill_at_any_instant_leaves_the_machine_as_it_was_found() {
    inside(|| {
        let scenario = machine::scenario(WHOLE[0])?;
        let mut killed = 0;
        let mut usual = Duration::ZERO;
        for n in 0..50 {
            on_a_machine(|machine| {
                arrange(machine, &scenario)?;
                let found = settled_dump()?;
                let started = Instant::now();
                if n == 0 {
                    machine.reconcile(0)?;
                    usual = started.elapsed();
                }
                let mut run = machine.command("reconcile").stderr(Stdio::null()).spawn()?;
                // Each time a little later; the instant is what is tried.
                let instant = usual * n / 50;
                thread::sleep(instant);
                run.kill()?;
                match run.wait()?.success() {
                    // The first was slow, by what else the machine did.
                    true if n > 0 => usual = instant,
                    true => {}
                    false => killed += 1,
                }
                let release = machine.eniup("release")?;
                ensure!(release.exit == 0, "release: {}", release.stderr);
                let difference = difference(&found, &settled_dump()?);
                ensure!(difference.is_empty(), "killed after {n}/50 of a run:\n{difference}");
                Ok(())
            })?;
        }
        ensure!(killed > 20, "only {killed} runs were killed");
        Ok(())
    });
}

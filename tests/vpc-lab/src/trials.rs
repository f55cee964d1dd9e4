//! Trials that eniup has to pass however they go: a metadata service that misbehaves, runs that are killed, many runs at
//! once while ENIs come and go. Each is repeated with everything that is left to chance drawn from a seed.

use std::net::IpAddr;
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fastrand::Rng;

use crate::flows::Flows;
use crate::ground::Ground;
use crate::imds::Faults;

/// What a process that has nothing to wait for may take on a machine that is busy with other things.
const SLACK: Duration = Duration::from_secs(2);

/// Called after each seed with how many are done.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

/// What the seeds of a trial came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    pub runs: u64,
    /// Runs by exit code.
    pub exits: std::collections::BTreeMap<i32, u64>,
    /// Requests that a fault has touched.
    pub faults: u64,
    pub longest_run: Duration,
    /// Messages of flows, and how many of them were lost.
    pub messages: u64,
    pub lost: u64,
    /// What was wrong, with its seed.
    pub failures: Vec<String>,
}

impl Summary {
    fn count(&mut self, exit: i32, took: Duration) {
        self.runs += 1;
        *self.exits.entry(exit).or_default() += 1;
        self.longest_run = self.longest_run.max(took);
    }

    pub fn add(&mut self, other: Summary) {
        let Summary { runs, exits, faults, longest_run, messages, lost, failures } = other;
        self.runs += runs;
        for (exit, count) in exits {
            *self.exits.entry(exit).or_default() += count;
        }
        self.faults += faults;
        self.longest_run = self.longest_run.max(longest_run);
        self.messages += messages;
        self.lost += lost;
        self.failures.extend(failures);
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Summary { runs, exits, faults, longest_run, messages, lost, failures } = self;
        let exits: Vec<String> = exits.iter().map(|(exit, count)| format!("exit {exit}: {count}")).collect();
        write!(
            f,
            "{runs} runs ({}), {faults} faulty requests, longest run {:.2} s",
            exits.join(", "),
            longest_run.as_secs_f64()
        )?;
        if *messages > 0 {
            write!(f, ", {messages} messages of flows, {lost} lost")?;
        }
        write!(f, ", {} failures", failures.len())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Trial {
    /// A metadata service that misbehaves; a seed is a schedule of faults.
    Faults,
    /// Runs that are killed at any instant, with flows under way; a seed is a kill.
    Kills,
    /// Fifty runs of mixed verbs at once while ENIs come and go, with flows under way; a seed is a storm.
    Storms,
}

/// Runs these seeds and prints progress and what they came to; gives whether all was right.
///
/// # Errors
/// The trial itself could not go on.
pub fn play(trial: Trial, eniup: &Path, seeds: Range<u64>, jobs: u64) -> Result<bool> {
    let (started, all) = (Instant::now(), seeds.end - seeds.start);
    let progress = |done: u64| {
        if done.is_multiple_of((all / 100).max(1)) {
            eprintln!("{done} of {all} after {:.0} s", started.elapsed().as_secs_f64());
        }
    };
    let summary = run(trial, eniup, seeds, jobs, &progress)?;
    summary.failures.iter().for_each(|failure| println!("{failure}"));
    println!("{all} seeds in {:.0} s: {summary}", started.elapsed().as_secs_f64());
    Ok(summary.failures.is_empty())
}

/// Runs these seeds, spread over so many VPCs.
///
/// # Errors
/// The trial itself could not go on.
pub fn run(trial: Trial, eniup: &Path, seeds: Range<u64>, jobs: u64, progress: Progress) -> Result<Summary> {
    let all = seeds.end - seeds.start;
    let each = all.div_ceil(jobs.max(1)).max(1);
    let done = AtomicU64::new(0);
    let one_more = || progress(done.fetch_add(1, Ordering::Relaxed) + 1);
    let act = match trial {
        Trial::Faults => faults,
        Trial::Kills => kills,
        Trial::Storms => storms,
    };
    let mut summary = Summary::default();
    std::thread::scope(|scope| -> Result<()> {
        let job = |n: u64| {
            let first = seeds.start + n * each;
            let (seeds, one_more) = (first..(first + each).min(seeds.end), &one_more);
            scope.spawn(move || act(eniup, n as usize, seeds, one_more))
        };
        let jobs: Vec<_> = (0..all.div_ceil(each)).map(job).collect();
        for job in jobs {
            summary.add(job.join().map_err(|_| anyhow!("a thread panicked"))??);
        }
        Ok(())
    })?;
    Ok(summary)
}

/// A metadata service that follows [`Faults::random`] of each seed, after something has changed: nothing that is wanted is
/// lost, nothing foreign is touched, no run passes its deadline, the exit code tells the truth, and one run is enough once
/// the service is well again.
fn faults(eniup: &Path, number: usize, seeds: Range<u64>, one_more: &dyn Fn()) -> Result<Summary> {
    let mut ground = Ground::build(eniup, number)?;
    let mut summary = Summary::default();
    converge(&ground, &mut summary)?;
    for seed in seeds {
        if let Err(error) = one_schedule(&mut ground, seed, &mut summary) {
            summary.failures.push(format!("seed {seed}: {error:#}"));
            // From a machine as it should be, so that each failure speaks for itself.
            ground.lab.service(&ground.name)?.set_faults(Faults::default());
            converge(&ground, &mut summary)?;
        }
        one_more();
    }
    Ok(summary)
}

/// All waiting of a run under faults ends by then.
const FAULTY_TIMEOUT: Duration = Duration::from_millis(1500);

fn one_schedule(ground: &mut Ground, seed: u64, summary: &mut Summary) -> Result<()> {
    let mut random = Rng::with_seed(seed);
    let before = ground.addresses();
    let what = ground.change(&mut random)?;
    // Where an address is now counts as well: one that has wandered to another ENI is new there.
    let kept: Vec<IpAddr> =
        ground.addresses().into_iter().filter(|own| before.contains(own)).map(|(_, own)| own).collect();
    let service = ground.lab.service(&ground.name)?;
    service.reset_counters();
    service.set_faults(Faults::random(seed));
    let as_it_was = ground.objects()?;
    // Half of them as a timer would run it.
    let is_automatic = seed % 2 == 1;
    let verb = if is_automatic { "reconcile --automatic" } else { "reconcile" };
    let (run, took) = timed(ground, &format!("{verb} --timeout {}ms", FAULTY_TIMEOUT.as_millis()), summary)?;
    let touched = service.requests().faults;
    summary.faults += touched;
    service.set_faults(Faults::default());

    let said = || String::from_utf8_lossy(&run.stderr).into_owned();
    ensure!(took < FAULTY_TIMEOUT + SLACK, "{what}: a run of {FAULTY_TIMEOUT:?} took {took:?}");
    let exit = run.status.code();
    ensure!([Some(0), Some(3), Some(69)].contains(&exit), "{what}: {}: {}", run.status, said());
    ensure!(exit == Some(0) || touched > 0, "{what}: {} without a fault: {}", run.status, said());
    ensure!(exit != Some(69) || ground.objects()? == as_it_was, "{what}: exit 69, and something was changed");
    let left = ground.eniup("plan --detailed-exitcode")?;
    // What waits for its proof is left in an automatic run.
    let is_done = is_automatic || left.status.code() == Some(0);
    ensure!(
        exit != Some(0) || is_done,
        "{what}: exit 0 with this left to do:\n{}",
        String::from_utf8_lossy(&left.stdout)
    );
    let missing = ground.missing_foreign_objects()?;
    ensure!(missing.is_empty(), "{what}: foreign objects are gone: {missing:#?}");
    let silent = ground.silent(&kept)?;
    ensure!(silent.is_empty(), "{what}, exit {exit:?}: cut off: {silent:#?}\n{}", said());

    converge(ground, summary).with_context(|| format!("{what}, well again"))
}

/// One run is enough: it ends well, nothing is left to do, every address answers, and somebody else's objects are there.
fn converge(ground: &Ground, summary: &mut Summary) -> Result<()> {
    let (run, _) = timed(ground, "reconcile", summary)?;
    ensure!(run.status.success(), "reconcile ({}): {}", run.status, String::from_utf8_lossy(&run.stderr));
    let left = ground.eniup("plan --detailed-exitcode")?;
    ensure!(left.status.success(), "left to do ({}):\n{}", left.status, String::from_utf8_lossy(&left.stdout));
    let addresses: Vec<IpAddr> = ground.addresses().into_iter().map(|(_, address)| address).collect();
    let silent = ground.silent(&addresses)?;
    ensure!(silent.is_empty(), "no answer: {silent:#?}");
    let missing = ground.missing_foreign_objects()?;
    ensure!(missing.is_empty(), "foreign objects are gone: {missing:#?}");
    Ok(())
}

fn timed(ground: &Ground, arguments: &str, summary: &mut Summary) -> Result<(Output, Duration)> {
    let started = Instant::now();
    let run = ground.eniup(arguments)?;
    let took = started.elapsed();
    summary.count(run.status.code().unwrap_or(-1), took);
    Ok((run, took))
}

/// Runs that are killed at any instant, while things change and flows are under way: the flows lose nothing, and the next
/// run that lives converges.
fn kills(eniup: &Path, number: usize, seeds: Range<u64>, one_more: &dyn Fn()) -> Result<Summary> {
    let mut ground = Ground::build(eniup, number)?;
    let mut summary = Summary::default();
    converge(&ground, &mut summary)?;
    let usual = summary.longest_run;
    let flows = Flows::start(&ground.lab, &ground.flow_specs()?)?;
    for seed in seeds {
        let mut random = Rng::with_seed(seed);
        let what = ground.change(&mut random)?;
        let mut run = spawn(&ground, "reconcile")?;
        // The instant is what is left to chance; some runs are through before it.
        std::thread::sleep(usual.mul_f64(random.f64()));
        run.kill().context("killing a run")?;
        let status = run.wait_with_output()?.status;
        summary.count(status.code().unwrap_or(-1), Duration::ZERO);
        // Some die in a row.
        if random.bool() {
            converge(&ground, &mut summary).unwrap_or_else(|error| {
                summary.failures.push(format!("seed {seed}: {what}, then {status}: {error:#}"));
            });
        }
        one_more();
    }
    if let Err(error) = converge(&ground, &mut summary) {
        summary.failures.push(format!("at the end: {error:#}"));
    }
    end_flows(flows, &mut summary);
    Ok(summary)
}

fn end_flows(flows: Flows, summary: &mut Summary) {
    for report in flows.finish() {
        summary.messages += report.sent;
        summary.lost += report.lost();
        if !report.is_whole() {
            summary.failures.push(report.to_string());
        }
    }
}

fn spawn(ground: &Ground, arguments: &str) -> Result<Child> {
    let mut command = ground.lab.command(&ground.name, &ground.lab.eniup)?;
    command.args(arguments.split_whitespace()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().context("starting eniup")
}

/// What the runs of a storm do, each with its timeout and the exit codes that tell the truth there; whoever has waited all
/// of its time may also say that it got no turn. An ENI may come or go between the look at metadata and at the kernel.
const VERBS: [(&str, Duration, &[i32]); 7] = [
    ("reconcile", PATIENT, &[0, 3]),
    ("reconcile --automatic", PATIENT, &[0, 3]),
    ("reconcile --dry-run", PATIENT, &[0, 3]),
    ("plan --detailed-exitcode", PATIENT, &[0, 2, 3]),
    ("status --json", PATIENT, &[0, 3]),
    ("release --dry-run", PATIENT, &[0]),
    ("reconcile", Duration::from_millis(50), &[0, 3]),
];

const PATIENT: Duration = Duration::from_secs(20);

/// The deadline has passed before the lock or an answer of metadata was had.
const OUT_OF_TIME: [i32; 2] = [69, 75];

/// So many runs at once.
const AT_ONCE: usize = 50;

/// Many runs of mixed verbs at once while ENIs and addresses come and go and flows are under way: no run passes its
/// deadline or ends other than it may, the flows lose nothing, and afterwards one run converges.
fn storms(eniup: &Path, number: usize, seeds: Range<u64>, one_more: &dyn Fn()) -> Result<Summary> {
    let mut ground = Ground::build(eniup, number)?;
    let mut summary = Summary::default();
    converge(&ground, &mut summary)?;
    let flows = Flows::start(&ground.lab, &ground.flow_specs()?)?;
    for seed in seeds {
        if let Err(error) = one_storm(&mut ground, seed, &mut summary) {
            summary.failures.push(format!("seed {seed}: {error:#}"));
        }
        if let Err(error) = converge(&ground, &mut summary) {
            summary.failures.push(format!("seed {seed}, afterwards: {error:#}"));
        }
        one_more();
    }
    end_flows(flows, &mut summary);
    Ok(summary)
}

fn one_storm(ground: &mut Ground, seed: u64, summary: &mut Summary) -> Result<()> {
    let mut random = Rng::with_seed(seed);
    let started = Instant::now();
    let mut running = Vec::new();
    for _ in 0..AT_ONCE {
        let (verb, timeout, exits) = VERBS[random.usize(0..VERBS.len())];
        let run = spawn(ground, &format!("{verb} --timeout {}ms", timeout.as_millis()))?;
        running.push(Run { verb, timeout, exits, run, started: Instant::now() });
    }
    while !running.is_empty() {
        let mut still = Vec::new();
        for mut run in running {
            match run.run.try_wait().context("waiting for a run")? {
                None => still.push(run),
                Some(_) => {
                    run.end(summary)?;
                    // As much happens as the runs have time for.
                    ground.change(&mut random)?;
                }
            }
        }
        running = still;
        ensure!(started.elapsed() < PATIENT + 2 * SLACK, "{} runs pass their deadline", running.len());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// One of a storm.
struct Run {
    verb: &'static str,
    timeout: Duration,
    exits: &'static [i32],
    run: Child,
    started: Instant,
}

impl Run {
    fn end(self, summary: &mut Summary) -> Result<()> {
        let Run { verb, timeout, exits, run, started } = self;
        let took = started.elapsed();
        let output = run.wait_with_output()?;
        let exit = output.status.code().unwrap_or(-1);
        summary.count(exit, took);
        ensure!(took < timeout + SLACK, "{verb} with {timeout:?} took {took:?}");
        let is_out_of_time =
            OUT_OF_TIME.contains(&exit) && verb.starts_with("reconcile") && took >= timeout.mul_f64(0.9);
        let is_true = exits.contains(&exit) || is_out_of_time;
        ensure!(is_true, "{verb} after {took:?} ({}): {}", output.status, String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

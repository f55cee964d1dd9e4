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
use crate::trouble::Trouble;
use crate::vpc::EniId;

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
    /// Requests that a fault has touched, and packets to and from the service that were lost.
    pub faults: u64,
    /// Runs that metadata misled in any way.
    pub troubles: u64,
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
        let Summary { runs, exits, faults, troubles, longest_run, messages, lost, failures } = other;
        self.runs += runs;
        for (exit, count) in exits {
            *self.exits.entry(exit).or_default() += count;
        }
        self.faults += faults;
        self.troubles += troubles;
        self.longest_run = self.longest_run.max(longest_run);
        self.messages += messages;
        self.lost += lost;
        self.failures.extend(failures);
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Summary { runs, exits, faults, troubles, longest_run, messages, lost, failures } = self;
        let exits: Vec<String> = exits.iter().map(|(exit, count)| format!("exit {exit}: {count}")).collect();
        write!(f, "{runs} runs ({}), longest run {:.2} s", exits.join(", "), longest_run.as_secs_f64())?;
        if *troubles > 0 {
            write!(f, ", {troubles} of them misled, by {faults} requests and packets among others")?;
        }
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

/// Metadata that goes wrong as its seed says, after something has changed: nothing that is wanted is lost, nothing foreign is
/// touched, an automatic run takes nothing away at first sight, no run passes its deadline, the exit code tells the truth,
/// and one run is enough once the service is well again.
fn faults(eniup: &Path, number: usize, seeds: Range<u64>, one_more: &dyn Fn()) -> Result<Summary> {
    let mut ground = Ground::build(eniup, number)?;
    let mut summary = Summary::default();
    converge(&ground, &mut summary)?;
    for seed in seeds {
        if let Err(error) = one_schedule(&mut ground, seed, &mut summary) {
            summary.failures.push(format!("seed {seed}: {error:#}"));
            // From a machine as it should be, so that each failure speaks for itself.
            ground.heal()?;
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
    let trouble = Trouble::random(seed);
    let before = ground.addresses();
    ground.lag(&trouble)?;
    let what = format!("{}; {trouble}", ground.change(&mut random)?);
    // Where an address is now counts as well: one that has wandered to another ENI is new there.
    let kept: Vec<IpAddr> =
        ground.addresses().into_iter().filter(|own| before.contains(own)).map(|(_, own)| own).collect();
    ground.spoil(&trouble)?;
    let (as_it_was, own_before) = (ground.objects()?, ground.own()?);
    // Half of them as a timer would run it.
    let is_automatic = seed % 2 == 1;
    let verb = if is_automatic { "reconcile --automatic" } else { "reconcile" };
    let (run, took) = timed(ground, &format!("{verb} --timeout {}ms", FAULTY_TIMEOUT.as_millis()), summary)?;
    let touched = ground.faults()?;
    summary.faults += touched;
    summary.troubles += u64::from(trouble.is_lie() || touched > 0);
    ground.cure()?;

    let said = || String::from_utf8_lossy(&run.stderr).into_owned();
    ensure!(took < FAULTY_TIMEOUT + SLACK, "{what}: a run of {FAULTY_TIMEOUT:?} took {took:?}");
    let exit = run.status.code();
    ensure!([Some(0), Some(3), Some(69)].contains(&exit), "{what}: {}: {}", run.status, said());
    let is_excused = touched > 0 || trouble.is_lie();
    // An address that has come to its ENI less than a minute ago leaves it on proof only; here it always has.
    let is_proof_due = is_automatic && what.contains(" goes to ") && said().contains("is not proven to be over");
    let is_right = exit == Some(0) || is_excused || exit == Some(3) && is_proof_due;
    ensure!(is_right, "{what}: {} without a fault: {}", run.status, said());
    ensure!(exit != Some(69) || ground.objects()? == as_it_was, "{what}: exit 69, and something was changed");
    let left = ground.eniup("plan --detailed-exitcode")?;
    // What waits for its proof is left in an automatic run; what metadata says by now need not be what the run was told.
    let is_done = is_automatic || trouble.is_unsteady() || left.status.code() == Some(0);
    ensure!(
        exit != Some(0) || is_done,
        "{what}: exit 0 with this left to do:\n{}",
        String::from_utf8_lossy(&left.stdout)
    );
    if is_automatic {
        // That another ENI has it by now is proof; until that one is ready, nobody has it.
        let has_moved = |own: &String| {
            let is_it = |(_, address): &&(EniId, IpAddr)| address.to_string() == *own;
            ground.addresses().iter().find(is_it).is_some_and(|owned| !before.contains(owned))
        };
        let own = ground.own()?;
        let gone: Vec<&String> = own_before.difference(&own).filter(|own| !has_moved(own)).collect();
        ensure!(gone.is_empty(), "{what}, exit {exit:?}: gone at first sight: {gone:#?}\n{}", said());
    }
    let missing = ground.missing_foreign_objects()?;
    ensure!(missing.is_empty(), "{what}: foreign objects are gone: {missing:#?}");
    let silent = ground.silent(&kept)?;
    ensure!(silent.is_empty(), "{what}, exit {exit:?}: cut off: {silent:#?}\n{}", said());

    ground.heal()?;
    converge(ground, summary).with_context(|| format!("{what}, well again"))?;
    Ok(())
}

/// One run is enough: it ends well, nothing is left to do, every address answers, and somebody else's objects are there. How long
/// it took.
fn converge(ground: &Ground, summary: &mut Summary) -> Result<Duration> {
    let (run, took) = timed(ground, "reconcile", summary)?;
    ensure!(run.status.success(), "reconcile ({}): {}", run.status, String::from_utf8_lossy(&run.stderr));
    let left = ground.eniup("plan --detailed-exitcode")?;
    ensure!(left.status.success(), "left to do ({}):\n{}", left.status, String::from_utf8_lossy(&left.stdout));
    let addresses: Vec<IpAddr> = ground.addresses().into_iter().map(|(_, address)| address).collect();
    let silent = ground.silent(&addresses)?;
    ensure!(silent.is_empty(), "no answer: {silent:#?}");
    let missing = ground.missing_foreign_objects()?;
    ensure!(missing.is_empty(), "foreign objects are gone: {missing:#?}");
    Ok(took)
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
    // How long a run takes at the moment: the machine may have more or less to do than it had.
    let mut usual = converge(&ground, &mut summary)?;
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
            match converge(&ground, &mut summary) {
                Ok(took) => usual = took,
                Err(error) => summary.failures.push(format!("seed {seed}: {what}, then {status}: {error:#}")),
            }
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

/// What a run of a storm does.
struct Verb {
    arguments: &'static str,
    timeout: Duration,
    /// The exit codes that tell the truth. An ENI may come or go between the look at metadata and at the kernel.
    exits: &'static [i32],
    /// Those that do only after all of the run's time was used: before the lock or an answer of metadata was had.
    late_exits: &'static [i32],
    /// One that stays is told to end after so long.
    stays: Option<Duration>,
}

const PATIENT: Duration = Duration::from_secs(20);

const SHORT: Duration = Duration::from_secs(3);

const fn verb(arguments: &'static str, exits: &'static [i32]) -> Verb {
    Verb { arguments, timeout: PATIENT, exits, late_exits: &[], stays: None }
}

/// One that waits for its turn.
const fn locking(arguments: &'static str) -> Verb {
    Verb { late_exits: &[69, 75], ..verb(arguments, &[0, 3]) }
}

/// What takes nothing away that is wanted.
const GENTLE: [Verb; 10] = [
    locking("reconcile"),
    locking("reconcile --automatic"),
    Verb { timeout: Duration::from_millis(50), ..locking("reconcile") },
    locking("reconcile --dry-run"),
    verb("plan --detailed-exitcode", &[0, 2, 3]),
    verb("status --json", &[0, 3]),
    verb("explain --from 10.0.1.20", &[0]),
    // An address that lasts, and one that comes and goes.
    verb("wait --ip 10.0.1.30", &[0]),
    Verb { timeout: SHORT, late_exits: &[3], ..verb("wait --ip 10.0.1.40", &[0]) },
    Verb { stays: Some(SHORT), ..verb("watch", &[0]) },
];

/// What takes away and brings back all that eniup has made. A run on trial is in everybody's way but those of `release` and
/// `confirm`.
const ROUGH: [Verb; 8] = [
    Verb { exits: &[0, 3, 75], ..locking("reconcile") },
    Verb { exits: &[0, 1, 3, 75], ..locking("reconcile --automatic") },
    Verb { exits: &[0, 1, 3, 75], ..locking("reconcile --confirm 1") },
    Verb { late_exits: &[75], ..verb("confirm", &[0, 1]) },
    Verb { late_exits: &[75], ..verb("release", &[0]) },
    verb("plan --detailed-exitcode", &[0, 2, 3]),
    verb("status --json", &[0, 3]),
    Verb { stays: Some(SHORT), ..verb("watch", &[0]) },
];

/// Waits for nothing: how long it takes tells how much the machine has to do. Each storm begins with a few of it.
const CONTROL: Verb = verb("release --dry-run", &[0]);
const CONTROLS: usize = 3;

/// So many runs at once.
const AT_ONCE: usize = 50;

/// Many runs of mixed verbs at once while ENIs and addresses come and go and flows are under way: no run passes its
/// deadline or ends other than it may, the flows lose nothing, and afterwards one run converges. Every other seed is rough:
/// there the flows are those of the addresses that eniup has not made.
fn storms(eniup: &Path, number: usize, seeds: Range<u64>, one_more: &dyn Fn()) -> Result<Summary> {
    let mut ground = Ground::build(eniup, number)?;
    let mut summary = Summary::default();
    converge(&ground, &mut summary)?;
    for seed in seeds {
        let is_rough = seed % 2 == 1;
        let (verbs, flows): (&[Verb], _) = match is_rough {
            false => (&GENTLE, ground.flow_specs()?),
            true => (&ROUGH, ground.flow_specs_of_primary()?),
        };
        let flows = Flows::start(&ground.lab, &flows)?;
        if let Err(error) = one_storm(&mut ground, seed, verbs, &mut summary) {
            summary.failures.push(format!("seed {seed}: {error:#}"));
        }
        if is_rough {
            // A run on trial whose time is up rolls back at any moment now; nobody has to wait for that.
            ground.eniup("release")?;
        }
        if let Err(error) = converge(&ground, &mut summary) {
            summary.failures.push(format!("seed {seed}, afterwards: {error:#}"));
        }
        end_flows(flows, &mut summary);
        one_more();
    }
    Ok(summary)
}

fn one_storm(ground: &mut Ground, seed: u64, verbs: &'static [Verb], summary: &mut Summary) -> Result<()> {
    let mut random = Rng::with_seed(seed);
    let chosen = |n| if n < CONTROLS { &CONTROL } else { &verbs[random.usize(0..verbs.len())] };
    let mut running: Vec<Run> = (0..AT_ONCE).map(chosen).map(|verb| Run::start(ground, verb)).collect::<Result<_>>()?;
    let (mut ended, mut wrong) = (Vec::new(), Vec::new());
    let mut changes = 0;
    while !running.is_empty() {
        let mut still = Vec::new();
        for mut run in running {
            match run.child.try_wait().context("waiting for a run")? {
                Some(_) => ended.push(run.end(summary)?),
                None if run.is_hanging() => wrong.push(run.give_up()?),
                None => {
                    run.stop_in_time()?;
                    still.push(run);
                }
            }
        }
        running = still;
        // As much happens as the runs have time for, and one thing at a time, so that no end is noticed late.
        match changes < ended.len() {
            true => drop(ground.change(&mut random)?),
            false => std::thread::sleep(Duration::from_millis(1)),
        }
        changes = (changes + 1).min(ended.len());
    }
    let of_controls = ended.iter().filter(|run| run.verb.arguments == CONTROL.arguments).map(|run| run.took);
    let slack = SLACK.max(4 * of_controls.max().unwrap_or_default());
    wrong.extend(ended.iter().filter_map(|run| run.wrong(slack)));
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// One of a storm.
struct Run {
    verb: &'static Verb,
    child: Child,
    started: Instant,
    is_told_to_end: bool,
}

impl Run {
    fn start(ground: &Ground, verb: &'static Verb) -> Result<Run> {
        let arguments = match verb.stays {
            None => format!("{} --timeout {}ms", verb.arguments, verb.timeout.as_millis()),
            Some(_) => verb.arguments.to_string(),
        };
        Ok(Run { verb, child: spawn(ground, &arguments)?, started: Instant::now(), is_told_to_end: false })
    }

    fn is_hanging(&self) -> bool {
        self.started.elapsed() >= 2 * self.verb.timeout + 10 * SLACK
    }

    /// Ends the process so that it is in nobody's way; gives what was wrong with it.
    fn give_up(mut self) -> Result<String> {
        self.child.kill().context("killing a run")?;
        self.child.wait()?;
        Ok(format!("{} with {:?} goes on after {:?}", self.verb.arguments, self.verb.timeout, self.started.elapsed()))
    }

    fn stop_in_time(&mut self) -> Result<()> {
        if !self.is_told_to_end && self.verb.stays.is_some_and(|time| self.started.elapsed() >= time) {
            // SAFETY: the child is not reaped yet, so the number is its own.
            let result = unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
            ensure!(result == 0, "telling {} to end: {}", self.verb.arguments, std::io::Error::last_os_error());
            self.is_told_to_end = true;
        }
        Ok(())
    }

    fn end(self, summary: &mut Summary) -> Result<Ended> {
        let Run { verb, child, started, is_told_to_end } = self;
        let took = started.elapsed();
        let output = child.wait_with_output()?;
        summary.count(output.status.code().unwrap_or(-1), took);
        Ok(Ended { verb, took, output, is_told_to_end })
    }
}

struct Ended {
    verb: &'static Verb,
    took: Duration,
    output: Output,
    is_told_to_end: bool,
}

impl Ended {
    /// What is, if it may take this much longer than it may wait.
    fn wrong(&self, slack: Duration) -> Option<String> {
        let Ended { verb: Verb { arguments, timeout, exits, late_exits, stays }, took, output, is_told_to_end } = self;
        let exit = output.status.code().unwrap_or(-1);
        let has_used_its_time = *took >= timeout.mul_f64(0.9);
        let is_true = exits.contains(&exit) || late_exits.contains(&exit) && has_used_its_time;
        let ends_as_told = stays.is_none() || *is_told_to_end;
        let is_right = is_true && ends_as_told && *took < *timeout + slack;
        let said = || String::from_utf8_lossy(&output.stderr).into_owned();
        (!is_right).then(|| format!("{arguments} with {timeout:?} took {took:?} ({}): {}", output.status, said()))
    }
}

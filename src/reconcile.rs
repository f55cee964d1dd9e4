//! The whole run, from top to bottom: read metadata, decide, observe, plan, apply, plan again and expect nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use tokio::time::{Instant, sleep_until};

use crate::config::Config;
use crate::desired::{Desired, desired};
use crate::eni::Attached;
use crate::imds::{Imds, Scope, Surroundings};
use crate::ledger::{self, Ledger, Noted};
use crate::lock::{self, Past, Turn};
use crate::machine_files;
use crate::metadata::{self, Unusable};
use crate::net::{Link, MacAddr, Observed};
use crate::netlink::Netlink;
use crate::plan::{Plan, Step, plan};
use crate::policy;
use crate::proof::{Judgement, Notes, Sighting, Taken, judge};
use crate::reading::{Reading, since_boot};
use crate::report::{self, Report, State, Trouble};
use crate::run::{self, Options, ROUNDS, SETTLING, carry_out, keep, observe_as_noted, observe_settled, unsettled};
use crate::selection::{select, unlisted_links};
use crate::trial::{self, InTheWay, Standing, Trial};
use crate::trouble::{listed, pending_troubles, plan_troubles, still_left_alone, unlisted_troubles, waiting_for_proof};
use crate::undo::{OVERDUE, last_trial, roll_back};

/// Before a pending ENI is asked for again; half as long again each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How long a turn may be in coming for what was read of metadata.
const FRESH: Duration = Duration::from_secs(1);

/// How long reading all of metadata again may take while others are kept out: this, and twice as long as without the turn right before,
/// which on a busy machine is long.
const HOLD: Duration = Duration::from_millis(500);
const LONGEST_HOLD: Duration = Duration::from_secs(2);

/// Makes the kernel agree with metadata, waiting for pending ENIs until the deadline.
///
/// # Errors
/// Nothing could be done: no lock, no metadata, no netlink, no permission, or another run's trial in the way. What
/// concerns single ENIs is in the report.
pub async fn reconcile(options: &Options) -> Result<Report> {
    reconcile_noting(options, None).await
}

/// The same on trial: everything is noted before it is changed.
///
/// # Errors
/// As for [`reconcile`]. What was done until then is in the trial.
pub async fn reconcile_on_trial(options: &Options, trial: &mut Trial) -> Result<Report> {
    reconcile_noting(options, Some(trial)).await
}

async fn reconcile_noting(options: &Options, mut trial: Option<&mut Trial>) -> Result<Report> {
    let mut netlink = Netlink::open().context("opening a netlink socket")?;
    // Who may not act is told at once.
    drop(lock::prepare(&options.directory)?);
    if trial::is_there(&options.directory) {
        // What is in the way is told at once, and what is to be rolled back is, whether metadata answers or not.
        drop(take_turn(&mut netlink, options).await?);
    }
    // Nobody is kept waiting while metadata is read.
    let before = lock::past(&options.directory)?;
    let surroundings = Surroundings::of(&netlink.observe().await?);
    let mut imds = Imds::connect(options.endpoint.as_deref(), &surroundings, options.deadline).await?;
    let reading = Reading::take(&mut imds, &options.config).await?;
    let (mut turn, mut ledger, mut reading) = turn_with(reading, before, &mut netlink, &mut imds, options).await?;
    // Once for each run: two that wait beside each other would make each other read all, again and again.
    lock::count_reading(&options.directory, reading.taken.ended);
    let mut report = Report::default();
    let mut pause = FIRST_PAUSE;
    loop {
        let (settled, attached) = settle(&mut netlink, &mut ledger, &reading, options, trial.as_deref_mut()).await?;
        report = report.followed_by(settled);
        if let Some(trial) = trial.as_deref_mut().filter(|trial| trial.has_begun()) {
            // Whoever is to confirm it does not wait for what is pending.
            trial.await_confirmation(since_boot()?, &options.directory)?;
            return Ok(report);
        }
        if report.is_settled() {
            // Nothing was to be done, which is as good as done.
            lift_hold(&mut netlink, options).await?;
        }
        if !report.may_pass() || Instant::now() + pause >= options.deadline {
            return Ok(report);
        }
        let waits = |trouble: &Trouble| pause == FIRST_PAUSE && trouble.state == State::Pending;
        for (eni, trouble) in report.troubles.iter().filter(|(_, trouble)| waits(trouble)) {
            let state = trouble.state.to_string();
            tracing::info!(eni = report::id(eni), state, reason = trouble.why, "waiting for {eni}: {}", trouble.why);
        }
        // Others may act meanwhile.
        let before = lock::past(&options.directory);
        drop(turn);
        sleep_until(Instant::now() + pause).await;
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
        let notes = &ledger.notes;
        let again = async {
            let reading = reading.again(&mut imds, &attached, notes, options.deadline, &options.config).await?;
            turn_with(reading, before?, &mut netlink, &mut imds, options).await
        };
        (turn, ledger, reading) = match again.await {
            Ok(again) => again,
            // What was done stays done, and what is pending stays pending; only waiting for it ends here.
            Err(_) if Instant::now() >= options.deadline => return Ok(report),
            Err(error) => {
                tracing::warn!("no longer waiting: {error:#}");
                return Ok(report);
            }
        };
    }
}

/// The lock, once no earlier run's trial is in the way, and the ledger, which nobody else writes meanwhile.
async fn take_turn(netlink: &mut Netlink, options: &Options) -> Result<(Turn, Ledger)> {
    let turn = lock::acquire(&options.directory, options.deadline).await?;
    let ledger = ledger::load_or_mend(&options.directory, since_boot()?);
    make_way(netlink, options).await?;
    Ok((turn, ledger))
}

/// A turn for what was read without one. Where another run has done anything meanwhile, or has read what is younger, or the turn was
/// long in coming, with all of it read anew: the machine may follow from what is newer, and metadata say something else. First that is
/// done without the turn, as nobody is to be kept out by a service that is silent by now; then within it for a moment, or one of many
/// runs would be overtaken again and again.
///
/// # Errors
/// As for [`take_turn`], and [`InTheWay`]: somebody has decided otherwise meanwhile, or it cannot be read anew until the deadline.
async fn turn_with(
    mut reading: Reading,
    mut before: Past,
    netlink: &mut Netlink,
    imds: &mut Imds,
    options: &Options,
) -> Result<(Turn, Ledger, Reading)> {
    let decisions = before.deeds.decisions;
    let mut took = None;
    loop {
        let asked = Instant::now();
        let (turn, ledger) = take_turn(netlink, options).await?;
        let now = lock::past(&options.directory)?;
        if now.deeds.decisions != decisions {
            return Err(InTheWay::Decided.into());
        }
        // A note of the future is of another boot.
        let is_younger = |read: u64| reading.taken.begun < read && since_boot().is_ok_and(|now| read <= now);
        let is_overtaken = now.deeds != before.deeds || now.read != before.read && is_younger(now.read);
        if !is_overtaken && asked.elapsed() <= FRESH {
            return Ok((turn, ledger, reading));
        }
        if let Some(took) = took {
            let deadline = options.deadline.min(Instant::now() + LONGEST_HOLD.min(HOLD + took * 2));
            if let Ok(again) = read_anew(&reading, imds, deadline, &options.config).await {
                imds.end_by(options.deadline);
                return Ok((turn, ledger, again));
            }
        }
        before = now;
        drop(turn);
        let begun = Instant::now();
        reading = read_anew(&reading, imds, options.deadline, &options.config).await?;
        took = Some(begun.elapsed());
    }
}

/// All of metadata, as soon as it tells at least what was known.
///
/// # Errors
/// Metadata does not answer, or does not tell all that was known, until the deadline.
async fn read_anew(known: &Reading, imds: &mut Imds, deadline: Instant, config: &Config) -> Result<Reading> {
    let mut pause = FIRST_PAUSE;
    imds.end_by(deadline);
    loop {
        let again = known.anew(imds, config).await;
        // What cannot be read for want of time would pass for pending.
        let is_late = Instant::now() >= deadline;
        match again {
            Ok(Some(again)) if !is_late => return Ok(again),
            Ok(_) if is_late => return Err(InTheWay::Overtaken.into()),
            Err(error) if is_late => return Err(error),
            Ok(_) | Err(_) => sleep_until(deadline.min(Instant::now() + pause)).await,
        }
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

/// Everything is decided from which ENI is the primary, so a snapshot that names another one than before is not believed, however
/// often it says so.
async fn ensure_known_primary(named: MacAddr, ledger: &Ledger, netlink: &mut Netlink) -> Result<()> {
    match ledger.primary() {
        Some(known) if known != named && netlink.links().await?.values().any(|link| link.mac == Some(known)) => {
            Err(Unusable::another_primary(named, known).into())
        }
        Some(_) | None => Ok(()),
    }
}

/// Makes the kernel agree with what was read; also gives what of that is ours to configure.
async fn settle(
    netlink: &mut Netlink,
    ledger: &mut Ledger,
    reading: &Reading,
    options: &Options,
    trial: Option<&mut Trial>,
) -> Result<(Report, Attached)> {
    let Reading { tree, taken, .. } = reading;
    let primary = reading.all.primary;
    ensure_known_primary(primary, ledger, netlink).await?;
    *ledger = std::mem::take(ledger).of(primary);
    let observed = observe_as_noted(netlink, ledger, options).await?;
    let all = &reading.told_here(&observed.links);
    let files = machine_files::read_of_container_networks();
    let ours = select(all, tree, &observed, &files, &options.config);
    let believed = believed(all, &ours, *taken, &observed, ledger, options);
    let (mut attached, mut taken_as_true) = (all.clone(), believed.clone());
    // By the links of the very moment: one that has come since, or has another name by now, may be left alone.
    let desire = |observed: &Observed| {
        attached = select(all, tree, observed, &files, &options.config);
        taken_as_true = select(&believed, tree, observed, &files, &options.config);
        desired(&taken_as_true, &options.config)
    };
    let mut report = converge(netlink, ledger, observed, desire, all.primary, options, trial).await?;
    report.troubles.extend(waiting_for_proof(&taken_as_true));
    report.troubles.extend(still_left_alone(&taken_as_true));
    report.troubles.extend(pending_troubles(&attached));
    report.enis = listed(&attached);
    if options.is_hotplug {
        report.troubles.extend(unlisted_troubles(all, &netlink.observe().await?, &options.config));
    }
    note_troubles(&report, ledger, options);
    Ok((report, attached))
}

/// Whether there may be anything to do, by a reading from before. Changes nothing.
///
/// # Errors
/// No netlink.
pub async fn may_differ(netlink: &mut Netlink, reading: &Reading, options: &Options) -> Result<bool> {
    let steps = differing(netlink, reading, options).await?;
    Ok(steps.iter().any(|step| !options.held_back.contains(&step.operation.to_string())))
}

/// Whether the kernel has anything of ours that this reading does not tell of, as long as that is not proven to be gone.
///
/// # Errors
/// No netlink.
pub async fn has_more(netlink: &mut Netlink, reading: &Reading, options: &Options) -> Result<bool> {
    Ok(differing(netlink, reading, options).await?.iter().any(|step| step.operation.takes_away()))
}

async fn differing(netlink: &mut Netlink, reading: &Reading, options: &Options) -> Result<Vec<Step>> {
    let ledger = ledger::load(&options.directory).of(reading.all.primary);
    let observed = ledger.recall(netlink.observe().await?, options.config.mark);
    let files = machine_files::read_of_container_networks();
    let attached = select(&reading.told_here(&observed.links), &reading.tree, &observed, &files, &options.config);
    Ok(plan(&desired(&attached, &options.config), &observed, attached.primary, &options.config).steps)
}

/// Of these links the ones that metadata may come to tell of, by name.
pub fn unlisted(links: BTreeMap<u32, Link>, reading: &Reading, config: &Config) -> BTreeSet<String> {
    let observed = Observed { links, ..Observed::default() };
    unlisted_links(&reading.all, &observed, config).into_iter().map(|link| link.name.clone()).collect()
}

/// The same for whoever stays: with a reading from before, and for as long as it takes to have one's turn. `known` is what was
/// done and read in all turns before that reading. Nothing is done, and none returned, where another run has done or read something
/// since: it may be newer.
///
/// # Errors
/// As for [`reconcile`], metadata apart.
pub async fn settle_again(
    netlink: &mut Netlink,
    reading: &Reading,
    known: &mut Past,
    options: &Options,
) -> Result<Option<Report>> {
    let (_turn, mut ledger) = take_turn(netlink, options).await?;
    if lock::past(&options.directory)? != *known {
        return Ok(None);
    }
    let notes = ledger.notes.clone();
    let settled = settle(netlink, &mut ledger, reading, options, None).await;
    // Two that stay would otherwise have each other ask again and again.
    if ledger.notes != notes {
        lock::count_reading(&options.directory, reading.taken.ended.max(known.read));
    }
    // Whatever was done meanwhile was done by this run.
    *known = lock::past(&options.directory)?;
    Ok(Some(settled?.0))
}

/// What is taken as true of a snapshot: all it says, and for an automatic run also what it lacks without proof.
fn believed(
    attached: &Attached,
    ours: &Attached,
    taken: Taken,
    observed: &Observed,
    ledger: &mut Ledger,
    options: &Options,
) -> Attached {
    let Judgement { attached, sightings, postponed } = match options.is_automatic {
        true => judge(attached, ours, observed, &ledger.notes, taken, &options.config),
        // Whatever was noted, this run acts on what it sees, and what is lost later is lost anew.
        false => Judgement::nothing_is_doubted(attached),
    };
    for lost in postponed {
        let pause = Duration::from_millis(policy::PROOF_PAUSE).as_secs();
        let is_in = |sightings: &BTreeSet<Sighting>| sightings.iter().any(|sighting| sighting.lost == lost);
        // Once is enough for a timer's log.
        match (is_in(&sightings), is_in(&ledger.notes.sightings)) {
            (true, false) => tracing::info!("{lost} stays: metadata has to lack it twice, at least {pause} s apart"),
            (true, true) => tracing::debug!("{lost} stays: metadata has to lack it twice, at least {pause} s apart"),
            (false, _) => tracing::debug!("{lost} stays: metadata does not tell all, so what it lacks proves nothing"),
        }
    }
    // Where nothing is ours nothing has arrived.
    let has_ours = observed.addresses.iter().any(|(_, address)| policy::owns_address(&options.config, address));
    let unknown_before = ledger.notes.unknown_before.filter(|_| has_ours);
    let arrivals = ledger.notes.recent_arrivals(taken);
    let macs: BTreeSet<MacAddr> = attached.macs().collect();
    // Who is pending has not been told to be anything else.
    let was_left_alone = |mac: &MacAddr| macs.contains(mac) && !ours.ready.contains_key(mac);
    let known = ledger.notes.left_alone.iter().copied().filter(was_left_alone);
    let left_alone = known.chain(ours.ignored.keys().copied()).chain(attached.still_left_alone.iter().copied());
    let left_alone = left_alone.collect();
    let notes = Notes { sightings, arrivals, attached: Some(macs), left_alone, unknown_before };
    keep(ledger, ledger.with_notes(notes), options);
    attached
}

/// Sees to an earlier run's trial: what is still to be confirmed is not overtaken, what should have been rolled back is
/// rolled back before anything else, and what was rolled back is done again by hand only.
async fn make_way(netlink: &mut Netlink, options: &Options) -> Result<()> {
    let Some(mut trial) = last_trial(netlink, options).await? else { return Ok(()) };
    match trial.standing(since_boot()?) {
        Standing::Confirmed | Standing::Superseded => Ok(()),
        Standing::Waits(left) => Err(InTheWay::Waits(left).into()),
        Standing::RolledBack(why) if options.is_automatic => Err(InTheWay::RolledBack(why).into()),
        // It holds automatic runs back until this one has come to something.
        Standing::RolledBack(_) => Ok(()),
        Standing::Overdue => {
            roll_back(&mut trial, OVERDUE, netlink, options).await?;
            bail!(
                "{OVERDUE}, so it was rolled back and nothing else was done; run `eniup reconcile` to have it after all"
            )
        }
    }
}

/// What was rolled back is had after all, by hand, so automatic runs may go on with it. The lock has to be held.
///
/// # Errors
/// No netlink, or it cannot be written.
async fn lift_hold(netlink: &mut Netlink, options: &Options) -> Result<()> {
    match last_trial(netlink, options).await? {
        Some(mut trial) if trial.was_rolled_back() => trial.become_state(trial::State::Superseded, &options.directory),
        Some(_) | None => Ok(()),
    }
}

/// Applies until nothing is left to do, a few rounds at most; what is left then is reported.
async fn converge(
    netlink: &mut Netlink,
    ledger: &mut Ledger,
    mut observed: Observed,
    mut desire: impl FnMut(&Observed) -> Desired,
    primary: MacAddr,
    options: &Options,
    mut trial: Option<&mut Trial>,
) -> Result<Report> {
    let mut report = Report::default();
    let mut failures = Vec::new();
    for round in 0.. {
        if round > 0 {
            // Only what this run has changed is worth waiting for.
            observed = observe_settled(netlink, ledger, options, SETTLING).await?;
        }
        let desired = desire(&observed);
        let mut plan = plan(&desired, &observed, primary, &options.config);
        report.drift = plan.steps.len();
        plan.steps.retain(|step| !options.held_back.contains(&step.operation.to_string()));
        if plan.steps.is_empty() || round == ROUNDS {
            report.notes.clone_from(&plan.notes);
            report.troubles.extend(plan_troubles(&plan, &failures));
            let machine: Vec<Step> = plan.steps.into_iter().filter(|step| step.eni.is_none()).collect();
            report.unsettled = unsettled(&machine, &failures);
            break;
        }
        match &mut trial {
            Some(trial) => {
                trial.note(&plan.steps, &observed, ledger, &options.directory)?;
                lock::count_decision(&options.directory);
            }
            None => lift_hold(netlink, options).await?,
        }
        let noted = ledger.noting(&plan.steps, &observed);
        keep(ledger, noted.with_arrivals(&plan.steps, &desired, &observed, since_boot()?), options);
        lock::count_change(&options.directory);
        failures = carry_out(netlink, &plan, &mut report).await?;
    }
    Ok(report)
}

/// For `status`: what is not so, and since when.
fn note_troubles(report: &Report, ledger: &mut Ledger, options: &Options) {
    let since = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let noted = |(eni, trouble): (&String, &Trouble)| {
        let is_failed = trouble.state == State::Failed;
        (eni.clone(), Noted { why: trouble.why.clone(), since, is_failed })
    };
    keep(ledger, ledger.with_troubles(report.troubles.iter().map(noted)), options);
}

/// What a run would do at this moment, without waiting for pending ENIs and without changing anything.
///
/// # Errors
/// No metadata or no netlink.
pub async fn preview(endpoint: Option<&str>, deadline: Instant, config: &Config) -> Result<(Attached, Plan)> {
    let observed = run::observe(config).await?;
    let mut imds = Imds::connect(endpoint, &Surroundings::of(&observed), deadline).await?;
    let tree = imds.snapshot(Scope::of(config)).await?;
    let files = machine_files::read_of_container_networks();
    let attached = select(&metadata::attached_here(&tree, &observed.links)?, &tree, &observed, &files, config);
    let plan = plan(&desired(&attached, config), &observed, attached.primary, config);
    Ok((attached, plan))
}

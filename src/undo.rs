//! Taking away what is ours, and taking back what a run on trial has done.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::config::Config;
use crate::ledger::{self, Ledger};
use crate::lock;
use crate::net::Observed;
use crate::netlink::Netlink;
use crate::plan::{Plan, spare_carriers};
use crate::reading::since_boot;
use crate::release::{Share, release};
use crate::report::Report;
use crate::rollback::rollback;
use crate::run::{Options, ROUNDS, SETTLING, carry_out, keep, observe_settled, unsettled};
use crate::selection::ignored_links;
use crate::trial::{self, InTheWay, Standing, Trial};
use crate::typo;

/// The last trial of this machine. The lock has to be held as long as anything is done about it.
///
/// # Errors
/// No netlink.
pub async fn last_trial(netlink: &mut Netlink, options: &Options) -> Result<Option<Trial>> {
    let Some(trial) = trial::load_or_mend(&options.directory) else { return Ok(None) };
    Ok(trial.is_of_machine(&netlink.links().await?).then_some(trial))
}

/// Ends an earlier run's trial, since what it noted is not to come back. The lock has to be held.
///
/// # Errors
/// No netlink, or it cannot be written.
async fn end_trial(netlink: &mut Netlink, options: &Options) -> Result<()> {
    match last_trial(netlink, options).await? {
        // There is nothing to come back, and whoever was cut off would be again as soon as an automatic run comes.
        Some(trial) if trial.was_rolled_back() => Ok(()),
        Some(mut trial) => trial.become_state(trial::State::Superseded, &options.directory),
        None => Ok(()),
    }
}

/// What is one ENI's decides nothing about the rest of what a run on trial has done. The lock has to be held.
///
/// # Errors
/// No netlink, or [`InTheWay`]: it can still be confirmed.
async fn ensure_no_trial(netlink: &mut Netlink, options: &Options) -> Result<()> {
    let Some(trial) = last_trial(netlink, options).await? else { return Ok(()) };
    match trial.standing(since_boot()?) {
        Standing::Waits(left) => Err(InTheWay::Waits(left).into()),
        Standing::Overdue | Standing::RolledBack(_) | Standing::Confirmed | Standing::Superseded => Ok(()),
    }
}

/// Whether an earlier run's trial was to be rolled back, and is by now. The lock has to be held.
///
/// # Errors
/// As for [`roll_back`].
async fn is_rolled_back_now(netlink: &mut Netlink, options: &Options) -> Result<bool> {
    let Some(mut trial) = last_trial(netlink, options).await? else { return Ok(false) };
    let is_overdue = trial.standing(since_boot()?) == Standing::Overdue;
    if is_overdue {
        roll_back(&mut trial, OVERDUE, netlink, options).await?;
    }
    Ok(is_overdue)
}

/// Why a trial is rolled back by another run.
pub const OVERDUE: &str = "an earlier run was not confirmed in time";

/// Puts back what the run on trial has changed, and says so in the trial. Whoever finds it meanwhile would do the same.
///
/// # Errors
/// No netlink, or not all could be put back: then the trial stays overdue.
pub async fn roll_back(trial: &mut Trial, why: &str, netlink: &mut Netlink, options: &Options) -> Result<()> {
    trial.until = trial.until.min(since_boot()?);
    lock::count_decision(&options.directory);
    warn_of(trial.save(&options.directory));
    let mut report = Report::default();
    let mut failures = Vec::new();
    for round in 0.. {
        let mut ledger = ledger::load(&options.directory).of(trial.primary);
        let patience = if round == 0 { Duration::ZERO } else { SETTLING };
        let observed = observe_settled(netlink, &mut ledger, options, patience).await?;
        let plan = rollback(&trial.before, &observed, &options.config);
        if plan.steps.is_empty() {
            plan.notes.iter().for_each(|note| tracing::warn!("{note}"));
            // Whatever is changed from now on is changed by others.
            let noted = ledger.with_links(&trial.found, &observed);
            keep(&mut ledger, noted, options);
            break;
        }
        if round == ROUNDS {
            bail!("rolling back ({why}) is not complete; not done: {}", unsettled(&plan.steps, &failures).join("; "));
        }
        let noted = ledger.noting(&plan.steps, &observed);
        keep(&mut ledger, noted, options);
        lock::count_change(&options.directory);
        failures = carry_out(netlink, &plan, &mut report).await?;
    }
    warn_of(trial.become_state(trial::State::RolledBack(why.into()), &options.directory));
    Ok(())
}

/// A rollback does not depend on what can be written; at worst the next run does it again and finds it done.
fn warn_of(written: Result<()>) {
    if let Err(error) = written {
        tracing::warn!("{error:#}; rolling back all the same");
    }
}

/// Takes away everything that is ours, or what of it belongs to one ENI. Metadata is not asked.
///
/// # Errors
/// No lock, no netlink, no permission, or no link of that ENI.
pub async fn take_away(eni: Option<&str>, options: &Options) -> Result<Report> {
    let _turn = lock::acquire(&options.directory, options.deadline).await?;
    ledger::load_or_mend(&options.directory, since_boot()?);
    let mut netlink = Netlink::open().context("opening a netlink socket")?;
    let mut report = Report::default();
    let mut failures = Vec::new();
    // Found once: its name goes with the rest.
    let mut share = share(eni, &netlink.observe().await?, &options.config)?;
    if share.is_some() && is_rolled_back_now(&mut netlink, options).await? {
        share = self::share(eni, &netlink.observe().await?, &options.config)?;
    }
    for round in 0.. {
        let (plan, ledger) = what_is_ours(&mut netlink, share.as_ref(), options).await?;
        // Of all that is ours also what a run on trial has taken away must not come back.
        if round == 0 && (share.is_none() || !plan.steps.is_empty()) {
            // As late as can be, or a release that fails would have ended it for nothing; but before anything is taken away,
            // or a rollback would bring some of it back.
            match share {
                Some(_) => ensure_no_trial(&mut netlink, options).await?,
                None => end_trial(&mut netlink, options).await?,
            }
            lock::count_decision(&options.directory);
        }
        if plan.steps.is_empty() {
            report.unsettled = plan.notes;
            // What stays has to be known as ours to the one who comes back for it, and an old kernel does not tell.
            let observed = netlink.observe().await?;
            let left = match share {
                _ if !report.unsettled.is_empty() => ledger.of_what_differs(&observed),
                Some(share) => ledger.without(share.link),
                None => ledger.only_of(&ignored_links(&observed, &options.config)),
            };
            ledger::save(&left, &options.directory);
            return Ok(report);
        }
        if round == ROUNDS {
            report.unsettled = unsettled(&plan.steps, &failures);
            break;
        }
        failures = carry_out(&mut netlink, &plan, &mut report).await?;
    }
    Ok(report)
}

/// What [`take_away`] would take away at this moment.
///
/// # Errors
/// No netlink, or no link of that ENI.
pub async fn preview_release(eni: Option<&str>, options: &Options) -> Result<Plan> {
    let mut netlink = Netlink::open().context("opening a netlink socket")?;
    let share = share(eni, &netlink.observe().await?, &options.config)?;
    Ok(what_is_ours(&mut netlink, share.as_ref(), options).await?.0)
}

fn share(eni: Option<&str>, observed: &Observed, config: &Config) -> Result<Option<Share>> {
    let Some(id) = eni else { return Ok(None) };
    let names = observed.links.values().flat_map(|link| &link.altnames).map(String::as_str);
    let ids: Vec<&str> = names.filter(|name| name.starts_with("eni-")).collect();
    let share = Share::of(id, observed, config).with_context(|| match ids.as_slice() {
        [] => format!("no link is called {id}, nor by any ENI's id"),
        ids => format!("no link is called {id}; there are {}{}", ids.join(", "), typo::hint(id, ids.iter().copied())),
    })?;
    Ok(Some(share))
}

/// As steps that take it away, with the ledger by which it is told.
async fn what_is_ours(netlink: &mut Netlink, share: Option<&Share>, options: &Options) -> Result<(Plan, Ledger)> {
    let observed = netlink.observe().await?;
    let ledger = ledger::load(&options.directory).of_machine(&observed);
    let observed = ledger.recall(observed, options.config.mark);
    let plan = release(&observed, share, &ledger, &options.config);
    let mut plan = match share {
        Some(share) => share.only(plan),
        None => plan,
    };
    plan.notes = spare_carriers(&mut plan.steps, &observed, &options.config);
    Ok((plan, ledger))
}

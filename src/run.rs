//! What every run has: what it needs from outside, how it sees the kernel, and how steps are carried out.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::{Instant, sleep_until};

use crate::config::Config;
use crate::ledger::{self, Ledger};
use crate::lock;
use crate::net::Observed;
use crate::netlink::apply::Outcome;
use crate::netlink::{self, Netlink};
use crate::plan::{Plan, Step};
use crate::policy;
use crate::report::Report;
use crate::tally::{self, Event};

/// Another manager may undo or overtake a change while it is made; more rounds than this would be a fight.
pub const ROUNDS: usize = 3;

/// How long the kernel may be busy with what it has acknowledged, and how often it is looked at meanwhile. On a link
/// without a carrier it never gets done, and that is no reason to wait longer.
pub const SETTLING: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_millis(1);

/// What a run needs from outside.
pub struct Options {
    /// Instead of the well-known endpoints.
    pub endpoint: Option<String>,
    /// All waiting ends by then: for the lock, for metadata, for pending ENIs.
    pub deadline: Instant,
    /// Holds the lock and the ledger.
    pub directory: PathBuf,
    /// Nobody looks on: what rests on metadata alone is taken away on proof only.
    pub is_automatic: bool,
    /// Not to be carried out for now, as `Operation` shows them: somebody undoes them again and again.
    pub held_back: BTreeSet<String>,
    /// A link has come or gone: metadata lists an ENI seconds after its link is here at times, so it is waited for.
    pub is_hotplug: bool,
    pub config: Config,
}

/// The kernel refused for want of a capability.
#[derive(Debug)]
pub struct NotPermitted;

impl std::fmt::Display for NotPermitted {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "changing the network needs CAP_NET_ADMIN: run it as root (sudo eniup …); `eniup plan` needs nothing")
    }
}

impl std::error::Error for NotPermitted {}

/// Writes the ledger, if there is anything new in it.
pub fn keep(ledger: &mut Ledger, noted: Ledger, options: &Options) {
    if noted != *ledger {
        ledger::save(&noted, &options.directory);
        *ledger = noted;
    }
}

/// What the kernel has, with the marks that it has lost.
pub async fn observe_as_noted(netlink: &mut Netlink, ledger: &mut Ledger, options: &Options) -> Result<Observed> {
    let observed = netlink.observe().await?;
    if let Some(noted) = ledger.learning_marks(&observed, options.config.mark) {
        keep(ledger, noted, options);
    }
    Ok(ledger.recall(observed, options.config.mark))
}

/// The same, once it is done with what it has acknowledged.
pub async fn observe_settled(
    netlink: &mut Netlink,
    ledger: &mut Ledger,
    options: &Options,
    patience: Duration,
) -> Result<Observed> {
    let deadline = Instant::now() + patience;
    loop {
        let observed = observe_as_noted(netlink, ledger, options).await?;
        if Instant::now() >= deadline || !policy::is_settling(&options.config, &observed) {
            return Ok(observed);
        }
        sleep_until(Instant::now() + LOOK).await;
    }
}

/// A step that failed, and why.
pub type Failure = (Step, String);

/// Carries out a plan; what failed is not reported yet, since another round may mend it.
///
/// # Errors
/// [`NotPermitted`], or no netlink.
pub async fn carry_out(netlink: &mut Netlink, plan: &Plan, report: &mut Report) -> Result<Vec<Failure>> {
    let outcomes = netlink.apply(&plan.steps).await?;
    let mut failures = Vec::new();
    for (step, outcome) in plan.steps.iter().zip(outcomes) {
        match outcome {
            Outcome::Done => {
                report.done.push(step.operation.to_string());
                tally::count(Event::Change(step.operation.action()));
                let Step { eni, operation, reason } = step;
                let action = operation.action();
                tracing::info!(eni, link = operation.link(), action, reason, "{step}");
            }
            Outcome::AlreadySo => {
                tracing::debug!("already so: {step}");
                // Of no interest, unless the step is still to be done when all is looked at again.
                failures.push((step.clone(), "something else is in its place".into()));
            }
            Outcome::Skipped => tracing::debug!("left out after a failure: {step}"),
            Outcome::Failed(error) if is_permission(&error) => return Err(NotPermitted.into()),
            Outcome::Failed(error) => {
                tracing::debug!("failed ({error}): {step}");
                failures.push((step.clone(), error.to_string()));
            }
        }
    }
    Ok(failures)
}

fn is_permission(error: &netlink::Error) -> bool {
    error.errno() == Some(libc::EPERM)
}

/// These steps are still to be done: each in words, with why it failed.
pub fn unsettled(steps: &[Step], failures: &[Failure]) -> Vec<String> {
    let why = |step: &Step| match failures.iter().find(|(failed, _)| failed.operation == step.operation) {
        Some((_, error)) => format!("{} ({error})", step.operation),
        None => format!("{} (made, but undone by somebody else, or left out after a failure)", step.operation),
    };
    steps.iter().map(why).collect()
}

/// What the kernel has, for commands that change nothing.
///
/// # Errors
/// No netlink.
pub async fn observe(config: &Config) -> Result<Observed> {
    let observed = Netlink::open().context("opening a netlink socket")?.observe().await?;
    Ok(ledger::load(&lock::runtime_directory()).of_machine(&observed).recall(observed, config.mark))
}

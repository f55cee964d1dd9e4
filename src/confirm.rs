//! A run on trial: it is made, and undone unless somebody confirms it in time. Whoever typed it may have cut off the very
//! connection by which it was typed, so this process goes on when its terminal is gone.

use std::future::pending;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures::FutureExt;
use futures::future::{Either, select, select_all};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};

use crate::imds::{Imds, Surroundings, Watch};
use crate::net::{MacAddr, Observed};
use crate::netlink::Netlink;
use crate::place::find_link;
use crate::policy;
use crate::reading::since_boot;
use crate::reconcile::reconcile_on_trial;
use crate::report::Report;
use crate::run::{Options, observe};
use crate::trial::{self, Standing, State, Trial};
use crate::undo::{OVERDUE, last_trial, roll_back};
use crate::{lock, metadata};

/// How often it is looked whether somebody has confirmed.
const LOOK: Duration = Duration::from_millis(100);

/// How long a rollback waits for its turn. Other runs end soon: none does anything while this one is on trial. One that was
/// stopped does not, and somebody may be cut off.
const PATIENCE: Duration = Duration::from_secs(30);

/// For how long a rollback that fails is tried again, and how soon; half as long again each time.
const PERSISTENCE: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A run that was made and waits for its confirmation.
pub struct Guard {
    trial: Trial,
    watch: Option<Watch>,
    signals: Signals,
}

/// What became of a run on trial.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    Confirmed,
    /// What was there before is there again, for this reason.
    RolledBack(String),
    /// Somebody has decided otherwise by hand meanwhile.
    Superseded,
}

/// Makes the kernel agree with metadata. Where anything was to be changed for it, the guard has to be waited for.
///
/// # Errors
/// As for [`reconcile`](crate::reconcile::reconcile); what was done until then is rolled back.
pub async fn try_out(options: &Options, window: Duration) -> Result<(Report, Option<Guard>)> {
    let mut signals = Signals::catch().context("catching signals")?;
    let mut trial = None;
    // A signal lets go of the run where it stands: the kernel has made each change that was sent, and the trial knows it.
    let outcome = match select(pin!(run(options, window, &mut trial)), pin!(signals.end())).await {
        Either::Left((result, _)) => result,
        Either::Right((name, _)) => Err(anyhow!("ended by {name}")),
    };
    let trial = trial.filter(Trial::has_begun);
    match (outcome, trial) {
        (Ok((report, watch)), trial) => Ok((report, trial.map(|trial| Guard { trial, watch, signals }))),
        (Err(error), None) => Err(error),
        (Err(error), Some(mut trial)) => {
            let what = match roll_back_alone(&mut trial, &format!("{error:#}"), options).await? {
                Verdict::RolledBack(_) => "what was done was rolled back",
                Verdict::Confirmed | Verdict::Superseded => "what was done was decided on by hand",
            };
            Err(error.context(what))
        }
    }
}

async fn run(options: &Options, window: Duration, trial: &mut Option<Trial>) -> Result<(Report, Option<Watch>)> {
    let observed = observe(&options.config).await?;
    let mut imds = Imds::connect(options.endpoint.as_deref(), &Surroundings::of(&observed), options.deadline).await?;
    let primary = metadata::primary(&imds.primary().await?)?;
    // Before anything is changed: which way leads there now.
    let watch = find_watch(options, primary, &observed).await?;
    let begun = since_boot()?;
    let left = options.deadline.saturating_duration_since(Instant::now()).as_millis() as u64;
    let trial = trial.insert(Trial::new(primary, window, begun, begun + left));
    Ok((reconcile_on_trial(options, trial).await?, watch))
}

async fn find_watch(options: &Options, primary: MacAddr, observed: &Observed) -> Result<Option<Watch>> {
    let Some(link) = find_link(primary, observed).ok().flatten() else { return Ok(None) };
    let endpoint = options.endpoint.as_deref();
    let watch = Watch::find(endpoint, &Surroundings::of(observed), &link.name, options.deadline).await?;
    if watch.is_none() {
        tracing::warn!("metadata is not reached by {0}, so it is not watched whether {0} loses it", link.name);
    }
    Ok(watch)
}

/// Keeps what the run on trial has done.
///
/// # Errors
/// There is nothing to confirm, or it is too late.
pub async fn confirm(options: &Options) -> Result<()> {
    const NOTHING: &str = "there is nothing to confirm";
    let _turn = lock::acquire(&options.directory, options.deadline).await?;
    let mut netlink = Netlink::open().context("opening a netlink socket")?;
    let Some(mut trial) = last_trial(&mut netlink, options).await? else {
        bail!("{NOTHING}: no `eniup reconcile --confirm` has changed anything");
    };
    match trial.standing(since_boot()?) {
        Standing::Waits(_) => trial.become_state(State::Confirmed, &options.directory),
        Standing::Confirmed => bail!("{NOTHING}: the last run is confirmed already"),
        Standing::Superseded => bail!("{NOTHING}: another run by hand has come since"),
        Standing::RolledBack(why) => bail!("{NOTHING}: the run was rolled back ({why})"),
        Standing::Overdue => {
            roll_back(&mut trial, OVERDUE, &mut netlink, options).await?;
            bail!("too late: {OVERDUE}, and was rolled back at this moment");
        }
    }
}

impl Guard {
    /// Waits for the confirmation and rolls back without it.
    ///
    /// # Errors
    /// Not all could be put back.
    pub async fn wait(mut self, options: &Options) -> Result<Verdict> {
        let why = match self.end(&options.directory).await {
            End::Decided(verdict) => return Ok(verdict),
            End::Due(why) => why,
        };
        roll_back_alone(&mut self.trial, &why, options).await
    }

    async fn end(&mut self, directory: &Path) -> End {
        let Guard { trial, watch, signals } = self;
        let lost = async {
            match watch {
                Some(watch) => End::Due(watch.lost(policy::WATCH_PAUSE, policy::WATCH_FAILURES).await),
                None => pending().await,
            }
        };
        let signalled = signals.end().map(|name| End::Due(format!("ended by {name}")));
        let ends = [decided(trial, directory).boxed_local(), lost.boxed_local(), signalled.boxed_local()];
        select_all(ends).await.0
    }
}

/// Why the waiting ends.
enum End {
    Decided(Verdict),
    /// It has to be rolled back.
    Due(String),
}

async fn decided(trial: &Trial, directory: &Path) -> End {
    loop {
        if let Some(verdict) = verdict(trial, directory) {
            return End::Decided(verdict);
        }
        // Without a clock nobody can tell whether it is too late.
        if since_boot().map_or(true, |now| now >= trial.until) {
            let window = humantime::format_duration(Duration::from_millis(trial.window));
            return End::Due(format!("nobody confirmed it within {window}"));
        }
        sleep(LOOK).await;
    }
}

/// What others have made of it. A note that is missing or cannot be read is no confirmation.
fn verdict(trial: &Trial, directory: &Path) -> Option<Verdict> {
    let noted = trial::load(directory).ok().flatten()?;
    match noted.state {
        _ if !noted.is_same(trial) => Some(Verdict::Superseded),
        State::Open => None,
        State::Confirmed => Some(Verdict::Confirmed),
        State::Superseded => Some(Verdict::Superseded),
        State::RolledBack(why) => Some(Verdict::RolledBack(why)),
    }
}

/// Rolls back, unless it is decided by the time that this has its turn. What fails is tried again: somebody may be cut off.
async fn roll_back_alone(trial: &mut Trial, why: &str, options: &Options) -> Result<Verdict> {
    let (begun, mut pause) = (Instant::now(), FIRST_PAUSE);
    let mut told = String::new();
    loop {
        let error = match roll_back_now(trial, why, options).await {
            Ok(verdict) => return Ok(verdict),
            Err(error) if begun.elapsed() + pause >= PERSISTENCE => {
                return Err(error.context("what was done is not rolled back yet: the next run of eniup tries it again"));
            }
            Err(error) => format!("{error:#}"),
        };
        if error != told {
            tracing::warn!("rolling back is tried again: {error}");
            told = error;
        }
        sleep(pause).await;
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

async fn roll_back_now(trial: &mut Trial, why: &str, options: &Options) -> Result<Verdict> {
    let turn = lock::acquire(&options.directory, Instant::now() + PATIENCE).await;
    if let Err(error) = &turn {
        tracing::warn!("{error:#}; rolling back all the same");
    }
    if let Some(verdict) = verdict(trial, &options.directory) {
        return Ok(verdict);
    }
    let mut netlink = Netlink::open().context("opening a netlink socket")?;
    roll_back(trial, why, &mut netlink, options).await?;
    Ok(Verdict::RolledBack(why.into()))
}

/// Signals that would end or stop this process while others rely on it.
struct Signals {
    ends: Vec<(&'static str, Signal)>,
    /// Of a terminal that goes away or wants it to stop: caught, and nothing more.
    _ignored: Vec<Signal>,
}

impl Signals {
    fn catch() -> std::io::Result<Signals> {
        let ends = [("SIGINT", libc::SIGINT), ("SIGQUIT", libc::SIGQUIT), ("SIGTERM", libc::SIGTERM)];
        let ignored = [libc::SIGHUP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
        let catch = |number: libc::c_int| signal(SignalKind::from_raw(number));
        Ok(Signals {
            ends: ends.into_iter().map(|(name, number)| Ok((name, catch(number)?))).collect::<std::io::Result<_>>()?,
            _ignored: ignored.into_iter().map(catch).collect::<std::io::Result<_>>()?,
        })
    }

    /// The name of the first that asks this process to end.
    async fn end(&mut self) -> &'static str {
        let received = self.ends.iter_mut().map(|(name, signal)| {
            let name = *name;
            async move {
                signal.recv().await;
                name
            }
            .boxed_local()
        });
        select_all(received).await.0
    }
}

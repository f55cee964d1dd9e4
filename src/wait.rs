//! Waiting until an address or an ENI is configured, whoever configures it: the kernel tells when something changes, and
//! metadata is asked meanwhile. Changes nothing.

use std::collections::BTreeSet;
use std::fmt;
use std::future::pending;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::FutureExt;
use futures::future::{LocalBoxFuture, select_all};
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::Config;
use crate::desired::desired;
use crate::explain::Said;
use crate::imds::{self, Imds, Scope, Surroundings};
use crate::machine_files;
use crate::metadata::{self, Tree};
use crate::net::{MacAddr, Observed};
use crate::netlink::Netlink;
use crate::netlink::events::Events;
use crate::plan::plan;
use crate::readiness::{Readiness, Target, of_address, of_eni, question, to_ask_again, why_not};
use crate::report::Exit;
use crate::run;
use crate::selection::select;

/// After something has changed, more does: a run makes its changes in a row.
const QUIET: Duration = Duration::from_millis(5);

/// Some of what is looked at changes without an event, as `accept_ra` does.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Before metadata is asked again; half as long again each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// For an address, of which metadata only says why it is not there: that is worth few requests.
const PAUSE_FOR_ADDRESS: Duration = Duration::from_secs(10);

/// What was waited for is not there.
#[derive(Debug)]
pub struct Unready {
    what: String,
    /// How long it was waited for; none when waiting does not help.
    waited: Option<Duration>,
    why: String,
}

impl Unready {
    pub fn exit(&self) -> Exit {
        if self.waited.is_some() { Exit::Degraded } else { Exit::Failed }
    }
}

impl fmt::Display for Unready {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Unready { what, waited, why } = self;
        match waited {
            Some(waited) => write!(f, "{what} is not configured after {:.1} s: {why}", waited.as_secs_f64()),
            None => write!(f, "{what} will not be configured: {why}"),
        }
    }
}

impl std::error::Error for Unready {}

/// Until it is configured; gives what there is to say of it then.
///
/// # Errors
/// [`Unready`]; no netlink; and for an ENI no metadata, since the kernel does not know what belongs to one.
pub async fn wait(target: &Target, endpoint: Option<&str>, deadline: Instant, config: &Config) -> Result<String> {
    let what = shown(target);
    let started = Instant::now();
    let mut events = Events::open(config.mark).context("listening to the kernel")?;
    let mut netlink = Netlink::open().context("opening a netlink socket")?;
    let mut metadata = Metadata::new(target, endpoint, deadline, config);
    let mut last_why = String::new();
    loop {
        events.forget().context("listening to the kernel")?;
        let observed = run::observe(config).await?;
        let why = match judge(target, &observed, &metadata, &mut netlink, config).await? {
            Readiness::Ready(how) => return Ok(format!("{what} is configured: {how}")),
            Readiness::Never(why) => return Err(Unready { what, waited: None, why }.into()),
            Readiness::Waits(why) => why,
        };
        if Instant::now() >= deadline {
            metadata.end(target, &observed).await?;
            return Err(Unready { what, waited: Some(started.elapsed()), why }.into());
        }
        // Not before metadata has had its say: for what is there a moment later nobody needs to hear that it was not.
        if metadata.has_answered() && last_why != why {
            tracing::info!("waiting for {what}: {why}");
            last_why = why;
        }
        metadata.ask(target, &observed);
        let event = async { events.changed().await.context("listening to the kernel") }.boxed_local();
        let look_again = sleep_until(deadline.min(Instant::now() + LOOK_AGAIN)).map(|()| Ok(())).boxed_local();
        let answer = metadata.answer().map(|()| Ok(())).boxed_local();
        select_all([answer, event, look_again]).await.0?;
        sleep(QUIET).await;
        metadata.check(target)?;
    }
}

fn shown(target: &Target) -> String {
    match target {
        Target::Address(address) => address.to_string(),
        Target::Eni(id) => id.clone(),
    }
}

async fn judge(
    target: &Target,
    observed: &Observed,
    metadata: &Metadata<'_>,
    netlink: &mut Netlink,
    config: &Config,
) -> Result<Readiness> {
    let here = |tree| metadata::attached_here(tree, &observed.links);
    let known = metadata.tree.as_ref().map(|tree| Ok::<_, metadata::Unusable>((tree, here(tree)?)));
    let files = machine_files::read_of_container_networks();
    let known = known.transpose()?.map(|(tree, all)| (tree, select(&all, tree, observed, &files, config)));
    match (target, known) {
        (Target::Eni(id), Some((_, attached))) => {
            let plan = plan(&desired(&attached, config), observed, attached.primary, config);
            Ok(of_eni(id, &attached, &plan, observed, config))
        }
        (Target::Eni(_), None) => Ok(Readiness::Waits("metadata has not answered".into())),
        (Target::Address(address), known) => {
            let said = match observed.addresses.iter().any(|(_, there)| there.net.addr() == *address) {
                true => netlink.ask(&question(*address)).await?,
                false => Said::Nothing("nobody has it".into()),
            };
            match (of_address(*address, observed, &said), known.map(|(tree, all)| why_not(*address, tree, &all))) {
                (Readiness::Waits(why), Some(Readiness::Waits(hint))) => Ok(Readiness::Waits(format!("{why}; {hint}"))),
                (Readiness::Waits(_), Some(Readiness::Never(why))) => Ok(Readiness::Never(why)),
                (readiness, _) => Ok(readiness),
            }
        }
    }
}

type Answer = (Option<Imds>, Result<Tree, imds::Error>);

/// What metadata says, asked for again and again.
struct Metadata<'a> {
    endpoint: Option<&'a str>,
    deadline: Instant,
    scope: Scope,
    tree: Option<Tree>,
    imds: Option<Imds>,
    asking: Option<LocalBoxFuture<'static, Answer>>,
    pause: Duration,
    /// It is not asked any more.
    failure: Option<imds::Error>,
}

impl<'a> Metadata<'a> {
    fn new(target: &Target, endpoint: Option<&'a str>, deadline: Instant, config: &Config) -> Metadata<'a> {
        let (scope, pause) = match target {
            // Public addresses are among the details.
            Target::Address(_) => (Scope::details(config), PAUSE_FOR_ADDRESS),
            Target::Eni(_) => (Scope::of(config), FIRST_PAUSE),
        };
        Metadata { endpoint, deadline, scope, tree: None, imds: None, asking: None, pause, failure: None }
    }

    fn has_answered(&self) -> bool {
        self.tree.is_some() || self.failure.is_some()
    }

    /// Begins to ask, unless it is being asked or of no use.
    fn ask(&mut self, target: &Target, observed: &Observed) {
        if self.asking.is_some() || self.failure.is_some() {
            return;
        }
        let (endpoint, scope, deadline) = (self.endpoint.map(String::from), self.scope, self.deadline);
        let again = self.tree.clone().zip(self.imds.take());
        self.asking = Some(match again {
            None => first(endpoint, Surroundings::of(observed), scope, deadline).boxed_local(),
            Some((tree, imds)) => {
                let enis = metadata::attached(&tree).map(|attached| to_ask_again(target, &attached));
                let at = Instant::now() + self.pause;
                self.pause = (self.pause * 3 / 2).min(LONGEST_PAUSE.max(self.pause));
                once_more(imds, tree, enis.unwrap_or_default(), scope, at).boxed_local()
            }
        });
    }

    /// Ends when there is something new.
    async fn answer(&mut self) {
        let Some(asking) = &mut self.asking else { return pending().await };
        let (imds, result) = asking.await;
        (self.asking, self.imds) = (None, imds);
        match result {
            Ok(tree) => self.tree = Some(tree),
            Err(error) => self.failure = Some(error),
        }
    }

    /// The time is over, which metadata's time is, too: so it ends at once.
    async fn end(&mut self, target: &Target, observed: &Observed) -> Result<()> {
        if !self.has_answered() {
            self.ask(target, observed);
            self.answer().await;
        }
        self.check(target)
    }

    /// Whether one can go on without what metadata did not answer.
    fn check(&mut self, target: &Target) -> Result<()> {
        let is_needed = matches!(target, Target::Eni(_)) && self.tree.is_none();
        let is_needed = |error: &mut imds::Error| is_needed || matches!(error, imds::Error::BadEndpoint { .. });
        self.failure.take_if(is_needed).map_or(Ok(()), |error| Err(error.into()))
    }
}

async fn first(endpoint: Option<String>, surroundings: Surroundings, scope: Scope, deadline: Instant) -> Answer {
    match Imds::connect(endpoint.as_deref(), &surroundings, deadline).await {
        Ok(mut imds) => {
            let tree = imds.snapshot(scope).await;
            (Some(imds), tree)
        }
        Err(error) => (None, Err(error)),
    }
}

async fn once_more(mut imds: Imds, tree: Tree, enis: BTreeSet<MacAddr>, scope: Scope, at: Instant) -> Answer {
    sleep_until(at).await;
    let again = imds.ask_again(tree.clone(), &enis, scope).await;
    // A read that fails takes back nothing.
    (Some(imds), again.map(|again| if again.lacks_what_is_known_in(&tree) { tree } else { again }))
}

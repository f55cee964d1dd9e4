//! Staying, and keeping it so: the kernel tells when something changes, and metadata is asked now and then.

mod cadence;
mod signals;

use std::collections::BTreeSet;
use std::fs;
use std::future::pending;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::FutureExt;
use futures::future::{LocalBoxFuture, select_all};
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::{Config, Problems};
use crate::fights::Fights;
use crate::imds::{Imds, Surroundings};
use crate::lock::{self, Past};
use crate::metrics_file;
use crate::net::MacAddr;
use crate::netlink::Netlink;
use crate::netlink::events::Events;
use crate::reading::{Reading, since_boot};
use crate::reconcile;
use crate::report::{self, Exit, Remark, Report};
use crate::run::Options;
use crate::service::Service;
use crate::trial::InTheWay;

pub use cadence::Pace;

use cadence::Cadence;
use signals::Signals;

/// After something has changed, more does: a manager makes its routes one by one.
const QUIET: Duration = Duration::from_millis(20);

/// How long something that is to be repaired waits for metadata's answer. It is repaired within 100 ms, the quiet before and the
/// run itself included.
const GRACE: Duration = Duration::from_millis(60);

/// How long a turn is waited for: signals are not heard meanwhile. And when it is tried again.
const PATIENCE: Duration = Duration::from_millis(500);
const NEXT_TURN: Duration = Duration::from_secs(1);

/// Between two metrics files while nothing happens: a collector reads them every 15 s or less often.
const METRICS_PAUSE: Duration = Duration::from_secs(10);

/// What it needs beside what a run needs.
pub struct Watch {
    pub pace: Pace,
    /// Where metrics are written.
    pub metrics: Option<PathBuf>,
    /// Reads the configuration anew, and what follows from it beside the command line.
    pub reload: Box<dyn Fn() -> Result<(Config, Pace), Problems>>,
}

/// What happens.
enum Event {
    Changed,
    Read(Box<Answer>),
    /// It is time to ask metadata, or somebody has been given way to for long enough.
    Due,
    Reload,
    Watchdog,
    Stop(&'static str),
}

/// What came of asking metadata, with the conversation for the next time; no reading if it says what it said before.
type Answer = (Option<Imds>, Result<Option<Reading>>);

struct State<'a> {
    options: Options,
    watch: &'a Watch,
    cadence: Cadence,
    service: Service,
    netlink: Netlink,
    imds: Option<Imds>,
    /// Metadata is being asked; what the kernel tells meanwhile is not kept waiting.
    asking: Option<LocalBoxFuture<'static, Answer>>,
    /// When what is to be repaired is repaired without an answer.
    settle_by: Option<Instant>,
    /// When asking began, in time on a CPU.
    cpu_before: Duration,
    reading: Option<Reading>,
    /// What was done in all turns before the reading, and what this process has done since.
    known: Past,
    /// The same of the reading that is asked for.
    asked: Past,
    /// Nothing was wrong, and the kernel had no more than metadata tells of: proof that something is gone takes whole readings.
    is_plain: bool,
    /// All was as it should be, and nothing has changed since.
    is_settled: bool,
    /// The links of the ENIs that metadata tells of, by MAC and index.
    links: BTreeSet<(MacAddr, u32)>,
    /// What metadata is expected to tell of.
    expected: BTreeSet<String>,
    /// Of these the ENIs that were pending when all was settled last.
    pending: BTreeSet<String>,
    fights: Fights,
    /// Who was the last to take something of ours away, with the process's number.
    last_remover: Option<String>,
    begun: Instant,
    /// When metrics were written last.
    noted_at: Instant,
    /// What was said last of what is wrong: nobody wants to read it every two seconds.
    last_trouble: Vec<Remark>,
}

/// Runs until it is told to stop. What goes wrong meanwhile is said, and tried again.
///
/// # Errors
/// It cannot begin, or the kernel tells nothing any more.
pub async fn watch(options: Options, watch: &Watch) -> Result<()> {
    Imds::check(options.endpoint.as_deref())?;
    let mut events = Events::open(options.config.mark).context("listening to the kernel")?;
    let mut signals = Signals::catch().context("catching signals")?;
    let mut state = State {
        options,
        watch,
        cadence: Cadence::of(watch.pace),
        service: Service::of_environment(),
        netlink: Netlink::open().context("opening a netlink socket")?,
        imds: None,
        asking: None,
        settle_by: None,
        cpu_before: Duration::ZERO,
        reading: None,
        known: Past::default(),
        asked: Past::default(),
        is_plain: false,
        is_settled: false,
        links: BTreeSet::new(),
        expected: BTreeSet::new(),
        pending: BTreeSet::new(),
        fights: Fights::default(),
        last_remover: None,
        begun: Instant::now(),
        noted_at: Instant::now(),
        last_trouble: Vec::new(),
    };
    let watchdog = state.service.watchdog();
    let mut alive_by = watchdog.map(|pause| Instant::now() + pause);
    let mut is_ready = false;
    state.ask().await;
    loop {
        match state.next(&mut events, &mut signals, alive_by).await? {
            Event::Changed => {
                state.is_settled = false;
                sleep(QUIET).await;
                events.forget().context("listening to the kernel")?;
                if let Some(port) = events.take_remover() {
                    // Of one that has ended by now nothing is known, and not that it was the one before.
                    state.last_remover = process(port);
                }
                state.look().await;
            }
            Event::Read(answer) => {
                state.take(*answer).await;
                if !std::mem::replace(&mut is_ready, true) {
                    state.service.say("READY=1");
                }
            }
            Event::Due if state.settle_by.is_some_and(|instant| instant <= Instant::now()) => state.settle().await,
            Event::Due if state.asking.is_some() || Instant::now() < state.cadence.ask_at() => state.look().await,
            Event::Due => state.ask().await,
            Event::Reload => {
                state.reload();
                events.ours_has(state.options.config.mark);
                state.ask().await;
                state.service.say("READY=1");
            }
            Event::Watchdog => {
                state.service.say("WATCHDOG=1");
                alive_by = watchdog.map(|pause| Instant::now() + pause);
            }
            Event::Stop(name) => {
                state.service.say("STOPPING=1");
                tracing::debug!("stopping: {name}");
                return Ok(());
            }
        }
    }
}

impl State<'_> {
    async fn next(&mut self, events: &mut Events, signals: &mut Signals, alive_by: Option<Instant>) -> Result<Event> {
        let retry_at = self.fights.next_end(self.begun.elapsed()).map(|end| self.begun + end);
        let ask_at = Some(self.cadence.ask_at()).filter(|_| self.asking.is_none());
        let due = [retry_at, ask_at, self.settle_by].into_iter().flatten().min();
        let at = |instant: Option<Instant>| async move {
            match instant {
                Some(instant) => sleep_until(instant).await,
                None => pending().await,
            }
        };
        let asking = &mut self.asking;
        let read = async {
            match asking {
                Some(asking) => asking.await,
                None => pending().await,
            }
        };
        let changed = async { events.changed().await.context("listening to the kernel").map(|()| Event::Changed) };
        // The first that is ready: a machine on which something changes all the time can still be stopped.
        let event = select_all([
            signals.next().map(Ok).boxed_local(),
            at(alive_by).map(|()| Ok(Event::Watchdog)).boxed_local(),
            read.map(|answer| Ok(Event::Read(Box::new(answer)))).boxed_local(),
            at(due).map(|()| Ok(Event::Due)).boxed_local(),
            changed.boxed_local(),
        ])
        .await
        .0;
        if let Ok(Event::Read(_)) = event {
            self.asking = None;
        }
        event
    }

    /// Begins to ask metadata, unless it is being asked.
    async fn ask(&mut self) {
        if self.asking.is_none() {
            self.cpu_before = cpu_time();
            self.asked = self.past();
            let surroundings = match self.imds {
                Some(_) => None,
                None => match self.netlink.observe().await {
                    Ok(observed) => Some(Surroundings::of(&observed)),
                    Err(error) => {
                        self.say(vec![format!("{error:#}").into()]);
                        self.cadence.note_failure();
                        self.ask_later();
                        return;
                    }
                },
            };
            let (imds, endpoint) = (self.imds.take(), self.options.endpoint.clone());
            let (config, deadline) = (self.options.config.clone(), Instant::now() + self.cadence.timeout());
            let known = self.reading.clone().filter(|_| self.is_plain && self.cadence.is_glance_enough());
            self.asking = Some(read(imds, endpoint, surroundings, known, config, deadline).boxed_local());
        }
    }

    /// What was done and read in all turns. Who cannot know it cannot have a turn either, and does nothing.
    fn past(&self) -> Past {
        lock::past(&self.options.directory).unwrap_or_default()
    }

    /// Whether something is to be done by what metadata said last. If so it is asked once more; but a service that did not answer
    /// last time is not waited for. Where another run has done something since, that may follow from something newer, so nothing is
    /// done before there is an answer.
    async fn look(&mut self) {
        self.options.held_back = self.fights.held_back(self.begun.elapsed());
        let has_moved = self.has_moved().await;
        let Some(reading) = &self.reading else { return };
        let past = self.past();
        match reconcile::may_differ(&mut self.netlink, reading, &self.options).await {
            Ok(_) if past != self.known => {
                // Once for each deed: who does not answer is not asked again by every change.
                if past != self.asked {
                    self.ask().await;
                }
            }
            Ok(true) if !self.cadence.is_failing() => {
                self.settle_by.get_or_insert(Instant::now() + GRACE);
                self.ask().await;
            }
            Ok(true) => self.settle().await,
            Ok(false) => {}
            // The kernel does not tell of a change a second time.
            Err(error) => {
                self.settle_by = Some(Instant::now() + NEXT_TURN);
                self.say(vec![format!("{error:#}").into()]);
            }
        }
        if self.expects_more().await || has_moved {
            self.ask().await;
        }
    }

    /// Whether an ENI's link has come, gone, or come again since this was asked last. It may be another device by now, of which a glance
    /// tells nothing, and so may what is being read.
    async fn has_moved(&mut self) -> bool {
        let (Some(reading), Ok(links)) = (&self.reading, self.netlink.links().await) else { return false };
        let macs: BTreeSet<MacAddr> = reading.all.macs().collect();
        let of_enis = links.values().filter_map(|link| Some((link.mac.filter(|mac| macs.contains(mac))?, link.index)));
        let links = of_enis.collect();
        let has_moved = self.links != links;
        if has_moved {
            self.links = links;
            self.cadence.ask_for_all();
            self.asking = None;
        }
        has_moved
    }

    /// Whether metadata is expected to tell of something of which it was not before.
    async fn expects_more(&mut self) -> bool {
        let Some(reading) = &self.reading else { return false };
        match self.netlink.links().await {
            Ok(links) => {
                let unlisted = reconcile::unlisted(links, reading, &self.options.config);
                let expected = &unlisted | &self.pending;
                let is_more = !expected.is_subset(&self.expected);
                self.expected = expected;
                if is_more {
                    self.cadence.be_eager();
                }
                is_more
            }
            Err(error) => {
                self.say(vec![format!("{error:#}").into()]);
                false
            }
        }
    }

    /// Settles what there is to settle by what was read, or by what was read before.
    async fn take(&mut self, (imds, result): Answer) {
        self.imds = imds;
        let trouble = match result {
            Ok(reading) => {
                self.cadence.note_answer(reading.is_some());
                // Nothing to settle, unless something has changed while it was asked.
                let is_as_before = reading.is_none() && self.is_settled;
                self.reading = reading.or(self.reading.take());
                self.known = self.asked;
                if is_as_before {
                    self.note_still_so();
                    self.ask_later();
                    return;
                }
                None
            }
            Err(error) => {
                self.cadence.note_failure();
                self.is_settled = false;
                Some(format!("{error:#}"))
            }
        };
        let wrong = self.make_agree().await;
        // After what else there is to say: it is why that may be out of date.
        if wrong.is_some() || trouble.is_some() {
            self.say(wrong.into_iter().flatten().chain(trouble.map(Remark::from)).collect());
        }
        self.expects_more().await;
        // Another run may have done something while it was asked.
        match self.past() != self.known && !self.cadence.is_failing() {
            true => self.cadence.ask_at_once(),
            false => self.ask_later(),
        }
    }

    fn ask_later(&mut self) {
        let cost = cpu_time().saturating_sub(self.cpu_before);
        self.cadence.ask_later(Instant::now(), cost, !self.expected.is_empty());
    }

    async fn settle(&mut self) {
        if let Some(wrong) = self.make_agree().await {
            self.say(wrong);
        }
    }

    /// Makes the kernel agree with what was read last, and gives what is wrong; none where that is not to be told before something newer
    /// is read. Who has no turn tries again soon, since the kernel does not tell of a change a second time.
    async fn make_agree(&mut self) -> Option<Vec<Remark>> {
        self.settle_by = None;
        self.is_settled = false;
        let begun = Instant::now();
        let Some(reading) = &self.reading else {
            self.note_metrics(begun, None);
            return None;
        };
        self.options.deadline = Instant::now() + PATIENCE;
        self.options.held_back = self.fights.held_back(self.begun.elapsed());
        match reconcile::settle_again(&mut self.netlink, reading, &mut self.known, &self.options).await {
            Ok(Some(report)) => {
                // Nobody else has done anything since that was asked for.
                self.asked = self.known;
                self.note_metrics(begun, Some(&report));
                let wrong = self.take_note(&report);
                let is_well = report.troubles.is_empty() && report.unsettled.is_empty();
                self.is_plain = is_well && !self.has_more().await;
                self.is_settled = self.is_plain && report.done.is_empty();
                Some(wrong)
            }
            Ok(None) => {
                if self.cadence.is_failing() {
                    self.note_metrics(begun, None);
                }
                None
            }
            Err(error) => {
                self.note_metrics(begun, None);
                self.settle_by = Some(Instant::now() + NEXT_TURN);
                Some(vec![told(&error).into()])
            }
        }
    }

    fn note_metrics(&mut self, begun: Instant, report: Option<&Report>) {
        let Some(path) = &self.watch.metrics else { return };
        let exit = match report {
            // It is as metadata had it last, and whether that is still so is not known.
            _ if self.cadence.is_failing() => Exit::MetadataUnavailable,
            Some(report) => report.exit(),
            None => Exit::Failed,
        };
        metrics_file::note_run(path, begun.elapsed(), exit, report);
        self.noted_at = Instant::now();
    }

    fn note_still_so(&mut self) {
        if let Some(path) = self.watch.metrics.as_ref().filter(|_| self.noted_at.elapsed() >= METRICS_PAUSE) {
            metrics_file::note_still_so(path);
            self.noted_at = Instant::now();
        }
    }

    /// Whether the kernel has more than the last reading tells of, or may.
    async fn has_more(&mut self) -> bool {
        let Some(reading) = &self.reading else { return true };
        reconcile::has_more(&mut self.netlink, reading, &self.options).await.unwrap_or(true)
    }

    /// What is wrong.
    fn take_note(&mut self, report: &Report) -> Vec<Remark> {
        for (change, times, pause) in self.fights.note(&report.done, self.begun.elapsed()) {
            tracing::warn!(
                "somebody undoes this again and again ({times} times by now), so it waits {} s before it is done again: \
                 {change}{}{}",
                pause.as_secs(),
                self.last_remover
                    .iter()
                    .map(|who| format!("; the last to take something of eniup's away: {who}"))
                    .collect::<String>(),
                suspects()
            );
        }
        let pending = report.troubles.iter().filter(|(_, trouble)| trouble.state == report::State::Pending);
        self.pending = pending.map(|(eni, _)| eni.clone()).collect();
        let held = self.options.held_back.iter().map(|change| format!("held back: {change}"));
        report.remarks().into_iter().chain(held.map(Remark::from)).collect()
    }

    /// Says what is wrong, once.
    fn say(&mut self, trouble: Vec<Remark>) {
        if self.last_trouble != trouble {
            trouble.iter().for_each(Remark::warn);
            self.last_trouble = trouble;
        }
        let status = self.last_trouble.first().and_then(|remark| remark.text.lines().next());
        self.service.status(status.unwrap_or("the kernel agrees with metadata"));
    }

    fn reload(&mut self) {
        self.service.say(&format!("RELOADING=1\nMONOTONIC_USEC={}", since_boot_in_microseconds()));
        match (self.watch.reload)() {
            Ok((config, pace)) => {
                self.options.config = config;
                self.cadence.change(pace);
                // It may not ask for what the configuration tells ENIs apart by.
                self.asking = None;
            }
            Err(problems) => tracing::warn!("{}", problems.told("going on with the configuration from before")),
        }
        self.last_trouble.clear();
        self.cadence.ask_for_all();
        self.is_settled = false;
    }
}

async fn read(
    imds: Option<Imds>,
    endpoint: Option<String>,
    surroundings: Option<Surroundings>,
    known: Option<Reading>,
    config: Config,
    deadline: Instant,
) -> Answer {
    let mut imds = match imds {
        Some(imds) => imds,
        None => match Imds::connect(endpoint.as_deref(), &surroundings.unwrap_or_default(), deadline).await {
            Ok(imds) => imds,
            Err(error) => return (None, Err(error.into())),
        },
    };
    imds.end_by(deadline);
    let is_still_so = match &known {
        Some(known) => known.is_still_so(&mut imds, &config).await,
        None => Ok(false),
    };
    let reading = match is_still_so {
        Ok(true) => Ok(None),
        Ok(false) => Reading::take(&mut imds, &config).await.map(Some),
        Err(error) => Err(error),
    };
    match reading {
        Ok(reading) => (Some(imds), Ok(reading)),
        // Another way may be open by now.
        Err(error) => (None, Err(error)),
    }
}

/// A process by its number, as long as it is there; not this one, which takes away what is not wanted any more.
fn process(number: u32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{number}/comm")).ok().filter(|_| number != std::process::id())?;
    Some(format!("{} (process {number})", name.trim_end()))
}

/// Managers that run here and are known to take away what they did not make, with what stops them.
fn suspects() -> String {
    let known = [
        (
            "/run/systemd/netif/state",
            "systemd-networkd runs here: it needs ManageForeignRoutes=no and ManageForeignRoutingPolicyRules=no",
        ),
        ("/run/NetworkManager", "NetworkManager runs here: is the link managed by it?"),
    ];
    let here = known.iter().filter(|(path, _)| fs::exists(path).unwrap_or(false));
    here.map(|(_, what)| format!("; {what}")).collect()
}

/// Without what is another every second, since it is said once.
fn told(error: &anyhow::Error) -> String {
    match error.downcast_ref() {
        Some(InTheWay::Waits(_)) => {
            "nothing is done: a run waits for its confirmation; `eniup confirm` keeps what it did".into()
        }
        _ => format!("{error:#}"),
    }
}

/// Time that this process has been on a CPU; zero where the kernel does not tell.
fn cpu_time() -> Duration {
    let read = fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    read.split_whitespace().next().and_then(|text| text.parse().ok()).map_or(Duration::ZERO, Duration::from_nanos)
}

/// `CLOCK_MONOTONIC` as systemd wants it, as near as `/proc/uptime` has it.
fn since_boot_in_microseconds() -> u64 {
    since_boot().map_or(0, |milliseconds| milliseconds * 1000)
}

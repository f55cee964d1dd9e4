//! When metadata is asked next.

use std::time::Duration;

use tokio::time::Instant;

use crate::policy;

/// Of a core, for asking metadata: an interval is at least this many times the time that asking took.
const RATIO: u32 = 1000;

/// Metadata is asked so often whatever it costs, or staying would be no better than the timer: on a machine that gets few turns
/// time on a CPU is counted that it did not have.
const RAREST: Duration = Duration::from_secs(10);

/// Before metadata is asked again for what it is expected to tell of: an ENI whose link has come, or of which it has not told
/// all. Half as long again each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// After so long all of metadata is read and all of the kernel is looked at, though nobody has told of a change: a sysctl is
/// set without a word.
const GLANCES: Duration = Duration::from_secs(60);

/// While metadata does not answer; doubled each time. Longer only where metadata is asked as rarely anyway.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How often, and for how long.
#[derive(Clone, Copy)]
pub struct Pace {
    /// Between two readings of metadata.
    pub interval: Duration,
    /// Longer where reading costs much.
    pub is_thrifty: bool,
    /// For one run.
    pub timeout: Duration,
}

/// What follows from the pace and from how metadata has answered.
pub(super) struct Cadence {
    pace: Pace,
    ask_at: Instant,
    /// Until when a glance tells whether metadata says something else than before.
    glances_until: Option<Instant>,
    eager_pause: Duration,
    /// Answers in a row that did not come.
    failures: u32,
}

impl Cadence {
    /// Of one that begins by asking.
    pub(super) fn of(pace: Pace) -> Cadence {
        Cadence { pace, ask_at: Instant::now(), glances_until: None, eager_pause: FIRST_PAUSE, failures: 0 }
    }

    pub(super) fn change(&mut self, pace: Pace) {
        self.pace = pace;
    }

    pub(super) fn ask_at(&self) -> Instant {
        self.ask_at
    }

    pub(super) fn timeout(&self) -> Duration {
        self.pace.timeout
    }

    /// Whether the last answer did not come.
    pub(super) fn is_failing(&self) -> bool {
        self.failures > 0
    }

    /// Whether all was read not long ago.
    pub(super) fn is_glance_enough(&self) -> bool {
        self.glances_until.is_some_and(|until| Instant::now() < until)
    }

    /// The next time all is read.
    pub(super) fn ask_for_all(&mut self) {
        self.glances_until = None;
    }

    /// An answer, after a glance or to all.
    pub(super) fn note_answer(&mut self, is_all: bool) {
        self.failures = 0;
        if is_all {
            self.glances_until = Some(Instant::now() + GLANCES);
        }
    }

    pub(super) fn note_failure(&mut self) {
        self.failures += 1;
        self.ask_for_all();
    }

    /// For what has come to be expected.
    pub(super) fn be_eager(&mut self) {
        self.eager_pause = FIRST_PAUSE;
    }

    pub(super) fn ask_at_once(&mut self) {
        self.ask_at = Instant::now();
    }

    /// After asking has cost so much time on a CPU; soon if metadata is expected to tell of something.
    pub(super) fn ask_later(&mut self, now: Instant, cost: Duration, is_expecting: bool) {
        let cost = if self.pace.is_thrifty { cost } else { Duration::ZERO };
        let least = match self.failures {
            0 => self.pace.interval,
            failures => pause_after_failures(failures, self.pace.interval),
        };
        let mut pause = pause_after(least, cost);
        if is_expecting && !self.is_failing() {
            pause = pause.min(self.eager_pause);
            self.eager_pause = pause * 3 / 2;
        }
        self.ask_at = now + pause;
    }
}

/// After so many answers in a row that did not come: soon at first, however rarely metadata is asked while it answers.
fn pause_after_failures(failures: u32, interval: Duration) -> Duration {
    let doubled = interval.min(policy::WATCH_INTERVAL).saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(LONGEST_PAUSE.max(interval))
}

/// From one asking to the next: long enough that asking is cheap, and not so rare that nobody would want to stay for it.
fn pause_after(least: Duration, cost: Duration) -> Duration {
    least.max((cost * RATIO).min(RAREST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_is_asked_again_soon_and_then_rarely() {
        let seconds = |interval, failures| pause_after_failures(failures, Duration::from_secs(interval)).as_secs();
        assert_eq!([1, 2, 5, 6, 99].map(|failures| seconds(2, failures)), [2, 4, 32, 60, 60]);
        assert_eq!([1, 2, 5, 6, 99].map(|failures| seconds(300, failures)), [2, 4, 32, 64, 300]);
        assert_eq!(pause_after_failures(1, Duration::from_millis(100)), Duration::from_millis(100));
    }

    #[test]
    fn what_is_expected_is_asked_for_soon_and_then_ever_later() {
        let interval = Duration::from_secs(2);
        let mut cadence = Cadence::of(Pace { interval, is_thrifty: false, timeout: interval });
        let pause = |cadence: &mut Cadence, is_expecting| {
            let now = Instant::now();
            cadence.ask_later(now, Duration::ZERO, is_expecting);
            (cadence.ask_at() - now).as_millis()
        };
        let pauses = [(); 10].map(|()| pause(&mut cadence, true));
        assert_eq!(pauses, [100, 150, 225, 337, 506, 759, 1139, 1708, 2000, 2000]);
        cadence.be_eager();
        assert_eq!(pause(&mut cadence, true), 100);
        assert_eq!(pause(&mut cadence, false), 2000);
        cadence.note_failure();
        assert_eq!(pause(&mut cadence, true), 2000);
    }

    #[test]
    fn asking_that_costs_much_is_rare_but_not_too_rare() {
        let least = Duration::from_secs(2);
        for (cost, pause) in [(1, 2), (5, 5), (29, 10), (900, 10)] {
            assert_eq!(pause_after(least, Duration::from_millis(cost)), Duration::from_secs(pause), "{cost} ms");
        }
        assert_eq!(pause_after(Duration::from_secs(600), Duration::from_secs(1)), Duration::from_secs(600));
    }
}

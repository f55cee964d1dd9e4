//! Whoever undoes a change again and again is not fought with, but given way to for longer and longer.

use std::collections::{BTreeMap, BTreeSet};
// A length of time, no clock.
use core::time::Duration;

/// A change that has to be made again within this time of the last was undone by somebody.
const MEMORY: Duration = Duration::from_secs(60);

/// So many times it is made again at once: a manager that restarts undoes it once, or twice.
const PATIENCE: u32 = 3;

/// How long it then waits: doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Changes that were made, by what they say. Times are since some beginning.
#[derive(Default, Debug)]
pub struct Fights {
    rounds: BTreeMap<String, Round>,
}

#[derive(Debug)]
struct Round {
    times: u32,
    last: Duration,
    held_until: Duration,
}

impl Fights {
    /// Notes what was done at a time. Gives what was done too often, with the times, and how long it is not done again.
    pub fn note(&mut self, done: &[String], now: Duration) -> Vec<(String, u32, Duration)> {
        let is_remembered = |round: &Round| now < round.last.max(round.held_until) + MEMORY;
        self.rounds.retain(|_, round| is_remembered(round));
        let mut fights = Vec::new();
        for change in done {
            let round =
                self.rounds.entry(change.clone()).or_insert(Round { times: 0, last: now, held_until: Duration::ZERO });
            round.times += 1;
            round.last = now;
            if round.times > PATIENCE {
                let doubled = FIRST_PAUSE.saturating_mul(1 << (round.times - PATIENCE - 1).min(16));
                let pause = doubled.min(LONGEST_PAUSE);
                round.held_until = now + pause;
                fights.push((change.clone(), round.times, pause));
            }
        }
        fights
    }

    /// What is not to be done at a time.
    pub fn held_back(&self, now: Duration) -> BTreeSet<String> {
        let held = self.rounds.iter().filter(|(_, round)| now < round.held_until);
        held.map(|(change, _)| change.clone()).collect()
    }

    /// When the next of them may be done again.
    pub fn next_end(&self, now: Duration) -> Option<Duration> {
        self.rounds.values().map(|round| round.held_until).filter(|until| *until > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: &str = "ip rule add …";

    #[test]
    fn who_undoes_a_change_again_and_again_is_given_way_to_for_longer_and_longer() {
        let mut fights = Fights::default();
        let mut now = Duration::ZERO;
        let mut pauses = Vec::new();
        for _ in 0..14 {
            let held = fights.note(&[RULE.into()], now);
            let pause = held.first().map_or(Duration::ZERO, |(_, _, pause)| *pause);
            assert_eq!(fights.held_back(now).contains(RULE), !pause.is_zero());
            now += pause + Duration::from_millis(10);
            assert!(fights.held_back(now).is_empty());
            pauses.push(pause.as_secs());
        }
        assert_eq!(pauses, [0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    }

    #[test]
    fn what_stays_for_a_minute_is_forgotten() {
        let mut fights = Fights::default();
        for n in 0..10 {
            assert_eq!(fights.note(&[RULE.into()], MEMORY * n), []);
        }
    }
}

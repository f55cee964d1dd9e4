//! What this process counts while it is at work: changes and requests. It is for metrics alone; nothing is decided by it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

static COUNTS: Mutex<Counts> = Mutex::new(Counts::new());

pub type Counts = BTreeMap<Event, u64>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Event {
    /// A change of the kernel, by `Operation::action`.
    Change(&'static str),
    /// A request to the metadata service, by the status of its answer; none where there was no answer.
    Request(Option<u16>),
}

pub fn count(event: Event) {
    *COUNTS.lock().unwrap_or_else(PoisonError::into_inner).entry(event).or_default() += 1;
}

/// What was counted since this was asked last.
pub fn take() -> Counts {
    std::mem::take(&mut *COUNTS.lock().unwrap_or_else(PoisonError::into_inner))
}

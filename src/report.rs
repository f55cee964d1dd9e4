//! What a run came to, for people and for the exit code.

use std::collections::BTreeMap;
use std::fmt;

/// Exit codes, fixed for ever.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    Ok = 0,
    Failed = 1,
    /// There are differences; only where `--detailed-exitcode` asks for it.
    Differences = 2,
    /// An ENI is pending or failed, the others are done.
    Degraded = 3,
    Usage = 64,
    MetadataUnavailable = 69,
    /// Another run held the lock.
    Busy = 75,
    NotPermitted = 77,
    BadConfiguration = 78,
}

impl Exit {
    /// A word for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Exit::Ok => "ok",
            Exit::Failed => "failed",
            Exit::Differences => "differences",
            Exit::Degraded => "degraded",
            Exit::Usage => "usage",
            Exit::MetadataUnavailable => "metadata-unavailable",
            Exit::Busy => "busy",
            Exit::NotPermitted => "not-permitted",
            Exit::BadConfiguration => "bad-configuration",
        }
    }
}

/// What became of the machine in one run.
#[derive(Default, Debug)]
pub struct Report {
    /// ENIs that are not as they should be, by id (or MAC), and why.
    pub troubles: BTreeMap<String, Trouble>,
    /// Changes that belong to no ENI and were not made, or did not stay.
    pub unsettled: Vec<String>,
    /// What an administrator should know though all is done.
    pub notes: Vec<String>,
    /// The changes made, as `Operation` shows them.
    pub done: Vec<String>,
    /// How many changes are left to be made.
    pub drift: usize,
    /// Every ENI that is listed, by id (or MAC), as far as metadata and configuration say; see [`Report::states`].
    pub enis: BTreeMap<String, State>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trouble {
    pub state: State,
    pub why: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Everything is known of it.
    Ready,
    /// It may be ready a moment later.
    Pending,
    /// Waiting does not help.
    Failed,
    /// Left alone, as configured.
    Ignored,
    /// Everything is known of it, and a run would change something.
    Drifted,
}

impl State {
    /// Whether nothing stands in the way of what it should be.
    pub fn is_well(self) -> bool {
        match self {
            State::Ready | State::Ignored | State::Drifted => true,
            State::Pending | State::Failed => false,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            State::Ready => "ready",
            State::Drifted => "drifted",
            State::Pending => "pending",
            State::Failed => "failed",
            State::Ignored => "ignored",
        })
    }
}

impl Report {
    pub fn exit(&self) -> Exit {
        if !self.unsettled.is_empty() {
            Exit::Failed
        } else if !self.troubles.is_empty() {
            Exit::Degraded
        } else {
            Exit::Ok
        }
    }

    /// This one, and then another of the same run, which says how things are by now.
    pub fn followed_by(mut self, next: Report) -> Report {
        self.done.extend(next.done);
        Report { done: self.done, ..next }
    }

    /// How each ENI stands.
    pub fn states(&self) -> impl Iterator<Item = (&str, State)> {
        let in_trouble = |eni: &String| self.troubles.get(eni).map(|trouble| trouble.state);
        self.enis.iter().map(move |(eni, state)| (eni.as_str(), in_trouble(eni).unwrap_or(*state)))
    }

    /// What is wrong, one line each.
    pub fn remarks(&self) -> Vec<Remark> {
        let troubles = self.troubles.iter().map(|(eni, trouble)| remark(eni, trouble));
        troubles.chain(self.unsettled.iter().map(|unsettled| format!("not done: {unsettled}").into())).collect()
    }

    /// Whether all is done that can be: what is wrong still is wrong for good.
    pub fn is_settled(&self) -> bool {
        self.unsettled.is_empty() && !self.may_pass()
    }

    /// Whether waiting may help.
    pub fn may_pass(&self) -> bool {
        self.troubles.values().any(|trouble| trouble.state == State::Pending)
    }
}

/// Something that is wrong, as it is told.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Remark {
    pub text: String,
    /// Of an ENI: its id.
    pub eni: Option<String>,
    pub state: Option<State>,
    pub why: Option<String>,
}

/// The target of what is told of an outcome, by which it is told apart from what is told on the way.
pub const OUTCOME: &str = "outcome";

impl Remark {
    pub fn warn(&self) {
        let Remark { text, eni, state, why } = self;
        let state = state.map(|state| state.to_string());
        tracing::warn!(target: OUTCOME, eni, state, reason = why, "{text}");
    }
}

impl From<String> for Remark {
    fn from(text: String) -> Remark {
        Remark { text, ..Remark::default() }
    }
}

/// What is said of an ENI in trouble.
pub fn remark(eni: &str, trouble: &Trouble) -> Remark {
    let Trouble { state, why } = trouble;
    let text = format!("{eni} is {state}: {why}");
    Remark { text, eni: id(eni).map(String::from), state: Some(*state), why: Some(why.clone()) }
}

/// The ENI's id, unless it goes by another name.
pub fn id(eni: &str) -> Option<&str> {
    Some(eni).filter(|name| name.starts_with("eni-"))
}

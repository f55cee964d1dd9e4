//! A run on trial, as a file below the runtime directory: what it found, until when it may be confirmed, and what has come
//! of it. It is written before the run's first change, so whoever reads it can roll back, also when the run is dead.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::ledger::{Found, Ledger, boot};
use crate::net::{Link, MacAddr, Observed};
use crate::plan::Step;
use crate::rollback::Before;
use crate::whole_file;

/// Raised when the meaning of a field changes; a file of another version is not read.
const VERSION: u32 = 1;

const MODE: u32 = 0o644;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Trial {
    version: u32,
    /// As of a [`Ledger`](crate::ledger::Ledger): these three tell whether it is about this machine's links.
    boot: String,
    pub primary: MacAddr,
    /// The run, and when it began (milliseconds since boot): these two tell it from every other.
    process: u32,
    begun: u64,
    /// Milliseconds for which it may be confirmed after its end.
    pub window: u64,
    /// Milliseconds since boot, time asleep included. Later it cannot be confirmed.
    pub until: u64,
    pub state: State,
    pub before: Before,
    /// Of the ledger, as it was before: what earlier runs have set is put back by a release still.
    #[serde(default)]
    pub found: BTreeMap<u32, Found>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It can be confirmed.
    Open,
    /// What it did stays.
    Confirmed,
    /// What it did is undone, for this reason. Only a run by hand may do it again.
    RolledBack(String),
    /// Somebody has decided otherwise by hand since: there is nothing left to roll back.
    Superseded,
}

/// What a trial means to whoever comes upon it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It can be confirmed for so long.
    Waits(Duration),
    /// It should have been rolled back by now, but whoever was to do it is gone.
    Overdue,
    RolledBack(String),
    Confirmed,
    Superseded,
}

/// What people are told of a trial, while there is something to be told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Notice {
    pub state: NoticeState,
    /// Why it was rolled back.
    pub why: Option<String>,
    /// For how long it may be confirmed.
    pub seconds_left: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoticeState {
    Waits,
    Overdue,
    RolledBack,
}

impl Notice {
    pub fn of(standing: Standing) -> Option<Notice> {
        let notice = |state| Notice { state, why: None, seconds_left: None };
        match standing {
            Standing::Waits(left) => {
                Some(Notice { seconds_left: Some(left.as_secs() + 1), ..notice(NoticeState::Waits) })
            }
            Standing::Overdue => Some(notice(NoticeState::Overdue)),
            Standing::RolledBack(why) => Some(Notice { why: Some(why), ..notice(NoticeState::RolledBack) }),
            Standing::Confirmed | Standing::Superseded => None,
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let why = self.why.as_deref().unwrap_or("nobody knows why");
        let left = self.seconds_left.unwrap_or_default();
        match self.state {
            NoticeState::Waits => write!(
                f,
                "the last run is on trial: in {left} s what it did is rolled back, unless you run `eniup confirm`"
            ),
            NoticeState::Overdue => {
                write!(f, "the last run was on trial and was not confirmed in time: the next run rolls it back")
            }
            NoticeState::RolledBack => write!(
                f,
                "the last run was rolled back ({why}): nothing is done by itself until you run `eniup reconcile`"
            ),
        }
    }
}

impl Trial {
    /// Of a run that has ended by then at the latest (milliseconds since boot).
    pub fn new(primary: MacAddr, window: Duration, begun: u64, ended: u64) -> Trial {
        let window = window.as_millis() as u64;
        Trial {
            version: VERSION,
            boot: boot().unwrap_or_default(),
            primary,
            process: std::process::id(),
            begun,
            window,
            until: ended + window,
            state: State::Open,
            before: Before::default(),
            found: BTreeMap::new(),
        }
    }

    /// Whether anything was to be changed.
    pub fn has_begun(&self) -> bool {
        !self.before.is_empty()
    }

    /// Whether it is of the machine with these links: one that is woken from another one's memory has that one's boot.
    pub fn is_of_machine(&self, links: &BTreeMap<u32, Link>) -> bool {
        links.values().any(|link| link.mac == Some(self.primary))
    }

    pub fn was_rolled_back(&self) -> bool {
        matches!(self.state, State::RolledBack(_))
    }

    pub fn is_same(&self, other: &Trial) -> bool {
        (self.process, self.begun) == (other.process, other.begun)
    }

    /// Notes what these steps find, before they are made.
    ///
    /// # Errors
    /// It cannot be written: then they must not be made, since nobody could undo them.
    pub fn note(&mut self, steps: &[Step], observed: &Observed, ledger: &Ledger, directory: &Path) -> Result<()> {
        if !self.has_begun() {
            self.found.clone_from(&ledger.links);
        }
        self.before = self.before.noting(steps, observed);
        self.save(directory).context("nothing that could not be rolled back is done")
    }

    /// The run has ended at this moment, so its time begins.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn await_confirmation(&mut self, now: u64, directory: &Path) -> Result<()> {
        self.until = now + self.window;
        self.save(directory)
    }

    pub fn standing(&self, now: u64) -> Standing {
        match &self.state {
            State::Open if now < self.until => Standing::Waits(Duration::from_millis(self.until - now)),
            State::Open => Standing::Overdue,
            State::RolledBack(why) => Standing::RolledBack(why.clone()),
            State::Confirmed => Standing::Confirmed,
            State::Superseded => Standing::Superseded,
        }
    }

    /// # Errors
    /// It cannot be written.
    pub fn save(&self, directory: &Path) -> Result<()> {
        whole_file::write(&path(directory), &serde_json::to_string_pretty(self)?, MODE)
    }

    /// # Errors
    /// It cannot be written.
    pub fn become_state(&mut self, state: State, directory: &Path) -> Result<()> {
        self.state = state;
        self.save(directory)
    }
}

fn path(directory: &Path) -> PathBuf {
    directory.join("trial.json")
}

/// Whether there may be a trial, of this boot or not.
pub fn is_there(directory: &Path) -> bool {
    fs::symlink_metadata(path(directory)).is_ok()
}

/// The last trial of this boot.
///
/// # Errors
/// There is something that cannot be read: nothing is known of a trial, and nothing is confirmed.
pub fn load(directory: &Path) -> Result<Option<Trial>> {
    let path = path(directory);
    let Some(bytes) = whole_file::read(&path)? else { return Ok(None) };
    let trial: Trial = serde_json::from_slice(&bytes).with_context(|| format!("reading {}", path.display()))?;
    let is_of_this_boot = boot().is_some_and(|boot| boot == trial.boot);
    Ok(Some(trial).filter(|trial| trial.version == VERSION && is_of_this_boot))
}

/// The same. One that cannot be read costs a line in the log, once: it may have been confirmed as well as not, and a
/// machine must not stay without its addresses for a file.
pub fn load_or_mend(directory: &Path) -> Option<Trial> {
    load(directory).unwrap_or_else(|error| {
        tracing::warn!("{error:#}; going on without it");
        // What is no file cannot be taken away like one, and stays as it is.
        let _ = fs::remove_file(path(directory));
        None
    })
}

/// Another run stands before this one.
#[derive(Debug)]
pub enum InTheWay {
    /// It is on trial.
    Waits(Duration),
    /// It was on trial.
    RolledBack(String),
    /// It was a release, or on trial, while this one read metadata.
    Decided,
    /// It has changed something since this one read metadata, or that is long ago, and it cannot be read once more.
    Overtaken,
}

impl fmt::Display for InTheWay {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            InTheWay::Waits(left) => write!(
                f,
                "nothing is done: a run waits for its confirmation, for {} s at most; `eniup confirm` keeps what it did",
                left.as_secs() + 1
            ),
            InTheWay::RolledBack(why) => write!(
                f,
                "nothing was done: the last run was rolled back ({why}), and doing it again by itself could cut somebody off \
                 again; run `eniup reconcile`, with or without --confirm, to have it after all"
            ),
            InTheWay::Decided => {
                write!(f, "meanwhile somebody has released what was done, or made a run on trial, so this one ends")
            }
            InTheWay::Overtaken => write!(
                f,
                "what this run has read of metadata may be out of date, as another run was at work meanwhile, and not all of it \
                 could be read again in time"
            ),
        }
    }
}

impl std::error::Error for InTheWay {}

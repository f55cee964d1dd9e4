//! What was read of metadata, when, and how a later reading takes its place.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::Instant;

use crate::config::Config;
use crate::eni::{Attached, Pending, Reason};
use crate::imds::{Imds, Scope};
use crate::metadata::{self, Tree, Unusable};
use crate::net::{Link, MacAddr};
use crate::proof::{Notes, Taken};

/// A look that ends so shortly before the deadline may lack what it had no time for.
const LATE: Duration = Duration::from_secs(1);

/// What metadata said, and when.
#[derive(Clone)]
pub struct Reading {
    pub tree: Tree,
    /// What the tree says.
    pub all: Attached,
    /// The ENIs that could not be read, and why not; of these the tree has what an earlier reading knew.
    unread: BTreeMap<MacAddr, Reason>,
    pub taken: Taken,
}

impl Reading {
    /// # Errors
    /// Metadata does not answer, or says nothing that can be used.
    pub async fn take(imds: &mut Imds, config: &Config) -> Result<Reading> {
        let begun = since_boot()?;
        let tree = imds.snapshot(Scope::of(config)).await?;
        let all = metadata::attached(&tree)?;
        Ok(Reading { all, tree, unread: BTreeMap::new(), taken: Taken { begun, ended: since_boot()? } })
    }

    /// What metadata told.
    fn told(&self) -> Attached {
        self.with_unread(self.all.clone())
    }

    /// The same on a machine with these links.
    pub fn told_here(&self, links: &BTreeMap<u32, Link>) -> Attached {
        if !self.all.has_clashes() {
            return self.told();
        }
        // What can be concluded from it without the links can be with them.
        let here = metadata::attached_here(&self.tree, links);
        here.map_or_else(|_| self.told(), |all| self.with_unread(all))
    }

    /// An ENI that could not be read is pending, with what was known of it.
    fn with_unread(&self, mut told: Attached) -> Attached {
        for (mac, reason) in &self.unread {
            match told.pending.get_mut(mac) {
                Some(pending) => pending.reason = reason.clone(),
                None => told.set_aside(*mac, reason.clone()),
            }
        }
        told
    }

    /// Whether metadata says the same still, as far as it changes while ENIs stay attached: few requests. What is not settled
    /// in it is to be read anew.
    ///
    /// # Errors
    /// As for [`Reading::take`].
    pub async fn is_still_so(&self, imds: &mut Imds, config: &Config) -> Result<bool> {
        let enis = self.all.ready.keys().copied().collect();
        Ok(self.told().unsettled().is_empty()
            && imds.glance(self.tree.clone(), &enis, Scope::of(config)).await? == self.tree)
    }

    /// Whether something could not be read that an earlier reading knows.
    pub fn lacks_what_is_known_by(&self, earlier: &Reading) -> bool {
        let mut enis = self.all.pending.keys();
        self.tree.lacks_what_is_known_in(&earlier.tree) || enis.any(|mac| self.lacks_eni_known_by(earlier, *mac))
    }

    /// The same of one ENI.
    fn lacks_eni_known_by(&self, earlier: &Reading, mac: MacAddr) -> bool {
        let is_unread = |pending: &Pending| matches!(pending.reason, Reason::Unknown { .. });
        let was_read = earlier.all.ready.contains_key(&mac)
            || earlier.all.pending.get(&mac).is_some_and(|pending| !is_unread(pending));
        self.tree.lacks_what_is_known_below(&metadata::eni_directory(mac), &earlier.tree)
            || was_read && self.all.pending.get(&mac).is_some_and(is_unread)
    }

    /// The same, with all that an earlier reading has of the ENIs of which something could not be read that it knows: a read that
    /// fails takes back nothing, and one ENI made of two readings may never have been.
    fn with_enis_known_by(self, earlier: &Reading) -> Result<Reading, Unusable> {
        let macs = self.all.ready.keys().chain(self.all.pending.keys()).copied();
        let unread = macs.filter(|mac| self.lacks_eni_known_by(earlier, *mac));
        let unread: BTreeMap<MacAddr, Reason> = unread.map(|mac| (mac, self.why_unread(mac))).collect();
        if unread.is_empty() {
            return Ok(self);
        }
        let put_back =
            |tree: Tree, mac: &MacAddr| tree.with_directory_of(&earlier.tree, &metadata::eni_directory(*mac));
        let tree = unread.keys().fold(self.tree, put_back);
        // What proves something has to be as young as it says.
        let taken = Taken { begun: earlier.taken.begun, ..self.taken };
        Ok(Reading { all: metadata::attached(&tree)?, tree, unread, taken })
    }

    /// All of metadata read again, with what is known of ENIs that cannot be read any more; none where it lacks more than that.
    ///
    /// # Errors
    /// As for [`Reading::take`].
    pub async fn anew(&self, imds: &mut Imds, config: &Config) -> Result<Option<Reading>> {
        let again = Reading::take(imds, config).await?.with_enis_known_by(self)?;
        Ok(Some(again).filter(|again| !again.lacks_what_is_known_by(self)))
    }

    fn why_unread(&self, mac: MacAddr) -> Reason {
        match self.all.pending.get(&mac).map(|pending| &pending.reason) {
            Some(reason @ Reason::Unknown { .. }) => reason.clone(),
            Some(_) | None => {
                let (key, why) = self.tree.unknown_below(&metadata::eni_directory(mac)).unwrap_or_default();
                Reason::Unknown { key: key.into(), why: why.into() }
            }
        }
    }

    /// With what was not settled in it read anew, which does not make the rest younger; once any of that is settled, or time may
    /// prove something, with all of it, so that what has gone from one ENI to another is seen on both.
    ///
    /// # Errors
    /// As for [`Reading::take`].
    pub async fn again(
        self,
        imds: &mut Imds,
        attached: &Attached,
        notes: &Notes,
        deadline: Instant,
        config: &Config,
    ) -> Result<Reading> {
        let is_proof_due = notes.is_proof_due(self.taken, since_boot()?);
        let unsettled = attached.unsettled();
        let tree = imds.ask_again(self.tree.clone(), &unsettled, Scope::of(config)).await?;
        let all = metadata::attached(&tree)?;
        let again = match !is_proof_due && all.unsettled().is_superset(&self.told().unsettled()) {
            true => Reading { tree, all, unread: BTreeMap::new(), taken: Taken { ended: since_boot()?, ..self.taken } },
            false => Reading::take(imds, config).await?,
        };
        let again = again.with_enis_known_by(&self)?;
        // What is not read for want of time says nothing of any ENI, and there is hardly another look. Nor does it say what is wrong.
        let is_late = !again.unread.is_empty() && Instant::now() + LATE >= deadline;
        let is_cut = Instant::now() >= deadline && again.all.unsettled().is_superset(&self.all.unsettled());
        Ok(if is_late || is_cut || again.lacks_what_is_known_by(&self) { self } else { again })
    }
}

/// Milliseconds since boot, time asleep included: `CLOCK_BOOTTIME`.
///
/// # Errors
/// `/proc` is not there.
pub fn since_boot() -> Result<u64> {
    let uptime = fs::read_to_string("/proc/uptime").context("reading /proc/uptime")?;
    let seconds = uptime.split_whitespace().next().and_then(|seconds| seconds.parse::<f64>().ok());
    Ok((seconds.context("/proc/uptime does not begin with seconds")? * 1000.0) as u64)
}

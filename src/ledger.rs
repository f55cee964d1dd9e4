//! What the kernel cannot remember for us: how a link was before we set it. One file below the runtime directory, which
//! lives as long as the kernel's own state does: until the machine is rebooted.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::net::{Link, Observed};
use crate::operation::{LinkChange, Operation};
use crate::plan::Step;

/// Raised when the meaning of a field changes; a file of another version is not read.
const VERSION: u32 = 1;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Ledger {
    version: u32,
    /// `/proc/sys/kernel/random/boot_id`: notes of another boot are about other links.
    boot: String,
    /// By link index; a link that comes back has another.
    pub links: BTreeMap<u32, Found>,
}

/// How a link was found when it was first set, and the names it was given since.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Found {
    /// Settings that were changed, as they were; nothing for one that was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_up: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accept_ra: Option<i32>,
    /// Names that were added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub altnames: Vec<String>,
}

impl Ledger {
    /// The ledger after these steps, of which it must know before they are made.
    pub fn noting(&self, steps: &[Step], observed: &Observed) -> Ledger {
        let mut ledger = self.clone();
        ledger.links.retain(|index, _| observed.links.contains_key(index));
        for step in steps {
            let Operation::SetLink { link, change } = &step.operation else { continue };
            let Some(before) = observed.links.get(&link.index) else { continue };
            ledger.links.entry(link.index).or_default().note(change, before);
        }
        ledger
    }
}

impl Found {
    /// The first change of a setting counts: what is there later may be ours.
    fn note(&mut self, change: &LinkChange, before: &Link) {
        match change {
            LinkChange::Up | LinkChange::Down => _ = self.is_up.get_or_insert(before.is_up),
            LinkChange::Mtu(_) => _ = self.mtu.get_or_insert(before.mtu),
            LinkChange::AcceptRa(_) => {
                if let Some(ipv6) = &before.ipv6 {
                    self.accept_ra.get_or_insert(ipv6.accept_ra);
                }
            }
            LinkChange::AddAltname(name) if !self.altnames.contains(name) => self.altnames.push(name.clone()),
            LinkChange::AddAltname(_) | LinkChange::DeleteAltname(_) => {}
            // The number says whose it is.
            LinkChange::Group(_) => {}
        }
    }
}

fn path(directory: &Path) -> PathBuf {
    directory.join("ledger.json")
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().into()).unwrap_or_default()
}

/// The ledger of this boot; an empty one when there is none. One that cannot be read costs a line in the log: what it
/// says is only needed to put links back as they were found.
pub fn load(directory: &Path) -> Ledger {
    let path = path(directory);
    let empty = Ledger { version: VERSION, boot: boot(), links: BTreeMap::new() };
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return empty,
        Err(error) => {
            tracing::warn!("{}: {error}; going on without it", path.display());
            return empty;
        }
    };
    match serde_json::from_str::<Ledger>(&text) {
        Ok(ledger) if ledger.version == VERSION && ledger.boot == empty.boot => ledger,
        Ok(_) => empty,
        Err(error) => {
            tracing::warn!("{}: {error}; going on without it", path.display());
            empty
        }
    }
}

/// Writes the ledger as a whole: a crash leaves the old one or the new one.
///
/// # Errors
/// The runtime directory cannot be written.
pub fn save(ledger: &Ledger, directory: &Path) -> Result<()> {
    let path = path(directory);
    let new = directory.join("ledger.json.new");
    let write = || -> Result<()> {
        let mut file = fs::File::create(&new)?;
        file.write_all(serde_json::to_string_pretty(ledger)?.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

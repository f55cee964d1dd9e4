//! What the kernel cannot remember for us: how a link was before we set it and, where it is older than Linux 5.18, which
//! addresses are ours. One file below the runtime directory, which lives as long as the kernel's own state does: until
//! the machine is rebooted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::desired::Desired;
use crate::net::{Address, Link, MacAddr, Observed};
use crate::operation::{LinkChange, Operation};
use crate::plan::Step;
use crate::policy;
use crate::proof::Notes;
use crate::whole_file;

/// Raised when the meaning of a field changes; a file of another version is not read.
const VERSION: u32 = 1;

const MODE: u32 = 0o644;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Ledger {
    version: u32,
    /// Boot and network namespace: notes of another one are about other links.
    boot: String,
    /// The MAC of the primary ENI, which an instance keeps for life: a machine that is woken from another one's memory has
    /// that one's boot, and other links.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    primary: Option<MacAddr>,
    /// By link index; a link that comes back has another.
    pub links: BTreeMap<u32, Found>,
    /// The kernel has shown a mark of ours, so it keeps them all.
    #[serde(default)]
    keeps_marks: bool,
    /// What was added, by link index.
    #[serde(default)]
    addresses: BTreeSet<(u32, IpNet)>,
    /// What metadata does not tell of any more or has told lately, and since when.
    #[serde(flatten)]
    pub notes: Notes,
    /// What the last run could not bring about, by the ENI's id (or MAC).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub troubles: BTreeMap<String, Noted>,
}

/// Why an ENI is not as it should be, and since when.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Noted {
    pub why: String,
    /// Seconds since 1970.
    pub since: u64,
    /// Waiting does not help.
    pub is_failed: bool,
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
    /// The same ledger if it is of the instance whose primary ENI this is; else one without notes.
    pub fn of(self, primary: MacAddr) -> Ledger {
        let is_its = self.primary.is_none_or(|noted| noted == primary);
        Ledger { primary: Some(primary), ..if is_its { self } else { empty() } }
    }

    /// Of the instance whose notes these are.
    pub fn primary(&self) -> Option<MacAddr> {
        self.primary
    }

    /// For commands that do not ask metadata: an instance has the link of its primary ENI.
    pub fn of_machine(self, observed: &Observed) -> Ledger {
        let is_here = |primary| observed.links.values().any(|link| link.mac == Some(primary));
        if self.primary.is_none_or(is_here) { self } else { empty() }
    }

    /// After a release that leaves these links alone: what is noted of them, and nothing else.
    pub fn only_of(mut self, links: &BTreeSet<u32>) -> Ledger {
        self.links.retain(|index, _| links.contains(index));
        self.addresses.retain(|(index, _)| links.contains(index));
        match self.links.is_empty() && self.addresses.is_empty() {
            true => Ledger::default(),
            false => Ledger { notes: Notes::default(), troubles: BTreeMap::new(), ..self },
        }
    }

    /// With no note of this link.
    pub fn without(mut self, link: u32) -> Ledger {
        self.links.remove(&link);
        self.addresses.retain(|(index, _)| *index != link);
        self
    }

    /// As it was before a run that is undone by now: with these notes of links, and none of addresses that are not there.
    pub fn with_links(&self, links: &BTreeMap<u32, Found>, observed: &Observed) -> Ledger {
        let mut ledger = Ledger { links: links.clone(), ..self.clone() };
        ledger.links.retain(|index, _| observed.links.contains_key(index));
        ledger.addresses.retain(|key| is_there(observed, key));
        ledger
    }

    /// Without notes of what is as it was found.
    pub fn of_what_differs(&self, observed: &Observed) -> Ledger {
        let mut ledger = self.clone();
        ledger.links.retain(|index, found| match observed.links.get(index) {
            Some(link) => {
                found.keep_what_differs(link);
                *found != Found::default()
            }
            None => false,
        });
        ledger.addresses.retain(|key| is_there(observed, key));
        ledger
    }

    /// The ledger after these steps, of which it must know before they are made.
    pub fn noting(&self, steps: &[Step], observed: &Observed) -> Ledger {
        let mut ledger = self.clone();
        ledger.links.retain(|index, _| observed.links.contains_key(index));
        // What somebody took away is not ours when somebody adds it again.
        ledger.addresses.retain(|key| is_there(observed, key));
        for step in steps {
            match &step.operation {
                Operation::SetLink { link, change } => {
                    let Some(before) = observed.links.get(&link.index) else { continue };
                    ledger.links.entry(link.index).or_default().note(change, before);
                }
                Operation::AddAddress { link, address } => _ = ledger.addresses.insert((link.index, address.net)),
                Operation::AddRoute { .. }
                | Operation::AddRule { .. }
                | Operation::ChangeAddress { .. }
                | Operation::DeleteAddress { .. }
                | Operation::DeleteRule { .. }
                | Operation::DeleteRoute { .. }
                | Operation::ResetLink { .. } => {}
            }
        }
        ledger
    }

    /// The ledger after a snapshot that leaves these.
    pub fn with_notes(&self, notes: Notes) -> Ledger {
        Ledger { notes, ..self.clone() }
    }

    /// The ledger after what these steps add has arrived with its ENI, `now` being in milliseconds since boot.
    pub fn with_arrivals(mut self, steps: &[Step], desired: &Desired, observed: &Observed, now: u64) -> Ledger {
        let arrival = |step: &Step| match &step.operation {
            Operation::AddAddress { link, address } => {
                Some((observed.links.get(&link.index)?.mac?, address.net.addr().into()))
            }
            Operation::AddRule { rule } if policy::is_of_prefix(rule) => {
                let (mac, _) = desired.enis.iter().find(|(_, eni)| eni.table == rule.table)?;
                Some((*mac, rule.from?))
            }
            _ => None,
        };
        for (mac, source) in steps.iter().filter_map(arrival) {
            self.notes.arrivals.entry(mac).or_default().insert(source, now);
        }
        self
    }

    /// The ledger after a run with these troubles. One that was there before is as old as it was.
    pub fn with_troubles(&self, troubles: impl Iterator<Item = (String, Noted)>) -> Ledger {
        let aged = |(eni, noted): (String, Noted)| {
            let known = self.troubles.get(&eni).filter(|known| known.why == noted.why);
            let since = known.map_or(noted.since, |known| known.since);
            (eni, Noted { since, ..noted })
        };
        Ledger { troubles: troubles.map(aged).collect(), ..self.clone() }
    }

    /// The ledger after this was seen as the kernel shows it, if that tells anything new of the kernel.
    pub fn learning_marks(&self, observed: &Observed, mark: u8) -> Option<Ledger> {
        let is_shown = || observed.addresses.iter().any(|(_, address)| address.protocol == mark);
        (!self.keeps_marks && is_shown()).then(|| Ledger { keeps_marks: true, ..self.clone() })
    }

    /// The same, with the mark back on addresses of ours from which the kernel has lost it. `IFA_PROTO` is there since
    /// Linux 5.18; older kernels take it without an error and forget it.
    pub fn recall(&self, mut observed: Observed, mark: u8) -> Observed {
        // A kernel that knows it puts it on ::1 itself, where there is IPv6, and shows what others set. Then each address speaks
        // for itself.
        if self.keeps_marks || observed.addresses.iter().any(|(_, address)| address.protocol != 0) {
            return observed;
        }
        let recall = |(index, address): (u32, Address)| {
            // Another manager may have put its own in the place of ours, of which it differs by a connected route or an end.
            let can_be_ours = !address.has_prefix_route && !address.is_leased;
            let is_ours = can_be_ours && self.addresses.contains(&(index, address.net));
            let protocol = if is_ours { mark } else { address.protocol };
            (index, Address { protocol, ..address })
        };
        observed.addresses = observed.addresses.into_iter().map(recall).collect();
        observed
    }
}

impl Found {
    fn keep_what_differs(&mut self, link: &Link) {
        self.is_up = self.is_up.filter(|found| *found != link.is_up);
        self.mtu = self.mtu.filter(|found| *found != link.mtu);
        let accept_ra = link.ipv6.as_ref().map(|ipv6| ipv6.accept_ra);
        self.accept_ra = self.accept_ra.filter(|found| Some(*found) != accept_ra);
        self.altnames.retain(|name| link.altnames.contains(name));
    }

    /// The first change of a setting counts: what is there later may be ours.
    pub fn note(&mut self, change: &LinkChange, before: &Link) {
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

fn is_there(observed: &Observed, (link, net): &(u32, IpNet)) -> bool {
    observed.addresses_on(*link).any(|address| address.net == *net)
}

fn path(directory: &Path) -> PathBuf {
    directory.join("ledger.json")
}

/// This boot and network namespace; none when that cannot be told, and then no ledger is known to be of it.
pub fn boot() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = match namespace_cookie() {
        Some(cookie) => format!("net:{cookie}"),
        None => fs::read_link("/proc/thread-self/ns/net").ok()?.display().to_string(),
    };
    Some(format!("{} {namespace}", boot.trim()))
}

/// The number that the kernel gives to one network namespace and never again; none before Linux 5.14. The number of its
/// inode, as `/proc` shows it, is given to the next one as soon as a namespace is gone.
fn namespace_cookie() -> Option<u64> {
    // Of a family that services are allowed anyway.
    // Not bound: all ports may be in use.
    // SAFETY: it makes a descriptor, which is this function's alone.
    let socket = unsafe {
        let number = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        (number >= 0).then(|| OwnedFd::from_raw_fd(number))?
    };
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is what `cookie` has.
    let result = unsafe {
        let value = std::ptr::from_mut(&mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value, &mut length)
    };
    (result == 0).then_some(cookie)
}

/// Of `linux/socket.h`, on every architecture that EC2 has.
const SO_NETNS_COOKIE: libc::c_int = 71;

fn empty() -> Ledger {
    Ledger { version: VERSION, boot: boot().unwrap_or_default(), ..Ledger::default() }
}

/// The ledger of this boot; an empty one when there is none. One that cannot be read costs a line in the log: what it
/// says is needed to put links back as they were found, to take addresses away on an old kernel and to prove what is
/// gone, and for nothing else.
pub fn load(directory: &Path) -> Ledger {
    let known = read(directory).unwrap_or_else(|error| {
        tracing::warn!("{error:#}; going on without it");
        None
    });
    known.unwrap_or_else(empty)
}

/// The ledger, with a new one put in the place of one that is not there or cannot be read, so that the log tells of it once.
/// `now` is in milliseconds since boot.
pub fn load_or_mend(directory: &Path, now: u64) -> Ledger {
    let known = read(directory).unwrap_or_else(|error| {
        tracing::warn!("{error:#}; going on with an empty one");
        None
    });
    let known = known.map(|known| Ledger { notes: known.notes.clone().until(now), ..known });
    known.unwrap_or_else(|| {
        let doubting = empty().with_notes(Notes { unknown_before: Some(now), ..Notes::default() });
        // Who can note nothing would doubt for ever.
        if save(&doubting, directory) { doubting } else { empty() }
    })
}

/// None where there is none of this version and boot.
fn read(directory: &Path) -> Result<Option<Ledger>> {
    let path = path(directory);
    let Some(bytes) = whole_file::read(&path)? else { return Ok(None) };
    let ledger: Ledger = serde_json::from_slice(&bytes).with_context(|| format!("reading {}", path.display()))?;
    let is_of_this_boot = boot().is_some_and(|boot| boot == ledger.boot);
    Ok((ledger.version == VERSION && is_of_this_boot).then_some(ledger))
}

/// Writes the ledger. If it cannot be written, that costs what it says and a line in the log, but no address. Whether it was
/// written.
pub fn save(ledger: &Ledger, directory: &Path) -> bool {
    let written = serde_json::to_string_pretty(ledger).map_err(anyhow::Error::from);
    let written = written.and_then(|text| whole_file::write(&path(directory), &text, MODE));
    if let Err(error) = &written {
        tracing::warn!("{error:#}; going on without it");
    }
    written.is_ok()
}

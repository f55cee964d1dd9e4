//! Snapshots in files: what is read of the machine for one, how one is written, and how it is read again. What is in it
//! and what it means is for `snapshot`.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, anyhow, ensure};
use tokio::time::Instant;

use crate::config::{Config, File};
use crate::history;
use crate::imds::{self, Imds, Scope, Surroundings};
use crate::ledger;
use crate::machine_files;
use crate::metadata::Tree;
use crate::net::Observed;
use crate::netlink::Netlink;
use crate::snapshot::{Snapshot, Taken};
use crate::trial::{self, Notice};
use crate::whole_file;

/// Bytes. The whole tree of the largest instance is below one MiB; a device that never ends is no snapshot.
const LARGEST: u64 = 64 << 20;

/// All that is there at this moment, and what went wrong with metadata if there is none: that is told in it, too.
///
/// # Errors
/// No netlink.
pub async fn take(
    endpoint: Option<&str>,
    deadline: Instant,
    config: &Config,
    configuration: &[File],
    directory: &Path,
) -> Result<(Snapshot, Option<imds::Error>)> {
    let observed = Netlink::open().context("opening a netlink socket")?.observe().await?;
    let tree = read_tree(endpoint, deadline, config, &observed).await;
    let uptime = fs::read_to_string("/proc/uptime").ok();
    let uptime: Option<f64> = uptime.and_then(|text| text.split(' ').next()?.parse().ok());
    let snapshot = Snapshot::new(Taken {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().into()),
        taken_at: SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
        uptime,
        trial: uptime.and_then(|uptime| notice(&observed, uptime, directory)),
        tree: tree.as_ref().map(Tree::clone).map_err(|error| (error.fault(), error.to_string())),
        imds_endpoint: endpoint.map(String::from),
        observed,
        configuration: configuration.to_vec(),
        ledger: ledger::load(directory),
        files: machine_files::read(Path::new("/")),
        history: history::read(directory),
    });
    Ok((snapshot, tree.err()))
}

fn notice(observed: &Observed, uptime: f64, directory: &Path) -> Option<Notice> {
    let trial = trial::load(directory).ok()??;
    let is_ours = trial.is_of_machine(&observed.links);
    is_ours.then(|| Notice::of(trial.standing((uptime * 1000.0) as u64)))?
}

async fn read_tree(
    endpoint: Option<&str>,
    deadline: Instant,
    config: &Config,
    observed: &Observed,
) -> Result<Tree, imds::Error> {
    let mut imds = Imds::connect(endpoint, &Surroundings::of(observed), deadline).await?;
    imds.snapshot(Scope::details(config)).await
}

/// Whole or not at all, and for its owner's eyes: it says much of a machine.
///
/// # Errors
/// It cannot be written, or something is there by that name that is no file.
pub fn write(text: &str, path: &Path) -> Result<()> {
    whole_file::write(path, text, 0o600)
}

/// # Errors
/// It cannot be read, or is none.
pub fn read(path: &Path) -> Result<Snapshot> {
    let snapshot = text(path).and_then(|text| Snapshot::from_json(&text));
    snapshot.with_context(|| unusable(path))
}

/// Metadata alone, of a file that has at least that.
///
/// # Errors
/// It cannot be read, or has none.
pub fn read_metadata(path: &Path) -> Result<Tree> {
    text(path).and_then(|text| Tree::from_json(&text)).with_context(|| unusable(path))
}

/// What is said of a file that is no help.
pub fn unusable(path: &Path) -> String {
    format!("the snapshot {} cannot be used", path.display())
}

fn text(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(LARGEST + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= LARGEST, "it is larger than {} MiB", LARGEST >> 20);
    String::from_utf8(bytes).map_err(|error| anyhow!("it is not UTF-8 (byte {})", error.utf8_error().valid_up_to()))
}

//! Metrics in a file for node_exporter's textfile collector. What they mean is for `metrics`.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow};

use crate::metrics::{Metrics, Run};
use crate::report::{Exit, Report};
use crate::tally::{self, Counts};
use crate::whole_file;

/// How long another process that writes the same file is waited for. It takes a millisecond.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);

/// For whoever runs the collector.
const MODE: u32 = 0o644;

/// Notes a run that has taken so long. If it cannot be written, that costs the metrics and a line in the log.
pub fn note_run(path: &Path, took: Duration, exit: Exit, report: Option<&Report>) {
    let run = Run { at: now(), seconds: took.as_secs_f64(), exit, report };
    update(path, |metrics, counts| metrics.after(&run, counts));
}

/// Notes that all is still as it was after the last run.
pub fn note_still_so(path: &Path) {
    update(path, |metrics, counts| metrics.still_so(now(), counts));
}

fn update(path: &Path, next: impl FnOnce(&Metrics, &Counts) -> Metrics) {
    let counts = tally::take();
    let write = || {
        whole_file::check(path)?;
        let _lock = lock(path)?;
        whole_file::write(path, &next(&read(path), &counts).to_string(), MODE)
    };
    if let Err(error) = write() {
        tracing::warn!("metrics cannot be written to {}: {error:#}", path.display());
    }
}

/// Counters would go backwards if two runs wrote at once.
fn lock(path: &Path) -> Result<File> {
    let name = path.file_name().with_context(|| format!("{} is no name of a file", path.display()))?;
    let lock = path.with_file_name(format!(".{}.lock", name.to_string_lossy()));
    let failed = || format!("locking {}", lock.display());
    // Whoever may open a file may lock it, so nobody else may.
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&lock).with_context(failed)?;
    let until = Instant::now() + PATIENCE;
    while let Err(error) = file.try_lock() {
        if Instant::now() >= until {
            return Err(anyhow!(error).context(failed()));
        }
        sleep(PAUSE);
    }
    Ok(file)
}

/// One that cannot be read costs a line in the log and what the counters were, which monitoring takes for a restart.
fn read(path: &Path) -> Metrics {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Metrics::default(),
        text => text.map_err(|error| error.to_string()),
    };
    text.and_then(|text| Metrics::parse(&text)).unwrap_or_else(|why| {
        tracing::warn!("the metrics in {} cannot be used: {why}; counters begin anew", path.display());
        Metrics::default()
    })
}

fn now() -> f64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_millis() as f64 / 1000.0)
}

//! What it takes to build eniup, and what comes of it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::eniup;
use super::tables::Section;

pub fn measure(r#static: Option<&Path>) -> Result<Section> {
    eprintln!("a clean build");
    let header = ["crates", "seconds of a clean release build", "jobs", "bytes, dynamic", "bytes, static"];
    let mut section = Section::new("build", &header);
    let jobs = std::thread::available_parallelism()?;
    section.push([
        crates()?.to_string(),
        format!("{:.0}", seconds()?),
        jobs.to_string(),
        bytes(eniup())?.to_string(),
        r#static.map(bytes).transpose()?.map_or("-".into(), |bytes| bytes.to_string()),
    ]);
    Ok(section)
}

/// In bytes.
pub fn bytes(file: &Path) -> Result<u64> {
    Ok(fs::metadata(file).with_context(|| file.display().to_string())?.len())
}

/// eniup itself is one of them.
fn crates() -> Result<usize> {
    let output = cargo(&["tree", "--edges", "normal", "--prefix", "none", "--format", "{p}"]).output()?;
    ensure!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let mut lines: Vec<&str> = std::str::from_utf8(&output.stdout)?.lines().collect();
    // One that is named again has a mark behind it.
    lines.iter_mut().for_each(|line| *line = line.trim_end_matches(" (*)"));
    lines.sort();
    lines.dedup();
    Ok(lines.len())
}

fn seconds() -> Result<f64> {
    let empty = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let started = Instant::now();
    let output = cargo(&["build", "--release", "--bin", "eniup"]).arg("--target-dir").arg(empty.path()).output()?;
    ensure!(output.status.success(), "cargo build: {}", String::from_utf8_lossy(&output.stderr));
    Ok(started.elapsed().as_secs_f64())
}

/// Of what has been fetched already: there is no network here.
fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments);
    command.args(["--package", "eniup", "--locked", "--offline"]);
    command
}

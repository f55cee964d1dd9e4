//! Answers on stdout, and the exit codes that they mean.

use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, Result};

use super::arguments::Color;
use crate::config::{File, Settings};
use crate::doctor::{self, Diagnosis};
use crate::eni::Attached;
use crate::explain::Explanation;
use crate::layout;
use crate::plan::Plan;
use crate::report::{self, Exit, Remark, Report};
use crate::snapshot::Snapshot;
use crate::snapshot_file;
use crate::status::{Status, Text};
use crate::trouble;

const NARROWEST: usize = 40;

/// What is wrong has been said by now.
pub(super) fn check(files: &[File]) -> Result<Exit> {
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    match names.is_empty() {
        true => text("no configuration file: everything is as by default\n")?,
        false => text(&format!("no errors in {}\n", names.join(", ")))?,
    }
    Ok(Exit::Ok)
}

pub(super) fn settings(settings: &Settings, files: &[File], is_json: bool) -> Result<Exit> {
    match is_json {
        true => text(&format!("{:#}\n", settings.to_json(files)))?,
        false => text(&settings.to_string())?,
    }
    Ok(Exit::Ok)
}

pub(super) fn plan(attached: &Attached, plan: &Plan, is_detailed: bool, is_json: bool) -> Result<Exit> {
    let troubles = trouble::preview_troubles(attached, plan);
    let notes: Vec<&String> = plan.notes.iter().chain(&attached.idle).collect();
    if is_json {
        let steps: Vec<serde_json::Value> = plan.steps.iter().map(|step| step.to_json()).collect();
        let troubles: Vec<serde_json::Value> = troubles
            .iter()
            .map(|(eni, trouble)| serde_json::json!({ "eni": eni, "state": trouble.state, "why": trouble.why }))
            .collect();
        let shown = serde_json::json!({ "schema": 1, "steps": steps, "troubles": troubles, "notes": notes });
        text(&format!("{shown:#}\n"))?;
    } else {
        steps(plan)?;
    }
    for note in &notes {
        tracing::warn!("{note}");
    }
    for (eni, trouble) in &troubles {
        report::remark(eni, trouble).warn();
    }
    match (troubles.is_empty(), is_detailed && !plan.steps.is_empty()) {
        (false, _) => Ok(Exit::Degraded),
        (true, true) => Ok(Exit::Differences),
        (true, false) => Ok(Exit::Ok),
    }
}

/// One line per step, as an ip(8) command.
pub(super) fn steps(plan: &Plan) -> Result<()> {
    for step in &plan.steps {
        text(&format!("{step}\n"))?;
    }
    Ok(())
}

pub(super) fn report(report: &Report) -> Result<Exit> {
    for note in &report.notes {
        // A run that had nothing to do is silent; `eniup plan` and `eniup status` say it at any time.
        match report.done.is_empty() {
            true => tracing::debug!("{note}"),
            false => tracing::warn!("{note}"),
        }
    }
    report.remarks().iter().for_each(Remark::warn);
    tracing::debug!("{} changes made", report.done.len());
    Ok(report.exit())
}

pub(super) fn diagnosis(diagnosis: &Diagnosis, is_json: bool) -> Result<Exit> {
    match is_json {
        true => text(&format!("{}\n", serde_json::to_string_pretty(diagnosis)?))?,
        false => text(&layout::fit(&diagnosis.to_string(), width(), is_fix))?,
    }
    Ok(if diagnosis.verdict == doctor::Verdict::Fail { Exit::Failed } else { Exit::Ok })
}

pub(super) fn snapshot(snapshot: Snapshot, output: Option<&Path>) -> Result<()> {
    match output {
        Some(path) => snapshot_file::write(&snapshot.to_json()?, path),
        None => text(&snapshot.to_json()?),
    }
}

pub(super) fn explanation(explanation: &Explanation, is_json: bool) -> Result<Exit> {
    match is_json {
        true => text(&format!("{}\n", serde_json::to_string_pretty(explanation)?))?,
        false => text(&layout::fit(&explanation.to_string(), width(), |_| false))?,
    }
    // The model is what the promise is tested with.
    Ok(if explanation.kernel_agrees == Some(false) { Exit::Failed } else { Exit::Ok })
}

pub(super) fn status(status: &Status, color: Color, is_json: bool) -> Result<Exit> {
    if is_json {
        text(&format!("{}\n", serde_json::to_string_pretty(status)?))?;
    } else {
        let (has_colour, width) = (color.is_for(&std::io::stdout()), width());
        let shown = Text { status, has_colour, width }.to_string();
        text(&layout::fit(&shown, width, |line| line.trim_start().starts_with("would change: ")))?;
    }
    Ok(status.exit())
}

/// Commands, in several lines at times.
fn is_fix(line: &str) -> bool {
    line.starts_with("      fix: ") || line.starts_with("           ")
}

/// Of a terminal; all else takes lines of any length.
fn width() -> Option<usize> {
    let stdout = std::io::stdout();
    let (terminal_size::Width(width), _) = terminal_size::terminal_size_of(&stdout).filter(|_| stdout.is_terminal())?;
    // A terminal that does not know its size says 0, and in a very narrow one nothing can be read anyway.
    Some(usize::from(width)).filter(|width| *width > 0).map(|width| width.max(NARROWEST))
}

/// To stdout. A reader that went away (`| head`) has what it wanted.
pub(super) fn text(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("writing to stdout"),
        _ => Ok(()),
    }
}

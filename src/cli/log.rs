//! What is told on stderr while a command is at work.

use std::sync::Mutex;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use super::arguments::{Cli, Command};
use crate::stderr::Unhindered;

pub(super) fn start(cli: &Cli) {
    let global = &cli.global;
    // A run on trial has to go on when its terminal does not.
    let is_on_trial = matches!(cli.command, Command::Reconcile { confirm: Some(_), .. });
    let writer = match is_on_trial.then(Unhindered::open).flatten() {
        Some(stderr) => BoxMakeWriter::new(Mutex::new(stderr)),
        None => BoxMakeWriter::new(std::io::stderr),
    };
    let level = match (global.quiet, global.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(writer)
        .with_ansi(global.color.is_for(&std::io::stderr()))
        // It would complain on stderr that stderr cannot be written, and panic since it cannot.
        .log_internal_errors(false)
        .without_time()
        .with_target(false)
        .init();
}

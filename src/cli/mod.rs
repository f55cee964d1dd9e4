//! Arguments to command to exit code. What the commands do is elsewhere.

mod arguments;
mod candidates;
mod commands;
mod help;
mod log;
mod man;
mod print;

use std::io::ErrorKind;
use std::time::Instant;

use anyhow::anyhow;
use clap::{CommandFactory, Parser};

use crate::config;
use crate::imds;
use crate::lock;
use crate::metadata;
use crate::metrics_file;
use crate::report::Exit;
use crate::run::NotPermitted;
use crate::snapshot::NoMetadata;
use crate::trial::InTheWay;
use crate::wait;
pub use arguments::Shell;
use arguments::{BadUsage, Cli, Command};
pub use man::{Page, pages};

/// The whole command line, for manual and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The script by which a shell completes eniup's command line, for packages.
pub fn completions(shell: Shell) -> &'static str {
    candidates::script(shell)
}

/// Runs the command of the process's arguments and gives its exit code.
pub fn run() -> Exit {
    leave_no_core();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let is_printed = error.print();
            return match (error.use_stderr(), is_printed) {
                (true, _) => Exit::Usage,
                (false, Err(error)) if error.kind() != ErrorKind::BrokenPipe => Exit::Failed,
                (false, _) => Exit::Ok,
            };
        }
    };
    match &cli.command {
        Command::Complete { words } => return candidates::complete(words),
        Command::Completions { shell } => return candidates::show_script(*shell),
        _ => {}
    }
    log::start(&cli);
    let (begun, mut report) = (Instant::now(), None);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(commands::dispatch(&cli, &mut report));
            // A name that is still being resolved is not waited for.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(anyhow!(error).context("starting the runtime")),
    };
    let exit = result.unwrap_or_else(|error| {
        tracing::error!("{error:#}");
        exit_of(&error)
    });
    if let Command::Reconcile { dry_run: false, metrics, .. } = &cli.command
        && let Some(path) = metrics.path()
    {
        metrics_file::note_run(path, begun.elapsed(), exit, report.as_ref());
    }
    exit
}

/// The exit code that an error stands for.
fn exit_of(error: &anyhow::Error) -> Exit {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<imds::Error>() {
            return if matches!(error, imds::Error::BadEndpoint { .. }) {
                Exit::Usage
            } else {
                Exit::MetadataUnavailable
            };
        }
        if let Some(error) = cause.downcast_ref::<wait::Unready>() {
            return error.exit();
        }
        if cause.is::<BadUsage>() {
            return Exit::Usage;
        }
        if cause.is::<metadata::Unusable>() || cause.is::<NoMetadata>() {
            return Exit::MetadataUnavailable;
        }
        if cause.is::<config::Problems>() {
            return Exit::BadConfiguration;
        }
        if cause.is::<lock::Busy>() || cause.is::<InTheWay>() {
            return Exit::Busy;
        }
        if cause.is::<NotPermitted>() {
            return Exit::NotPermitted;
        }
    }
    Exit::Failed
}

/// A core would hold the session token of instance metadata.
fn leave_no_core() {
    // SAFETY: changes an attribute of this process and touches no memory. It cannot fail with this value.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

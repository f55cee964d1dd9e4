//! The `vpc-lab` command.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use vpc_lab::matrix::{self, How};
use vpc_lab::trials::{self, Trial};
use vpc_lab::{demo, figures, sandbox, shell, storm, vigil};

/// A VPC in a box: EC2's networking in the namespaces of one process, to see and to judge eniup in.
#[derive(Parser)]
#[command(version, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Verb,

    /// The binary to judge, instead of building this checkout's.
    #[arg(long, global = true, value_name = "FILE", env = "ENIUP")]
    eniup: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Verb {
    /// Play the main job: who reaches what before and after `eniup reconcile`, a hot-plugged ENI, two failovers.
    Demo,
    /// The same VPC by hand: EC2's verbs, programs on the instances, probes. Reads lines; `help` lists the verbs.
    Shell,
    /// Make every exchange on every layout.
    Matrix {
        /// Who configures the instances.
        #[arg(long, value_enum, default_value_t = How::Eniup)]
        how: How,
        /// Only these layouts.
        #[arg(long, value_name = "NAME")]
        layout: Vec<String>,
    },
    /// Let ENIs, addresses and prefixes come and go at random, and see whether a conversation over anything else suffers.
    Storm {
        /// Replays a storm.
        #[arg(long)]
        seed: Option<u64>,
        #[arg(long, default_value_t = 500)]
        operations: usize,
        /// Show every operation.
        #[arg(long)]
        list: bool,
    },
    /// A NAT box forwards conversations of a private subnet while ENIs come and go.
    NatBox {
        #[arg(long, default_value_t = 1000)]
        conversations: usize,
        #[arg(long, default_value_t = 5)]
        rounds: u32,
    },
    /// Repeat a trial with everything that is left to chance drawn from seeds; prints what it came to.
    Trial {
        #[arg(value_enum)]
        trial: Trial,
        /// How many seeds.
        #[arg(long, default_value_t = 100)]
        count: u64,
        /// The first of them.
        #[arg(long, default_value_t = 0)]
        first: u64,
        /// VPCs that share the work.
        #[arg(long, default_value_t = 1)]
        jobs: u64,
    },
    /// Measure what `eniup reconcile` costs for 1, 4 and 15 ENIs with ten addresses each.
    Figures {
        /// What `eniup watch` costs instead: while nothing happens, and how soon it repairs.
        #[arg(long)]
        watch: bool,
        /// How long nothing happens.
        #[arg(long, default_value_t = 10, requires = "watch")]
        minutes: u64,
    },
}

fn main() -> ExitCode {
    // A reader that went away (`| head`) has what it wanted.
    // SAFETY: only changes how this process takes a signal.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vpc-lab: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run() -> Result<ExitCode> {
    let cli = Cli::parse();
    if !sandbox::is_inside() {
        if matches!(cli.command, Verb::Shell) {
            // Ctrl-C is for the programs that run in the shell, not for the lab around them.
            // SAFETY: only changes how this process and its children take a signal.
            unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
        }
        return enter(cli.eniup);
    }
    let eniup = cli.eniup.context("inside the sandbox the binary is given")?;
    let is_right = match cli.command {
        Verb::Demo => demo::play(eniup)?,
        Verb::Shell => {
            let mut demo = demo::step("building a VPC", || demo::build(eniup))?;
            shell::talk(&mut demo)?
        }
        Verb::Matrix { how, layout } => {
            let is_right = matrix::play(&eniup, how, &layout)?;
            is_right || how == How::None
        }
        Verb::Storm { seed, operations, list } => {
            let seed = seed.unwrap_or_else(|| fastrand::u64(..));
            println!("storm of {operations} operations, --seed {seed}");
            let report = storm::play(&eniup, seed, operations, |n| eprintln!("{n} operations done"))?;
            report.operations.iter().filter(|_| list).for_each(|operation| println!("  {operation}"));
            println!("{}", report.rate);
            show(&report)
        }
        Verb::NatBox { conversations, rounds } => show(&storm::nat_box(&eniup, conversations, rounds)?),
        Verb::Trial { trial, count, first, jobs } => trials::play(trial, &eniup, first..first + count, jobs)?,
        Verb::Figures { watch, minutes } => {
            match watch {
                true => vigil::measure(&eniup, Duration::from_secs(minutes * 60))?,
                false => figures::measure(&eniup)?,
            }
            true
        }
    };
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// What became of the conversations; gives whether none has lost anything.
fn show(report: &storm::Report) -> bool {
    let sent: u64 = report.flows.iter().map(|flow| flow.sent).sum();
    let lost: u64 = report.flows.iter().map(|flow| flow.lost()).sum();
    println!(
        "{} operations, {} conversations, {sent} messages, {lost} lost, {} packets dropped by the source check",
        report.operations.len(),
        report.flows.len(),
        report.drops
    );
    report.broken().iter().take(10).for_each(|flow| println!("  {flow}"));
    report.is_right()
}

/// This very command again, in the sandbox.
fn enter(eniup: Option<PathBuf>) -> Result<ExitCode> {
    let eniup = match eniup {
        Some(file) => file.canonicalize().with_context(|| format!("looking for {}", file.display()))?,
        None => demo::step("building eniup", build)?,
    };
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).env("ENIUP", eniup);
    sandbox::prepare(&mut command);
    let status = command.status().map_err(sandbox::explain)?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

/// Builds this checkout's eniup in the profile in which the lab itself was built, and gives its path.
fn build() -> Result<PathBuf> {
    let manifest = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
    ensure!(manifest.exists(), "the checkout this lab was built from is gone: give the binary to judge with --eniup");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--locked", "-p", "eniup", "--bin", "eniup", "--message-format=json"]);
    command.arg("--manifest-path").arg(&manifest);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let output = command.stderr(std::process::Stdio::inherit()).output().context("running cargo")?;
    ensure!(output.status.success(), "building eniup failed ({})", output.status);
    // Cargo says where the binary is; a target directory can be anywhere.
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if let Some(path) = message["executable"].as_str() {
            return Ok(path.into());
        }
    }
    bail!("cargo built eniup and did not say where")
}

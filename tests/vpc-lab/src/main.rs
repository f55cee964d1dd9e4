//! The `vpc-lab` command.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use vpc_lab::matrix::{self, How};
use vpc_lab::trials::{self, Trial};
use vpc_lab::{demo, figures, sandbox, shell};

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
    Figures,
}

fn main() -> ExitCode {
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
        Verb::Trial { trial, count, first, jobs } => trials::play(trial, &eniup, first..first + count, jobs)?,
        Verb::Figures => {
            figures::measure(&eniup)?;
            true
        }
    };
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(1) })
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
    // Ctrl-C reaches the lab too, and the lab decides.
    // SAFETY: only changes how this process takes a signal.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
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

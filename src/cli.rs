//! Arguments to command to exit code. What the commands do is elsewhere.

use std::fs;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use tokio::time::Instant;
use tracing::level_filters::LevelFilter;

use crate::config::{self, Config, File, Settings};
use crate::config_files::{self, Places};
use crate::desired::desired;
use crate::eni::Attached;
use crate::imds::{self, Imds, Scope, Surroundings};
use crate::lock;
use crate::metadata::{self, Tree};
use crate::plan::{Plan, fresh_machine, plan};
use crate::reconcile::{self, NotPermitted, Options};
use crate::report::{Exit, Report};
use crate::selection::select;
use crate::status::{Status, Text, status};

const EXAMPLES: &str = "\
Examples:
  eniup plan                  what would change, as ip(8) commands; changes nothing
  sudo eniup reconcile        make the kernel agree with instance metadata
  eniup status                every ENI, as metadata and the kernel have it
  sudo eniup release          take away everything that eniup added

Exit codes:
  0 ok   1 failed   2 differences (with --detailed-exitcode)   3 an ENI is pending or failed, the others are done
  64 usage   69 metadata unavailable   75 another run is busy   77 needs CAP_NET_ADMIN   78 bad configuration";

/// Bytes. The whole tree of the largest instance is below one MiB; a device that never ends is no snapshot.
const LARGEST_SNAPSHOT: u64 = 64 << 20;

/// Makes every elastic network interface (ENI) of an EC2 instance work.
///
/// Reads instance metadata (IMDSv2) and makes the kernel agree by netlink: links up, addresses, source-based policy
/// routing. A packet whose source address belongs to an ENI leaves by that ENI; the primary ENI stays as it is.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    global: Global,
}

#[derive(Args)]
struct Global {
    /// Say more: why nothing was done, and what was there already. Twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    /// Say only what went wrong.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,

    /// When to colour: a terminal is coloured unless NO_COLOR is set.
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    color: Color,

    /// The configuration file, instead of /etc/eniup/config.toml and the drop-ins.
    #[arg(long, global = true, value_name = "PATH")]
    config: Option<PathBuf>,

    /// Where the metadata service is, instead of 169.254.169.254 and fd00:ec2::254.
    #[arg(long, global = true, value_name = "URL", env = "AWS_EC2_METADATA_SERVICE_ENDPOINT")]
    imds_endpoint: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

impl Color {
    fn is_for(self, stream: &impl IsTerminal) -> bool {
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        match self {
            Color::Auto => stream.is_terminal() && !is_set("NO_COLOR") && !is_dumb(),
            Color::Always => true,
            Color::Never => false,
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Make the kernel agree with metadata; what boot, udev and the timer run.
    Reconcile {
        /// Only print what would change, like `eniup plan`.
        #[arg(long)]
        dry_run: bool,
        /// For a timer, udev or boot: take away nothing because metadata lacks it, unless it lacks it in two complete
        /// snapshots at least 10 s apart. Whoever runs it by hand can look before, so there one is enough.
        #[arg(long, conflicts_with = "dry_run")]
        automatic: bool,
        /// For udev: a link has come or gone, and metadata may list it only later. Waits until every network card here is
        /// listed, but for those that the configuration ignores.
        #[arg(long, conflicts_with = "dry_run")]
        hotplug: bool,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Print what would change, as ip(8) commands; changes nothing and needs no privilege.
    Plan {
        /// Read metadata from a saved snapshot: a JSON object whose `leaves` maps metadata paths to their text. If it
        /// is another machine's, the plan is for a fresh one with its links named eth0, eth1, …
        #[arg(long, value_name = "FILE")]
        metadata: Option<PathBuf>,
        /// Exit with 2 when something would change.
        #[arg(long)]
        detailed_exitcode: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Show every ENI as metadata and the kernel have it.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Take away everything that eniup added, and nothing else; asks no metadata.
    Release {
        /// Only print what would be taken away.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Look at the configuration: /etc/eniup/config.toml, then the drop-ins config.d/*.toml in /usr/lib/eniup,
    /// /run/eniup and /etc/eniup by the order of their names. None of them needs to be there.
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Say everything that is wrong with the configuration files, or that nothing is.
    Check,
    /// Print what is in effect, as a configuration file, and where each value was written.
    Show {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct Timeout {
    /// When to give up waiting, for another run, for metadata or for an ENI that is not all there yet: 500ms, 30s, 2m.
    /// Without it what is configured, else 30s.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
}

impl Timeout {
    fn deadline(&self, config: &Config) -> Instant {
        // An hour is as good as for ever, and far from what an instant can hold.
        Instant::now() + self.timeout.unwrap_or(config.timeout).min(Duration::from_secs(3600))
    }
}

/// The whole command line, for manual and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command of the process's arguments and gives its exit code.
pub fn run() -> Exit {
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
    start_log(&cli.global);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(dispatch(&cli)),
        Err(error) => Err(anyhow!(error).context("starting the runtime")),
    };
    result.unwrap_or_else(|error| {
        // Nobody is left to tell when this cannot be printed; the exit code still says it.
        let _ = writeln!(std::io::stderr(), "eniup: {error:#}");
        exit_of(&error)
    })
}

fn start_log(global: &Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(global.color.is_for(&std::io::stderr()))
        // It would complain on stderr that stderr cannot be written, and panic since it cannot.
        .log_internal_errors(false)
        .without_time()
        .with_target(false)
        .init();
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
        if cause.is::<metadata::Unusable>() {
            return Exit::MetadataUnavailable;
        }
        if cause.is::<config::Problems>() {
            return Exit::BadConfiguration;
        }
        if cause.is::<lock::Busy>() {
            return Exit::Busy;
        }
        if cause.is::<NotPermitted>() {
            return Exit::NotPermitted;
        }
    }
    Exit::Failed
}

async fn dispatch(cli: &Cli) -> Result<Exit> {
    let endpoint = cli.global.imds_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
    let files = match &cli.global.config {
        Some(file) => vec![config_files::read_one(file)],
        None => config_files::read_all(&Places::default()),
    };
    let settings = config::read(&files)?;
    let config = settings.config.clone();
    match &cli.command {
        Command::Reconcile { dry_run: true, timeout, .. } => {
            let (attached, plan) = reconcile::preview(endpoint, timeout.deadline(&config), &config).await?;
            show_plan(&attached, &plan, false, false)
        }
        Command::Reconcile { dry_run: false, automatic, hotplug, timeout } => {
            check_permission()?;
            let options =
                Options { is_automatic: *automatic, is_hotplug: *hotplug, ..options(endpoint, timeout, config) };
            show_report(&reconcile::reconcile(&options).await?)
        }
        Command::Plan { metadata: Some(file), detailed_exitcode, json, timeout: _ } => {
            let (attached, plan) = plan_offline(file, &config).await?;
            show_plan(&attached, &plan, *detailed_exitcode, *json)
        }
        Command::Plan { metadata: None, detailed_exitcode, json, timeout } => {
            let (attached, plan) = reconcile::preview(endpoint, timeout.deadline(&config), &config).await?;
            show_plan(&attached, &plan, *detailed_exitcode, *json)
        }
        Command::Status { json, timeout } => {
            let status = read_status(endpoint, timeout.deadline(&config), &config).await?;
            show_status(&status, cli.global.color, *json)
        }
        Command::Release { dry_run: true, timeout } => {
            for step in reconcile::preview_release(&options(endpoint, timeout, config)).await?.steps {
                print(&format!("{step}\n"))?;
            }
            Ok(Exit::Ok)
        }
        Command::Release { dry_run: false, timeout } => {
            check_permission()?;
            show_report(&reconcile::release_all(&options(endpoint, timeout, config)).await?)
        }
        Command::Config(ConfigCommand::Check) => show_check(&files),
        Command::Config(ConfigCommand::Show { json }) => show_settings(&settings, &files, *json),
    }
}

/// What is wrong has been said by now.
fn show_check(files: &[File]) -> Result<Exit> {
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    match names.is_empty() {
        true => print("no configuration file: everything is as by default\n")?,
        false => print(&format!("no errors in {}\n", names.join(", ")))?,
    }
    Ok(Exit::Ok)
}

fn show_settings(settings: &Settings, files: &[File], is_json: bool) -> Result<Exit> {
    match is_json {
        true => print(&format!("{:#}\n", settings.to_json(files)))?,
        false => print(&settings.to_string())?,
    }
    Ok(Exit::Ok)
}

fn options(endpoint: Option<&str>, timeout: &Timeout, config: Config) -> Options {
    Options {
        endpoint: endpoint.map(String::from),
        deadline: timeout.deadline(&config),
        directory: lock::runtime_directory(),
        is_automatic: false,
        is_hotplug: false,
        config,
    }
}

/// Said before anything is read, so that nobody waits for metadata only to hear it then.
fn check_permission() -> Result<()> {
    const CAP_NET_ADMIN: u64 = 12;
    let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    match effective.is_none_or(|bits| bits >> CAP_NET_ADMIN & 1 == 1) {
        true => Ok(()),
        false => Err(NotPermitted.into()),
    }
}

/// Another machine's snapshot says nothing of this one's links, so the plan is made for a fresh machine.
async fn plan_offline(file: &Path, config: &Config) -> Result<(Attached, Plan)> {
    let tree = read_snapshot(file).with_context(|| format!("the snapshot {} cannot be used", file.display()))?;
    // Not passed on as it is: the metadata service was not asked, so it is not what is unavailable.
    let attached = metadata::attached(&tree)
        .map_err(|error| anyhow!("the snapshot {} cannot be used: {}", file.display(), error.what()))?;
    let mut observed = reconcile::observe(config).await?;
    if !observed.links.values().any(|link| link.mac == Some(attached.primary)) {
        tracing::info!("the snapshot is not of this machine: planning for a fresh one with links eth0, eth1, …");
        observed = fresh_machine(&attached);
    }
    let attached = select(&attached, &tree, &observed, config);
    let plan = plan(&desired(&attached, config), &observed, attached.primary, config);
    Ok((attached, plan))
}

fn read_snapshot(file: &Path) -> Result<Tree> {
    let mut bytes = Vec::new();
    fs::File::open(file)?.take(LARGEST_SNAPSHOT + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= LARGEST_SNAPSHOT, "it is larger than {} MiB", LARGEST_SNAPSHOT >> 20);
    let text = String::from_utf8(bytes)
        .map_err(|error| anyhow!("it is not UTF-8 (byte {})", error.utf8_error().valid_up_to()))?;
    Tree::from_json(&text)
}

fn show_plan(attached: &Attached, plan: &Plan, is_detailed: bool, is_json: bool) -> Result<Exit> {
    let troubles = reconcile::preview_troubles(attached, plan);
    if is_json {
        let steps: Vec<serde_json::Value> = plan.steps.iter().map(|step| step.to_json()).collect();
        let troubles: Vec<serde_json::Value> = troubles
            .iter()
            .map(|(eni, trouble)| serde_json::json!({ "eni": eni, "state": trouble.state, "why": trouble.why }))
            .collect();
        let shown = serde_json::json!({ "schema": 1, "steps": steps, "troubles": troubles, "notes": plan.notes });
        print(&format!("{shown:#}\n"))?;
    } else {
        for step in &plan.steps {
            print(&format!("{step}\n"))?;
        }
    }
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
    for (eni, trouble) in &troubles {
        tracing::warn!("{eni} is {}: {}", trouble.state, trouble.why);
    }
    match (troubles.is_empty(), is_detailed && !plan.steps.is_empty()) {
        (false, _) => Ok(Exit::Degraded),
        (true, true) => Ok(Exit::Differences),
        (true, false) => Ok(Exit::Ok),
    }
}

fn show_report(report: &Report) -> Result<Exit> {
    for note in &report.notes {
        // A run that had nothing to do is silent; `eniup plan` and `eniup status` say it at any time.
        match report.changes {
            0 => tracing::debug!("{note}"),
            _ => tracing::warn!("{note}"),
        }
    }
    for line in report.to_string().lines() {
        tracing::warn!("{line}");
    }
    tracing::debug!("{} changes made", report.changes);
    Ok(report.exit())
}

async fn read_status(endpoint: Option<&str>, deadline: Instant, config: &Config) -> Result<Status> {
    let observed = reconcile::observe(config).await?;
    let mut imds = Imds::connect(endpoint, &Surroundings::of(&observed), deadline).await?;
    let tree = imds.snapshot(Scope::Details).await?;
    let attached = select(&metadata::attached(&tree)?, &tree, &observed, config);
    let plan = plan(&desired(&attached, config), &observed, attached.primary, config);
    Ok(status(&tree, &attached, &observed, &plan, config))
}

fn show_status(status: &Status, color: Color, is_json: bool) -> Result<Exit> {
    if is_json {
        print(&format!("{}\n", serde_json::to_string_pretty(status)?))?;
    } else {
        print(&Text { status, has_colour: color.is_for(&std::io::stdout()) }.to_string())?;
    }
    Ok(status.exit())
}

/// To stdout. A reader that went away (`| head`) has what it wanted.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("writing to stdout"),
        _ => Ok(()),
    }
}

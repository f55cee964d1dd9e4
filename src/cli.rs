//! Arguments to command to exit code. What the commands do is elsewhere.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use tokio::time::Instant;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::config::{self, Config, File, Settings};
use crate::config_files::{self, Places};
use crate::confirm::{self, Verdict};
use crate::desired::desired;
use crate::doctor::{self, Diagnosis};
use crate::eni::Attached;
use crate::explain::{self, Explanation, Known, Said};
use crate::fib::Packet;
use crate::imds::{self, Imds, Scope, Surroundings};
use crate::lock;
use crate::metadata::{self, Tree};
use crate::net::{Link, Observed};
use crate::netlink::Netlink;
use crate::plan::{Plan, fresh_machine, plan};
use crate::policy;
use crate::readiness::{self, Target};
use crate::reconcile::{self, NotPermitted, Options};
use crate::report::{Exit, Report};
use crate::selection::select;
use crate::snapshot::{NoMetadata, Snapshot};
use crate::snapshot_file;
use crate::status::{Status, Text, status};
use crate::stderr::Unhindered;
use crate::trial::InTheWay;
use crate::wait;
use crate::watch::{self, Watch};

const EXAMPLES: &str = "\
Examples:
  eniup plan                  what would change, as ip(8) commands; changes nothing
  sudo eniup reconcile        make the kernel agree with instance metadata
  sudo eniup reconcile --confirm 60   the same, and undo it after 60 s unless somebody types:
  sudo eniup confirm          keep what the run on trial did
  eniup status                every ENI, as metadata and the kernel have it
  eniup explain --from 10.0.1.20 --to 192.0.2.7
                              which way such a packet goes, why, and whether the VPC takes it
  eniup wait --ip 10.0.1.77   until that address is configured, for scripts that move one here
  eniup doctor                what is wrong on this machine, and what to do about it
  sudo eniup release          take away everything that eniup added
  eniup snapshot -o FILE      all that eniup looks at, for a bug report; `eniup plan --snapshot FILE` looks at it again

Exit codes:
  0 ok   1 failed   2 differences (with --detailed-exitcode)   3 an ENI is pending or failed, the others are done
  64 usage   69 metadata unavailable   75 another run is busy or on trial   77 needs CAP_NET_ADMIN   78 bad configuration";

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
        /// Roll back to what was unless `eniup confirm` is run within this time after the changes: 60, 90s, 5m; or at once
        /// when metadata is not reached any more by the primary ENI, or on Ctrl-C. A terminal or SSH session that goes
        /// away does not stop it. Meanwhile, and after a rollback until somebody reconciles by hand, automatic runs do
        /// nothing.
        #[arg(long, value_name = "SECONDS", value_parser = parse_window, conflicts_with_all = ["automatic", "dry_run"])]
        confirm: Option<Duration>,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Keep what `eniup reconcile --confirm` has done, which is rolled back otherwise.
    Confirm {
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Print what would change, as ip(8) commands; changes nothing and needs no privilege.
    Plan {
        /// Read metadata from a saved snapshot: a JSON object whose `leaves` maps metadata paths to their text. If it
        /// is another machine's, the plan is for a fresh one with its links named eth0, eth1, …
        #[arg(long, value_name = "FILE", conflicts_with = "snapshot")]
        metadata: Option<PathBuf>,
        #[command(flatten)]
        saved: Saved,
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
        #[command(flatten)]
        saved: Saved,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Tell which way a packet goes and why: rule by rule, as the model and the kernel have it, whether the VPC takes it, and
    /// where a reply comes in. Changes nothing and needs no privilege.
    #[command(after_help = EXPLAIN_EXAMPLES)]
    Explain {
        #[command(flatten)]
        question: Question,
        #[command(flatten)]
        saved: Saved,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Stay, and keep it so: repairs what others undo as soon as the kernel tells of it, and asks metadata now and then. Ends
    /// by SIGTERM or SIGINT, reads its configuration anew on SIGHUP, and tells systemd how it is (Type=notify).
    Watch {
        /// Between two readings of metadata. Without it 2s, or longer where that would cost more than a thousandth of a core.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        interval: Option<Duration>,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Wait until an address or an ENI is configured, whoever configures it, and say so: for scripts that move one here. Changes
    /// nothing and needs no privilege. Exits with 3 when the time is over, and at once with 1 when waiting does not help.
    Wait {
        #[command(flatten)]
        target: WaitFor,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Look for what commonly goes wrong on a machine with several ENIs, with what to do about each. Changes nothing and needs
    /// no privilege; exits with 1 if something fails.
    Doctor {
        #[command(flatten)]
        saved: Saved,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Write down all that eniup looks at, as one JSON file: metadata, what the kernel has, the configuration. For bug reports,
    /// and for the commands with --snapshot. Needs no privilege; no secret is in it.
    Snapshot {
        /// The file; without it stdout.
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Replace public addresses and account numbers, each by one of its own, so that it can be shown to others.
        #[arg(long)]
        redact: bool,
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
struct Saved {
    /// Look at a file that `eniup snapshot` wrote, with the configuration that is in it, instead of at this machine.
    #[arg(long, value_name = "FILE")]
    snapshot: Option<PathBuf>,
}

impl Command {
    fn saved(&self) -> Option<&Path> {
        match self {
            Command::Plan { saved, .. }
            | Command::Status { saved, .. }
            | Command::Explain { saved, .. }
            | Command::Doctor { saved, .. } => saved.snapshot.as_deref(),
            Command::Reconcile { .. }
            | Command::Confirm { .. }
            | Command::Snapshot { .. }
            | Command::Release { .. }
            | Command::Watch { .. }
            | Command::Wait { .. }
            | Command::Config(_) => None,
        }
    }
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct WaitFor {
    /// An address: the kernel answers for it, and sends what it sends by the link that has it. Needs no metadata.
    #[arg(long, value_name = "ADDRESS", value_parser = readiness::parse_address)]
    ip: Option<IpAddr>,
    /// An ENI by its id: metadata tells all of it, and all that belongs to it is there.
    #[arg(long, value_name = "ID", value_parser = readiness::parse_id)]
    eni: Option<String>,
}

impl WaitFor {
    fn target(&self) -> Option<Target> {
        self.ip.map(Target::Address).or_else(|| self.eni.clone().map(Target::Eni))
    }
}

const EXPLAIN_EXAMPLES: &str = "\
Examples:
  eniup explain --from 10.0.1.20                   what an ENI's address sends to the internet
  eniup explain --to 10.0.9.9                      what a program sends that binds to no address
  eniup explain --from 10.0.1.20 --to 172.17.0.2   what it answers to a container
  eniup explain --oif ens6 --to 192.0.2.7          what curl --interface ens6 sends
  eniup explain --iif docker0 --from 10.0.1.97     what a container with a delegated address sends";

#[derive(Args)]
#[group(required = true, multiple = true)]
struct Question {
    /// The source address; without it the packet of a program that binds to none.
    #[arg(long, value_name = "ADDRESS")]
    from: Option<IpAddr>,
    /// The destination; without it somewhere on the internet.
    #[arg(long, value_name = "ADDRESS")]
    to: Option<IpAddr>,
    /// The link by which it came in, if it is forwarded.
    #[arg(long, value_name = "LINK", conflicts_with = "oif")]
    iif: Option<String>,
    /// The link that the socket is bound to.
    #[arg(long, value_name = "LINK")]
    oif: Option<String>,
    /// The firewall mark, decimal or 0x….
    #[arg(long, value_name = "MARK", value_parser = parse_mark, default_value = "0", hide_default_value = true)]
    mark: u32,
}

fn parse_mark(text: &str) -> Result<u32, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

/// Of the addresses for documentation (RFC 5737, RFC 3849): they stand for any of the internet.
const ANYWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1))];

const SOON: Duration = Duration::from_secs(3);

impl Question {
    /// # Errors
    /// Two families in one packet, or a link that is not there.
    fn packet(&self, observed: &Observed) -> Result<Packet> {
        let anywhere = ANYWHERE[usize::from(self.from.is_some_and(|from| from.is_ipv6()))];
        let destination = self.to.unwrap_or(anywhere);
        if let Some(from) = self.from.filter(|from| from.is_ipv4() != destination.is_ipv4()) {
            return Err(BadUsage(format!("--from {from} and --to {destination} are of two families")).into());
        }
        let index = |name: &Option<String>| name.as_ref().map(|name| find_by_name(observed, name)).transpose();
        let (input, output) = (index(&self.iif)?, index(&self.oif)?);
        Ok(Packet { source: self.from, destination, input, output, mark: self.mark })
    }
}

fn find_by_name(observed: &Observed, name: &String) -> Result<u32> {
    let is_it = |link: &&Link| link.name == *name || link.altnames.contains(name);
    let link = observed.links.values().find(is_it).with_context(|| {
        let names: Vec<&str> = observed.links.values().map(|link| link.name.as_str()).collect();
        format!("there is no link {name}; there are {}", names.join(", "))
    })?;
    Ok(link.index)
}

/// Arguments that contradict each other.
#[derive(Debug)]
struct BadUsage(String);

impl std::fmt::Display for BadUsage {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}; see --help", self.0)
    }
}

impl std::error::Error for BadUsage {}

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

    /// For what has an answer also when metadata does not answer, so that nobody waits long for it.
    fn soon(&self, config: &Config) -> Instant {
        self.deadline(config).min(Instant::now() + self.timeout.unwrap_or(SOON))
    }
}

/// A bare number is one of seconds: nobody who is in a hurry should have to look up units.
fn parse_window(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map(Duration::from_secs).ok();
    let window =
        seconds.or_else(|| humantime::parse_duration(text).ok()).filter(|window| policy::TRIAL.contains(window));
    let [least, most] = [policy::TRIAL.start(), policy::TRIAL.end()].map(|end| humantime::format_duration(*end));
    window.ok_or_else(|| format!("expected {least} to {most}, as 60, 90s or 5m"))
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
    start_log(&cli);
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

fn start_log(cli: &Cli) {
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

/// Metadata is not asked more often, whatever is wished.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

fn config_texts(file: Option<&Path>) -> Vec<File> {
    match file {
        Some(file) => vec![config_files::read_one(file)],
        None => config_files::read_all(&Places::default()),
    }
}

async fn dispatch(cli: &Cli) -> Result<Exit> {
    let endpoint = cli.global.imds_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
    let saved = cli.command.saved().map(snapshot_file::read).transpose()?;
    let files = match (&cli.global.config, &saved) {
        (None, Some(saved)) => saved.configuration_files(),
        (file, _) => config_texts(file.as_deref()),
    };
    let (settings, problems) = match config::read(&files) {
        Ok(settings) => (settings, None),
        // A bad configuration is what a snapshot may be wanted for.
        Err(problems) if matches!(cli.command, Command::Snapshot { .. }) => (Settings::default(), Some(problems)),
        Err(problems) => return Err(problems.into()),
    };
    let config = settings.config.clone();
    match &cli.command {
        Command::Reconcile { dry_run: true, timeout, .. } => {
            let (attached, plan) = reconcile::preview(endpoint, timeout.deadline(&config), &config).await?;
            show_plan(&attached, &plan, false, false)
        }
        Command::Reconcile { confirm: Some(window), timeout, .. } => {
            check_permission()?;
            try_out(&options(endpoint, timeout, config), *window).await
        }
        Command::Confirm { timeout } => {
            check_permission()?;
            confirm::confirm(&options(endpoint, timeout, config)).await?;
            print("confirmed: what the run on trial did stays\n")?;
            Ok(Exit::Ok)
        }
        Command::Reconcile { dry_run: false, automatic, hotplug, timeout, .. } => {
            check_permission()?;
            let options =
                Options { is_automatic: *automatic, is_hotplug: *hotplug, ..options(endpoint, timeout, config) };
            show_report(&reconcile::reconcile(&options).await?)
        }
        Command::Plan { metadata: Some(file), detailed_exitcode, json, .. } => {
            let (attached, plan) = plan_offline(file, &config).await?;
            show_plan(&attached, &plan, *detailed_exitcode, *json)
        }
        Command::Plan { metadata: None, detailed_exitcode, json, timeout, saved: _ } => {
            let (attached, plan) = match &saved {
                Some(saved) => plan_saved(saved, &config)?,
                None => reconcile::preview(endpoint, timeout.deadline(&config), &config).await?,
            };
            show_plan(&attached, &plan, *detailed_exitcode, *json)
        }
        Command::Status { json, timeout, saved: _ } => {
            let (observed, tree) = match &saved {
                Some(saved) => (saved.observed(config.mark), saved.tree()?),
                None => look(endpoint, timeout.deadline(&config), &config).await?,
            };
            let status = make_status(&observed, &tree, &config)?;
            show_status(&status, cli.global.color, *json)
        }
        Command::Explain { question, json, timeout, saved: _ } => {
            let deadline = timeout.soon(&config);
            let explanation = match &saved {
                Some(saved) => explain_saved(question, saved, &config)?,
                None => read_explanation(question, endpoint, deadline, &config).await?,
            };
            show_explanation(&explanation, *json)
        }
        Command::Watch { interval, timeout } => {
            check_permission()?;
            let file = cli.global.config.clone();
            let watched = Watch {
                interval: interval.unwrap_or(policy::WATCH_INTERVAL).max(SHORTEST_INTERVAL),
                is_thrifty: interval.is_none(),
                timeout: timeout.timeout.unwrap_or(config.timeout),
                reload: Box::new(move || Ok(config::read(&config_texts(file.as_deref()))?.config)),
            };
            let options = Options { is_automatic: true, ..options(endpoint, timeout, config) };
            watch::watch(options, &watched).await?;
            Ok(Exit::Ok)
        }
        Command::Wait { target, timeout } => {
            let target = target.target().context("neither --ip nor --eni")?;
            print(&format!("{}\n", wait::wait(&target, endpoint, timeout.deadline(&config), &config).await?))?;
            Ok(Exit::Ok)
        }
        Command::Doctor { json, timeout, saved: _ } => {
            let deadline = timeout.soon(&config);
            let snapshot = match saved {
                Some(saved) => saved,
                None => snapshot_file::take(endpoint, deadline, &files, &lock::runtime_directory()).await?.0,
            };
            show_diagnosis(&doctor::examine(&snapshot, &config), *json)
        }
        Command::Snapshot { output, redact, timeout } => {
            let (deadline, directory) = (timeout.deadline(&config), lock::runtime_directory());
            let (snapshot, failure) = snapshot_file::take(endpoint, deadline, &files, &directory).await?;
            show_snapshot(if *redact { snapshot.redacted()? } else { snapshot }, output.as_deref())?;
            problems.map_or(Ok(()), |problems| Err(anyhow!(problems)))?;
            failure.map_or(Ok(Exit::Ok), |error| Err(error.into()))
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

async fn try_out(options: &Options, window: Duration) -> Result<Exit> {
    let (report, guard) = confirm::try_out(options, window).await?;
    let exit = show_report(&report)?;
    let Some(guard) = guard else {
        tracing::info!("nothing was changed, so there is nothing to confirm");
        return Ok(exit);
    };
    let shown = humantime::format_duration(window);
    tracing::warn!("this is rolled back in {shown} unless you run `eniup confirm`, here or from another session");
    match guard.wait(options).await? {
        Verdict::Confirmed => {
            tracing::info!("confirmed");
            Ok(exit)
        }
        Verdict::RolledBack(why) => bail!("rolled back to what was before: {why}"),
        Verdict::Superseded => bail!("no longer on trial, and not rolled back: another run by hand has come since"),
    }
}

fn options(endpoint: Option<&str>, timeout: &Timeout, config: Config) -> Options {
    Options {
        endpoint: endpoint.map(String::from),
        deadline: timeout.deadline(&config),
        directory: lock::runtime_directory(),
        is_automatic: false,
        held_back: BTreeSet::new(),
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
    let tree = snapshot_file::read_metadata(file)?;
    // Not passed on as it is: the metadata service was not asked, so it is not what is unavailable.
    let attached =
        metadata::attached(&tree).map_err(|error| anyhow!("{}: {}", snapshot_file::unusable(file), error.what()))?;
    let mut observed = reconcile::observe(config).await?;
    if !observed.links.values().any(|link| link.mac == Some(attached.primary)) {
        tracing::info!("the snapshot is not of this machine: planning for a fresh one with links eth0, eth1, …");
        observed = fresh_machine(&attached);
    }
    let attached = select(&attached, &tree, &observed, config);
    let plan = plan(&desired(&attached, config), &observed, attached.primary, config);
    Ok((attached, plan))
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
        match report.done.is_empty() {
            true => tracing::debug!("{note}"),
            false => tracing::warn!("{note}"),
        }
    }
    for line in report.to_string().lines() {
        tracing::warn!("{line}");
    }
    tracing::debug!("{} changes made", report.done.len());
    Ok(report.exit())
}

/// Both sides, with all that `status` shows.
async fn look(endpoint: Option<&str>, deadline: Instant, config: &Config) -> Result<(Observed, Tree)> {
    let observed = reconcile::observe(config).await?;
    let mut imds = Imds::connect(endpoint, &Surroundings::of(&observed), deadline).await?;
    let tree = imds.snapshot(Scope::Details).await?;
    Ok((observed, tree))
}

fn make_status(observed: &Observed, tree: &Tree, config: &Config) -> Result<Status> {
    let attached = select(&metadata::attached(tree)?, tree, observed, config);
    let plan = plan(&desired(&attached, config), observed, attached.primary, config);
    Ok(status(tree, &attached, observed, &plan, config))
}

fn plan_saved(saved: &Snapshot, config: &Config) -> Result<(Attached, Plan)> {
    let (observed, tree) = (saved.observed(config.mark), saved.tree()?);
    let attached = select(&metadata::attached(&tree)?, &tree, &observed, config);
    let plan = plan(&desired(&attached, config), &observed, attached.primary, config);
    Ok((attached, plan))
}

fn explain_saved(question: &Question, saved: &Snapshot, config: &Config) -> Result<Explanation> {
    let observed = saved.observed(config.mark);
    let packet = question.packet(&observed)?;
    let why = explain::unaskable(&observed, &packet).unwrap_or("it is a snapshot's".into());
    let tree = saved.tree().map_err(anyhow::Error::from);
    let attached = tree.and_then(|tree| Ok(metadata::attached(&tree)?)).map_err(|error| format!("{error:#}"));
    let known = Known { observed: &observed, attached: attached.as_ref().map_err(String::clone), config };
    Ok(explain::explain(&known, &packet, &Said::Nothing(why)))
}

fn show_diagnosis(diagnosis: &Diagnosis, is_json: bool) -> Result<Exit> {
    match is_json {
        true => print(&format!("{}\n", serde_json::to_string_pretty(diagnosis)?))?,
        false => print(&diagnosis.to_string())?,
    }
    Ok(if diagnosis.verdict == doctor::Verdict::Fail { Exit::Failed } else { Exit::Ok })
}

fn show_snapshot(snapshot: Snapshot, output: Option<&Path>) -> Result<()> {
    match output {
        Some(path) => snapshot_file::write(&snapshot.to_json()?, path),
        None => print(&snapshot.to_json()?),
    }
}

async fn read_explanation(
    question: &Question,
    endpoint: Option<&str>,
    deadline: Instant,
    config: &Config,
) -> Result<Explanation> {
    let observed = reconcile::observe(config).await?;
    let packet = question.packet(&observed)?;
    let said = match explain::unaskable(&observed, &packet) {
        Some(why) => Said::Nothing(why),
        None => Netlink::open().context("opening a netlink socket")?.ask(&packet).await?,
    };
    let attached = read_attached(endpoint, deadline, &observed).await.map_err(|error| format!("{error:#}"));
    let known = Known { observed: &observed, attached: attached.as_ref().map_err(String::clone), config };
    Ok(explain::explain(&known, &packet, &said))
}

/// Every ENI, those that are left alone included: the VPC knows them, too.
async fn read_attached(endpoint: Option<&str>, deadline: Instant, observed: &Observed) -> Result<Attached> {
    let mut imds = Imds::connect(endpoint, &Surroundings::of(observed), deadline).await?;
    Ok(metadata::attached(&imds.snapshot(Scope::Routing).await?)?)
}

fn show_explanation(explanation: &Explanation, is_json: bool) -> Result<Exit> {
    match is_json {
        true => print(&format!("{}\n", serde_json::to_string_pretty(explanation)?))?,
        false => print(&explanation.to_string())?,
    }
    // The model is what the promise is tested with.
    Ok(if explanation.kernel_agrees == Some(false) { Exit::Failed } else { Exit::Ok })
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

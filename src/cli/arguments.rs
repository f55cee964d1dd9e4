//! The command line's grammar: what may be asked for, and what the values mean.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::engine::ArgValueCandidates;
use tokio::time::Instant;

use super::{candidates, help};
use crate::config::Config;
use crate::fib::{Packet, is_for_many};
use crate::net::{Link, Observed};
use crate::policy;
use crate::readiness::{self, Target};
use crate::typo;

/// Makes every elastic network interface (ENI) of an EC2 instance work.
///
/// Reads instance metadata (IMDSv2) and makes the kernel agree by netlink: links up, addresses, source-based policy
/// routing. A packet whose source address belongs to an ENI leaves by that ENI; the primary ENI stays as it is.
#[derive(Parser)]
#[command(version, after_help = help::ENIUP, max_term_width = 120)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,

    #[command(flatten)]
    pub(super) global: Global,
}

#[derive(Args)]
pub(super) struct Global {
    /// Say more: why nothing was done, and what was there already. Twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(super) verbose: u8,

    /// Say only what went wrong: an error, and which ENIs are pending or failed.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(super) quiet: bool,

    /// When to colour: a terminal is coloured unless NO_COLOR is set.
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub(super) color: Color,

    /// How to tell on stderr what is done: `auto` is for people, or for systemd's journal with fields (ENI_ID=, IFNAME=,
    /// ACTION=, REASON=) where stderr is connected with it; `json` is one object a line.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "auto")]
    pub(super) log_format: LogFormat,

    /// The configuration file, instead of /etc/eniup/config.toml and the drop-ins.
    #[arg(long, global = true, value_name = "PATH")]
    pub(super) config: Option<PathBuf>,

    /// Where the metadata service is, instead of 169.254.169.254 and fd00:ec2::254.
    #[arg(long, global = true, value_name = "URL", env = "AWS_EC2_METADATA_SERVICE_ENDPOINT")]
    pub(super) imds_endpoint: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Color {
    Auto,
    Always,
    Never,
}

/// Of those whose command line can be completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Auto,
    Plain,
    Json,
    /// Plain where the journal cannot be reached.
    Journal,
}

impl Color {
    pub(super) fn is_for(self, stream: &impl IsTerminal) -> bool {
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
pub(super) enum Command {
    /// Make the kernel agree with metadata; what boot, udev and the timer run.
    #[command(after_help = help::RECONCILE)]
    Reconcile {
        /// Only print what would change, like `eniup plan`.
        #[arg(long)]
        dry_run: bool,
        /// With --dry-run: exit with 2 when something would change.
        #[arg(long, requires = "dry_run")]
        detailed_exitcode: bool,
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
        metrics: MetricsFile,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Keep what `eniup reconcile --confirm` has done, which is rolled back otherwise.
    #[command(after_help = help::CONFIRM)]
    Confirm {
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Print what would change, as ip(8) commands; changes nothing and needs no privilege.
    #[command(after_help = help::PLAN)]
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
    #[command(after_help = help::STATUS)]
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
    #[command(after_help = help::EXPLAIN)]
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
    #[command(after_help = help::WATCH)]
    Watch {
        /// Between two readings of metadata. Without it 2s, or longer where that would cost more than a thousandth of a core.
        #[arg(long, value_name = "TIME", value_parser = parse_interval)]
        interval: Option<Duration>,
        #[command(flatten)]
        metrics: MetricsFile,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Wait until an address or an ENI is configured, whoever configures it, and say so: for scripts that move one here. Changes
    /// nothing and needs no privilege. Exits with 3 when the time is over, and at once with 1 when waiting does not help.
    #[command(after_help = help::WAIT)]
    Wait {
        #[command(flatten)]
        target: WaitFor,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Look for what commonly goes wrong on a machine with several ENIs, with what to do about each. Changes nothing and needs
    /// no privilege; exits with 1 if something fails.
    #[command(after_help = help::DOCTOR)]
    Doctor {
        #[command(flatten)]
        saved: Saved,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Write down all that eniup looks at, as one JSON file: metadata, what the kernel has, the configuration, and what the last
    /// runs have told. For bug reports, and for the commands with --snapshot. Needs no privilege; no secret is in it.
    #[command(after_help = help::SNAPSHOT)]
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
    #[command(after_help = help::RELEASE)]
    Release {
        /// Only what belongs to this ENI, by the id that is a name of its link: its addresses, its table with the rules to it, its
        /// names and settings. The next run brings it back unless the configuration ignores the ENI.
        #[arg(long, value_name = "ID", value_parser = readiness::parse_id, add = ArgValueCandidates::new(candidates::enis))]
        eni: Option<String>,
        /// Only print what would be taken away.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Look at the configuration: /etc/eniup/config.toml, then the drop-ins config.d/*.toml in /usr/lib/eniup,
    /// /run/eniup and /etc/eniup by the order of their names. None of them needs to be there.
    #[command(subcommand, after_help = help::CONFIG)]
    Config(ConfigCommand),
    /// Print the script by which a shell completes eniup's commands, options, ENIs, links and addresses. Packages install it.
    #[command(after_help = help::COMPLETIONS)]
    Completions { shell: Shell },
    /// Print a manual page as man(1) reads it: `eniup man | man -l -`. Packages install them.
    #[command(after_help = help::MAN)]
    Man {
        /// Of a command, or eniup.toml: without it that of eniup.
        #[arg(default_value = "eniup", hide_default_value = true)]
        page: String,
    },
    /// What may come next: what these scripts ask.
    #[command(hide = true)]
    Complete {
        #[arg(last = true)]
        words: Vec<OsString>,
    },
}

#[derive(Subcommand)]
pub(super) enum ConfigCommand {
    /// Say everything that is wrong with the configuration files, or that nothing is.
    #[command(after_help = help::CONFIG_CHECK)]
    Check,
    /// Print what is in effect, as a configuration file, and where each value was written.
    #[command(after_help = help::CONFIG_SHOW)]
    Show {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
pub(super) struct Saved {
    /// Look at a file that `eniup snapshot` wrote, with the configuration that is in it, instead of at this machine.
    #[arg(long, value_name = "FILE")]
    pub(super) snapshot: Option<PathBuf>,
}

impl Command {
    pub(super) fn saved(&self) -> Option<&Path> {
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
            | Command::Config(_)
            | Command::Completions { .. }
            | Command::Man { .. }
            | Command::Complete { .. } => None,
        }
    }
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(super) struct WaitFor {
    /// An address: the kernel answers for it, and sends what it sends by the link that has it. Needs no metadata.
    #[arg(long, value_name = "ADDRESS", value_parser = readiness::parse_address, add = addresses())]
    pub(super) ip: Option<IpAddr>,
    /// An ENI by its id: metadata tells all of it, and all that belongs to it is there.
    #[arg(long, value_name = "ID", value_parser = readiness::parse_id, add = ArgValueCandidates::new(candidates::enis))]
    pub(super) eni: Option<String>,
}

impl WaitFor {
    pub(super) fn target(&self) -> Option<Target> {
        self.ip.map(Target::Address).or_else(|| self.eni.clone().map(Target::Eni))
    }
}

#[derive(Args)]
#[group(required = true, multiple = true)]
pub(super) struct Question {
    /// The source address; without it, or with 0.0.0.0 or ::, the packet of a program that binds to none.
    #[arg(long, value_name = "ADDRESS", add = addresses())]
    pub(super) from: Option<IpAddr>,
    /// The destination; without it somewhere on the internet.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "destination")]
    pub(super) to: Option<IpAddr>,
    /// The same as --to.
    #[arg(value_name = "DESTINATION")]
    pub(super) destination: Option<IpAddr>,
    /// The link by which it came in, if it is forwarded.
    #[arg(long, value_name = "LINK", conflicts_with = "oif", add = links())]
    pub(super) iif: Option<String>,
    /// The link that the socket is bound to.
    #[arg(long, value_name = "LINK", add = links())]
    pub(super) oif: Option<String>,
    /// The firewall mark, decimal or 0x….
    #[arg(long, value_name = "MARK", value_parser = parse_mark, default_value = "0", hide_default_value = true)]
    pub(super) mark: u32,
}

fn addresses() -> ArgValueCandidates {
    ArgValueCandidates::new(candidates::addresses)
}

fn links() -> ArgValueCandidates {
    ArgValueCandidates::new(candidates::links)
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
    pub(super) fn packet(&self, observed: &Observed) -> Result<Packet> {
        let anywhere = ANYWHERE[usize::from(self.from.is_some_and(|from| from.is_ipv6()))];
        let destination = self.to.or(self.destination).unwrap_or(anywhere);
        if destination.is_unspecified() {
            return Err(BadUsage(format!("{destination} is nobody's address, so nothing is sent there")).into());
        }
        if let Some(from) = self.from.filter(|from| is_for_many(*from)) {
            return Err(BadUsage(format!("{from} is for many, and no packet comes from it")).into());
        }
        if let Some(from) = self.from.filter(|from| from.is_ipv4() != destination.is_ipv4()) {
            return Err(BadUsage(format!("--from {from} and --to {destination} are of two families")).into());
        }
        let index = |name: &Option<String>| name.as_ref().map(|name| find_by_name(observed, name)).transpose();
        let (input, output) = (index(&self.iif)?, index(&self.oif)?);
        let source = self.from.filter(|from| !from.is_unspecified());
        Ok(Packet { source, destination, input, output, mark: self.mark })
    }
}

fn find_by_name(observed: &Observed, name: &String) -> Result<u32> {
    let is_it = |link: &&Link| link.name == *name || link.altnames.contains(name);
    let link = observed.links.values().find(is_it).with_context(|| {
        let names: Vec<&str> = observed.links.values().map(|link| link.name.as_str()).collect();
        let hint = typo::hint(name, names.iter().copied());
        format!("there is no link {name}; there are {}{hint}", names.join(", "))
    })?;
    Ok(link.index)
}

/// Arguments that contradict each other.
#[derive(Debug)]
pub(super) struct BadUsage(pub(super) String);

impl std::fmt::Display for BadUsage {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}; see --help", self.0)
    }
}

impl std::error::Error for BadUsage {}

#[derive(Args)]
pub(super) struct MetricsFile {
    /// Write metrics there for node_exporter's textfile collector, which wants a name that ends in .prom. Counters go on from
    /// what is there.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
}

impl MetricsFile {
    pub(super) fn path(&self) -> Option<&Path> {
        self.metrics.as_deref()
    }
}

#[derive(Args)]
pub(super) struct Timeout {
    /// When to give up waiting, for another run, for metadata or for an ENI that is not all there yet: 500ms, 30s, 2m.
    /// Without it what is configured, else 30s.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(super) timeout: Option<Duration>,
}

impl Timeout {
    pub(super) fn deadline(&self, config: &Config) -> Instant {
        // An hour is as good as for ever, and far from what an instant can hold.
        Instant::now() + self.timeout.unwrap_or(config.timeout).min(Duration::from_secs(3600))
    }

    /// For what has an answer also when metadata does not answer, so that nobody waits long for it.
    pub(super) fn soon(&self, config: &Config) -> Instant {
        self.deadline(config).min(Instant::now() + self.timeout.unwrap_or(SOON))
    }
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let [least, most] = [policy::INTERVAL.start(), policy::INTERVAL.end()].map(|end| humantime::format_duration(*end));
    Some(interval)
        .filter(|interval| policy::INTERVAL.contains(interval))
        .ok_or_else(|| format!("expected {least} to {most}"))
}

/// A bare number is one of seconds: nobody who is in a hurry should have to look up units.
fn parse_window(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map(Duration::from_secs).ok();
    let window =
        seconds.or_else(|| humantime::parse_duration(text).ok()).filter(|window| policy::TRIAL.contains(window));
    let [least, most] = [policy::TRIAL.start(), policy::TRIAL.end()].map(|end| humantime::format_duration(*end));
    window.ok_or_else(|| format!("expected {least} to {most}, as 60, 90s or 5m"))
}

//! Each command as a few lines: what it looks at, what it does, what it shows. The work is elsewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tokio::time::Instant;

use super::arguments::{Cli, Command, ConfigCommand, MetricsFile, Question, Timeout};
use super::{man, print};
use crate::config::{self, Config, File, Problems, Settings};
use crate::config_files::{self, Places};
use crate::confirm::{self, Verdict};
use crate::desired::desired;
use crate::doctor;
use crate::eni::Attached;
use crate::explain::{self, Explanation, Known, Said};
use crate::fib::Packet;
use crate::imds::{Imds, Scope, Surroundings};
use crate::lock;
use crate::machine_files;
use crate::markers::Files;
use crate::metadata;
use crate::net::Observed;
use crate::netlink::Netlink;
use crate::plan::{Plan, fresh_machine, plan};
use crate::policy;
use crate::reconcile;
use crate::report::{Exit, Report};
use crate::run::{self, NotPermitted, Options};
use crate::selection::select;
use crate::snapshot::Snapshot;
use crate::snapshot_file;
use crate::status;
use crate::undo;
use crate::wait;
use crate::watch::{self, Pace, Watch};

/// What a command begins with.
struct Ground<'a> {
    endpoint: Option<&'a str>,
    /// What is looked at instead of this machine.
    saved: Option<Snapshot>,
    config_file: Option<&'a Path>,
    files: Vec<File>,
    settings: Settings,
    /// What is wrong with the files, where a command goes on in spite of it.
    problems: Option<Problems>,
}

/// Also leaves behind what a run came to, if there was one.
pub(super) async fn dispatch(cli: &Cli, report: &mut Option<Report>) -> Result<Exit> {
    if let Command::Man { page } = &cli.command {
        print::text(&man::page(page)?)?;
        return Ok(Exit::Ok);
    }
    let ground = ground(cli)?;
    let config = &ground.settings.config;
    match &cli.command {
        Command::Reconcile { dry_run: true, detailed_exitcode, timeout, .. } => {
            let (attached, plan) = reconcile::preview(ground.endpoint, timeout.deadline(config), config).await?;
            print::plan(&attached, &plan, *detailed_exitcode, false)
        }
        Command::Reconcile { confirm: Some(window), timeout, .. } => {
            check_permission()?;
            try_out(&ground.options(timeout), *window, report).await
        }
        Command::Reconcile { automatic, hotplug, timeout, .. } => {
            check_permission()?;
            let options = Options { is_automatic: *automatic, is_hotplug: *hotplug, ..ground.options(timeout) };
            print::report(report.insert(reconcile::reconcile(&options).await?))
        }
        Command::Confirm { timeout } => {
            check_permission()?;
            confirm::confirm(&ground.options(timeout)).await?;
            print::text("confirmed: what the run on trial did stays\n")?;
            Ok(Exit::Ok)
        }
        Command::Plan { metadata, detailed_exitcode, json, timeout, .. } => {
            let (attached, plan) = ground.plan(metadata.as_deref(), timeout).await?;
            print::plan(&attached, &plan, *detailed_exitcode, *json)
        }
        Command::Status { json, timeout, .. } => {
            let status = status::of_snapshot(&ground.look(timeout).await?, config)?;
            print::status(&status, cli.global.color, *json)
        }
        Command::Explain { question, json, timeout, .. } => {
            let explanation = match &ground.saved {
                Some(saved) => explain_saved(question, saved, config)?,
                None => read_explanation(question, ground.endpoint, timeout.soon(config), config).await?,
            };
            print::explanation(&explanation, *json)
        }
        Command::Watch { interval, metrics, timeout } => {
            check_permission()?;
            let options = Options { is_automatic: true, ..ground.options(timeout) };
            watch::watch(options, &ground.watch(*interval, metrics, timeout)).await?;
            Ok(Exit::Ok)
        }
        Command::Wait { target, timeout } => {
            let target = target.target().context("neither --ip nor --eni")?;
            let deadline = timeout.deadline(config);
            print::text(&format!("{}\n", wait::wait(&target, ground.endpoint, deadline, config).await?))?;
            Ok(Exit::Ok)
        }
        Command::Doctor { json, timeout, .. } => ground.examine(timeout, *json).await,
        Command::Snapshot { output, redact, timeout } => ground.snapshot(output.as_deref(), *redact, timeout).await,
        Command::Release { dry_run: true, eni, timeout } => {
            print::steps(&undo::preview_release(eni.as_deref(), &ground.options(timeout)).await?)?;
            Ok(Exit::Ok)
        }
        Command::Release { dry_run: false, eni, timeout } => {
            check_permission()?;
            print::report(&undo::take_away(eni.as_deref(), &ground.options(timeout)).await?)
        }
        // Answered before: they need no configuration.
        Command::Completions { .. } | Command::Complete { .. } | Command::Man { .. } => Ok(Exit::Ok),
        Command::Config(ConfigCommand::Check) => print::check(&ground.files),
        Command::Config(ConfigCommand::Show { json }) => print::settings(&ground.settings, &ground.files, *json),
    }
}

fn ground(cli: &Cli) -> Result<Ground<'_>> {
    let saved = cli.command.saved().map(snapshot_file::read).transpose()?;
    let config_file = cli.global.config.as_deref();
    let files = match (config_file, &saved) {
        (None, Some(saved)) => saved.configuration_files(),
        (file, _) => config_texts(file),
    };
    let (settings, problems) = match config::read(&files) {
        Ok(settings) => (settings, None),
        // A bad configuration is what a snapshot may be wanted for.
        Err(problems) if matches!(cli.command, Command::Snapshot { .. }) => (Settings::default(), Some(problems)),
        Err(problems) => return Err(problems.into()),
    };
    let endpoint = cli.global.imds_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
    Ok(Ground { endpoint, saved, config_file, files, settings, problems })
}

fn config_texts(file: Option<&Path>) -> Vec<File> {
    match file {
        Some(file) => vec![config_files::read_one(file)],
        None => config_files::read_all(&Places::default()),
    }
}

impl Ground<'_> {
    fn options(&self, timeout: &Timeout) -> Options {
        let config = self.settings.config.clone();
        Options {
            endpoint: self.endpoint.map(String::from),
            deadline: timeout.deadline(&config),
            directory: lock::runtime_directory(),
            is_automatic: false,
            held_back: BTreeSet::new(),
            is_hotplug: false,
            config,
        }
    }

    fn watch(&self, interval: Option<Duration>, metrics: &MetricsFile, timeout: &Timeout) -> Watch {
        let timeout = timeout.timeout;
        let pace = move |config: &Config| {
            let interval = interval.or(config.interval);
            Pace {
                interval: interval.unwrap_or(policy::WATCH_INTERVAL),
                is_thrifty: interval.is_none(),
                timeout: timeout.unwrap_or(config.timeout),
            }
        };
        let file: Option<PathBuf> = self.config_file.map(Path::to_path_buf);
        let reload = move || {
            let Settings { config, .. } = config::read(&config_texts(file.as_deref()))?;
            let pace = pace(&config);
            Ok((config, pace))
        };
        Watch {
            pace: pace(&self.settings.config),
            metrics: metrics.path().map(Path::to_path_buf),
            reload: Box::new(reload),
        }
    }

    async fn plan(&self, metadata: Option<&Path>, timeout: &Timeout) -> Result<(Attached, Plan)> {
        let config = &self.settings.config;
        match (metadata, &self.saved) {
            (Some(file), _) => plan_offline(file, config).await,
            (None, Some(saved)) => plan_saved(saved, config),
            (None, None) => reconcile::preview(self.endpoint, timeout.deadline(config), config).await,
        }
    }

    /// Both sides, with all that `status` shows.
    async fn look(&self, timeout: &Timeout) -> Result<Snapshot> {
        let config = &self.settings.config;
        if let Some(saved) = &self.saved {
            return Ok(saved.clone());
        }
        let (deadline, directory) = (timeout.deadline(config), lock::runtime_directory());
        let (snapshot, failure) = snapshot_file::take(self.endpoint, deadline, config, &self.files, &directory).await?;
        failure.map_or(Ok(snapshot), |error| Err(error.into()))
    }

    async fn examine(self, timeout: &Timeout, is_json: bool) -> Result<Exit> {
        let config = &self.settings.config;
        let deadline = timeout.soon(config);
        let nothing_told = doctor::Told::new();
        let diagnosis = match &self.saved {
            Some(saved) => doctor::examine(saved, config, &nothing_told),
            None => {
                let directory = lock::runtime_directory();
                let taken = snapshot_file::take(self.endpoint, deadline, config, &self.files, &directory).await?.0;
                let told = ask_kernel(doctor::examine(&taken, config, &nothing_told).asks()).await?;
                doctor::examine(&taken, config, &told)
            }
        };
        print::diagnosis(&diagnosis, is_json)
    }

    async fn snapshot(self, output: Option<&Path>, is_redacted: bool, timeout: &Timeout) -> Result<Exit> {
        let config = &self.settings.config;
        let (deadline, directory) = (timeout.deadline(config), lock::runtime_directory());
        let (snapshot, failure) = snapshot_file::take(self.endpoint, deadline, config, &self.files, &directory).await?;
        print::snapshot(if is_redacted { snapshot.redacted()? } else { snapshot }, output)?;
        self.problems.map_or(Ok(()), |problems| Err(anyhow!(problems)))?;
        failure.map_or(Ok(Exit::Ok), |error| Err(error.into()))
    }
}

async fn try_out(options: &Options, window: Duration, report: &mut Option<Report>) -> Result<Exit> {
    let (made, guard) = confirm::try_out(options, window).await?;
    let exit = print::report(report.insert(made))?;
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
    let mut observed = run::observe(config).await?;
    let mut files = machine_files::read_of_container_networks();
    if !observed.links.values().any(|link| link.mac == Some(attached.primary)) {
        tracing::info!("the snapshot is not of this machine: planning for a fresh one with links eth0, eth1, …");
        (observed, files) = (fresh_machine(&attached), Files::default());
    }
    let attached = select(&attached, &tree, &observed, &files, config);
    let plan = plan(&desired(&attached, config), &observed, attached.primary, config);
    Ok((attached, plan))
}

fn plan_saved(saved: &Snapshot, config: &Config) -> Result<(Attached, Plan)> {
    let (observed, tree) = (saved.observed(config.mark), saved.tree()?);
    let attached = select(&metadata::attached_here(&tree, &observed.links)?, &tree, &observed, &saved.files, config);
    let plan = plan(&desired(&attached, config), &observed, attached.primary, config);
    Ok((attached, plan))
}

fn explain_saved(question: &Question, saved: &Snapshot, config: &Config) -> Result<Explanation> {
    let observed = saved.observed(config.mark);
    let packet = question.packet(&observed)?;
    let why = "this is a snapshot, so the model alone answers".into();
    let tree = saved.tree().map_err(anyhow::Error::from);
    let attached = tree.and_then(|tree| Ok(metadata::attached(&tree)?)).map_err(|error| format!("{error:#}"));
    let known = Known { observed: &observed, attached: attached.as_ref().map_err(String::clone), config };
    Ok(explain::explain(&known, &packet, &Said::Nothing(why)))
}

/// What the kernel has no answer to is left out.
async fn ask_kernel(packets: impl Iterator<Item = &Packet>) -> Result<doctor::Told> {
    let mut netlink = Netlink::open().context("opening a netlink socket")?;
    let mut told = doctor::Told::new();
    for packet in packets {
        if let Said::Way { way, .. } = netlink.ask(packet).await? {
            told.insert(*packet, way);
        }
    }
    Ok(told)
}

async fn read_explanation(
    question: &Question,
    endpoint: Option<&str>,
    deadline: Instant,
    config: &Config,
) -> Result<Explanation> {
    let observed = run::observe(config).await?;
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

//! What whole runs cost, beside the same done otherwise: `cargo bench --bench runs -- --help`. Each table compares within
//! itself: what stands in one row was measured moments apart on one machine.
//!
//! The machine is a network namespace whose links are veth ends, its metadata service the lab's; no fabric carries packets
//! between ENIs, so that only eniup, the kernel and the service are measured.

#[path = "../support/metadata_lab.rs"]
mod lab;
#[path = "../support/model.rs"]
mod model;

mod build;
mod instance;
mod machine;
mod metadata;
mod netlink;
mod packets;
mod planner;
mod tables;
mod targets;

use std::num::NonZeroUsize;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use instance::Instance;
use machine::Size;
use netlink::Cpu;
use tables::{Section, Tables};
use vpc_lab::cost::{self, Cost, Spread, milliseconds};
use vpc_lab::sandbox;

/// Measures whole runs of eniup, and the same work done by others.
#[derive(Parser)]
struct Arguments {
    /// What to measure; everything by default, and `build` only with --write.
    section: Vec<What>,
    /// Runs of each, instead of 9, 3 of what takes long, and 51 of a start; the tables show the median and the spread.
    #[arg(long)]
    runs: Option<NonZeroUsize>,
    /// A statically linked build, to compare its start with.
    #[arg(long, value_name = "FILE")]
    r#static: Option<PathBuf>,
    /// Write what is measured here, as JSON; other tables that it has stay.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Put the tables into this file, between the marks that bear their names.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Instead of measuring, run this command on an instance of this size: `--on 15x50 -- eniup status`.
    #[arg(long, value_name = "SIZE", requires = "command")]
    on: Option<Size>,
    #[arg(last = true)]
    command: Vec<String>,
    /// Of cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    fn wants(&self, what: What) -> bool {
        match self.section.as_slice() {
            [] => what != What::Build || self.write.is_some(),
            named => named.contains(&what),
        }
    }

    fn runs_or(&self, usual: usize) -> usize {
        self.runs.map_or(usual, NonZeroUsize::get)
    }

    fn measure(&self, what: What) -> Result<Section> {
        match what {
            What::Whole => whole(|size| self.runs_or(if CLOSELY.contains(&size) { 9 } else { FEW })),
            What::Apply => apply(self.runs_or(9)),
            What::Latency => latency(self.runs_or(FEW)),
            What::Metadata => metadata::measure(),
            What::Planner => planner::measure(self.runs_or(9)),
            What::Packets => packets::measure(self.runs_or(9)),
            What::Start => start(self.runs_or(51), self.r#static.as_deref()),
            What::Build => build::measure(self.r#static.as_deref()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// From nothing, with nothing to do, and with one address to add, for all sizes.
    Whole,
    /// Applying, beside the same netlink messages in bare batches, `ip -batch`, and one `ip` for each change.
    Apply,
    /// With a metadata service that takes its time.
    Latency,
    /// Reading metadata, and nothing else.
    Metadata,
    /// Deciding, without a kernel.
    Planner,
    /// What a packet's way costs with few rules, with a rule for each ENI and with one for each address.
    Packets,
    /// Starting alone.
    Start,
    /// Building eniup from nothing, which takes minutes.
    Build,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if !sandbox::is_inside() {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1));
        sandbox::prepare(&mut command);
        return Err(sandbox::explain(command.exec()));
    }
    if let (Some(size), [program, rest @ ..]) = (arguments.on, arguments.command.as_slice()) {
        let _instance = Instance::new(size)?;
        let status = Command::new(program).args(rest).status().with_context(|| format!("starting {program}"))?;
        ensure!(status.success(), "{program}: {status}");
        return Ok(());
    }
    let mut tables = Tables::with_those_of(arguments.json.as_deref())?;
    for what in What::value_variants().iter().filter(|what| arguments.wants(**what)) {
        tables.push(arguments.measure(*what)?);
    }
    tables.push(targets::section(&tables));
    if let Some(file) = &arguments.json {
        tables.save(file)?;
    }
    if let Some(file) = &arguments.write {
        tables.put_into(file)?;
    }
    Ok(())
}

/// Every number of ENIs with every number of addresses each, of one family and of both.
fn whole_sizes() -> impl Iterator<Item = Size> {
    let sizes = [1, 4, 15, 24, 64, 80].into_iter().flat_map(|enis| [1, 10, 50].map(|addresses| (enis, addresses)));
    sizes.flat_map(|(enis, addresses)| [Size::ipv4(enis, addresses), Size::dual_stack(enis, addresses)])
}

/// Of which something is promised: these are run more often.
const CLOSELY: [Size; 2] = [Size::ipv4(4, 10), Size::ipv4(15, 50)];

fn whole(runs: impl Fn(Size) -> usize) -> Result<Section> {
    let header = [
        "ENIs x addresses",
        "objects",
        "run",
        "netlink changes",
        "wall ms",
        "least",
        "most",
        "CPU ms",
        "CPU us per object",
        "peak MiB",
        "requests",
    ];
    let mut section = Section::new("whole", &header);
    for size in whole_sizes() {
        eprintln!("whole runs, {size}");
        let instance = Instance::new(size)?;
        let objects = instance.objects()?;
        // Counted apart, since counting takes time, and first, since the first of all takes longer.
        let changes = instance.three_runs(Instance::changes)?;
        let costs = (0..runs(size)).map(|_| instance.three_runs(cost_and_requests)).collect::<Result<Vec<_>>>()?;
        for (n, run) in ["cold", "idle", "one address"].into_iter().enumerate() {
            let costs: Vec<(Cost, u64)> = costs.iter().map(|costs| costs[n]).collect();
            let wall = Spread::of(costs.iter().map(|(cost, _)| cost.wall));
            let cpu = Spread::of(costs.iter().map(|(cost, _)| cost.cpu)).median;
            let each = || format!("{:.1}", cpu.as_secs_f64() * 1e6 / objects as f64);
            section.push([
                size.to_string(),
                objects.to_string(),
                run.into(),
                changes[n].to_string(),
                milliseconds(wall.median),
                milliseconds(wall.least),
                milliseconds(wall.most),
                milliseconds(cpu),
                if objects == 0 { "-".into() } else { each() },
                peak(costs.iter().map(|(cost, _)| cost)),
                costs.iter().map(|(_, requests)| requests).max().map_or("-".into(), u64::to_string),
            ]);
        }
    }
    Ok(section)
}

fn cost_and_requests(instance: &Instance) -> Result<(Cost, u64)> {
    let before = instance.requests();
    Ok((instance.reconcile()?, instance.requests() - before))
}

/// The most of all, in MiB.
fn peak<'a>(costs: impl Iterator<Item = &'a Cost>) -> String {
    format!("{:.1}", costs.map(|cost| cost.peak).max().unwrap_or_default() as f64 / 1024.0)
}

/// Of what takes long, or hardly varies.
const FEW: usize = 3;

/// What it is called, how many rounds of it count, and one of them.
type Way<'a> = (&'a str, usize, &'a dyn Fn() -> Result<Cpu>);

fn apply(runs: usize) -> Result<Section> {
    let header = [
        "ENIs x addresses",
        "changes",
        "how",
        "wall ms",
        "least",
        "most",
        "wall, times the bare",
        "CPU ms",
        "CPU, least",
        "CPU, most",
        "CPU, times the bare",
    ];
    let mut section = Section::new("apply", &header);
    for size in [Size::ipv4(4, 10), Size::ipv4(15, 50), Size::ipv4(80, 50)] {
        eprintln!("applying, {size}");
        let instance = Instance::new(size)?;
        instance.forget_but_sysctls()?;
        let messages = instance.messages()?;
        instance.forget_but_sysctls()?;
        let plan = instance.plan()?;
        let commands: Vec<String> = plan.steps.iter().map(|step| step.operation.to_string()).collect();
        ensure!(commands.iter().all(|command| command.starts_with("ip ")), "a change that is not netlink's");
        let ways: [Way; 4] = [
            ("bare netlink, in batches", runs, &|| netlink::replay(&messages)),
            ("eniup", runs, &|| netlink::apply(&plan)),
            ("ip -batch", runs, &|| instance::ip_batch(&commands)),
            ("an ip for each", runs.min(FEW), &|| instance::ip_each(&commands)),
        ];
        let mut costs: [Vec<Cpu>; 4] = Default::default();
        // The first round is not counted.
        for round in 0..=runs {
            for n in in_turn(ways.len(), round).filter(|n| round <= ways[*n].1) {
                instance.forget_but_sysctls()?;
                let cost = ways[n].2()?;
                ensure!(instance.plan()?.steps.is_empty(), "{} did not do all", ways[n].0);
                costs[n].extend((round > 0).then_some(cost));
            }
        }
        let spreads = costs.map(|costs| {
            (Spread::of(costs.iter().map(|cost| cost.wall)), Spread::of(costs.iter().map(|cost| cost.cpu)))
        });
        let bare = spreads[0];
        for ((how, ..), (wall, cpu)) in ways.iter().zip(spreads) {
            section.push([
                size.to_string(),
                commands.len().to_string(),
                how.to_string(),
                two(wall.median),
                two(wall.least),
                two(wall.most),
                times(wall.median, bare.0.median),
                two(cpu.median),
                two(cpu.least),
                two(cpu.most),
                times(cpu.median, bare.1.median),
            ]);
        }
    }
    Ok(section)
}

/// So many things, each round beginning with another one: what else the machine does falls on all of them, and so does what
/// one of them leaves in caches for the next.
fn in_turn(count: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |n| (n + round) % count)
}

/// What each answer of the service takes. With the two longest the packet limit waits for nothing.
const LATENCIES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(1),
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(100),
];

/// Answers that are waited for one after the other, also behind requests in flight: from what a run takes with the two longest
/// latencies.
fn round_trips(shorter: Duration, longer: Duration) -> u32 {
    let [.., short, long] = LATENCIES;
    (longer.saturating_sub(shorter).as_secs_f64() / (long - short).as_secs_f64()).round() as u32
}

fn latency(runs: usize) -> Result<Section> {
    let header = [
        "ENIs x addresses",
        "latency ms",
        "cold, round trips",
        "wall ms",
        "bound ms",
        "idle, round trips",
        "idle, wall ms",
        "idle, bound ms",
        "holds",
    ];
    let mut section = Section::new("latency", &header);
    let sizes = [(1, 10), (4, 10), (15, 50), (24, 50), (64, 50), (80, 50)];
    for size in sizes.map(|(enis, addresses)| Size::ipv4(enis, addresses)) {
        eprintln!("slow metadata, {size}");
        let instance = Instance::new(size)?;
        let mut walls = Vec::new();
        for latency in LATENCIES {
            walls.push(with_latency(&instance, latency, runs)?);
        }
        let [at_once, .., shorter, longer] = walls.as_slice() else { unreachable!("as many as latencies") };
        let trips = [0, 1].map(|n| round_trips(shorter[n], longer[n]));
        for (latency, walls) in LATENCIES.into_iter().zip(&walls) {
            let bounds = [0, 1].map(|n| (trips[n] + 1) * latency + at_once[n]);
            let verdict = match latency.is_zero() {
                true => "-",
                false => targets::verdict(walls[0] <= bounds[0] && walls[1] <= bounds[1]),
            };
            section.push([
                size.to_string(),
                latency.as_millis().to_string(),
                trips[0].to_string(),
                milliseconds(walls[0]),
                milliseconds(bounds[0]),
                trips[1].to_string(),
                milliseconds(walls[1]),
                milliseconds(bounds[1]),
                verdict.into(),
            ]);
        }
    }
    Ok(section)
}

/// What a cold and an idle run take, in the median. Where most of that is waiting, two runs take as long as one another.
fn with_latency(instance: &Instance, latency: Duration, runs: usize) -> Result<[Duration; 2]> {
    instance.lab.service.set_latency(latency);
    let runs = if latency < LATENCIES[3] { runs } else { 1 };
    let mut walls: [Vec<Duration>; 2] = Default::default();
    for _ in 0..runs {
        instance.forget()?;
        for walls in &mut walls {
            walls.push(instance.reconcile()?.wall);
        }
    }
    Ok(walls.map(|walls| Spread::of(walls).median))
}

/// In milliseconds, for what takes few of them.
fn two(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1000.0)
}

fn times(time: Duration, bare: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() / bare.as_secs_f64())
}

/// The binary that is measured everywhere but where another is named.
fn eniup() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_eniup"))
}

fn start(runs: usize, r#static: Option<&Path>) -> Result<Section> {
    let header = ["build", "bytes", "run", "wall ms", "least", "most", "CPU ms", "peak MiB"];
    let mut section = Section::new("start", &header);
    let directory = tempfile::tempdir()?;
    let metadata = directory.path().join("metadata.json");
    let tree = Size::ipv4(1, 1).tree();
    std::fs::write(&metadata, serde_json::to_string(&tree.save())?)?;
    let metadata = metadata.to_string_lossy();
    let starts =
        [("--version", vec!["--version"]), ("plan --metadata", vec!["plan", "--quiet", "--metadata", &metadata])];
    let builds = [("dynamic", Some(eniup())), ("static", r#static)];
    for (build, binary) in builds.into_iter().filter_map(|(build, binary)| Some((build, binary?))) {
        for (name, arguments) in &starts {
            eprintln!("starting, {build}, {name}");
            let command = || {
                let mut command = Command::new(binary);
                command.args(arguments);
                command
            };
            // Apart, since a look at the peak takes a tenth of a start.
            let costs = (0..FEW).map(|_| Cost::of(&mut command())).collect::<Result<Vec<_>>>()?;
            let times = (0..runs).map(|_| cost::times(&mut command())).collect::<Result<Vec<_>>>()?;
            let wall = Spread::of(times.iter().map(|(wall, _)| *wall));
            section.push([
                build.into(),
                build::bytes(binary)?.to_string(),
                name.to_string(),
                two(wall.median),
                two(wall.least),
                two(wall.most),
                two(Spread::of(times.iter().map(|(_, cpu)| *cpu)).median),
                peak(costs.iter()),
            ]);
        }
    }
    Ok(section)
}

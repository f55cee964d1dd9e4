//! What whole runs cost, beside the same done otherwise: `cargo bench --bench runs -- --help`. Each table compares within
//! itself: what stands in one row was measured moments apart on one machine.
//!
//! The machine is a network namespace whose links are veth ends, its metadata service the lab's; no fabric carries packets
//! between ENIs, so that only eniup, the kernel and the service are measured.

#[path = "../support/metadata_lab.rs"]
mod lab;
#[path = "../support/model.rs"]
mod model;

mod instance;
mod machine;
mod netlink;
mod packets;
mod tables;

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
use vpc_lab::cost::{Cost, Spread, milliseconds};
use vpc_lab::sandbox;

/// Measures whole runs of eniup, and the same work done by others.
#[derive(Parser)]
struct Arguments {
    /// What to measure; everything by default.
    section: Vec<What>,
    /// Runs of each; the tables show the median and the spread.
    #[arg(long, default_value_t = 9)]
    runs: usize,
    /// A statically linked build, to compare its start with.
    #[arg(long, value_name = "FILE")]
    r#static: Option<PathBuf>,
    /// Write what is measured here, as JSON.
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

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// From nothing, with nothing to do, and with one address to add, for all sizes.
    Whole,
    /// Applying, beside the same netlink messages in bare batches, `ip -batch`, and one `ip` for each change.
    Apply,
    /// With a metadata service that takes its time.
    Latency,
    /// What a packet's way costs with few rules, with a rule for each ENI and with one for each address.
    Packets,
    /// Starting alone.
    Start,
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
    let is_wanted = |what| arguments.section.is_empty() || arguments.section.contains(&what);
    let mut tables = Tables::default();
    for what in What::value_variants().iter().filter(|what| is_wanted(**what)) {
        let section = match what {
            What::Whole => whole(arguments.runs),
            What::Apply => apply(arguments.runs),
            What::Latency => latency(arguments.runs),
            What::Packets => packets::measure(arguments.runs),
            What::Start => start(arguments.runs, arguments.r#static.as_deref()),
        }?;
        println!("{section}");
        tables.push(section);
    }
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

fn whole(runs: usize) -> Result<Section> {
    let mut section = Section::new(
        "whole",
        &[
            "ENIs x addresses",
            "objects",
            "run",
            "wall ms",
            "least",
            "most",
            "CPU ms",
            "CPU us per object",
            "peak MiB",
            "requests",
        ],
    );
    for size in whole_sizes() {
        eprintln!("whole runs, {size}");
        let instance = Instance::new(size)?;
        let objects = instance.objects()?;
        let mut costs: [Vec<Cost>; 3] = Default::default();
        let mut requests = [0; 3];
        for _ in 0..runs {
            instance.forget()?;
            for (n, prepare) in [Instance::as_it_is, Instance::as_it_is, Instance::with_one_more].iter().enumerate() {
                prepare(&instance)?;
                let before = instance.requests();
                costs[n].push(instance.reconcile()?);
                requests[n] = instance.requests() - before;
            }
            instance.with_one_less()?;
        }
        for (n, run) in ["cold", "idle", "one address"].into_iter().enumerate() {
            let wall = Spread::of(costs[n].iter().map(|cost| cost.wall));
            let cpu = Spread::of(costs[n].iter().map(|cost| cost.cpu)).median;
            let peak = costs[n].iter().map(|cost| cost.peak).max().unwrap_or_default();
            section.push([
                size.to_string(),
                objects.to_string(),
                run.into(),
                milliseconds(wall.median),
                milliseconds(wall.least),
                milliseconds(wall.most),
                milliseconds(cpu),
                match objects {
                    0 => "-".into(),
                    _ => format!("{:.1}", cpu.as_secs_f64() * 1e6 / objects as f64),
                },
                format!("{:.1}", peak as f64 / 1024.0),
                requests[n].to_string(),
            ]);
        }
    }
    Ok(section)
}

fn apply(runs: usize) -> Result<Section> {
    let mut section = Section::new(
        "apply",
        &["ENIs x addresses", "changes", "how", "wall ms", "times the bare", "CPU ms", "times the bare"],
    );
    for size in [Size::ipv4(4, 10), Size::ipv4(15, 50), Size::ipv4(80, 50)] {
        eprintln!("applying, {size}");
        let instance = Instance::new(size)?;
        instance.forget_but_sysctls()?;
        let messages = instance.messages()?;
        instance.forget_but_sysctls()?;
        let plan = instance.plan()?;
        let commands: Vec<String> = plan.steps.iter().map(|step| step.operation.to_string()).collect();
        ensure!(commands.iter().all(|command| command.starts_with("ip ")), "a change that is not netlink's");
        let ways: [(&str, &dyn Fn() -> Result<Cpu>); 4] = [
            ("bare netlink, in batches", &|| netlink::replay(&messages)),
            ("eniup", &|| netlink::apply(&plan)),
            ("ip -batch", &|| instance::ip_batch(&commands)),
            ("an ip for each", &|| instance::ip_each(&commands)),
        ];
        let mut costs: [Vec<Cpu>; 4] = Default::default();
        // In turn, so that what else the machine does falls on all of them.
        for _ in 0..runs {
            for (n, (_, way)) in ways.iter().enumerate() {
                instance.forget_but_sysctls()?;
                costs[n].push(way()?);
                ensure!(instance.plan()?.steps.is_empty(), "{} did not do all", ways[n].0);
            }
        }
        let median = |costs: &[Cpu]| {
            let wall = Spread::of(costs.iter().map(|cost| cost.wall)).median;
            (wall, Spread::of(costs.iter().map(|cost| cost.cpu)).median)
        };
        let bare = median(&costs[0]);
        for (n, (how, _)) in ways.iter().enumerate() {
            let (wall, cpu) = median(&costs[n]);
            let times = |time: Duration, bare: Duration| format!("{:.2}", time.as_secs_f64() / bare.as_secs_f64());
            section.push([
                size.to_string(),
                commands.len().to_string(),
                how.to_string(),
                milliseconds(wall),
                times(wall, bare.0),
                milliseconds(cpu),
                times(cpu, bare.1),
            ]);
        }
    }
    Ok(section)
}

fn latency(runs: usize) -> Result<Section> {
    let header =
        ["ENIs x addresses", "latency ms", "cold, wall ms", "latencies beyond 0 ms", "idle, wall ms", "beyond"];
    let mut section = Section::new("latency", &header);
    for size in [Size::ipv4(4, 10), Size::ipv4(15, 50), Size::ipv4(80, 50)] {
        eprintln!("slow metadata, {size}");
        let instance = Instance::new(size)?;
        let mut at_once = [Duration::ZERO; 2];
        for latency in [0, 1, 10, 100].map(Duration::from_millis) {
            instance.lab.service.set_latency(latency);
            let mut walls: [Vec<Duration>; 2] = Default::default();
            for _ in 0..runs {
                instance.forget()?;
                walls[0].push(instance.reconcile()?.wall);
                walls[1].push(instance.reconcile()?.wall);
            }
            let walls = walls.map(|walls| Spread::of(walls).median);
            if latency.is_zero() {
                at_once = walls;
            }
            let beyond = |n: usize| match latency.is_zero() {
                true => "-".to_string(),
                false => {
                    format!("{:.1}", walls[n].saturating_sub(at_once[n]).as_secs_f64() / latency.as_secs_f64())
                }
            };
            section.push([
                size.to_string(),
                latency.as_millis().to_string(),
                milliseconds(walls[0]),
                beyond(0),
                milliseconds(walls[1]),
                beyond(1),
            ]);
        }
    }
    Ok(section)
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
    let builds = [("dynamic", Some(eniup())), ("static", r#static)];
    for (build, binary) in builds.into_iter().filter_map(|(build, binary)| Some((build, binary?))) {
        let bytes = std::fs::metadata(binary).with_context(|| binary.display().to_string())?.len();
        let metadata = metadata.to_string_lossy();
        for (name, arguments) in
            [("--version", vec!["--version"]), ("plan --metadata", vec!["plan", "--quiet", "--metadata", &metadata])]
        {
            let costs: Vec<Cost> =
                (0..runs.max(50)).map(|_| Cost::of(Command::new(binary).args(&arguments))).collect::<Result<_>>()?;
            let wall = Spread::of(costs.iter().map(|cost| cost.wall));
            let two = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1000.0);
            section.push([
                build.into(),
                bytes.to_string(),
                name.into(),
                two(wall.median),
                two(wall.least),
                two(wall.most),
                two(Spread::of(costs.iter().map(|cost| cost.cpu)).median),
                format!("{:.1}", costs.iter().map(|cost| cost.peak).max().unwrap_or_default() as f64 / 1024.0),
            ]);
        }
    }
    Ok(section)
}

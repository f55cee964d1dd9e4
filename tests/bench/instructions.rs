//! A guard against work that creeps in: `cargo bench --bench instructions`. Counts instructions with valgrind's callgrind,
//! which are the same whatever else the machine does, and compares them with `instructions.json`; `-- --record` writes that
//! file anew. Beside it the system calls and netlink messages of a run that finds nothing to do.
//!
//! A function's count is that of two runs of it less that of one, in processes that differ in nothing else.

#[path = "../support/metadata_lab.rs"]
mod lab;
#[path = "../support/model.rs"]
mod model;

mod instance;
mod machine;
mod netlink;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use eniup::cover::cover;
use eniup::desired::desired;
use eniup::metadata::attached;
use instance::Instance;
use ipnet::IpNet;
use machine::{Prepared, Size};
use vpc_lab::interposer;
use vpc_lab::sandbox;
use vpc_lab::table::{Align, Table};

/// Counts may differ by this much: another compiler, or another libc, shifts them by about one in a hundred.
const TOLERANCE: f64 = 0.05;

/// Calls that are not counted: their number depends on whether answers come alone or together, and on how the allocator grows. Not
/// every architecture has all of them.
const NOT_COUNTED: &str =
    "!?epoll_wait,?epoll_pwait,?poll,?ppoll,?futex,?read,?recvfrom,?recvmsg,?brk,?mmap,?munmap,?mremap";

const SIZE: Size = Size::dual_stack(15, 50);

/// What an address costs does not depend on how many there are: within this factor between these two sizes.
const GROWTH: f64 = 1.5;
const SMALL: Size = Size::ipv4(15, 10);
const LARGE: Size = Size::ipv4(80, 50);

type Function = fn(&Prepared);

const FUNCTIONS: [(&str, Function); 5] = [
    ("parse", |it| drop(std::hint::black_box(attached(&it.tree)))),
    ("desire", |it| drop(std::hint::black_box(desired(&it.attached, &it.config)))),
    ("plan everything", |it| drop(std::hint::black_box(it.plan(&it.fresh)))),
    ("plan nothing", |it| drop(std::hint::black_box(it.plan(&it.configured)))),
    ("cover a shared subnet", |_| drop(std::hint::black_box(cover_a_shared_subnet()))),
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--once", name, size, times] => repeat(name, size.parse()?, times.parse()?),
        ["--no-op"] => print_no_op(),
        [] => {
            compare(&count()?)?;
            is_flat()
        }
        ["--record"] => record(&count()?),
        other => bail!("unknown arguments {other:?}: there is --record, or none"),
    }
}

fn repeat(name: &str, size: Size, times: u32) -> Result<()> {
    let (_, function) = FUNCTIONS.iter().find(|(known, _)| *known == name).context("no such function")?;
    let prepared = Prepared::new(size)?;
    (0..times).for_each(|_| function(&prepared));
    Ok(())
}

/// Every other address is another ENI's.
fn cover_a_shared_subnet() -> Vec<IpNet> {
    let nth = |n: u32| IpNet::from(IpAddr::from((0x0a00_0000 + n).to_be_bytes()));
    let own: Vec<IpNet> = (0..500).map(|n| nth(n * 2)).collect();
    let others: Vec<IpNet> = (0..500).map(|n| nth(n * 2 + 1)).collect();
    cover(&own, &others, "10.0.0.0/16".parse().expect("a prefix"))
}

fn count() -> Result<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    for (name, _) in FUNCTIONS {
        eprintln!("counting {name}");
        counts.insert(format!("instructions: {name}, {SIZE}"), callgrind(name, SIZE)?);
    }
    counts.extend(no_op()?);
    Ok(counts)
}

/// Of one more run of the function.
fn callgrind(name: &str, size: Size) -> Result<u64> {
    let [once, twice] = [1, 2].map(|times| total(name, size, times));
    twice?.checked_sub(once?).context("twice is less than once")
}

fn is_flat() -> Result<()> {
    let each = |name: &str, size: Size| {
        Ok::<_, anyhow::Error>(callgrind(name, size)? as f64 / (f64::from(size.enis) * f64::from(size.addresses)))
    };
    for name in ["parse", "desire", "plan everything", "plan nothing"] {
        let (small, large) = (each(name, SMALL)?, each(name, LARGE)?);
        println!("{name}: {small:.0} instructions an address for {SMALL}, {large:.0} for {LARGE}");
        ensure!(large <= small * GROWTH, "{name} costs more for each address, the more of them there are");
    }
    Ok(())
}

fn total(name: &str, size: Size, times: u32) -> Result<u64> {
    let file = tempfile::NamedTempFile::new()?;
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--quiet"]).arg(format!("--callgrind-out-file={}", file.path().display()));
    command.arg(std::env::current_exe()?).args(["--once", name, &size.to_string(), &times.to_string()]);
    let output = command.output().context("running valgrind: tests/prepare target/tools valgrind gets it")?;
    ensure!(output.status.success(), "valgrind: {}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(file.path())?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: ")).context("callgrind gave no totals")?;
    Ok(total.trim().parse()?)
}

/// In a sandbox: what a run says to the kernel and asks of the system that finds nothing to do.
fn no_op() -> Result<BTreeMap<String, u64>> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--no-op");
    sandbox::prepare(&mut command);
    let output = command.output().map_err(sandbox::explain)?;
    ensure!(output.status.success(), "a run with nothing to do: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn print_no_op() -> Result<()> {
    let instance = Instance::new(Size::ipv4(4, 10))?;
    instance.reconcile()?;
    let (mut messages, mut changes) = (0, 0);
    for mut datagram in instance.said()? {
        messages += interposer::messages(&mut datagram).len() as u64;
        changes += instance::changes(&mut datagram) as u64;
    }
    let counts = BTreeMap::from([
        ("netlink messages: nothing to do, 4x10".to_string(), messages),
        ("netlink changes: nothing to do, 4x10".to_string(), changes),
        ("system calls: nothing to do, 4x10".to_string(), least_system_calls()?),
    ]);
    println!("{}", serde_json::to_string(&counts)?);
    Ok(())
}

/// Of several runs: what is lost on a busy machine is sent again.
fn least_system_calls() -> Result<u64> {
    let counts: Vec<u64> = (0..3).map(|_| system_calls()).collect::<Result<_>>()?;
    counts.into_iter().min().context("no run")
}

fn system_calls() -> Result<u64> {
    let file = tempfile::NamedTempFile::new()?;
    let mut command = Command::new("strace");
    // Cargo's, in which the loader would look for each library, in as many directories as were built.
    command.env_remove("LD_LIBRARY_PATH");
    command
        .args(["-f", "-qq", "-e", &format!("trace={NOT_COUNTED}"), "-o"])
        .arg(file.path())
        .arg(eniup())
        .args(["reconcile", "--quiet"]);
    let status = command.status().context("running strace: tests/prepare target/tools strace gets it")?;
    ensure!(status.success(), "strace eniup reconcile: {status}");
    Ok(std::fs::read_to_string(file.path())?.lines().filter(|line| !line.contains(" resumed>")).count() as u64)
}

fn compare(counts: &BTreeMap<String, u64>) -> Result<()> {
    let path = file();
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let recorded: BTreeMap<String, u64> = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    ensure!(
        recorded.keys().eq(counts.keys()),
        "{}: not the counts that are taken; -- --record writes them anew",
        path.display()
    );
    let mut table = Table::new(["count", "recorded", "counted", "change"].map(Into::into).into(), Align::Right);
    let mut is_well = true;
    for (name, count) in counts {
        let recorded = recorded[name];
        let change = (*count as f64 - recorded as f64) / recorded.max(1) as f64;
        // What costs less is welcome, but is recorded, or it could creep back.
        let is_within = if recorded == 0 { *count == 0 } else { change.abs() <= TOLERANCE };
        is_well &= is_within;
        let verdict = if is_within { "" } else { "  outside" };
        table.push(
            [name.clone(), recorded.to_string(), count.to_string(), format!("{:+.1} %{verdict}", change * 100.0)]
                .map(Into::into)
                .into(),
        );
    }
    print!("{table}");
    ensure!(is_well, "a count is not what {} says; if it has to be, -- --record writes it anew", path.display());
    Ok(())
}

fn record(counts: &BTreeMap<String, u64>) -> Result<()> {
    let text = serde_json::to_string_pretty(counts)? + "\n";
    std::fs::write(file(), text).with_context(|| format!("writing {}", file().display()))
}

fn file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/instructions.json")
}

fn eniup() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_eniup"))
}

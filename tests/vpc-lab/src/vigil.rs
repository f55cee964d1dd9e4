//! What `eniup watch` costs while nothing happens, and how soon it repairs what somebody takes away.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;

use crate::figures::{ADDRESSES, instance};
use crate::kernel;
use crate::lab::Lab;
use crate::table::{Align, Cell, Table};

/// For what should be there at once, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks whether an address is back.
const LOOK: Duration = Duration::from_micros(200);

/// The longest pause between two drifts, so that they meet every moment of what the watch does meanwhile.
const LONGEST_PAUSE_IN_MILLISECONDS: u64 = 150;

/// Measures for so long and prints two tables.
///
/// # Errors
/// The watch ends, or does not configure or repair something.
pub fn measure(eniup: &Path, idle: Duration) -> Result<()> {
    let header =
        ["ENIs", "idle s", "CPU ms", "% of a core", "resident MiB", "peak MiB", "requests", "request every ms"];
    let mut costs = Table::new(header.map(Cell::from).into(), Align::Right);
    let header = ["ENIs", "repairs", "median ms", "p99 ms", "most ms"];
    let mut repairs = Table::new(header.map(Cell::from).into(), Align::Right);
    for enis in [1, 15] {
        let lab = instance(eniup, enis)?;
        let watch = Watch::start(&lab)?;
        wait_for_all(&lab, enis)?;
        costs.push(idle_cost(&lab, &watch, enis, idle)?);
        repairs.push(drift(&lab, enis)?);
    }
    print!("{costs}\n{repairs}");
    Ok(())
}

/// A running `eniup watch`, killed when it was measured.
struct Watch {
    child: Child,
}

impl Watch {
    fn start(lab: &Lab) -> Result<Watch> {
        let mut command = lab.command("web", &lab.eniup)?;
        command.args(["watch", "--quiet"]).stdout(Stdio::null());
        Ok(Watch { child: command.spawn().context("starting eniup")? })
    }

    /// Of the kernel, in its own unit.
    fn read<T: std::str::FromStr>(&self, file: &str, label: &str) -> Result<T> {
        let path = format!("/proc/{}/{file}", self.child.id());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let value =
            text.lines().find_map(|line| line.strip_prefix(label)).and_then(|rest| rest.split_whitespace().next());
        value.and_then(|value| value.parse().ok()).with_context(|| format!("no {label} in {path}"))
    }

    fn cpu(&self) -> Result<Duration> {
        Ok(Duration::from_nanos(self.read("schedstat", "")?))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The addresses of an ENI with its link; the first one is left out, since the primary's is not eniup's.
fn secondaries(enis: usize) -> impl Iterator<Item = (String, IpAddr)> {
    let of_eni =
        |n: usize| (1..ADDRESSES).map(move |host| (format!("ens{}", 5 + n), [10, 0, n as u8, 10 + host].into()));
    (0..enis).flat_map(of_eni)
}

/// Whether this machine answers for it: only then can a socket have it.
fn is_here(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

fn wait_for(address: IpAddr) -> Result<Duration> {
    let begun = Instant::now();
    while !is_here(address) {
        ensure!(begun.elapsed() < PATIENCE, "{address} is not there");
        std::thread::sleep(LOOK);
    }
    Ok(begun.elapsed())
}

fn wait_for_all(lab: &Lab, enis: usize) -> Result<()> {
    lab.node("web")?.enter(|| secondaries(enis).try_for_each(|(_, address)| wait_for(address).map(drop)))
}

fn idle_cost(lab: &Lab, watch: &Watch, enis: usize, idle: Duration) -> Result<Vec<Cell>> {
    lab.service("web")?.reset_counters();
    let (begun, before) = (Instant::now(), watch.cpu()?);
    // What is measured is the time that passes.
    for passed in (0..idle.as_secs().div_ceil(60)).map(|minutes| Duration::from_secs(60 * minutes)) {
        eprintln!("{enis} ENIs, nothing happens: {} of {} min", passed.as_secs() / 60, idle.as_secs() / 60);
        std::thread::sleep((idle - passed).min(Duration::from_secs(60)));
    }
    let (passed, cpu) = (begun.elapsed(), watch.cpu()? - before);
    let requests = lab.service("web")?.requests().gets_by_status.values().sum::<u64>();
    let mebibytes = |label| Ok::<_, anyhow::Error>(watch.read::<f64>("status", label)? / 1024.0);
    let percent = cpu.as_secs_f64() / passed.as_secs_f64() * 100.0;
    Ok([
        enis.to_string(),
        format!("{:.0}", passed.as_secs_f64()),
        format!("{:.0}", cpu.as_secs_f64() * 1000.0),
        format!("{percent:.3}"),
        format!("{:.1}", mebibytes("VmRSS:")?),
        format!("{:.1}", mebibytes("VmHWM:")?),
        requests.to_string(),
        format!("{:.0}", passed.as_secs_f64() * 1000.0 / requests.max(1) as f64),
    ]
    .map(Cell::from)
    .into())
}

/// Each address is taken away once: who takes away the same again and again is given way to.
fn drift(lab: &Lab, enis: usize) -> Result<Vec<Cell>> {
    let mut took: Vec<Duration> = lab.node("web")?.enter(|| {
        let repair = |(link, address): (String, IpAddr)| {
            std::thread::sleep(Duration::from_millis(fastrand::u64(..LONGEST_PAUSE_IN_MILLISECONDS)));
            kernel::delete_address(&link, IpNet::from(address))?;
            wait_for(address)
        };
        secondaries(enis).map(repair).collect()
    })?;
    took.sort();
    let milliseconds = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1000.0);
    Ok([
        enis.to_string(),
        took.len().to_string(),
        milliseconds(took[took.len() / 2]),
        milliseconds(took[(took.len() * 99).div_ceil(100) - 1]),
        milliseconds(took[took.len() - 1]),
    ]
    .map(Cell::from)
    .into())
}

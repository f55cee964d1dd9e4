//! What `eniup reconcile` costs on an instance of so many ENIs and addresses: from nothing, and when nothing is to do.

use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::Ipv4Net;
use std::net::Ipv4Addr;

use crate::lab::{Distribution, Lab};
use crate::table::{Align, Cell, Table};
use crate::vpc::{CreateEni, EniId};

/// Runs of each; the table shows their median and spread.
const RUNS: usize = 9;
/// Addresses of every ENI.
pub(crate) const ADDRESSES: u8 = 10;

struct Cost {
    wall: Duration,
    cpu: Duration,
    /// KiB, at most resident.
    peak: i64,
    requests: u64,
}

/// Measures and prints a table.
///
/// # Errors
/// A run fails.
pub fn measure(eniup: &std::path::Path) -> Result<()> {
    let header = ["run", "ENIs", "addresses", "wall ms", "(least..most)", "CPU ms", "peak MiB", "requests"];
    let mut table = Table::new(header.map(Cell::from).into(), Align::Right);
    for enis in [1, 4, 15] {
        let mut lab = instance(eniup, enis)?;
        let (mut cold, mut idle) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            lab.stop_instance("web")?;
            lab.start_instance("web")?;
            cold.push(run(&lab)?);
            idle.push(run(&lab)?);
        }
        for (name, costs) in [("cold", cold), ("idle", idle)] {
            table.push(row(name, enis, costs));
        }
    }
    print!("{table}");
    Ok(())
}

pub(crate) fn instance(eniup: &std::path::Path, enis: usize) -> Result<Lab> {
    let mut lab = Lab::new(eniup)?;
    let created: Vec<EniId> = (0..enis)
        .map(|n| {
            let subnet = lab.fabric.world(|world| -> Result<String> {
                let vpc = match world.vpcs.keys().next() {
                    Some(vpc) => vpc.clone(),
                    None => world.create_vpc(&["10.0.0.0/16".parse()?]),
                };
                world.create_subnet(&vpc, Some(Ipv4Net::new(Ipv4Addr::new(10, 0, n as u8, 0), 24)?), &[])
            })?;
            let ipv4s = (0..ADDRESSES).map(|host| Ipv4Addr::new(10, 0, n as u8, 10 + host)).collect();
            lab.create_network_interface(CreateEni { subnet, ipv4s, ..CreateEni::default() })
        })
        .collect::<Result<_>>()?;
    lab.run_instance("web", &created, "m7i.24xlarge", Distribution::Primary)?;
    Ok(lab)
}

fn run(lab: &Lab) -> Result<Cost> {
    lab.service("web")?.reset_counters();
    let mut command = lab.command("web", &lab.eniup)?;
    command.args(["reconcile", "--quiet"]).stdout(Stdio::null());
    let started = Instant::now();
    let child = command.spawn().context("starting eniup")?;
    let (status, usage) = wait(child.id())?;
    let wall = started.elapsed();
    ensure!(status.success(), "eniup reconcile: {status}");
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    Ok(Cost {
        wall,
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        peak: usage.ru_maxrss,
        requests: lab.service("web")?.requests().gets_by_status.values().sum::<u64>() + 1,
    })
}

/// Waits for a child and gives what it used.
fn wait(process: u32) -> Result<(ExitStatus, libc::rusage)> {
    let mut status = 0;
    // SAFETY: all zeros is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers live as long as the call, and the child is this process's own.
    match unsafe { libc::wait4(process as libc::pid_t, &mut status, 0, &mut usage) } {
        -1 => Err(std::io::Error::last_os_error()).context("waiting for eniup"),
        _ => Ok((ExitStatus::from_raw(status), usage)),
    }
}

fn row(name: &str, enis: usize, mut costs: Vec<Cost>) -> Vec<Cell> {
    let milliseconds = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1000.0);
    costs.sort_by_key(|cost| cost.cpu);
    let cpu = costs[costs.len() / 2].cpu;
    costs.sort_by_key(|cost| cost.wall);
    let median = &costs[costs.len() / 2];
    let peak = costs.iter().map(|cost| cost.peak).max().unwrap_or_default();
    let (least, most) = (costs[0].wall, costs[costs.len() - 1].wall);
    [
        name.into(),
        enis.to_string(),
        (enis * usize::from(ADDRESSES)).to_string(),
        milliseconds(median.wall),
        format!("({}..{})", milliseconds(least), milliseconds(most)),
        milliseconds(cpu),
        format!("{:.1}", peak as f64 / 1024.0),
        median.requests.to_string(),
    ]
    .map(Cell::from)
    .into()
}

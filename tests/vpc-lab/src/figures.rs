//! What `eniup reconcile` costs on an instance of so many ENIs and addresses: from nothing, and when nothing is to do.

use std::net::Ipv4Addr;

use anyhow::Result;
use ipnet::Ipv4Net;

use crate::cost::{Cost, Spread, milliseconds};
use crate::lab::{Distribution, Lab};
use crate::table::{Align, Cell, Table};
use crate::vpc::{CreateEni, EniId};

/// Runs of each; the table shows their median and spread.
const RUNS: usize = 9;
/// Addresses of every ENI.
pub(crate) const ADDRESSES: u8 = 10;

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

fn run(lab: &Lab) -> Result<(Cost, u64)> {
    lab.service("web")?.reset_counters();
    let mut command = lab.command("web", &lab.eniup)?;
    let cost = Cost::of(command.args(["reconcile", "--quiet"]))?;
    let requests = lab.service("web")?.requests().gets_by_status.values().sum::<u64>() + 1;
    Ok((cost, requests))
}

fn row(name: &str, enis: usize, costs: Vec<(Cost, u64)>) -> Vec<Cell> {
    let requests = costs.last().map_or(0, |(_, requests)| *requests);
    let costs: Vec<Cost> = costs.into_iter().map(|(cost, _)| cost).collect();
    let Spread { least, median, most } = Spread::of(costs.iter().map(|cost| cost.wall));
    let cpu = Spread::of(costs.iter().map(|cost| cost.cpu)).median;
    let peak = costs.iter().map(|cost| cost.peak).max().unwrap_or_default();
    [
        name.into(),
        enis.to_string(),
        (enis * usize::from(ADDRESSES)).to_string(),
        milliseconds(median),
        format!("({}..{})", milliseconds(least), milliseconds(most)),
        milliseconds(cpu),
        format!("{:.1}", peak as f64 / 1024.0),
        requests.to_string(),
    ]
    .map(Cell::from)
    .into()
}

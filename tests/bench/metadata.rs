//! What reading metadata costs, beside no work at all: requests, round trips, connections, packets and times.
//!
//! A dual-stack ENI has seven keys for routing. The service is behind a veth link in a namespace of its own; packets are
//! the kernel's count on that link, the peak is the most in any second. `Connection: close` is how EC2's own service was
//! seen to answer.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use eniup::imds::{Imds, Scope};

use super::lab::{
    Lab, Peak, all_links, block_on, dual_stack_eni, ip, mac, metadata_listeners, packets, plug, watching,
};
use super::tables::Section;
use super::{LATENCIES, round_trips, two};

/// Beyond this a table is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn measure() -> Result<Section> {
    let header = [
        "ENIs",
        "connections",
        "requests",
        "round trips",
        "opened",
        "packets",
        "most sent in a second",
        "most both ways",
        "ms at 0 ms",
        "at 1 ms",
        "at 10 ms",
        "at 50 ms",
        "at 100 ms",
    ];
    let mut section = Section::new("metadata", &header);
    for (is_kept, how) in [(true, "kept"), (false, "one each")] {
        for count in [1, 4, 15, 24, 64, 80] {
            eprintln!("metadata, {count} ENIs, connections {how}");
            section.push(row(count, is_kept, how)?);
        }
    }
    Ok(section)
}

struct Figures {
    requests: u64,
    connections: u64,
    packets: u64,
    peak: Peak,
    time: Duration,
}

fn row(count: u8, is_kept: bool, how: &str) -> Result<[String; 13]> {
    let [shorter @ .., longest] = LATENCIES;
    let mut all = shorter.map(|latency| figures(count, is_kept, latency)).into_iter().collect::<Result<Vec<_>>>()?;
    let half = all[shorter.len() - 1].time;
    if half * 2 <= PATIENCE {
        all.push(figures(count, is_kept, longest)?);
    }
    ensure!(all.iter().all(|one| one.requests == all[0].requests), "the number of requests depends on the latency");
    let most = |value: fn(&Figures) -> u64| all.iter().map(value).max().unwrap_or_default().to_string();
    let at = |n: usize| all.get(n).map_or("-".into(), |figures| two(figures.time));
    let trips = match all.get(shorter.len()) {
        Some(full) => round_trips(half, full.time),
        // All but less than one of them is waiting.
        None => (half.as_millis() / shorter[shorter.len() - 1].as_millis()) as u32,
    };
    Ok([
        count.to_string(),
        how.into(),
        all[0].requests.to_string(),
        trips.to_string(),
        most(|figures| figures.connections),
        all[0].packets.to_string(),
        most(|figures| figures.peak.sent),
        most(|figures| figures.peak.both),
        at(0),
        at(1),
        at(2),
        at(3),
        at(4),
    ])
}

fn figures(count: u8, is_kept: bool, latency: Duration) -> Result<Figures> {
    ip("link set lo up")?;
    let listeners = plug("eth0", mac(0), metadata_listeners)?;
    ip("addr add 10.0.0.10/24 dev eth0")?;
    ip("route add default via 10.0.0.1")?;
    let lab = Lab::serving((0..count).map(dual_stack_eni).collect(), listeners, String::new());
    lab.service.set_keep_alive(is_kept);
    lab.service.set_latency(latency);
    let surroundings = all_links(&lab.view);
    // The link has only just come up, and the first packet of all may be lost.
    drop(TcpStream::connect("169.254.169.254:80")?);
    lab.service.reset_counters();
    let before = packets("eth0")?;
    let started = Instant::now();
    let read = || {
        Ok(block_on(async {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
            Imds::connect(None, &surroundings, deadline).await?.snapshot(Scope::Routing).await
        })?)
    };
    let ((tree, time), peak) = watching("eth0", || read().map(|tree| (tree, started.elapsed())))?;
    ensure!(lab.unknown_keys(&tree)? == 0, "the snapshot is not the truth");
    let after = packets("eth0")?;
    let counters = lab.service.requests();
    ip("link del eth0")?;
    Ok(Figures {
        requests: counters.tokens + counters.gets_by_path.values().sum::<u64>(),
        connections: counters.connections,
        packets: after.0 - before.0 + after.1 - before.1,
        peak,
        time,
    })
}

//! What reading metadata costs: `cargo bench --bench imds`.
//!
//! A dual-stack ENI has seven keys for routing. The service is behind a veth link in a namespace of its own; packets are
//! the kernel's count on that link, the peak is the most in any second. A round trip is what is waited for one after the
//! other, also behind the requests in flight: the time at 50 ms for each answer, divided by that. `Connection: close` is
//! how EC2's own service was seen to answer.

#[path = "../support/metadata_lab.rs"]
mod lab;

use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use eniup::imds::{Imds, Scope};
use lab::{Lab, Peak, all_links, block_on, dual_stack_eni, ip, mac, metadata_listeners, packets, plug, watching};

const LONG: Duration = Duration::from_millis(50);

fn main() -> Result<()> {
    if !vpc_lab::sandbox::is_inside() {
        let mut command = Command::new(std::env::current_exe()?);
        vpc_lab::sandbox::prepare(&mut command);
        return Err(vpc_lab::sandbox::explain(command.exec()));
    }
    for (is_kept, how) in [(true, "connections kept"), (false, "Connection: close")] {
        println!("{how}");
        println!(
            "{:>5} {:>9} {:>11} {:>12} {:>8} {:>10} {:>10} {:>9} {:>9} {:>9}",
            "ENIs",
            "requests",
            "round trips",
            "connections",
            "packets",
            "peak sent",
            "peak both",
            "0 ms",
            "1 ms",
            "10 ms"
        );
        for count in [1, 4, 15, 64, 80] {
            println!("{}", row(count, is_kept)?);
        }
    }
    Ok(())
}

struct Figures {
    requests: u64,
    connections: u64,
    packets: u64,
    peak: Peak,
    time: Duration,
}

fn row(count: u8, is_kept: bool) -> Result<String> {
    let mut times = Vec::new();
    let mut figures = figures(count, is_kept, Duration::ZERO)?;
    times.push(figures.time);
    for latency in [Duration::from_millis(1), Duration::from_millis(10), LONG] {
        let slower = self::figures(count, is_kept, latency)?;
        ensure!(slower.requests == figures.requests, "the number of requests depends on the latency");
        figures.peak.sent = figures.peak.sent.max(slower.peak.sent);
        figures.peak.both = figures.peak.both.max(slower.peak.both);
        figures.connections = figures.connections.max(slower.connections);
        times.push(slower.time);
    }
    let shown: Vec<String> = times.iter().take(3).map(|time| format!("{:>6} ms", time.as_millis())).collect();
    let round_trips = times[3].as_millis() / LONG.as_millis();
    let Figures { requests, connections, packets, peak, .. } = figures;
    let Peak { sent, both } = peak;
    let times = shown.join(" ");
    Ok(format!(
        "{count:>5} {requests:>9} {round_trips:>11} {connections:>12} {packets:>8} {sent:>10} {both:>10} {times}"
    ))
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

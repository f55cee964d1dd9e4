//! What the kernel has thrown away because a queue was full: the lab's own loss, which is nobody's route. A machine that is
//! too busy for what it is asked to carry shows here.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

use crate::node::Node;

/// Full queues of this thread's network namespace, by name: links' and UDP sockets'.
pub fn of_this_namespace() -> Result<BTreeMap<String, u64>> {
    let read = |file: &str| {
        let path = format!("/proc/thread-self/net/{file}");
        fs::read_to_string(&path).with_context(|| format!("reading {path}"))
    };
    Ok(links(&read("dev")?).chain(udp(&read("snmp")?)).chain(udp6(&read("snmp6")?)).filter(|(_, n)| *n > 0).collect())
}

/// The same of a node.
pub fn of(node: &Node) -> Result<BTreeMap<String, u64>> {
    node.enter(of_this_namespace)
}

/// `link: received packets errors dropped … sent packets errors dropped …`, after two lines of titles.
fn links(dev: &str) -> impl Iterator<Item = (String, u64)> {
    const DROPPED: [(usize, &str); 2] = [(3, "received"), (11, "sent")];
    dev.lines().skip(2).filter_map(|line| line.split_once(':')).flat_map(|(link, counters)| {
        let counters: Vec<u64> = counters.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        DROPPED.map(|(n, what)| (format!("{}, {what}", link.trim()), counters.get(n).copied().unwrap_or(0)))
    })
}

/// A line `Udp:` of titles, and one of numbers.
fn udp(snmp: &str) -> impl Iterator<Item = (String, u64)> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Udp: ")).map(str::split_whitespace);
    let (titles, numbers) = (lines.next(), lines.next());
    let pairs: Vec<_> = titles.into_iter().flatten().zip(numbers.into_iter().flatten()).collect();
    let named = pairs.into_iter().filter(|(title, _)| title.ends_with("bufErrors"));
    named.map(|(title, n)| (format!("Udp{title}"), n.parse().unwrap_or(0))).collect::<Vec<_>>().into_iter()
}

/// Lines of a title and a number.
fn udp6(snmp6: &str) -> impl Iterator<Item = (String, u64)> {
    let pairs = snmp6.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let named = pairs.filter(|(title, _)| title.starts_with("Udp6") && title.ends_with("bufErrors"));
    named.map(|(title, n)| (title.to_string(), n.trim().parse().unwrap_or(0)))
}

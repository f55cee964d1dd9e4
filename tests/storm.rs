//! Nothing that goes on is lost while ENIs, addresses and prefixes come and go. `cargo run -p vpc-lab -- storm` and
//! `… nat-box` do the same with other seeds and sizes.

use std::path::Path;

use anyhow::{Result, ensure};
use vpc_lab::storm::{self, Report};

const ENIUP: &str = env!("CARGO_BIN_EXE_eniup");

/// Pings that should be sent every millisecond: so many a second must have been, at least, for what they did not lose to mean
/// anything. A machine with nothing else to do sends several times as many.
const RATE: f64 = 100.0;

fn assert_whole(report: &Report) -> Result<()> {
    let sent: u64 = report.flows.iter().map(|flow| flow.sent).sum();
    let broken = report.broken();
    ensure!(broken.is_empty() && report.drops == 0, "{} dropped, broken: {broken:#?}", report.drops);
    eprintln!("{} conversations, {sent} messages", report.flows.len());
    Ok(())
}

fn play(seed: u64, operations: usize) -> Result<()> {
    let report = storm::play(Path::new(ENIUP), seed, operations, |_| {})?;
    ensure!(report.operations.len() == operations);
    eprintln!("{}", report.rate);
    ensure!(report.rate.per_second() >= RATE, "the fast pings were slow: {}", report.rate);
    assert_whole(&report)
}

#[test]
fn five_hundred_operations_cost_no_conversation_a_message() {
    vpc_lab::inside(|| play(1, 500));
}

#[test]
fn another_storm_costs_no_message_either() {
    vpc_lab::inside(|| play(20_261_124, 150));
}

#[test]
fn a_nat_box_forwards_a_thousand_conversations_while_enis_come_and_go() {
    vpc_lab::inside(|| {
        let report = storm::nat_box(Path::new(ENIUP), 1000, 4)?;
        ensure!(report.flows.len() == 1000 && report.operations.len() == 12);
        assert_whole(&report)
    });
}

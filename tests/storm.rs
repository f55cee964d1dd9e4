//! Nothing that goes on is lost while ENIs, addresses and prefixes come and go. `cargo run -p vpc-lab -- storm` and
//! `… nat-box` do the same with other seeds and sizes.

use std::path::Path;

use anyhow::{Result, ensure};
use vpc_lab::storm::{self, Report};

const ENIUP: &str = env!("CARGO_BIN_EXE_eniup");

fn assert_whole(report: &Report) -> Result<()> {
    let sent: u64 = report.flows.iter().map(|flow| flow.sent).sum();
    ensure!(sent > 1000, "only {sent} messages were sent");
    let broken: Vec<String> =
        report.flows.iter().filter(|flow| !flow.is_whole()).map(|flow| flow.to_string()).collect();
    ensure!(broken.is_empty() && report.drops == 0, "{} dropped, broken: {broken:#?}", report.drops);
    Ok(())
}

#[test]
fn five_hundred_operations_cost_no_conversation_a_message() {
    vpc_lab::inside(|| assert_whole(&storm::play(Path::new(ENIUP), 1, 500, |_| {})?));
}

#[test]
fn another_storm_costs_no_message_either() {
    vpc_lab::inside(|| assert_whole(&storm::play(Path::new(ENIUP), 20_261_124, 150, |_| {})?));
}

#[test]
fn a_nat_box_forwards_a_thousand_conversations_while_enis_come_and_go() {
    vpc_lab::inside(|| {
        let report = storm::nat_box(Path::new(ENIUP), 1000, 4)?;
        ensure!(report.flows.len() == 1000 && report.operations.len() == 12);
        assert_whole(&report)
    });
}

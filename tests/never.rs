//! Never wrong: the trials of the VPC in a box, with as many seeds as a test has time for. `docs/reliability.md` says how
//! to run thousands of them.

use std::path::Path;

use anyhow::{Result, ensure};
use vpc_lab::trials::{self, Summary, Trial};

const ENIUP: &str = env!("CARGO_BIN_EXE_eniup");

fn assert_right(summary: Summary, runs: u64) -> Result<()> {
    ensure!(summary.failures.is_empty(), "{summary}\n{}", summary.failures.join("\n"));
    ensure!(summary.runs >= runs, "{summary}, and {runs} runs were meant");
    eprintln!("{summary}");
    Ok(())
}

#[test]
fn a_misbehaving_service_costs_nothing_and_one_run_is_enough_once_it_is_well() {
    vpc_lab::inside(|| {
        let summary = trials::run(Trial::Faults, Path::new(ENIUP), 0..240, 8, &|_| ())?;
        ensure!(summary.faults > 480 && summary.troubles > 180, "the service was too well: {summary}");
        assert_right(summary, 480)
    });
}

#[test]
fn runs_that_are_killed_at_any_instant_lose_nothing_of_flows_that_stay() {
    vpc_lab::inside(|| {
        let summary = trials::run(Trial::Kills, Path::new(ENIUP), 0..60, 1, &|_| ())?;
        ensure!(summary.exits.get(&-1).is_some_and(|killed| *killed > 20), "hardly a run was killed: {summary}");
        ensure!(summary.messages > 10_000, "hardly a flow: {summary}");
        assert_right(summary, 80)
    });
}

#[test]
fn fifty_runs_at_once_while_enis_come_and_go_end_in_one_result() {
    vpc_lab::inside(|| {
        let summary = trials::run(Trial::Storms, Path::new(ENIUP), 0..4, 1, &|_| ())?;
        assert_right(summary, 200)
    });
}

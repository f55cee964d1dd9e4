//! What deciding takes, by the clock: from ENIs to what the kernel should have, and to what is to be done.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use eniup::desired::desired;
use eniup::net::Observed;
use vpc_lab::cost::Spread;

use super::machine::{Prepared, Size};
use super::tables::Section;
use super::two;

pub fn measure(runs: usize) -> Result<Section> {
    let mut section = Section::new("planner", &["ENIs x addresses", "to do", "median ms", "least", "most"]);
    for size in [Size::ipv4(15, 10), Size::ipv4(15, 50), Size::ipv4(80, 50), Size::dual_stack(80, 50)] {
        eprintln!("the planner, {size}");
        let prepared = Prepared::new(size)?;
        for (what, observed) in [("everything", &prepared.fresh), ("nothing", &prepared.configured)] {
            let Spread { least, median, most } = time(&prepared, observed, runs);
            section.push([size.to_string(), what.into(), two(median), two(least), two(most)]);
        }
    }
    Ok(section)
}

/// One run more than is counted comes first.
fn time(prepared: &Prepared, observed: &Observed, runs: usize) -> Spread {
    let decide = || {
        let started = Instant::now();
        black_box(desired(black_box(&prepared.attached), &prepared.config));
        black_box(prepared.plan(black_box(observed)));
        started.elapsed()
    };
    Spread::of((0..=runs).map(|_| decide()).skip(1))
}

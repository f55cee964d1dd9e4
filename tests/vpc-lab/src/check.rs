//! What should be reachable, and how: probes with the answer that is right, and tables of what came of them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;

use crate::lab::Lab;
use crate::probe::{Outcome, Probe};
use crate::table::{Align, Cell, Style, Table};

/// An exchange and what makes it right: answered from the address that was asked, to the client that the other side
/// should see.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Check {
    /// What it stands for in a table.
    pub row: String,
    pub column: String,
    pub probe: Probe,
    pub expected: Expected,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expected {
    /// Answered, from the address that was asked.
    Answer {
        /// The client's address as the other side should see it, one of these; any when there are none.
        seen: Vec<IpAddr>,
    },
    /// Something else on the machine leads it astray, and that is not eniup's to change.
    Silence,
}

impl Expected {
    pub fn seen_as(address: IpAddr) -> Expected {
        Expected::Answer { seen: vec![address] }
    }
}

/// Makes all exchanges; for each nothing, or what was wrong.
///
/// # Errors
/// A check names a node that there is not.
pub fn run(lab: &Lab, checks: &[Check], patience: Duration) -> Result<Vec<Option<String>>> {
    let probes: Vec<Probe> = checks.iter().map(|check| check.probe.clone()).collect();
    let outcomes = lab.probe(&probes, patience)?;
    Ok(checks.iter().zip(outcomes).map(|(check, outcome)| fault(check, &outcome)).collect())
}

fn fault(check: &Check, outcome: &Outcome) -> Option<String> {
    let Check { row: _, column: _, probe, expected } = check;
    let what = || {
        let bound = match &probe.bound {
            crate::probe::Bound::Nothing => String::new(),
            crate::probe::Bound::Address(address) => format!(" as {address}"),
            crate::probe::Bound::Device(device) => format!(" by {device}"),
        };
        format!("{} {}{bound} → {}", probe.kind, probe.from, probe.to)
    };
    let seen = match (expected, outcome) {
        (Expected::Answer { seen }, _) => seen,
        (Expected::Silence, Outcome::Answer { .. }) => return Some(format!("{}: {outcome}, unlike before", what())),
        (Expected::Silence, Outcome::Failed(_) | Outcome::Silence) => return None,
    };
    if !outcome.is_answer_of(probe.to) {
        return Some(format!("{}: {outcome}", what()));
    }
    match outcome.seen() {
        _ if seen.is_empty() => None,
        Some(by) if seen.contains(&by) => None,
        Some(by) => Some(format!("{}: seen as {by}, not {}", what(), listed(seen))),
        None => Some(format!("{}: nobody saw it, least of all as {}", what(), listed(seen))),
    }
}

fn listed(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" or ")
}

/// Rows and columns in the order in which they first appear; a cell shows how many of its exchanges were right.
pub fn table(title: &str, checks: &[Check], faults: &[Option<String>]) -> Table {
    let mut rows: Vec<&str> = Vec::new();
    let mut columns: Vec<&str> = Vec::new();
    let mut counts: BTreeMap<(&str, &str), (usize, usize)> = BTreeMap::new();
    for (check, fault) in checks.iter().zip(faults) {
        if !rows.contains(&check.row.as_str()) {
            rows.push(&check.row);
        }
        if !columns.contains(&check.column.as_str()) {
            columns.push(&check.column);
        }
        let (passed, all) = counts.entry((&check.row, &check.column)).or_default();
        *passed += usize::from(fault.is_none());
        *all += 1;
    }
    let header = std::iter::once(title).chain(columns.iter().copied());
    let mut table = Table::new(header.map(Cell::from).collect(), Align::Left);
    for row in rows {
        let cells = columns.iter().map(|column| match counts.get(&(row, *column)) {
            None => Cell::styled("·", Style::Faint),
            Some((passed, all)) if passed == all => Cell::styled("ok", Style::Good),
            Some((0, _)) => Cell::styled("no", Style::Bad),
            Some((passed, all)) => Cell::styled(format!("{passed}/{all}"), Style::Bad),
        });
        table.push(std::iter::once(Cell::from(row)).chain(cells).collect());
    }
    table
}

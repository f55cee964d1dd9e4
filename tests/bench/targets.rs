//! What eniup is to cost at most, beside what the tables say.

use super::tables::{Section, Tables};

/// Of one target: what it is about, the table that shows it, its bound, and what was measured.
type Target = (&'static str, &'static str, Bound, fn(&Tables) -> Option<f64>);

#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}
use Bound::{AtLeast, AtMost};

const TARGETS: &[Target] = &[
    ("15x50 from nothing, wall ms", "whole", AtMost(50.0), |it| it.number("whole", &["15x50", "cold"], "wall ms")),
    ("15x50 from nothing, CPU ms", "whole", AtMost(25.0), |it| it.number("whole", &["15x50", "cold"], "CPU ms")),
    ("15x50 from nothing, peak MiB", "whole", AtMost(12.0), |it| it.number("whole", &["15x50", "cold"], "peak MiB")),
    ("15x50, nothing to do, netlink changes", "whole", AtMost(0.0), |it| {
        it.number("whole", &["15x50", "idle"], "netlink changes")
    }),
    ("4x10, nothing to do, wall ms", "whole", AtMost(5.0), |it| it.number("whole", &["4x10", "idle"], "wall ms")),
    ("4x10, nothing to do, CPU ms", "whole", AtMost(4.0), |it| it.number("whole", &["4x10", "idle"], "CPU ms")),
    ("15x50, one address, netlink changes", "whole", AtMost(1.0), |it| {
        it.number("whole", &["15x50", "one address"], "netlink changes")
    }),
    ("CPU for an object, 80x50 beside 1x10", "whole", AtMost(1.5), |it| growth(it, "1x10", "80x50")),
    ("CPU for an object, 80x50 beside 15x50", "whole", AtMost(1.5), |it| growth(it, "15x50", "80x50")),
    ("CPU for an object, 80x50+6 beside 15x50+6", "whole", AtMost(1.5), |it| growth(it, "15x50+6", "80x50+6")),
    ("15x50, applying, wall as against bare netlink", "apply", AtMost(1.6), |it| times_the_bare(it, "eniup", WALL)),
    ("15x50, applying, CPU as against bare netlink", "apply", AtMost(1.6), |it| times_the_bare(it, "eniup", CPU)),
    ("15x50, wall of `ip -batch` as against eniup", "apply", AtLeast(3.0), |it| ip_beside_eniup(it, WALL)),
    ("15x50, CPU of `ip -batch` as against eniup", "apply", AtLeast(3.0), |it| ip_beside_eniup(it, CPU)),
    ("latencies at which a run takes longer than its bound", "latency", AtMost(0.0), |it| {
        Some(it.rows_with("latency", verdict(false))? as f64)
    }),
    ("80x50, planning everything, ms", "planner", AtMost(10.0), |it| planning(it, "everything")),
    ("80x50, planning nothing, ms", "planner", AtMost(10.0), |it| planning(it, "nothing")),
    ("a packet of the primary, as against one rule an ENI", "packets", AtMost(1.1), |it| packet(it, "the primary's")),
    ("a packet of the first ENI", "packets", AtMost(1.1), |it| packet(it, "the first ENI's")),
    ("a packet of the last ENI's last address", "packets", AtMost(1.1), |it| packet(it, "the last ENI's last")),
    ("the primary's, as against one rule an address", "packets", AtMost(1.1), |it| {
        let of = |rules| it.number("packets", &["the primary's", rules], "look-up us");
        Some(of("eniup")? / of("one an address")?)
    }),
    ("the static binary, bytes", "start", AtMost(4e6), |it| it.number("start", &["static"], "bytes")),
];

const WALL: &str = "wall, times the bare";
const CPU: &str = "CPU, times the bare";

pub fn section(tables: &Tables) -> Section {
    let mut section = Section::new("targets", &["what", "table", "target", "measured", "holds"]);
    for &(what, table, bound, value) in TARGETS {
        let value = value(tables);
        let (target, holds) = match bound {
            AtMost(most) => (format!("at most {most}"), value.map(|value| value <= most)),
            AtLeast(least) => (format!("at least {least}"), value.map(|value| value >= least)),
        };
        section.push([
            what.into(),
            table.into(),
            target,
            value.map_or("-".into(), |value| format!("{}", (value * 100.0).round() / 100.0)),
            holds.map_or("-", verdict).into(),
        ]);
    }
    section
}

pub fn verdict(holds: bool) -> &'static str {
    if holds { "yes" } else { "no" }
}

fn growth(tables: &Tables, small: &str, large: &str) -> Option<f64> {
    let each = |size| tables.number("whole", &[size, "cold"], "CPU us per object");
    Some(each(large)? / each(small)?)
}

fn times_the_bare(tables: &Tables, how: &str, column: &str) -> Option<f64> {
    tables.number("apply", &["15x50", how], column)
}

fn ip_beside_eniup(tables: &Tables, column: &str) -> Option<f64> {
    Some(times_the_bare(tables, "ip -batch", column)? / times_the_bare(tables, "eniup", column)?)
}

fn planning(tables: &Tables, what: &str) -> Option<f64> {
    tables.number("planner", &["80x50", what], "median ms")
}

/// Of a look-up and a datagram the dearer.
fn packet(tables: &Tables, source: &str) -> Option<f64> {
    let times = |column| tables.number("packets", &[source, "eniup"], column);
    Some(times("look-up, times one an ENI")?.max(times("datagram, times one an ENI")?))
}

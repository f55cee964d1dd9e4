//! What a monitoring system wants to know, in Prometheus' text format. Counters go on where the last run has left them.
//! <https://github.com/prometheus/docs/blob/main/docs/instrumenting/exposition_formats.md>

use std::collections::BTreeMap;
use std::fmt;

use crate::report::{Exit, Report, State};
use crate::tally::{Counts, Event};

/// Name, type and what it is. A summary's samples are its sum and its count.
const FAMILIES: [(&str, &str, &str); 10] = [
    ("eniup_build_info", "gauge", "The version of eniup that has written this."),
    ("eniup_changes_total", "counter", "Changes of the kernel, by what was done."),
    ("eniup_drift", "gauge", "Changes that the last run had to leave undone."),
    ("eniup_eni_ready", "gauge", "Whether all is configured for an ENI that is not left alone."),
    ("eniup_enis", "gauge", "ENIs attached, by state."),
    ("eniup_imds_requests_total", "counter", "Requests to the metadata service, by the status of the answer."),
    ("eniup_last_run_timestamp_seconds", "gauge", "When all was looked at last."),
    ("eniup_last_success_timestamp_seconds", "gauge", "When all was found or made as it should be last."),
    ("eniup_run_duration_seconds", "summary", "How long runs took, waiting included."),
    ("eniup_runs_total", "counter", "Runs, by how they ended."),
];

const DRIFT: &str = "eniup_drift";
const ENI_READY: &str = "eniup_eni_ready";
const ENIS: &str = "eniup_enis";
const LAST_RUN: &str = "eniup_last_run_timestamp_seconds";
const LAST_SUCCESS: &str = "eniup_last_success_timestamp_seconds";
const DURATION_SUM: &str = "eniup_run_duration_seconds_sum";
const DURATION_COUNT: &str = "eniup_run_duration_seconds_count";

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Metrics {
    samples: BTreeMap<Sample, f64>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
}

/// A run that has ended.
pub struct Run<'a> {
    /// Seconds since 1970.
    pub at: f64,
    pub seconds: f64,
    pub exit: Exit,
    /// None if it did not come so far.
    pub report: Option<&'a Report>,
}

impl Metrics {
    /// After this run, which has counted this much. What it has not found out is left out.
    pub fn after(&self, run: &Run, counts: &Counts) -> Metrics {
        let mut next = Metrics::default();
        next.samples
            .extend(self.samples.iter().filter(|(sample, _)| goes_on(&sample.name)).map(|(s, v)| (s.clone(), *v)));
        next.set("eniup_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        next.add_counts(counts);
        next.add("eniup_runs_total", &[("result", run.exit.name())], 1.0);
        next.add(DURATION_SUM, &[], run.seconds);
        next.add(DURATION_COUNT, &[], 1.0);
        next.set(LAST_RUN, &[], run.at);
        if run.exit == Exit::Ok {
            next.set(LAST_SUCCESS, &[], run.at);
        }
        if let Some(report) = run.report {
            next.set_report(report);
        }
        next
    }

    /// After a look at all by which it was still as the last run had left it.
    pub fn still_so(&self, at: f64, counts: &Counts) -> Metrics {
        let mut next = self.clone();
        next.add_counts(counts);
        next.set(LAST_RUN, &[], at);
        next.set(LAST_SUCCESS, &[], at);
        next
    }

    fn set_report(&mut self, report: &Report) {
        self.set(DRIFT, &[], report.drift as f64);
        for state in [State::Ready, State::Pending, State::Failed, State::Ignored] {
            self.set(ENIS, &[("state", &state.to_string())], 0.0);
        }
        for (eni, state) in report.states() {
            self.add(ENIS, &[("state", &state.to_string())], 1.0);
            if state != State::Ignored {
                self.set(ENI_READY, &[("eni", eni)], if state == State::Ready { 1.0 } else { 0.0 });
            }
        }
    }

    fn add_counts(&mut self, counts: &Counts) {
        for (event, count) in counts {
            match event {
                Event::Change(op) => self.add("eniup_changes_total", &[("op", op)], *count as f64),
                Event::Request(status) => {
                    let status = status.map_or("none".into(), |status| status.to_string());
                    self.add("eniup_imds_requests_total", &[("status", &status)], *count as f64);
                }
            }
        }
    }

    fn set(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.samples.insert(sample(name, labels), value);
    }

    fn add(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        *self.samples.entry(sample(name, labels)).or_default() += value;
    }

    /// What [`Metrics`] wrote.
    ///
    /// # Errors
    /// The first line that it did not write.
    pub fn parse(text: &str) -> Result<Metrics, String> {
        let mut metrics = Metrics::default();
        for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with('#')) {
            let (sample, value) = parse_sample(line).ok_or_else(|| format!("line {}: `{line}` is no sample", n + 1))?;
            metrics.samples.insert(sample, value);
        }
        Ok(metrics)
    }
}

/// Whether the next run takes it over.
fn goes_on(name: &str) -> bool {
    name.ends_with("_total") || [LAST_SUCCESS, DURATION_SUM, DURATION_COUNT].contains(&name)
}

fn sample(name: &str, labels: &[(&str, &str)]) -> Sample {
    let owned = |(label, value): &(&str, &str)| (label.to_string(), value.to_string());
    Sample { name: name.into(), labels: labels.iter().map(owned).collect() }
}

/// `name{label="value",…} number`, of a family that is known.
fn parse_sample(line: &str) -> Option<(Sample, f64)> {
    let (head, value) = line.rsplit_once(' ')?;
    let value = value.parse().ok().filter(|value: &f64| value.is_finite() && *value >= 0.0)?;
    let (name, mut rest) = match head.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}')?),
        None => (head, ""),
    };
    let mut labels = Vec::new();
    while !rest.is_empty() {
        let (label, opened) = rest.split_once("=\"")?;
        let (text, after) = parse_value(opened)?;
        labels.push((label.to_string(), text));
        rest = after.strip_prefix(',').unwrap_or(after);
    }
    FAMILIES.iter().find(|family| is_of(name, family))?;
    Some((Sample { name: name.into(), labels }, value))
}

/// Up to its closing quotation mark, and what is behind it.
fn parse_value(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match letters.next()?.1 {
                'n' => '\n',
                letter => letter,
            }),
            letter => value.push(letter),
        }
    }
    None
}

fn is_of(name: &str, (family, kind, _): &(&str, &str, &str)) -> bool {
    match *kind {
        "summary" => name.strip_prefix(family).is_some_and(|part| ["_sum", "_count"].contains(&part)),
        _ => name == *family,
    }
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for family in &FAMILIES {
            let (name, kind, help) = family;
            let samples: Vec<_> = self.samples.iter().filter(|(sample, _)| is_of(&sample.name, family)).collect();
            if !samples.is_empty() {
                writeln!(f, "# HELP {name} {help}\n# TYPE {name} {kind}")?;
            }
            for (sample, value) in samples {
                writeln!(f, "{sample} {value}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<String> =
            self.labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escape(value))).collect();
        match labels.is_empty() {
            true => write!(f, "{}", self.name),
            false => write!(f, "{}{{{}}}", self.name, labels.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_whatever_is_in_a_label() {
        let mut metrics = Metrics::default();
        for value in ["plain", "a \"b\" c", "back\\slash", "two\nlines", "a=\"b\",c=\"d\"} 7", ""] {
            metrics.set(ENI_READY, &[("eni", value)], 1.0);
        }
        metrics.set(LAST_RUN, &[], 1_790_000_000.25);
        assert_eq!(Metrics::parse(&metrics.to_string()), Ok(metrics));
    }

    #[test]
    fn what_is_no_sample_of_ours_is_told() {
        for line in [
            "x",
            "eniup_runs_total",
            "eniup_runs_total{result=\"ok\" 3",
            "eniup_drift NaN",
            "eniup_drift -1",
            "node_load1 0.5",
        ] {
            assert!(
                Metrics::parse(&format!("# HELP eniup_drift x\n{line}\n")).is_err_and(|why| why.contains("line 2"))
            );
        }
    }

    #[test]
    fn a_run_that_came_to_nothing_keeps_the_counters_and_tells_of_no_eni() {
        let mut report = Report { drift: 2, ..Report::default() };
        report.enis = [("eni-1".into(), State::Ready), ("eni-2".into(), State::Ignored)].into();
        let counts = Counts::from([(Event::Change("add-rule"), 3), (Event::Request(Some(200)), 5)]);
        let run = Run { at: 100.0, seconds: 0.5, exit: Exit::Ok, report: Some(&report) };
        let first = Metrics::default().after(&run, &counts);
        let counts = Counts::from([(Event::Request(None), 2)]);
        let run = Run { at: 200.0, seconds: 1.5, exit: Exit::MetadataUnavailable, report: None };
        let text = first.after(&run, &counts).to_string();
        let samples: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).skip(1).collect();
        assert_eq!(
            samples,
            [
                "eniup_changes_total{op=\"add-rule\"} 3",
                "eniup_imds_requests_total{status=\"200\"} 5",
                "eniup_imds_requests_total{status=\"none\"} 2",
                "eniup_last_run_timestamp_seconds 200",
                "eniup_last_success_timestamp_seconds 100",
                "eniup_run_duration_seconds_count 2",
                "eniup_run_duration_seconds_sum 2",
                "eniup_runs_total{result=\"metadata-unavailable\"} 1",
                "eniup_runs_total{result=\"ok\"} 1",
            ]
        );
    }
}

//! From the files' texts to what is in effect: which keys there are, what each may be, and what cannot be together.

// A length of time, no clock.
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};

use toml::de::{DeTable, DeValue};

use super::choices::Choices;
use super::problem::{Problem, Problems, Source, line_of};
use super::selector::{Attribute, Selector};
use super::table::{Spot, Table, Wrong, number, text, word};
use super::{Config, File, Origin, Rules, Settings};
use crate::policy;

/// What the files say, each overriding those before it.
///
/// # Errors
/// All that is wrong, in all of the files: then nothing of them may be used.
pub fn read(files: &[File]) -> Result<Settings, Problems> {
    let mut reading = Reading::default();
    for (rank, File { name, text }) in files.iter().enumerate() {
        match text {
            Ok(text) => reading.read_file(Source { name, text, rank }),
            Err(why) => reading.problems.push(Problem::unreadable(name, why)),
        }
    }
    if reading.problems.is_empty() {
        reading.check_numbers();
    }
    let Reading { config, spots, problems } = reading;
    if !problems.is_empty() {
        return Err(Problems(problems));
    }
    Ok(Settings {
        config,
        origins: spots.into_iter().map(|(key, (source, span))| (key, origin(source, &span))).collect(),
    })
}

pub fn origin(source: Source, span: &Range<usize>) -> Origin {
    Origin { file: source.name.into(), line: line_of(source.text, span.start) }
}

pub const RULES: [(&str, Rules); 2] = [("aggregated", Rules::Aggregated), ("per-address", Rules::PerAddress)];

/// What has been read so far.
#[derive(Default)]
struct Reading<'a> {
    config: Config,
    spots: BTreeMap<&'static str, (Source<'a>, Range<usize>)>,
    problems: Vec<Problem>,
}

impl<'a> Reading<'a> {
    fn read_file(&mut self, source: Source<'a>) {
        let (document, errors) = DeTable::parse_recoverable(source.text);
        let whole = 0..source.text.len();
        let span = |error: &toml::de::Error| error.span().unwrap_or(whole.clone());
        let mut problems: Vec<Problem> =
            errors.iter().map(|error| source.problem(span(error), error.message(), None)).collect();
        let line = |problem: &Problem| problem.place.as_ref().map(|place| place.line);
        let broken: BTreeSet<usize> = problems.iter().filter_map(line).collect();
        let mended;
        let document = match broken.is_empty() {
            true => document,
            false => {
                mended = without_lines(source.text, &broken);
                DeTable::parse_recoverable(&mended).0
            }
        };
        let mut table = Table::new(source, document.get_ref());
        self.read(source, &mut table);
        // What was made of a broken line may be anything, so nothing more is said of it.
        problems.extend(
            table.finish().into_iter().filter(|problem| line(problem).is_none_or(|line| !broken.contains(&line))),
        );
        problems.sort_by_key(|problem| problem.place.as_ref().map(|place| (place.line, place.column)));
        self.problems.extend(problems);
    }

    fn read(&mut self, source: Source<'a>, table: &mut Table) {
        self.set("rules", source, table.value("rules", |value| word(value, &RULES)), |config| &mut config.rules);
        self.set("timeout", source, table.value("timeout", |value| duration(value, policy::TIMEOUTS)), |config| {
            &mut config.timeout
        });
        table.table("watch", |table| {
            let interval = table.value("interval", interval);
            self.set("watch.interval", source, interval, |config| &mut config.interval);
        });
        table.table("numbers", |table| self.read_numbers(source, table));
        table.tables("manage", |table, span| self.config.manage.extend(selector(source, table, span)));
        table.tables("ignore", |table, span| self.config.ignore.extend(selector(source, table, span)));
        table.tables("eni", |table, span| {
            let choices = Choices::read(table, span);
            self.config.enis.extend(selector(source, table, span).map(|selector| (selector, choices)));
        });
    }

    fn read_numbers(&mut self, source: Source<'a>, table: &mut Table) {
        self.set("numbers.mark", source, table.value("mark", mark), |config| &mut config.mark);
        // The guard rule has 387 priorities before it, and main's own rule comes at 32766.
        let priority = table.value("guard_priority", |value| number(value, 400..=32_000));
        self.set("numbers.guard_priority", source, priority, |config| &mut config.guard_priority);
        // Below are the tables of people, and the kernel's own at 253 to 255.
        let base = table.value("table_base", |value| number(value, 1_000..=25_000));
        self.set("numbers.table_base", source, base, |config| &mut config.table_base);
        let offset = table.value("subnet_rule_offset", |value| number(value, policy::SLOTS..=12_000));
        self.set("numbers.subnet_rule_offset", source, offset, |config| &mut config.subnet_rule_offset);
        let group = table.value("link_group", |value| number(value, 1..=i32::MAX as u32));
        self.set("numbers.link_group", source, group, |config| &mut config.link_group);
    }

    fn set<T>(
        &mut self,
        key: &'static str,
        source: Source<'a>,
        found: Option<Spot<T>>,
        place: impl FnOnce(&mut Config) -> &mut T,
    ) {
        if let Some(Spot { value, span }) = found {
            *place(&mut self.config) = value;
            self.spots.insert(key, (source, span));
        }
    }

    /// What no number is wrong in by itself. Only where all are good: else it would repeat what was said.
    fn check_numbers(&mut self) {
        let Config { table_base, guard_priority, subnet_rule_offset, .. } = self.config;
        if guard_priority >= table_base {
            let what = format!(
                "the guard rule's priority ({guard_priority}) has to be below `table_base` ({table_base}), from which the \
                 priorities of the ENIs' rules begin"
            );
            self.disagree(&["numbers.guard_priority", "numbers.table_base"], what);
        }
        let last = table_base + policy::SLOTS + 2 * subnet_rule_offset;
        if last >= policy::MAIN_PRIORITY {
            let what = format!(
                "`table_base` ({table_base}) and twice `subnet_rule_offset` ({subnet_rule_offset}) give rules of priority \
                 {last}, which is behind main's own ({})",
                policy::MAIN_PRIORITY
            );
            self.disagree(&["numbers.subnet_rule_offset", "numbers.table_base"], what);
        }
    }

    /// Says so where the last of the values stands that cannot be together.
    fn disagree(&mut self, keys: &[&'static str], what: String) {
        let spots = keys.iter().filter_map(|key| self.spots.get(key));
        if let Some((source, span)) = spots.max_by_key(|(source, span)| (source.rank, span.start)) {
            self.problems.push(source.problem(span.clone(), what, None));
        }
    }
}

/// The text with these lines blank and all else in its place, since at a key without a value the parser ends. Below a broken
/// table header nobody knows whose the keys are, so they are blank up to the next one.
fn without_lines(text: &str, broken: &BTreeSet<usize>) -> String {
    let mut is_lost = false;
    let line = |(n, line): (usize, &str)| {
        let is_broken = broken.contains(&(n + 1));
        if line.trim_start().starts_with('[') {
            is_lost = is_broken;
        }
        match is_broken || is_lost {
            true => line.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }).collect(),
            false => line.to_string(),
        }
    };
    text.split_inclusive('\n').enumerate().map(line).collect()
}

/// Which ENIs an entry means.
fn selector(source: Source, table: &mut Table, span: &Range<usize>) -> Option<Selector> {
    let selector = Selector::read(table, origin(source, span));
    if !Attribute::ALL.iter().any(|attribute| table.has(attribute.key())) && table.has_only_known() {
        table.wrong(span, "this means no ENI", "say which: mac = \"02:…\", id = \"eni-…\", link = \"ens6\"");
    }
    selector
}

fn duration(value: &DeValue, range: RangeInclusive<Duration>) -> Result<Duration, Wrong> {
    let example = "write it as in \"30s\" or \"2m\"";
    let text = text(value).map_err(|wrong| wrong.hint(example))?;
    let duration =
        humantime::parse_duration(text).map_err(|error| Wrong::new(format!("\"{text}\": {error}")).hint(example))?;
    match range.contains(&duration) {
        true => Ok(duration),
        false => {
            let [least, most] = [range.start(), range.end()].map(|end| humantime::format_duration(*end).to_string());
            Err(Wrong::new(format!("a length of time from \"{least}\" to \"{most}\" is expected")))
        }
    }
}

/// How `watch.interval` says that it is for eniup to choose.
pub const AUTOMATIC: &str = "auto";

fn interval(value: &DeValue) -> Result<Option<Duration>, Wrong> {
    match value.as_str() == Some(AUTOMATIC) {
        true => Ok(None),
        false => duration(value, policy::INTERVAL).map(Some),
    }
}

/// Not a number that others write on their routes: eniup removes what carries its own.
fn mark(value: &DeValue) -> Result<u8, Wrong> {
    let mark = number(value, 1..=255)?;
    match policy::PROTOCOLS_IN_USE.iter().find(|(number, _)| *number == mark) {
        Some((_, by)) => Err(Wrong::new(format!("protocol {mark} is {by}'s, and eniup removes what carries its mark"))),
        None => Ok(mark),
    }
}

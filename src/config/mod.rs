//! What the administrator may choose, from the texts of the configuration files. Nothing needs to be configured: the
//! defaults come from `policy`. Which files there are, and reading them, is for `config_files`.

mod problem;
mod table;

// A length of time, no clock.
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use toml::de::{DeTable, DeValue};

use crate::policy;
pub use problem::{Problem, Problems};
use table::{Spot, Table, Wrong, number, text, word};

/// The numbers by which eniup marks and orders what it puts into the kernel, and what else can be chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Protocol number on every address, route and rule of ours, 1..=255.
    pub mark: u8,
    /// Table of the ENI in slot 0/0; the others follow at 100 a card and 1 a device.
    pub table_base: u32,
    /// Priority of the guard rule; below every source rule's.
    pub guard_priority: u32,
    /// Added to an ENI's table number for the priority of a rule that covers its whole subnet; and to table and priority
    /// for its last resort.
    pub subnet_rule_offset: u32,
    /// Link group of attached ENIs.
    pub link_group: u32,
    pub rules: Rules,
    /// When a run gives up waiting: for another run, for metadata, for pending ENIs.
    pub timeout: Duration,
}

/// The form of the rules that send an ENI's traffic by that ENI. Both forms send every address the same way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Rules {
    /// As few as can be, since every rule that does not match costs each look-up 10 ns.
    #[default]
    Aggregated,
    /// One for each address, for those who want to read them.
    PerAddress,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            mark: policy::MARK,
            table_base: policy::TABLE_BASE,
            guard_priority: policy::GUARD_PRIORITY,
            subnet_rule_offset: policy::SUBNET_RULE_OFFSET,
            link_group: policy::LINK_GROUP,
            rules: Rules::default(),
            timeout: policy::TIMEOUT,
        }
    }
}

/// One file, by the name under which people find it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct File {
    pub name: String,
    pub text: String,
}

/// Where a value was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    pub file: String,
    /// From 1.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// What is in effect, and where each value that is no default was written.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    pub config: Config,
    /// By key, as in `numbers.mark`.
    pub origins: BTreeMap<&'static str, Origin>,
}

/// What the files say, each overriding those before it.
///
/// # Errors
/// All that is wrong, in all of the files: then nothing of them may be used.
pub fn read(files: &[File]) -> Result<Settings, Problems> {
    let mut reading = Reading::default();
    for file in files {
        reading.read_file(file);
    }
    if reading.problems.is_empty() {
        reading.check_numbers();
    }
    let Reading { config, spots, problems } = reading;
    if !problems.is_empty() {
        return Err(Problems(problems));
    }
    Ok(Settings { config, origins: spots.into_iter().map(|(key, (file, span))| (key, origin(file, &span))).collect() })
}

fn origin(file: &File, span: &Range<usize>) -> Origin {
    Origin { file: file.name.clone(), line: problem::line_of(&file.text, span.start) }
}

const RULES: [(&str, Rules); 2] = [("aggregated", Rules::Aggregated), ("per-address", Rules::PerAddress)];

/// What has been read so far.
#[derive(Default)]
struct Reading<'a> {
    config: Config,
    spots: BTreeMap<&'static str, (&'a File, Range<usize>)>,
    problems: Vec<Problem>,
}

impl<'a> Reading<'a> {
    fn read_file(&mut self, file: &'a File) {
        let (document, errors) = DeTable::parse_recoverable(&file.text);
        let whole = 0..file.text.len();
        let span = |error: &toml::de::Error| error.span().unwrap_or(whole.clone());
        let mut problems: Vec<Problem> =
            errors.iter().map(|error| Problem::new(file, span(error), error.message(), None)).collect();
        let broken: BTreeSet<usize> = problems.iter().map(|problem| problem.line).collect();
        let mended;
        let document = match broken.is_empty() {
            true => document,
            false => {
                mended = without_lines(&file.text, &broken);
                DeTable::parse_recoverable(&mended).0
            }
        };
        let mut table = Table::new(file, document.get_ref());
        self.read(file, &mut table);
        // What was made of a broken line may be anything, so nothing more is said of it.
        problems.extend(table.finish().into_iter().filter(|problem| !broken.contains(&problem.line)));
        problems.sort_by_key(|problem| (problem.line, problem.column));
        self.problems.extend(problems);
    }

    fn read(&mut self, file: &'a File, table: &mut Table) {
        self.set("rules", file, table.value("rules", |value| word(value, &RULES)), |config| &mut config.rules);
        self.set("timeout", file, table.value("timeout", duration), |config| &mut config.timeout);
        table.table("numbers", |table| self.read_numbers(file, table));
    }

    fn read_numbers(&mut self, file: &'a File, table: &mut Table) {
        self.set("numbers.mark", file, table.value("mark", mark), |config| &mut config.mark);
        // The guard rule has 387 priorities before it, and main's own rule comes at 32766.
        let priority = table.value("guard_priority", |value| number(value, 400..=32_000));
        self.set("numbers.guard_priority", file, priority, |config| &mut config.guard_priority);
        // Below are the tables of people, and the kernel's own at 253 to 255.
        let base = table.value("table_base", |value| number(value, 1_000..=25_000));
        self.set("numbers.table_base", file, base, |config| &mut config.table_base);
        let offset = table.value("subnet_rule_offset", |value| number(value, policy::SLOTS..=12_000));
        self.set("numbers.subnet_rule_offset", file, offset, |config| &mut config.subnet_rule_offset);
        let group = table.value("link_group", |value| number(value, 1..=i32::MAX as u32));
        self.set("numbers.link_group", file, group, |config| &mut config.link_group);
    }

    fn set<T>(
        &mut self,
        key: &'static str,
        file: &'a File,
        found: Option<Spot<T>>,
        place: impl FnOnce(&mut Config) -> &mut T,
    ) {
        if let Some(Spot { value, span }) = found {
            *place(&mut self.config) = value;
            self.spots.insert(key, (file, span));
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
        let mut spots = keys.iter().filter_map(|key| self.spots.get(key));
        if let Some((file, span)) = spots.next_back() {
            self.problems.push(Problem::new(file, span.clone(), what, None));
        }
    }
}

/// The text with these lines blank and all else in its place, since at a key without a value the parser ends. It makes
/// something of a broken table header, which tells whose the keys below are.
fn without_lines(text: &str, broken: &BTreeSet<usize>) -> String {
    let line = |(n, line): (usize, &str)| match broken.contains(&(n + 1)) && !line.trim_start().starts_with('[') {
        true => line.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }).collect(),
        false => line.to_string(),
    };
    text.split_inclusive('\n').enumerate().map(line).collect()
}

fn duration(value: &DeValue) -> Result<Duration, Wrong> {
    let example = "write it as in \"30s\" or \"2m\"";
    let text = text(value).map_err(|wrong| wrong.hint(example))?;
    humantime::parse_duration(text).map_err(|error| Wrong::new(format!("\"{text}\": {error}")).hint(example))
}

/// Not a number that others write on their routes: eniup removes what carries its own.
fn mark(value: &DeValue) -> Result<u8, Wrong> {
    let mark = number(value, 1..=255)?;
    match policy::PROTOCOLS_IN_USE.iter().find(|(number, _)| *number == mark) {
        Some((_, by)) => Err(Wrong::new(format!("protocol {mark} is {by}'s, and eniup removes what carries its mark"))),
        None => Ok(mark),
    }
}

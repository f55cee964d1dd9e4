//! A walk over one table of a parsed file. A bad value is noted and the walk goes on, so that all that is wrong is said at
//! once; what nobody has asked for by the end is an unknown key, and what was asked for is what could have been meant.

use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::problem::{Problem, Source};

/// Why a value cannot be used, and what to write instead.
pub struct Wrong {
    what: String,
    hint: Option<String>,
}

impl Wrong {
    pub fn new(what: impl Into<String>) -> Wrong {
        Wrong { what: what.into(), hint: None }
    }

    pub fn hint(self, hint: impl Into<String>) -> Wrong {
        Wrong { hint: Some(hint.into()), ..self }
    }
}

/// A value and where it stands in its file.
pub struct Spot<T> {
    pub value: T,
    pub span: Range<usize>,
}

/// One table of a file, while it is read.
pub struct Table<'a> {
    source: Source<'a>,
    entries: &'a DeTable<'a>,
    asked: Vec<&'static str>,
    problems: Vec<Problem>,
}

impl<'a> Table<'a> {
    pub fn new(source: Source<'a>, entries: &'a DeTable<'a>) -> Table<'a> {
        Table { source, entries, asked: Vec::new(), problems: Vec::new() }
    }

    /// The value of a key, if it is there and good.
    pub fn value<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&'a DeValue<'a>) -> Result<T, Wrong>,
    ) -> Option<Spot<T>> {
        self.asked.push(key);
        let found = self.entries.get(key)?;
        match read(found.get_ref()) {
            Ok(value) => Some(Spot { value, span: found.span() }),
            Err(Wrong { what, hint }) => {
                self.problems.push(self.source.problem(found.span(), format!("`{key}`: {what}"), hint));
                None
            }
        }
    }

    /// A table inside this one, walked by `read`.
    pub fn table(&mut self, key: &'static str, read: impl FnOnce(&mut Table<'a>)) {
        let table = |value: &'a DeValue<'a>| {
            value.as_table().ok_or_else(|| Wrong::new(format!("a table [{key}] is expected, not {}", sort(value))))
        };
        if let Some(entries) = self.value(key, table) {
            let mut inner = Table::new(self.source, entries.value);
            read(&mut inner);
            self.problems.extend(inner.finish());
        }
    }

    /// The tables of a list, as `[[key]]` writes them, each walked by `read`, which also learns where it is.
    pub fn tables(&mut self, key: &'static str, mut read: impl FnMut(&mut Table<'a>, &Range<usize>)) {
        let hint = format!("write it as [[{key}]], or as {key} = [{{ … }}]");
        let tables = |value: &'a DeValue<'a>| {
            let list = value.as_array().filter(|list| list.iter().all(|item| item.get_ref().is_table()));
            list.ok_or_else(|| Wrong::new(format!("a list of tables is expected, not {}", sort(value))).hint(hint))
        };
        for item in self.value(key, tables).map(|list| list.value).into_iter().flatten() {
            let Some(entries) = item.get_ref().as_table() else { continue };
            let mut inner = Table::new(self.source, entries);
            read(&mut inner, &item.span());
            self.problems.extend(inner.finish());
        }
    }

    /// Notes what is wrong with this table as a whole.
    pub fn wrong(&mut self, span: &Range<usize>, what: &str, hint: &str) {
        self.problems.push(self.source.problem(span.clone(), what, Some(hint.into())));
    }

    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Whether every key here has been asked for.
    pub fn has_only_known(&self) -> bool {
        self.unknown().next().is_none()
    }

    fn unknown(&self) -> impl Iterator<Item = &'a Spanned<DeString<'a>>> {
        self.entries.keys().filter(|key| !self.asked.contains(&key.get_ref().as_ref()))
    }

    /// All that is wrong with this table.
    pub fn finish(mut self) -> Vec<Problem> {
        for key in self.unknown().collect::<Vec<_>>() {
            let name = key.get_ref().as_ref();
            let hint = nearest(name, &self.asked).map(|known| format!("did you mean `{known}`?"));
            let hint = hint.unwrap_or_else(|| format!("known here: {}", self.asked.join(", ")));
            self.problems.push(self.source.problem(key.span(), format!("unknown key `{name}`"), Some(hint)));
        }
        self.problems
    }
}

/// What a person who wrote `name` most likely meant.
fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    /// Less alike than this is another word.
    const ALIKE: f64 = 0.75;
    let likeness = |known: &&str| strsim::jaro_winkler(&name.replace('-', "_"), &known.replace('-', "_"));
    let best = known.iter().copied().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    best.filter(|best| likeness(best) >= ALIKE)
}

/// What a value is, in TOML's words.
fn sort(value: &DeValue) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

pub fn text<'a>(value: &'a DeValue<'a>) -> Result<&'a str, Wrong> {
    value.as_str().ok_or_else(|| Wrong::new(format!("a text in quotes is expected, not {}", sort(value))))
}

pub fn truth(value: &DeValue) -> Result<bool, Wrong> {
    let wrong = || Wrong::new(format!("true or false is expected, not {}", sort(value)));
    let unquoted = value.as_str().filter(|text| ["true", "false"].contains(text));
    value.as_bool().ok_or_else(|| match unquoted {
        Some(text) => wrong().hint(format!("write it without quotes: {text}")),
        None => wrong(),
    })
}

/// A list of such values, or one alone.
pub fn list<'a, T>(
    value: &'a DeValue<'a>,
    read: impl Fn(&'a DeValue<'a>) -> Result<T, Wrong>,
) -> Result<Vec<T>, Wrong> {
    match value.as_array() {
        None => Ok(vec![read(value)?]),
        Some(items) if items.is_empty() => Err(Wrong::new("an empty list means nothing")),
        Some(items) => items.iter().map(|item| read(item.get_ref())).collect(),
    }
}

/// One of the words, by what it stands for.
pub fn word<T: Copy>(value: &DeValue, words: &[(&'static str, T)]) -> Result<T, Wrong> {
    let names: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
    let choice = format!("one of \"{}\"", names.join("\", \""));
    let text = value.as_str().ok_or_else(|| Wrong::new(format!("{choice} is expected, not {}", sort(value))))?;
    let found = words.iter().find(|(name, _)| *name == text);
    found.map(|(_, meaning)| *meaning).ok_or_else(|| match nearest(text, &names) {
        Some(near) => Wrong::new(format!("\"{text}\" is not {choice}")).hint(format!("did you mean \"{near}\"?")),
        None => Wrong::new(format!("\"{text}\" is not {choice}")),
    })
}

pub fn number<T: TryFrom<i64> + Into<i64> + Copy>(value: &DeValue, range: RangeInclusive<T>) -> Result<T, Wrong> {
    let (least, most): (i64, i64) = ((*range.start()).into(), (*range.end()).into());
    let expected = format!("a whole number from {least} to {most} is expected");
    let Some(integer) = value.as_integer() else {
        let wrong = Wrong::new(format!("{expected}, not {}", sort(value)));
        let unquoted = value.as_str().filter(|text| text.parse::<i64>().is_ok());
        return Err(match unquoted {
            Some(text) => wrong.hint(format!("write it without quotes: {text}")),
            None => wrong,
        });
    };
    let number = i64::from_str_radix(integer.as_str(), integer.radix()).ok();
    let number = number.filter(|number| (least..=most).contains(number)).and_then(|number| T::try_from(number).ok());
    number.ok_or_else(|| Wrong::new(expected))
}

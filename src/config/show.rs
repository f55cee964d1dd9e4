//! What is in effect, as a configuration file that says so, each value with where it was written.

use std::fmt;

use glob::Pattern;
use serde_json::json;

use super::choices::{Choices, name};
use super::reading::{AUTOMATIC, RULES};
use super::selector::{Attribute, Selector};
use super::{Config, File, Origin, Settings};

/// One `[[key]]` table, its values as TOML has them.
struct Entry<'a> {
    key: &'static str,
    values: Vec<(&'static str, String)>,
    origin: &'a Origin,
}

impl Entry<'_> {
    fn to_json(&self) -> serde_json::Value {
        let Entry { key, values, origin: Origin { file, line } } = self;
        let values: Vec<String> = values.iter().map(|(name, value)| format!("{name} = {value}")).collect();
        json!({ "key": key, "value": format!("{{ {} }}", values.join(", ")), "file": file, "line": line })
    }
}

impl Settings {
    /// Every single value as TOML has it, by key.
    pub fn values(&self) -> Vec<(&'static str, String)> {
        let Config {
            mark,
            table_base,
            guard_priority,
            subnet_rule_offset,
            link_group,
            rules,
            timeout,
            interval,
            manage: _,
            ignore: _,
            enis: _,
        } = &self.config;
        let mut values = vec![
            ("rules", name(*rules, &RULES)),
            ("timeout", quoted(&humantime::format_duration(*timeout).to_string())),
            ("numbers.mark", mark.to_string()),
            ("numbers.table_base", table_base.to_string()),
            ("numbers.guard_priority", guard_priority.to_string()),
            ("numbers.subnet_rule_offset", subnet_rule_offset.to_string()),
            ("numbers.link_group", link_group.to_string()),
        ];
        let interval = interval.map(|interval| humantime::format_duration(interval).to_string());
        values.push(("watch.interval", quoted(interval.as_deref().unwrap_or(AUTOMATIC))));
        values
    }

    /// The entries that select ENIs, in the order in which they were written.
    fn entries(&self) -> Vec<Entry<'_>> {
        let Config { manage, ignore, enis, .. } = &self.config;
        let of_eni = |(selector, choices): &'_ (Selector, Choices)| [attributes(selector), choices.values()].concat();
        let enis = enis.iter().map(|eni| Entry { key: "eni", values: of_eni(eni), origin: &eni.0.origin });
        let entry = |key| move |selector| Entry { key, values: attributes(selector), origin: &selector.origin };
        manage.iter().map(entry("manage")).chain(ignore.iter().map(entry("ignore"))).chain(enis).collect()
    }

    /// The same facts for programs; an origin of null is a default.
    pub fn to_json(&self, files: &[File]) -> serde_json::Value {
        let files: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        let value = |(key, value): (&'static str, String)| {
            let origin = self.origins.get(key);
            json!({ "key": key, "value": value, "file": origin.map(|origin| &origin.file), "line": origin.map(|origin| origin.line) })
        };
        let values = self.values().into_iter().map(value);
        let values: Vec<serde_json::Value> = values.chain(self.entries().iter().map(Entry::to_json)).collect();
        json!({ "schema": 1, "files": files, "values": values })
    }

    /// Where a value was written, for people.
    pub fn origin(&self, key: &str) -> String {
        self.origins.get(key).map_or_else(|| "default".into(), |origin| origin.to_string())
    }
}

fn attributes(selector: &Selector) -> Vec<(&'static str, String)> {
    let value = |attribute: Attribute, pattern: &Pattern| match attribute {
        Attribute::NetworkCard | Attribute::DeviceNumber => pattern.to_string(),
        _ => quoted(pattern.as_str()),
    };
    let list = |attribute: Attribute, patterns: &Vec<Pattern>| {
        let values: Vec<String> = patterns.iter().map(|pattern| value(attribute, pattern)).collect();
        match values.as_slice() {
            [value] => value.clone(),
            values => format!("[{}]", values.join(", ")),
        }
    };
    selector.wanted.iter().map(|(attribute, patterns)| (attribute.key(), list(*attribute, patterns))).collect()
}

/// A text as TOML has it.
pub fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted += &format!("\\u{:04X}", u32::from(c)),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut section = "";
        for (key, value) in self.values() {
            let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
            if table != section {
                writeln!(f, "\n[{table}]")?;
                section = table;
            }
            writeln!(f, "{:32}  # {}", format!("{name} = {value}"), self.origin(key))?;
        }
        for Entry { key, values, origin } in self.entries() {
            writeln!(f, "\n[[{key}]]  # {origin}")?;
            for (name, value) in values {
                writeln!(f, "{name} = {value}")?;
            }
        }
        Ok(())
    }
}

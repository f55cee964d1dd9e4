//! What is in effect, as a configuration file that says so, each value with where it was written.

use std::fmt;

use serde_json::json;

use super::reading::RULES;
use super::{Config, File, Settings};

impl Settings {
    /// Every single value as TOML has it, by key.
    pub fn values(&self) -> Vec<(&'static str, String)> {
        let Config { mark, table_base, guard_priority, subnet_rule_offset, link_group, rules, timeout } = &self.config;
        let rules = RULES.iter().find(|(_, meaning)| meaning == rules).map(|(name, _)| *name).unwrap_or_default();
        vec![
            ("rules", quoted(rules)),
            ("timeout", quoted(&humantime::format_duration(*timeout).to_string())),
            ("numbers.mark", mark.to_string()),
            ("numbers.table_base", table_base.to_string()),
            ("numbers.guard_priority", guard_priority.to_string()),
            ("numbers.subnet_rule_offset", subnet_rule_offset.to_string()),
            ("numbers.link_group", link_group.to_string()),
        ]
    }

    /// The same facts for programs; an origin of null is a default.
    pub fn to_json(&self, files: &[File]) -> serde_json::Value {
        let files: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        let value = |(key, value): (&'static str, String)| {
            let origin = self.origins.get(key);
            json!({ "key": key, "value": value, "file": origin.map(|origin| &origin.file), "line": origin.map(|origin| origin.line) })
        };
        let values: Vec<serde_json::Value> = self.values().into_iter().map(value).collect();
        json!({ "schema": 1, "files": files, "values": values })
    }

    /// Where a value was written, for people.
    pub fn origin(&self, key: &str) -> String {
        self.origins.get(key).map_or_else(|| "default".into(), |origin| origin.to_string())
    }
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
        Ok(())
    }
}

//! What was measured: as a table on the terminal, as JSON, and in the documentation.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vpc_lab::table::{Align, Cell, Table};

/// One table.
pub struct Section {
    name: &'static str,
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Section {
    pub fn new(name: &'static str, header: &[&'static str]) -> Section {
        Section { name, header: header.to_vec(), rows: Vec::new() }
    }

    pub fn push<const N: usize>(&mut self, row: [String; N]) {
        assert_eq!(N, self.header.len(), "a row of {} is as wide as its header", self.name);
        self.rows.push(row.into());
    }

    fn markdown(&self) -> String {
        let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
        let mut text = line(self.header.clone());
        text += &line(vec!["---"; self.header.len()]);
        for row in &self.rows {
            text += &line(row.iter().map(String::as_str).collect());
        }
        text
    }

    /// Each row as an array in the header's order, since a header may name two columns alike.
    fn json(&self) -> Value {
        let cell = |text: &String| text.parse::<f64>().map_or_else(|_| json!(text), |number| json!(number));
        let rows: Vec<Vec<Value>> = self.rows.iter().map(|row| row.iter().map(cell).collect()).collect();
        json!({ "columns": self.header, "rows": rows })
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut table = Table::new(self.header.iter().copied().map(Cell::from).collect(), Align::Right);
        for row in &self.rows {
            table.push(row.iter().map(|cell| cell.as_str().into()).collect());
        }
        write!(f, "{table}")
    }
}

pub struct Tables {
    measured: Vec<Section>,
    /// As JSON, by name: these, and others that were measured before.
    all: BTreeMap<String, Value>,
}

impl Tables {
    /// None are measured yet; a file that is not there has no others.
    pub fn with_those_of(file: Option<&Path>) -> Result<Tables> {
        let all = match file.filter(|file| file.exists()) {
            Some(file) => {
                let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
                serde_json::from_str(&text).with_context(|| file.display().to_string())?
            }
            None => BTreeMap::new(),
        };
        Ok(Tables { measured: Vec::new(), all })
    }

    /// Prints it, too.
    pub fn push(&mut self, section: Section) {
        println!("{}\n{section}", section.name);
        self.all.insert(section.name.to_string(), section.json());
        self.measured.push(section);
    }

    /// The number in this column of the first row that has these cells; none where it was not measured.
    pub fn number(&self, table: &str, cells: &[&str], column: &str) -> Option<f64> {
        let table = self.all.get(table)?;
        let column = table["columns"].as_array()?.iter().position(|name| name == column)?;
        let has_all =
            |row: &&Value| cells.iter().all(|cell| row.as_array().is_some_and(|row| row.contains(&json!(cell))));
        table["rows"].as_array()?.iter().find(has_all)?[column].as_f64()
    }

    /// How many rows have this cell.
    pub fn rows_with(&self, table: &str, cell: &str) -> Option<usize> {
        let rows = self.all.get(table)?["rows"].as_array()?;
        Some(rows.iter().filter(|row| row.as_array().is_some_and(|row| row.contains(&json!(cell)))).count())
    }

    pub fn save(&self, file: &Path) -> Result<()> {
        fs::write(file, serde_json::to_string_pretty(&self.all)? + "\n")
            .with_context(|| format!("writing {}", file.display()))
    }

    /// Between `<!-- NAME -->` and `<!-- end of NAME -->`.
    pub fn put_into(&self, file: &Path) -> Result<()> {
        let mut text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        for section in &self.measured {
            let (begin, end) = (format!("<!-- {} -->\n", section.name), format!("<!-- end of {} -->", section.name));
            let place = |mark: &str| text.find(mark).with_context(|| format!("{}: no {mark:?}", file.display()));
            let (start, stop) = (place(&begin)? + begin.len(), place(&end)?);
            text.replace_range(start..stop, &format!("\n{}\n", section.markdown()));
        }
        fs::write(file, text).with_context(|| format!("writing {}", file.display()))
    }
}

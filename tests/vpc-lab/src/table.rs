//! Tables for people: columns aligned, colour only where the reader's terminal has it.

use std::fmt::{self, Write as _};
use std::io::IsTerminal;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    Plain,
    Good,
    Bad,
    Faint,
    Bold,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Align {
    Left,
    Right,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    pub fn styled(text: impl Into<String>, style: Style) -> Cell {
        Cell { text: text.into(), style }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell::styled(text, Style::Plain)
    }
}

/// The first column stands left, the others as `align` says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    header: Vec<Cell>,
    rows: Vec<Vec<Cell>>,
    align: Align,
}

impl Table {
    pub fn new(header: Vec<Cell>, align: Align) -> Table {
        Table { header, rows: Vec::new(), align }
    }

    pub fn push(&mut self, row: Vec<Cell>) {
        self.rows.push(row);
    }

    /// As text, with colour if `has_colour`.
    pub fn render(&self, has_colour: bool) -> String {
        let width = |column: usize| {
            let cells = std::iter::once(&self.header).chain(&self.rows).filter_map(|row| row.get(column));
            cells.map(|cell| cell.text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let mut text = String::new();
        for (n, row) in std::iter::once(&self.header).chain(&self.rows).enumerate() {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let pad = " ".repeat(width - cell.text.chars().count());
                let style = if n == 0 { Style::Bold } else { cell.style };
                let shown = paint(&cell.text, style, has_colour);
                let _ = match (column, self.align) {
                    (0, _) | (_, Align::Left) => write!(line, "{shown}{pad}  "),
                    (_, Align::Right) => write!(line, "{pad}{shown}  "),
                };
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.render(has_colour()))
    }
}

/// Whether stdout is a terminal that wants colour.
pub fn has_colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

pub fn paint(text: &str, style: Style, has_colour: bool) -> String {
    let code = match style {
        _ if !has_colour => return text.into(),
        Style::Plain => return text.into(),
        Style::Good => 32,
        Style::Bad => 31,
        Style::Faint => 2,
        Style::Bold => 1,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_whatever_the_colour() {
        let mut table = Table::new(vec!["target".into(), "a".into(), "client".into()], Align::Left);
        table.push(vec!["10.0.0.1".into(), Cell::styled("ok", Style::Good), Cell::styled("·", Style::Faint)]);
        assert_eq!(table.render(false), "target    a   client\n10.0.0.1  ok  ·\n");
        let coloured = table.render(true);
        assert!(coloured.contains("\x1b[32mok\x1b[0m"), "{coloured:?}");
        assert_eq!(
            coloured.replace("\x1b[32m", "").replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", ""),
            table.render(false)
        );
    }
}

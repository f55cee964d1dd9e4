//! Text for a terminal of some width: prose wraps below itself, tables leave out what matters least. Commands stay on one line, or
//! nobody could copy them.

/// Each line that is longer than the terminal is wide goes on below, behind its label. Lines that are `fixed` stay as they are.
pub fn fit(text: &str, width: Option<usize>, is_fixed: impl Fn(&str) -> bool) -> String {
    let Some(width) = width else { return text.into() };
    let mut fitted = String::new();
    for line in text.lines() {
        match length(line) <= width || is_fixed(line) {
            true => fitted += line,
            false => fitted += &wrap(line, width),
        }
        fitted.push('\n');
    }
    fitted
}

fn wrap(line: &str, width: usize) -> String {
    let indent = hanging(line, width);
    let first = line.len() - line.trim_start().len();
    let mut wrapped = " ".repeat(first);
    let mut column = first;
    let mut gap = "";
    for (word, space) in words(line.trim_start()) {
        if column + gap.len() + length(word) > width && column > indent {
            wrapped += &format!("\n{}", " ".repeat(indent));
            column = indent;
        } else {
            wrapped += gap;
            column += gap.len();
        }
        wrapped += word;
        column += length(word);
        gap = space;
    }
    wrapped
}

/// Words, each with the spaces behind it.
fn words(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = rest.find(' ').unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        let spaces = behind.len() - behind.trim_start_matches(' ').len();
        let (space, behind) = behind.split_at(spaces);
        rest = behind;
        Some((word, space))
    })
}

/// Where the next line begins: behind the last gap between two columns, unless that leaves it too little room.
fn hanging(line: &str, width: usize) -> usize {
    let indent = line.len() - line.trim_start().len();
    let gaps = line.trim_start().match_indices("  ").map(|(at, _)| {
        let behind = &line[indent + at..];
        length(&line[..indent + at]) + behind.len() - behind.trim_start().len()
    });
    gaps.filter(|column| *column <= width / 2).max().unwrap_or(indent + 2)
}

/// Letters that a terminal shows: escape sequences for colours have no width.
fn length(text: &str) -> usize {
    let mut parts = text.split('\u{1b}');
    let plain = parts.next().unwrap_or_default().chars().count();
    plain + parts.map(|part| part.split_once('m').map_or(0, |(_, shown)| shown.chars().count())).sum::<usize>()
}

pub struct Column {
    pub head: &'static str,
    pub cells: Vec<String>,
    /// The highest is left out first; one of 0 never is.
    pub rank: u8,
}

const INDENT: usize = 2;
const GAP: usize = 2;

/// Columns below their heads, and what had to be left out.
pub fn table(mut columns: Vec<Column>, width: Option<usize>) -> String {
    let mut left_out = Vec::new();
    while width.is_some_and(|width| total(&columns) > width) {
        let Some(least) = (0..columns.len()).filter(|n| columns[*n].rank > 0).max_by_key(|n| columns[*n].rank) else {
            break;
        };
        left_out.push(columns.remove(least).head);
    }
    let rows = columns.first().map_or(0, |column| column.cells.len());
    let mut text = line(columns.iter().map(|column| (column.head, column.width())));
    for row in 0..rows {
        text += &line(columns.iter().map(|column| (column.cells[row].as_str(), column.width())));
    }
    if !left_out.is_empty() {
        text += &format!("  (no room here for: {})\n", left_out.join(", "));
    }
    text
}

fn total(columns: &[Column]) -> usize {
    INDENT + columns.iter().map(|column| column.width() + GAP).sum::<usize>() - GAP
}

fn line<'a>(cells: impl Iterator<Item = (&'a str, usize)>) -> String {
    let cells: Vec<String> = cells.map(|(cell, width)| format!("{cell:width$}")).collect();
    format!("  {}\n", cells.join("  ").trim_end())
}

impl Column {
    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| cell.chars().count());
        cells.max().unwrap_or(0).max(self.head.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_goes_on_behind_its_label_and_commands_stay_whole() {
        let text = "  security groups  one, two, three, four, five\n  would change: ip addr add 10.0.0.1/24 dev eth0\n";
        let fitted = fit(text, Some(38), |line| line.contains("would change: "));
        let expected = "  security groups  one, two, three,\n                   four, five\n  would change: ip addr add 10.0.0.1/24 dev eth0\n";
        assert_eq!(fitted, expected);
        assert_eq!(fit(text, None, |_| false), text);
    }

    #[test]
    fn colours_take_no_room_and_a_word_longer_than_the_line_stays_whole() {
        let coloured = "\u{1b}[1meni-02\u{1b}[0m  ready\n";
        assert_eq!(fit(coloured, Some(13), |_| false), coloured);
        assert_eq!(fit("a bbbbbbbbbbbb c", Some(8), |_| false), "a bbbbbbbbbbbb\n  c\n");
    }

    #[test]
    fn no_line_is_longer_than_the_terminal_whatever_the_width() {
        let text =
            "PASS  D-ASYM        does a reply leave by the ENI that was asked, and is that so for each of them?\n";
        for width in 20..100 {
            let fitted = fit(text, Some(width), |_| false);
            assert!(fitted.lines().all(|line| length(line) <= width), "{width}:\n{fitted}");
            assert_eq!(fitted.split_whitespace().collect::<Vec<_>>(), text.split_whitespace().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_table_leaves_out_what_matters_least_and_says_so() {
        let column = |head, cell: &str, rank| Column { head, cells: vec![cell.into()], rank };
        let columns =
            || vec![column("address", "10.0.0.1", 0), column("public", "198.51.100.1", 2), column("link", "eth0", 1)];
        assert_eq!(table(columns(), None), "  address   public        link\n  10.0.0.1  198.51.100.1  eth0\n");
        assert_eq!(table(columns(), Some(20)), "  address   link\n  10.0.0.1  eth0\n  (no room here for: public)\n");
        assert!(table(columns(), Some(5)).starts_with("  address\n  10.0.0.1\n"));
    }
}

//! As much of Markdown as `docs/` uses, as a manual page: headings, paragraphs, lists, tables and code.

/// The page of this name and section.
pub fn page(name: &str, section: &str, about: &str, markdown: &str) -> String {
    let mut page = format!(".TH {name} {section} \"\" eniup\n.SH NAME\n{name} \\- {about}\n.SH DESCRIPTION\n");
    let mut is_code = false;
    // The title is in the name already.
    for line in markdown.lines().skip_while(|line| line.starts_with("# ")) {
        if line.starts_with("```") {
            page += if is_code { ".EE\n.RE\n" } else { ".PP\n.RS 4\n.EX\n" };
            is_code = !is_code;
        } else if is_code {
            page += &format!("{}\n", protect(&escape(line)));
        } else {
            page += &block(line);
        }
    }
    page
}

/// Sections of text that is set in columns: a heading ends in a colon, and an empty line ends a section.
pub fn sections(text: &str) -> String {
    let mut page = String::new();
    for section in text.split("\n\n").filter(|section| !section.is_empty()) {
        let (heading, lines) = section.split_once(":\n").unwrap_or(("", section));
        page += &format!(".SH {}\n.EX\n", escape(&heading.to_uppercase()));
        for line in lines.lines() {
            page += &format!("{}\n", protect(&escape(line.strip_prefix("  ").unwrap_or(line))));
        }
        page += ".EE\n";
    }
    page
}

/// Letters beyond ASCII by their numbers, since only some readers of manual pages take them as they are.
pub fn to_ascii(page: &str) -> String {
    let named = |letter: char| format!("\\[u{:04X}]", u32::from(letter));
    page.chars().map(|letter| if letter.is_ascii() { letter.to_string() } else { named(letter) }).collect()
}

fn block(line: &str) -> String {
    if let Some(heading) = line.strip_prefix("## ") {
        format!(".SH {}\n", escape(&heading.to_uppercase()))
    } else if let Some(row) = line.strip_prefix('|') {
        table_row(row)
    } else if let Some(item) = line.strip_prefix("- ") {
        format!(".IP \\(bu 2\n{}\n", inline(item))
    } else if let Some((number, item)) = line.split_once(". ").filter(|(number, _)| number.parse::<u8>().is_ok()) {
        format!(".IP {number}. 3\n{}\n", inline(item))
    } else if line.is_empty() {
        ".PP\n".into()
    } else {
        format!("{}\n", protect(&inline(line.trim_start())))
    }
}

/// The first cell is a term, the others are said of it. Headings and rules of tables say nothing here.
fn table_row(row: &str) -> String {
    let cells: Vec<&str> = row.trim_end_matches('|').split('|').map(str::trim).collect();
    let [term, default, rest @ ..] = cells.as_slice() else { return String::new() };
    if term.starts_with("---") || *term == "key" || term.is_empty() {
        return String::new();
    }
    let default = match rest.is_empty() {
        true => format!("{}\n", inline(default)),
        false => format!("Default: {}.\n", inline(default)),
    };
    format!(".TP\n{}\n{default}{}\n", inline(term), rest.iter().map(|cell| inline(cell)).collect::<Vec<_>>().join("\n"))
}

/// Code in bold; a link as its text.
fn inline(text: &str) -> String {
    let mut shown = String::new();
    for (n, part) in text.split('`').enumerate() {
        shown += &if n % 2 == 1 { format!("\\fB{}\\fR", escape(part)) } else { escape(&without_links(part)) };
    }
    shown
}

fn without_links(text: &str) -> String {
    let mut shown = String::new();
    let mut rest = text;
    while let Some((before, label, after)) = link(rest) {
        shown += before;
        shown += label;
        rest = after;
    }
    shown + rest
}

/// What is before the first link, its text, and what is behind it.
fn link(text: &str) -> Option<(&str, &str, &str)> {
    let (before, opened) = text.split_once('[')?;
    let (label, target) = opened.split_once("](")?;
    let (_, after) = target.split_once(')')?;
    Some((before, label, after))
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace("**", "")
}

/// A line that begins with a dot or an apostrophe would be a command.
fn protect(line: &str) -> String {
    if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_never_becomes_a_command_of_the_page() {
        let page = page("x", "5", "about", "# Title\n\n.ig\n\n```\n.so /etc/passwd\n'br\n```\n");
        assert!(page.contains("\n\\&.ig\n") && page.contains("\n\\&.so /etc/passwd\n") && page.contains("\n\\&'br\n"));
    }

    #[test]
    fn a_table_becomes_terms_with_what_is_said_of_them() {
        let page =
            page("x", "5", "about", "| key | default | |\n| --- | --- | --- |\n| `mtu` | 1500 | bytes, see [a](b) |\n");
        assert!(page.ends_with(".TP\n\\fBmtu\\fR\nDefault: 1500.\nbytes, see a\n"), "{page}");
    }
}

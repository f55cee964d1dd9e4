//! What is wrong with a configuration file, shown with file, line, column and the offending text underlined.

use std::fmt;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

/// A file whose text is there.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub name: &'a str,
    pub text: &'a str,
    /// Higher for those that override others.
    pub rank: usize,
}

impl Source<'_> {
    pub fn problem(self, span: Range<usize>, what: impl Into<String>, hint: Option<String>) -> Problem {
        let place = Some(Place::new(self.text, span));
        Problem { what: what.into(), hint, file: self.name.into(), place }
    }
}

/// One mistake in one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    pub what: String,
    /// What to write instead, as far as it can be told.
    pub hint: Option<String>,
    pub file: String,
    /// None when the file as a whole cannot be used.
    pub place: Option<Place>,
}

/// Where in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// The lines that hold the offending text.
    excerpt: String,
    /// Where in the excerpt it stands, in bytes.
    span: Range<usize>,
}

impl Problem {
    pub fn unreadable(file: &str, why: &str) -> Problem {
        Problem { what: format!("{file} cannot be read: {why}"), hint: None, file: file.into(), place: None }
    }
}

impl Place {
    pub fn new(text: &str, span: Range<usize>) -> Place {
        let span = floor(text, span.start)..floor(text, span.end.max(span.start));
        let first = text[..span.start].rfind('\n').map_or(0, |newline| newline + 1);
        let end = text[span.end..].find('\n').map_or(text.len(), |newline| span.end + newline);
        Place {
            line: line_of(text, span.start),
            column: text[first..span.start].chars().count() + 1,
            excerpt: text[first..end].to_string(),
            span: span.start - first..span.end - first,
        }
    }
}

/// The line, from 1, on which this byte stands.
pub fn line_of(text: &str, position: usize) -> usize {
    text[..floor(text, position)].matches('\n').count() + 1
}

/// The nearest place at or before this byte where a character begins.
fn floor(text: &str, position: usize) -> usize {
    (0..=position.min(text.len())).rev().find(|position| text.is_char_boundary(*position)).unwrap_or(0)
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Problem { what, hint, file, place } = self;
        let title = Level::ERROR.primary_title(what);
        let mut group = match place {
            None => Group::with_title(title),
            Some(Place { line, column: _, excerpt, span }) => {
                let annotation = AnnotationKind::Primary.span(span.clone());
                title.element(Snippet::source(excerpt).line_start(*line).path(file).annotation(annotation))
            }
        };
        if let Some(hint) = hint {
            group = group.element(Level::HELP.message(hint));
        }
        write!(f, "{}", Renderer::plain().render(&[group]))
    }
}

/// Everything that is wrong with a configuration; nothing of it is used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// All of them, behind what comes of it.
    pub fn told(&self, outcome: &str) -> String {
        let count = match self.0.len() {
            1 => "1 error".into(),
            n => format!("{n} errors"),
        };
        let problems: String = self.0.iter().map(|problem| format!("\n\n{problem}")).collect();
        format!("the configuration has {count}; {outcome}{problems}")
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.told("nothing was changed"))
    }
}

impl std::error::Error for Problems {}

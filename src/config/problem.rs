//! What is wrong with a configuration file, shown with file, line, column and the offending text underlined.

use std::fmt;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};

use super::File;

/// One mistake in one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    pub what: String,
    /// What to write instead, as far as it can be told.
    pub hint: Option<String>,
    pub file: String,
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
    pub fn new(file: &File, span: Range<usize>, what: impl Into<String>, hint: Option<String>) -> Problem {
        let text = file.text.as_str();
        let span = floor(text, span.start)..floor(text, span.end.max(span.start));
        let first = text[..span.start].rfind('\n').map_or(0, |newline| newline + 1);
        let end = text[span.end..].find('\n').map_or(text.len(), |newline| span.end + newline);
        Problem {
            what: what.into(),
            hint,
            file: file.name.clone(),
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
        let Problem { what, hint, file, line, column: _, excerpt, span } = self;
        let annotation = AnnotationKind::Primary.span(span.clone());
        let snippet = Snippet::source(excerpt).line_start(*line).path(file).annotation(annotation);
        let mut group = Level::ERROR.primary_title(what).element(snippet);
        if let Some(hint) = hint {
            group = group.element(Level::HELP.message(hint));
        }
        write!(f, "{}", Renderer::plain().render(&[group]))
    }
}

/// Everything that is wrong with a configuration; nothing of it is used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let count = match self.0.len() {
            1 => "1 error".into(),
            n => format!("{n} errors"),
        };
        write!(f, "the configuration has {count}; nothing was changed")?;
        for problem in &self.0 {
            write!(f, "\n\n{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

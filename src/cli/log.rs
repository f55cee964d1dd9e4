//! What is told while a command is at work: on stderr as lines for people or as JSON, or to the journal with fields.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::arguments::{Cli, Command, LogFormat};
use crate::history;
use crate::journal::{self, Journal};
use crate::lock;
use crate::report::OUTCOME;
use crate::stderr::Unhindered;

/// What an event may tell beside its message, and the journal's name for it.
const FIELDS: [(&str, &str); 5] =
    [("eni", "ENI_ID"), ("link", "IFNAME"), ("action", "ACTION"), ("state", "STATE"), ("reason", "REASON")];

struct Log {
    level: LevelFilter,
    form: Form,
    /// Where the lines of commands that change something are kept, too.
    history: Option<PathBuf>,
    stderr: Mutex<Box<dyn Write + Send>>,
}

enum Form {
    Plain { has_colour: bool },
    Json,
    Journal(Journal),
}

pub(super) fn start(cli: &Cli) {
    let global = &cli.global;
    // It may have cut off its own terminal, and the next run waits for its lock.
    let stderr: Box<dyn Write + Send> = match changes_something(&cli.command).then(Unhindered::open).flatten() {
        Some(stderr) => Box::new(stderr),
        None => Box::new(std::io::stderr()),
    };
    let level = match (global.quiet, global.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    let plain = Form::Plain { has_colour: global.color.is_for(&std::io::stderr()) };
    let form = match global.log_format {
        LogFormat::Json => Form::Json,
        LogFormat::Auto if !journal::is_stderr() => plain,
        LogFormat::Plain => plain,
        LogFormat::Auto | LogFormat::Journal => Journal::open().map_or(plain, Form::Journal),
    };
    let history = changes_something(&cli.command).then(lock::runtime_directory);
    // Fails where there is one already, which is as good.
    let _ = tracing::subscriber::set_global_default(Log { level, form, history, stderr: Mutex::new(stderr) });
}

fn changes_something(command: &Command) -> bool {
    matches!(
        command,
        Command::Reconcile { dry_run: false, .. }
            | Command::Confirm { .. }
            | Command::Release { dry_run: false, .. }
            | Command::Watch { .. }
    )
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What is wrong in the end is no chatter: it is why a quiet command does not exit with 0.
        *metadata.level() <= self.level || metadata.target() == OUTCOME
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level.max(LevelFilter::WARN))
    }

    fn event(&self, event: &Event<'_>) {
        let told = Told::of(event);
        if let Some(directory) = self.history.as_ref().filter(|_| told.level <= Level::INFO) {
            history::add(&told.json(), directory);
        }
        let line = match &self.form {
            Form::Plain { has_colour } => told.plain(*has_colour),
            Form::Json => told.json(),
            Form::Journal(journal) => match told.send(journal) {
                Ok(()) => return,
                Err(_) => told.plain(false),
            },
        };
        // Nobody is left to tell when this cannot be written; the exit code still says how it went.
        if let Ok(mut stderr) = self.stderr.lock() {
            let _ = stderr.write_all(line.as_bytes());
        }
    }

    // Spans are not shown, so all of them may be one.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// One event.
struct Told {
    level: Level,
    message: String,
    fields: BTreeMap<&'static str, String>,
}

impl Told {
    fn of(event: &Event) -> Told {
        let mut told = Told { level: *event.metadata().level(), message: String::new(), fields: BTreeMap::new() };
        event.record(&mut told);
        told
    }

    fn plain(&self, has_colour: bool) -> String {
        let (name, colour) = match self.level {
            // The last words of a command that failed.
            Level::ERROR => return format!("eniup: {}\n", visible(&self.message)),
            Level::WARN => (" WARN", 33),
            Level::INFO => (" INFO", 32),
            Level::DEBUG => ("DEBUG", 34),
            Level::TRACE => ("TRACE", 35),
        };
        let message = visible(&self.message);
        match has_colour {
            true => format!("\u{1b}[{colour}m{name}\u{1b}[0m {message}\n"),
            false => format!("{name} {message}\n"),
        }
    }

    fn json(&self) -> String {
        let mut object = serde_json::json!({
            "time": humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            "level": self.level.to_string().to_lowercase(),
            "message": self.message,
        });
        for (name, _) in FIELDS {
            object[name] = self.fields.get(name).map(String::as_str).into();
        }
        format!("{object}\n")
    }

    fn send(&self, journal: &Journal) -> std::io::Result<()> {
        // As syslog(3) counts. A change is more than the chatter that a unit may keep out of the journal: it is a notice.
        let priority = match self.level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "5",
            Level::DEBUG => "6",
            Level::TRACE => "7",
        };
        let mut fields =
            vec![("MESSAGE", self.message.as_str()), ("PRIORITY", priority), ("SYSLOG_IDENTIFIER", "eniup")];
        fields.extend(FIELDS.iter().filter_map(|(name, journals)| Some((*journals, self.fields.get(name)?.as_str()))));
        journal.send(&fields)
    }
}

impl Visit for Told {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.into();
        } else if FIELDS.iter().any(|(name, _)| *name == field.name()) {
            self.fields.insert(field.name(), value.into());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// Nothing that a terminal would take for a command: much of what is told was read somewhere.
fn visible(text: &str) -> String {
    let is_shown = |letter: char| !letter.is_control() || matches!(letter, '\n' | '\t');
    text.chars()
        .map(|letter| if is_shown(letter) { letter.to_string() } else { format!("{}", letter.escape_default()) })
        .collect()
}

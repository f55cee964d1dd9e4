//! The manual pages, made of the command line's own definition and of `docs/configuration.md`, so that neither is written
//! twice.

mod roff;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_mangen::Man;

use super::arguments::{BadUsage, Cli};
use crate::typo;

const CONFIGURATION: &str = include_str!("../../../docs/configuration.md");

/// What the definition of the command line does not say.
const ENIUP_END: &str = include_str!("eniup-end.roff");

/// One manual page.
pub struct Page {
    /// As in `eniup-plan`.
    pub name: String,
    pub section: u8,
    pub text: String,
}

/// Every page.
///
/// # Errors
/// None that is known: pages are written to memory.
pub fn pages() -> Result<Vec<Page>> {
    let mut command = Cli::command();
    command.build();
    let mut pages = Vec::new();
    add_pages(&command, "eniup", &mut pages)?;
    let text = roff::to_ascii(&roff::page("eniup.toml", "5", "configuration of eniup", CONFIGURATION));
    pages.push(Page { name: "eniup.toml".into(), section: 5, text });
    Ok(pages)
}

/// The page of this name, which need not begin with `eniup-`.
pub(super) fn page(name: &str) -> Result<String> {
    let pages = pages()?;
    let is_it = |page: &&Page| page.name == name || page.name.strip_prefix("eniup-") == Some(name);
    let page = pages.iter().find(is_it).ok_or_else(|| {
        let names: Vec<&str> = pages.iter().map(|page| page.name.trim_start_matches("eniup-")).collect();
        let hint = typo::hint(name, names.iter().copied());
        BadUsage(format!("there is no page {name}; there are {}{hint}", names.join(", ")))
    })?;
    Ok(page.text.clone())
}

/// The page of a command, and those of the commands below it.
fn add_pages(command: &Command, name: &str, pages: &mut Vec<Page>) -> Result<()> {
    let is_top = !name.contains('-');
    // The options of all commands are told once; what `after_help` sets in columns would be filled to paragraphs here.
    let mut shown = command.clone().after_help(None);
    if !is_top {
        shown = hide_global(shown, command);
    }
    let man =
        Man::new(shown).title(name).section("8").manual("eniup").source(format!("eniup {}", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.render(&mut page).context("making a page")?;
    let end = match is_top {
        true => ENIUP_END.into(),
        false => roff::sections(&after_help(command)) + ".SH SEE ALSO\neniup(8), eniup.toml(5)\n",
    };
    let text = String::from_utf8(page).context("a page is not UTF-8")? + &end;
    pages.push(Page { name: name.into(), section: 8, text: roff::to_ascii(&text) });
    let is_shown = |below: &&Command| below.get_name() != "help" && !below.is_hide_set();
    for below in command.get_subcommands().filter(is_shown) {
        add_pages(below, &format!("{name}-{}", below.get_name()), pages)?;
    }
    Ok(())
}

fn after_help(command: &Command) -> String {
    command.get_after_help().map(|help| help.to_string()).unwrap_or_default()
}

fn hide_global(shown: Command, command: &Command) -> Command {
    let global: Vec<_> = command.get_arguments().filter(|argument| argument.is_global_set()).collect();
    global.into_iter().fold(shown, |shown, argument| shown.mut_arg(argument.get_id(), |argument| argument.hide(true)))
}

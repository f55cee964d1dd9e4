//! Writes the manual pages and shell completions into a folder. They are made from the command line's own definition and from
//! `docs/configuration.md`, so neither is written twice, and the installed binary carries neither.

mod roff;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;
use clap_mangen::Man;
use eniup::cli::Shell;

const CONFIGURATION: &str = include_str!("../../../docs/configuration.md");

/// What the definition of the command line does not say.
const ENIUP_END: &str = include_str!("eniup-end.roff");

fn main() -> Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).context("usage: eniup-pages FOLDER")?);
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let mut command = eniup::cli::command();
    for (shell, name) in [(Shell::Bash, "eniup.bash"), (Shell::Zsh, "_eniup"), (Shell::Fish, "eniup.fish")] {
        fs::write(folder.join(name), eniup::cli::completions(shell)).with_context(|| format!("writing {name}"))?;
    }
    command.build();
    write_pages(&command, "eniup", &folder)?;
    let page = roff::page("eniup.toml", "5", "configuration of eniup", CONFIGURATION);
    fs::write(folder.join("eniup.toml.5"), roff::to_ascii(&page)).context("writing eniup.toml.5")
}

/// The page of a command, and those of the commands below it.
fn write_pages(command: &Command, name: &str, folder: &Path) -> Result<()> {
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
    page.write_all(end.as_bytes())?;
    let path = folder.join(format!("{name}.8"));
    let page = String::from_utf8(page).context("a page is not UTF-8")?;
    fs::write(&path, roff::to_ascii(&page)).with_context(|| format!("writing {}", path.display()))?;
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        write_pages(below, &format!("{name}-{}", below.get_name()), folder)?;
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

//! What may come next on a command line: the shells ask `eniup complete` for it while somebody types, so it is quick, says nothing
//! else, and asks the kernel alone.

use std::ffi::OsString;
use std::fmt::Write;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::engine::{self, CompletionCandidate};

use super::arguments::{Cli, Shell};
use super::print;
use crate::net::Observed;
use crate::netlink::Netlink;
use crate::report::Exit;

/// The script that lets a shell ask.
pub(super) fn script(shell: Shell) -> &'static str {
    match shell {
        Shell::Bash => include_str!("completions/eniup.bash"),
        Shell::Zsh => include_str!("completions/_eniup"),
        Shell::Fish => include_str!("completions/eniup.fish"),
    }
}

/// One candidate a line for the last of these words, with what is said of it behind a tab.
pub(super) fn complete(words: &[OsString]) -> Exit {
    let Some(last) = words.len().checked_sub(1) else { return Exit::Ok };
    let folder = std::env::current_dir().ok();
    let candidates = engine::complete(&mut Cli::command(), words.to_vec(), last, folder.as_deref()).unwrap_or_default();
    let mut lines = String::new();
    for candidate in candidates {
        let help = candidate.get_help().map(|help| help.to_string()).unwrap_or_default();
        let help = help.lines().next().map_or_else(String::new, |help| format!("\t{help}"));
        let _ = writeln!(lines, "{}{help}", candidate.get_value().to_string_lossy());
    }
    answer(&lines)
}

pub(super) fn show_script(shell: Shell) -> Exit {
    answer(script(shell))
}

fn answer(text: &str) -> Exit {
    print::text(text).map_or(Exit::Failed, |()| Exit::Ok)
}

/// ENIs by the names that eniup gives to their links.
pub(super) fn enis() -> Vec<CompletionCandidate> {
    let links = observed().links.into_values();
    let names = links.flat_map(|link| link.altnames.into_iter().map(move |altname| (altname, link.name.clone())));
    let ids = names.filter(|(altname, _)| altname.starts_with("eni-"));
    ids.map(|(id, link)| CompletionCandidate::new(id).help(Some(link.into()))).collect()
}

pub(super) fn links() -> Vec<CompletionCandidate> {
    let links = observed().links.into_values();
    links
        .map(|link| {
            let others = link.altnames.into_iter().collect::<Vec<_>>().join(", ");
            CompletionCandidate::new(link.name).help((!others.is_empty()).then(|| others.into()))
        })
        .collect()
}

/// The machine's own, but for those that are the same on every machine.
pub(super) fn addresses() -> Vec<CompletionCandidate> {
    let observed = observed();
    let named = observed.addresses.iter().filter_map(|(index, address)| {
        let address = address.net.addr();
        let is_everywhere =
            address.is_loopback() || matches!(address, std::net::IpAddr::V6(v6) if v6.is_unicast_link_local());
        let link = observed.links.get(index)?;
        (!is_everywhere).then(|| CompletionCandidate::new(address.to_string()).help(Some(link.name.clone().into())))
    });
    named.collect()
}

/// Nothing, where the kernel cannot be asked: nobody wants to read why in the middle of typing.
fn observed() -> Observed {
    let look = || -> Result<Observed> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { Netlink::open().context("opening a netlink socket")?.observe().await })
    };
    look().unwrap_or_default()
}

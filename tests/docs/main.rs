//! What the documentation says can be done is done here: its commands are run in the VPC in a box, or at least are ones that
//! the binary knows; its configurations are valid, its links lead somewhere.
//!
//! The words behind a fence say what a block is. `sh lab` is run, the blocks of a page one after the other in one lab (`ec2` says
//! what is there), on the instance `web` or `on=` another one, and ends with 0 or `exit=` another code. `sh host` is for a real
//! machine. `text shown` is what the block for the lab before it prints. `toml` is eniup's configuration. `OTHERS` is for nobody
//! here.

mod ec2;
mod page;
#[allow(dead_code)] // Only ip(8) is needed here.
#[path = "../support/tools.rs"]
mod tools;

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use eniup::{cli, config, doctor};

use crate::ec2::Ec2;
use crate::page::{Page, pages, root};

/// Other programs' configuration, and what programs print.
const OTHERS: [&str; 7] = ["conf", "hcl", "ini", "json", "text", "udev", "yaml"];

#[test]
fn every_block_says_what_it_is() -> Result<()> {
    let mut faults = Vec::new();
    for block in pages()?.into_iter().flat_map(|page| page.blocks) {
        let words: Vec<&str> = block.words.iter().map(String::as_str).collect();
        let is_known = match words.as_slice() {
            ["sh", "lab", options @ ..] => {
                options.iter().all(|word| word.starts_with("exit=") || word.starts_with("on="))
            }
            ["sh", "host"] | ["toml"] | ["text", "shown"] => true,
            [word] => OTHERS.contains(word),
            _ => false,
        };
        if !is_known {
            faults.push(format!("{}: ```{}", block.place, words.join(" ")));
        }
    }
    none(faults)
}

#[test]
fn what_is_for_the_lab_does_what_it_says() {
    vpc_lab::inside(|| {
        let mut faults = Vec::new();
        for page in pages()? {
            if page.blocks.iter().any(|block| block.has("lab")) {
                faults.extend(try_out(&page).with_context(|| page.name.clone())?);
            }
        }
        none(faults)
    });
}

/// The first block that does otherwise; those behind it lean on it. With `SHOW=1` and `--nocapture` what all of them print
/// is shown.
fn try_out(page: &Page) -> Result<Option<String>> {
    let mut ec2 = Ec2::build()?;
    let mut said = String::new();
    for block in page.blocks.iter().filter(|block| block.has("lab") || block.has("shown")) {
        if block.has("shown") {
            if let Some(line) = not_said(&block.text, &said) {
                return Ok(Some(format!("{}: nobody says `{line}`; this is what was said\n{said}", block.place)));
            }
            continue;
        }
        let output = ec2.run(block.value("on").unwrap_or("web"), &block.text).context(block.place.clone())?;
        said = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat();
        let told = format!("{}: {}\n{}\n{said}", block.place, output.status, block.text);
        let expected = block.value("exit").map_or(Ok(0), str::parse)?;
        if output.status.code() != Some(expected) {
            return Ok(Some(format!("exit {expected} was expected\n{told}")));
        }
        if std::env::var_os("SHOW").is_some() {
            println!("{told}");
        }
    }
    Ok(None)
}

/// A line that a page shows as printed and that was not. Ids and the width of gaps may differ, and `…` stands for more lines.
fn not_said<'a>(shown: &'a str, said: &str) -> Option<&'a str> {
    let plain = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let words = words.join(" ");
        let mut parts = words.split("-0");
        let first = parts.next().unwrap_or_default().to_string();
        parts.fold(first, |line, rest| line + "-0" + rest.trim_start_matches(|c: char| c.is_ascii_hexdigit()))
    };
    let said: Vec<String> = said.lines().map(plain).collect();
    shown.lines().find(|line| !["", "…"].contains(&line.trim()) && !said.contains(&plain(line)))
}

#[test]
fn every_script_is_one() -> Result<()> {
    let mut faults = Vec::new();
    for block in pages()?.into_iter().flat_map(|page| page.blocks).filter(|block| block.has("sh")) {
        let mut shell = Command::new("sh").arg("-n").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        shell.stdin.take().context("its input")?.write_all(block.text.as_bytes())?;
        let output = shell.wait_with_output()?;
        if !output.status.success() {
            faults.push(format!("{}: {}", block.place, String::from_utf8_lossy(&output.stderr)));
        }
    }
    none(faults)
}

#[test]
fn every_command_is_one_that_the_binary_knows() -> Result<()> {
    let (mut faults, mut count) = (Vec::new(), 0);
    for page in pages()? {
        for block in page.blocks.iter().filter(|block| !block.has("text")) {
            for words in block.commands() {
                count += 1;
                faults.extend(fault(&words).map(|fault| format!("{}: {fault}", block.place)));
            }
        }
        // A sentence may leave out what a verb needs.
        for mut words in
            page.inline_code().iter().filter(|code| !code.contains('…')).filter_map(|code| page::command(code))
        {
            words.push("--help".into());
            faults.extend(fault(&words).map(|fault| format!("{}: {fault}", page.name)));
        }
    }
    ensure!(count > 10, "only {count} commands were found");
    none(faults)
}

/// What the binary's own parser has against a command. Shell's variables, systemd's specifiers and capitals stand for values of any sort.
fn fault(words: &[String]) -> Option<String> {
    const VALUES: [&str; 4] = ["10.0.1.77", "eni-0123456789abcdef0", "60s", "1"];
    let is_placeholder = |word: &String| word.contains(['$', '%']) || word.chars().all(|c| c.is_ascii_uppercase());
    let attempts = VALUES.map(|value| {
        let words = words.iter().map(|word| if is_placeholder(word) { value } else { word });
        match cli::command().try_get_matches_from(words) {
            Err(error) if error.use_stderr() => Err(error),
            _ => Ok(()),
        }
    });
    let [first, others @ ..] = attempts;
    let error = first.err()?;
    others.iter().all(Result::is_err).then(|| format!("{}: {error}", words.join(" ")))
}

#[test]
fn every_configuration_is_valid() -> Result<()> {
    let (mut faults, mut count) = (Vec::new(), 0);
    for block in pages()?.into_iter().flat_map(|page| page.blocks).filter(|block| block.has("toml")) {
        count += 1;
        if let Err(problems) = config::read(&[config::File { name: block.place, text: Ok(block.text) }]) {
            faults.push(problems.to_string());
        }
    }
    ensure!(count > 1, "only {count} configurations were found");
    none(faults)
}

#[test]
fn every_link_leads_somewhere() -> Result<()> {
    let pages = pages()?;
    let mut faults = Vec::new();
    for page in &pages {
        let folder = root().join(&page.name).parent().context("a page is in a folder")?.to_path_buf();
        for link in page.links().iter().filter(|link| !link.starts_with("http")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let file = if file.is_empty() { root().join(&page.name) } else { folder.join(file) };
            let target = pages
                .iter()
                .find(|other| root().join(&other.name) == file.components().collect::<std::path::PathBuf>());
            let is_there = file.exists()
                && (anchor.is_empty() || target.is_some_and(|page| page.anchors().iter().any(|other| other == anchor)));
            if !is_there {
                faults.push(format!("{}: {link}", page.name));
            }
        }
        // Pages that a sentence names without a link.
        let named =
            page.inline_code().into_iter().filter(|code| code.ends_with(".md") && !code.contains(['*', ' ', '/']));
        faults.extend(named.filter(|name| !folder.join(name).exists()).map(|name| format!("{}: `{name}`", page.name)));
    }
    none(faults)
}

#[test]
fn the_readme_leads_to_every_page() -> Result<()> {
    let pages = pages()?;
    let readme = pages.iter().find(|page| page.name == "README.md").context("README.md")?;
    let links = readme.links();
    none(
        pages
            .iter()
            .map(|page| page.name.clone())
            .filter(|name| name != "README.md" && !links.contains(name))
            .collect(),
    )
}

#[test]
fn every_check_of_doctor_that_is_named_is_one() -> Result<()> {
    let ids = doctor::ids();
    let mut faults = Vec::new();
    for page in pages()? {
        let words = page.text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        let is_id = |word: &&str| {
            word.starts_with("D-") && word.len() > 2 && word.chars().all(|c| c.is_ascii_uppercase() || c == '-')
        };
        let unknown = words.filter(is_id).filter(|word| !ids.contains(word));
        faults.extend(unknown.map(|word| format!("{}: {word}", page.name)));
    }
    none(faults)
}

fn none(faults: Vec<String>) -> Result<()> {
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(())
}

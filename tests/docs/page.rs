//! A page of the documentation: its blocks of code, the commands in them and in its sentences, its headings and links.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

pub struct Page {
    /// From the project's folder, as in `docs/failover.md`.
    pub name: String,
    pub text: String,
    pub blocks: Vec<Block>,
}

pub struct Block {
    /// Where its first line of code is, as `docs/failover.md:7`.
    pub place: String,
    /// What stands behind the fence: `sh lab`, `toml`.
    pub words: Vec<String>,
    pub text: String,
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `README.md` and all of `docs/`, by name.
pub fn pages() -> Result<Vec<Page>> {
    let mut files = vec![root().join("README.md")];
    for entry in fs::read_dir(root().join("docs"))? {
        files.push(entry?.path());
    }
    files.retain(|file| file.extension().is_some_and(|kind| kind == "md"));
    files.sort();
    ensure!(files.len() > 5, "the pages are missing");
    files.iter().map(read).collect()
}

fn read(file: &PathBuf) -> Result<Page> {
    let name = file.strip_prefix(root())?.display().to_string();
    let text = fs::read_to_string(file).with_context(|| name.clone())?;
    let blocks = blocks(&name, &text)?;
    Ok(Page { name, text, blocks })
}

/// Also those that are only indented, which have no words. In a list a block is as far to the right as its item's text.
fn blocks(name: &str, text: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, Block)> = None;
    let mut is_after_empty = true;
    for (n, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        match (open.take(), trimmed.strip_prefix("```")) {
            (Some((_, block)), Some("")) => blocks.push(block),
            (Some((of_fence, mut block)), _) => {
                block.text += &line[indent.min(of_fence)..];
                block.text.push('\n');
                open = Some((of_fence, block));
            }
            (None, Some(info)) => {
                let words = info.split_whitespace().map(String::from).collect();
                open = Some((indent, Block { place: format!("{name}:{}", n + 2), words, text: String::new() }));
            }
            (None, None) if indent >= 4 && is_after_empty && !trimmed.is_empty() => {
                let place = format!("{name}:{}", n + 1);
                blocks.push(Block { place, words: Vec::new(), text: format!("{line}\n") });
            }
            (None, None) => {}
        }
        is_after_empty = line.is_empty();
    }
    ensure!(open.is_none(), "{name}: a fence is not closed");
    Ok(blocks)
}

impl Page {
    /// The lines outside of blocks.
    pub fn prose(&self) -> String {
        let mut is_code = false;
        let is_prose = |line: &&str| {
            let is_fence = line.trim_start().starts_with("```");
            is_code ^= is_fence;
            !is_code && !is_fence
        };
        self.text.lines().filter(is_prose).map(|line| format!("{line}\n")).collect()
    }

    /// What stands between backticks in sentences.
    pub fn inline_code(&self) -> Vec<String> {
        let prose = self.prose();
        let code = prose.split('`').skip(1).step_by(2);
        code.map(|code| code.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    /// The targets of its links.
    pub fn links(&self) -> Vec<String> {
        let prose = self.prose();
        prose.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_string())).collect()
    }

    /// Its headings as the fragments by which links name them.
    pub fn anchors(&self) -> Vec<String> {
        let prose = self.prose();
        let headings = prose.lines().filter_map(|line| Some(line.strip_prefix('#')?.trim_start_matches('#').trim()));
        headings.map(anchor).collect()
    }
}

/// As GitHub makes it: small letters, without punctuation, hyphens for spaces.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

impl Block {
    pub fn has(&self, word: &str) -> bool {
        self.words.iter().any(|other| other == word)
    }

    /// What follows `key=` behind the fence.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.words.iter().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// The calls of eniup in it, word by word.
    pub fn commands(&self) -> Vec<Vec<String>> {
        let joined = self.text.replace("\\\n", " ");
        let lines = joined.lines().filter(|line| !line.trim_start().starts_with('#'));
        let lines = lines.map(|line| line.split_once(" #").map_or(line, |(code, _)| code));
        lines
            .flat_map(|line| line.split([';', '&', '|', '(', ')', '`', '{', '}', '[', ']']))
            .filter_map(command)
            .collect()
    }
}

/// What may stand before a command, in shell, in units and in lists of commands.
const BEFORE: [&str; 14] =
    ["sudo", "exec", "if", "then", "else", "elif", "while", "until", "do", "!", "time", "nice", "-", "timeout"];

/// The call of eniup that a piece of a line is. A name alone is none.
pub fn command(piece: &str) -> Option<Vec<String>> {
    let piece = piece.trim();
    let piece = match piece.split_once('=') {
        Some((key, value)) if key.starts_with("Exec") => value,
        _ => piece,
    };
    let words = piece.split_whitespace().map(|word| word.trim_matches(['"', '\'', ',']));
    let is_before =
        |word: &&str| BEFORE.contains(word) || word.ends_with(':') || word.starts_with(|c: char| c.is_ascii_digit());
    let words = words.skip_while(is_before).take_while(|word| !word.contains(['<', '>']));
    let words: Vec<String> = words.map(String::from).collect();
    let program = words.first()?.rsplit('/').next()?;
    (program == "eniup" && words.len() > 1).then_some(words)
}

#[test]
fn commands_are_found_wherever_they_stand() {
    let text = "sudo eniup plan | head\nif ! eniup wait --ip \"$a\" >/dev/null; then x=$(eniup status); fi\n\
                ExecStartPre=/usr/bin/eniup wait \\\n  --ip A\ntimeout 9 eniup watch & # eniup no\n# eniup no\n\
                validate: eniup config check\n- [eniup, wait, --ip, A]\n- name: eniup\n";
    let block = Block { place: String::new(), words: Vec::new(), text: text.into() };
    let found: Vec<String> = block.commands().iter().map(|words| words.join(" ")).collect();
    let expected = [
        "eniup plan",
        "eniup wait --ip $a",
        "eniup status",
        "/usr/bin/eniup wait --ip A",
        "eniup watch",
        "eniup config check",
        "eniup wait --ip A",
    ];
    assert_eq!(found, expected);
}

#[test]
fn blocks_are_found_also_without_a_fence() -> Result<()> {
    let found = blocks("p", "a\n\n    indented\n\n```sh lab exit=2\n    x\n```\n- b\n\n  ```ini\n  [a]\n  ```\n")?;
    let found: Vec<_> = found.iter().map(|b| (b.place.as_str(), b.words.join(" "), b.text.as_str())).collect();
    let expected = [
        ("p:3", String::new(), "    indented\n"),
        ("p:6", "sh lab exit=2".into(), "    x\n"),
        ("p:11", "ini".into(), "[a]\n"),
    ];
    assert_eq!(found, expected);
    assert!(blocks("p", "```sh host\n").is_err());
    Ok(())
}

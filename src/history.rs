//! The last lines that runs have told, for `snapshot`: also where there is no journal, or where it is not the reader's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::whole_file;

/// How many are kept.
const LINES: usize = 100;

/// Bytes from which on the file is cut to its last lines, and as many as those may have.
const LONGEST: u64 = 64 << 10;
const KEPT: usize = 32 << 10;

const MODE: u32 = 0o644;

/// A line of `--log-format json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Line {
    pub time: String,
    pub level: String,
    pub message: String,
    pub eni: Option<String>,
    pub link: Option<String>,
    pub action: Option<String>,
    pub state: Option<String>,
    pub reason: Option<String>,
}

/// Adds a line, which ends in a newline. Where that fails nothing is lost that a run depends on.
pub fn add(line: &str, directory: &Path) {
    let _ = append(line, &path(directory));
}

/// Those that are there; what a crash has left of one is none.
pub fn read(directory: &Path) -> Vec<Line> {
    let text = text(&path(directory)).unwrap_or_default();
    let lines: Vec<Line> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    lines[lines.len().saturating_sub(LINES)..].to_vec()
}

fn path(directory: &Path) -> PathBuf {
    directory.join("history")
}

/// In one write, so that lines of two processes do not mix.
fn append(line: &str, path: &Path) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let mut file = File::options().append(true).create(true).mode(MODE).custom_flags(flags).open(path)?;
    file.write_all(line.as_bytes())?;
    if file.metadata()?.len() > LONGEST {
        // Fails where something is there by that name that is no file, which then stays as it is.
        let _ = whole_file::write(path, last_lines(&text(path)?), MODE);
    }
    Ok(())
}

fn last_lines(text: &str) -> &str {
    let starts = text.match_indices('\n').map(|(at, _)| at + 1).rev();
    let starts = starts.skip(1).take(LINES).take_while(|start| text.len() - start <= KEPT);
    &text[starts.last().unwrap_or(text.len())..]
}

fn text(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    file.take(2 * LONGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &str) -> String {
        format!("{{\"time\": \"t\", \"level\": \"info\", \"message\": \"{message}\"}}\n")
    }

    fn messages(directory: &Path) -> Vec<String> {
        read(directory).into_iter().map(|line| line.message).collect()
    }

    #[test]
    fn the_last_lines_are_kept_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        for n in 0..3000 {
            add(&line(&n.to_string()), directory.path());
        }
        let expected: Vec<String> = (2900..3000).map(|n| n.to_string()).collect();
        assert_eq!(messages(directory.path()), expected);
        add(&line(&"x".repeat(200_000)), directory.path());
        add(&line("after a long one"), directory.path());
        assert!(std::fs::metadata(directory.path().join("history")).unwrap().len() <= LONGEST);
        assert_eq!(messages(directory.path()).last().map(String::as_str), Some("after a long one"));
    }

    #[test]
    fn what_is_no_line_is_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(messages(directory.path()), Vec::<String>::new());
        let torn = [b"\xff\x00 {\"time\": \"t\", \"mess\n".as_slice(), line("whole").as_bytes(), b"{\"time\""].concat();
        std::fs::write(directory.path().join("history"), torn).unwrap();
        assert_eq!(messages(directory.path()), ["whole"]);
        // Nobody's /dev/null, and no waiting for a reader of a pipe.
        let elsewhere = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", elsewhere.path().join("history")).unwrap();
        add(&line("lost"), elsewhere.path());
        assert_eq!(messages(elsewhere.path()), Vec::<String>::new());
    }
}

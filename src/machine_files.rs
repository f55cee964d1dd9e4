//! Reading the files that `markers` names.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::markers::{self, Files, Found, Wanted};

/// Bytes. None of these files is longer.
const LARGEST: u64 = 1 << 16;

/// Those that are there, below this root.
pub fn read(root: &Path) -> Files {
    read_some(root, markers::wanted())
}

/// Those of container networks alone, on this machine.
pub fn read_of_container_networks() -> Files {
    read_some(Path::new("/"), markers::of_container_networks())
}

fn read_some(root: &Path, wanted: impl Iterator<Item = &'static Wanted>) -> Files {
    let root = root.to_string_lossy();
    let root = root.trim_end_matches('/');
    let mut files = Files::default();
    for Wanted { pattern, word } in wanted {
        // The patterns are ours and are valid; what cannot be listed is not there for us.
        let paths = glob::glob(&format!("{}{pattern}", glob::Pattern::escape(root))).into_iter().flatten().flatten();
        for path in paths {
            let name = path.to_string_lossy().strip_prefix(root).map(String::from);
            if let (Some(name), Some(found)) = (name, found(&path, *word)) {
                files.0.insert(name, found);
            }
        }
    }
    files
}

fn found(path: &Path, word: Option<&str>) -> Option<Found> {
    let is_masked = fs::read_link(path).is_ok_and(|target| target == Path::new("/dev/null"));
    let Some(word) = word.filter(|_| !is_masked) else {
        return Some(if is_masked { Found::Masked } else { Found::There });
    };
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(LARGEST).read_to_end(&mut bytes));
    match read {
        Ok(_) => {
            let text = String::from_utf8_lossy(&bytes);
            let kept = text.lines().filter(|line| line.contains(word)).map(|line| format!("{line}\n"));
            Some(Found::Text(kept.collect()))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => Some(Found::Unreadable(error.to_string())),
    }
}

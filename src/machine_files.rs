//! Reading the files that `markers` names.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::markers::{Files, Found, WANTED, Wanted};

/// Bytes. None of these files is longer.
const LARGEST: u64 = 1 << 16;

/// Those that are there, below this root.
pub fn read(root: &Path) -> Files {
    let root = root.to_string_lossy();
    let root = root.trim_end_matches('/');
    let mut files = Files::default();
    for Wanted { pattern, has_text } in WANTED {
        // The patterns are ours and are valid; what cannot be listed is not there for us.
        let paths = glob::glob(&format!("{}{pattern}", glob::Pattern::escape(root))).into_iter().flatten().flatten();
        for path in paths {
            let name = path.to_string_lossy().strip_prefix(root).map(String::from);
            if let (Some(name), Some(found)) = (name, found(&path, has_text)) {
                files.0.insert(name, found);
            }
        }
    }
    files
}

fn found(path: &Path, has_text: bool) -> Option<Found> {
    let is_masked = fs::read_link(path).is_ok_and(|target| target == Path::new("/dev/null"));
    if is_masked {
        return Some(Found::Masked);
    }
    if !has_text {
        return Some(Found::There);
    }
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(LARGEST).read_to_end(&mut bytes));
    match read {
        Ok(_) => Some(Found::Text(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => Some(Found::Unreadable(error.to_string())),
    }
}

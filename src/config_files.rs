//! Which files the configuration is, and their texts. What they mean is for `config`.

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::config::File;

/// The file of an administrator who needs only one. It need not be there.
pub const MAIN: &str = "/etc/eniup/config.toml";

/// Bytes. A file that never ends is no configuration.
const LARGEST: u64 = 1 << 20;

/// A file that is there, or that was asked for, and cannot be read.
#[derive(Debug)]
pub struct Unreadable {
    path: PathBuf,
    why: String,
    is_absent: bool,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "the configuration file {} cannot be read: {}; nothing was changed", self.path.display(), self.why)
    }
}

impl std::error::Error for Unreadable {}

/// The files in order of increasing precedence: the one that was asked for and nothing else, or those that the machine
/// has.
///
/// # Errors
/// A file that is there cannot be read, or the one that was asked for is not there.
pub fn read(asked_for: Option<&Path>) -> Result<Vec<File>, Unreadable> {
    match asked_for {
        Some(path) => Ok(vec![file(path)?]),
        None => match file(Path::new(MAIN)) {
            Err(error) if error.is_absent => Ok(Vec::new()),
            file => Ok(vec![file?]),
        },
    }
}

fn file(path: &Path) -> Result<File, Unreadable> {
    let unreadable = |why: String| Unreadable { path: path.into(), why, is_absent: false };
    let bytes = bytes(path).map_err(|error| Unreadable {
        is_absent: error.kind() == io::ErrorKind::NotFound,
        ..unreadable(error.to_string())
    })?;
    if bytes.len() as u64 > LARGEST {
        return Err(unreadable(format!("it is larger than {} MiB", LARGEST >> 20)));
    }
    let text = String::from_utf8(bytes)
        .map_err(|error| unreadable(format!("it is not UTF-8 (byte {})", error.utf8_error().valid_up_to())))?;
    Ok(File { name: path.display().to_string(), text })
}

fn bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(LARGEST + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

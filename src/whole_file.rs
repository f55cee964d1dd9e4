//! Files that are read and written as a whole: a crash leaves the old one or the new one, and a reader never sees a part.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// None where there is nothing.
///
/// # Errors
/// It cannot be read, or it is no file: a FIFO would keep the reader waiting.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let failed = || format!("reading {}", path.display());
    let mut file = match File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.with_context(failed)?,
    };
    let mut bytes = Vec::new();
    let is_file = file.metadata().with_context(failed)?.is_file();
    ensure!(is_file, "{}: it is there and is no file", failed());
    file.read_to_end(&mut bytes).with_context(failed)?;
    Ok(Some(bytes))
}

/// # Errors
/// Something is there by that name that is no file: a rename would put one in the place of /dev/null.
pub fn check(path: &Path) -> Result<()> {
    let is_file = fs::symlink_metadata(path).map_or(true, |there| there.is_file());
    ensure!(is_file, "it is there and is no file");
    Ok(())
}

/// # Errors
/// It cannot be written, and then the old one stands; or something is there by that name that is no file.
pub fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let failed = || format!("writing {}", path.display());
    check(path).with_context(failed)?;
    let name = path.file_name().with_context(failed)?.to_string_lossy();
    let new = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let written = || -> std::io::Result<()> {
        // What a killed process of this number has left; where it is another's, making the file fails.
        let _ = fs::remove_file(&new);
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    written().with_context(|| {
        let _ = fs::remove_file(&new);
        failed()
    })
}

//! Writing a file as a whole: a crash leaves the old one or the new one, and a reader never sees a part.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

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
        let mut file = fs::File::options().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    written().with_context(|| {
        let _ = fs::remove_file(&new);
        failed()
    })
}

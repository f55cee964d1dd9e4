//! Writes the manual pages and shell completions into a folder, as the binary itself prints them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use eniup::cli::{Page, Shell};

fn main() -> Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).context("usage: eniup-pages FOLDER")?);
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    for (shell, name) in [(Shell::Bash, "eniup.bash"), (Shell::Zsh, "_eniup"), (Shell::Fish, "eniup.fish")] {
        fs::write(folder.join(name), eniup::cli::completions(shell)).with_context(|| format!("writing {name}"))?;
    }
    for Page { name, section, text } in eniup::cli::pages()? {
        let path = folder.join(format!("{name}.{section}"));
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

//! Tools of the distribution: ip(8), the tests' second opinion, and systemd-analyze(1). Where the machine has none, `tests/prepare`
//! gets it: for the whole machine as root, else unpacked below the target directory.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The value of PATH with which `ip` and the other tools are found.
///
/// # Panics
/// When there is no ip(8) and none can be had: without it these tests cannot run, and none of them passes unrun.
pub fn path() -> &'static OsString {
    static PATH: OnceLock<OsString> = OnceLock::new();
    PATH.get_or_init(|| path_to("ip"))
}

/// The value of PATH with which this tool is found.
///
/// # Panics
/// When it cannot be had.
pub fn path_to(tool: &str) -> OsString {
    find(tool).or_else(|_| prepare(tool)).unwrap_or_else(|why| panic!("{why}"))
}

/// Where `tests/prepare` unpacks: `target/tools`, which `cargo clean` takes away.
fn tools() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("tools")
}

/// The user's PATH, then the system's directories, which an ordinary user's may leave out, then our own.
fn find(tool: &str) -> Result<OsString, String> {
    let users = std::env::var_os("PATH").unwrap_or_default();
    let users = std::env::split_paths(&users);
    let folders: Vec<PathBuf> = users.chain(["/usr/sbin".into(), "/sbin".into(), tools().join("bin")]).collect();
    match folders.iter().any(|folder| folder.join(tool).is_file()) {
        true => std::env::join_paths(folders).map_err(|error| format!("PATH: {error}")),
        false => Err(format!("the tests need {tool}, and it is not here")),
    }
}

fn prepare(tool: &str) -> Result<OsString, String> {
    // The tests of the workspace's other members use it, too.
    let mut folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|folder| folder.join("tests/prepare"));
    let script = folders.find(|script| script.is_file()).ok_or("tests/prepare is not here")?;
    // A sandbox has no network to get anything by.
    if vpc_lab::sandbox::is_inside() {
        return Err(format!("the tests need {tool}: run {} {} {tool}", script.display(), tools().display()));
    }
    let output = Command::new(&script).arg(tools()).arg(tool).output();
    let output =
        output.map_err(|error| format!("the tests need {tool}, and {} cannot be run: {error}", script.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "the tests need {tool}, and it could not be had: {}",
            said.lines().last().unwrap_or_default()
        ));
    }
    find(tool)
}

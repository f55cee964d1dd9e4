//! Which files the configuration is, and their texts. What they mean is for `config`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::config::File;

/// Where files of the configuration are looked for.
pub struct Places {
    /// The file of an administrator who needs only one.
    pub main: PathBuf,
    /// Folders of drop-ins, which come after the main file in the order of their names, whatever folder they are in. Of
    /// two with one name the one in the later folder counts, and the other one is not read.
    pub drop_ins: Vec<PathBuf>,
}

impl Default for Places {
    /// As systemd has it: the packager's, this boot's, the administrator's.
    fn default() -> Places {
        let folders = ["/usr/lib/eniup/config.d", "/run/eniup/config.d", "/etc/eniup/config.d"];
        Places { main: "/etc/eniup/config.toml".into(), drop_ins: folders.map(PathBuf::from).into() }
    }
}

/// Bytes. A file that never ends is no configuration.
const LARGEST: u64 = 1 << 20;

/// The file that was asked for, and nothing else.
pub fn read_one(path: &Path) -> File {
    file(path, bytes(path))
}

/// The files that are there, in order of increasing precedence.
pub fn read_all(places: &Places) -> Vec<File> {
    let mut files = Vec::new();
    match bytes(&places.main) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        bytes => files.push(file(&places.main, bytes)),
    }
    let mut drop_ins = BTreeMap::new();
    for folder in &places.drop_ins {
        match names(folder) {
            Ok(names) => drop_ins.extend(names.into_iter().map(|name| (name.clone(), folder.join(name)))),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => files.push(file(folder, Err(error))),
        }
    }
    files.extend(drop_ins.values().map(|path| read_one(path)));
    files
}

/// The drop-ins in a folder: `*.toml`, but for hidden ones, which editors leave behind.
fn names(folder: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let bytes = name.as_encoded_bytes();
        if bytes.ends_with(b".toml") && !bytes.starts_with(b".") {
            names.push(name);
        }
    }
    Ok(names)
}

fn bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(LARGEST + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn file(path: &Path, bytes: io::Result<Vec<u8>>) -> File {
    let text = match bytes {
        Err(error) => Err(error.to_string()),
        Ok(bytes) if bytes.len() as u64 > LARGEST => Err(format!("it is larger than {} MiB", LARGEST >> 20)),
        Ok(bytes) => String::from_utf8(bytes).map_err(|error| {
            let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = String::from_utf8_lossy(good).matches('\n').count() + 1;
            format!("it is not UTF-8 (byte {}, on line {line})", good.len())
        }),
    };
    File { name: path.display().to_string(), text }
}

//! The texts of two configuration files, with a NUL between them.
#![no_main]

use eniup::config::{Config, File, Settings, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|texts: &str| {
    let texts = texts.splitn(2, '\0').enumerate();
    let files: Vec<File> = texts.map(|(n, text)| file(&format!("{n}.toml"), text)).collect();
    match read(&files) {
        Ok(settings) => what_is_shown_means_the_same(&settings, &files),
        Err(problems) => assert!(!problems.to_string().is_empty()),
    }
});

fn file(name: &str, text: &str) -> File {
    File { name: name.into(), text: Ok(text.into()) }
}

fn what_is_shown_means_the_same(settings: &Settings, files: &[File]) {
    let shown = settings.to_string();
    let again = read(&[file("shown.toml", &shown)]).unwrap_or_else(|problems| panic!("{problems}\n{shown}"));
    assert_eq!(without_origins(&again.config), without_origins(&settings.config), "{shown}");
    settings.to_json(files);
}

fn without_origins(config: &Config) -> Config {
    let mut config = config.clone();
    let of_enis = config.enis.iter_mut().map(|(selector, _)| selector);
    for selector in config.manage.iter_mut().chain(&mut config.ignore).chain(of_enis) {
        selector.origin.file.clear();
        selector.origin.line = 0;
    }
    config
}

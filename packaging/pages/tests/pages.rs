//! The manual pages as a reader gets them: all there, and groff has nothing to say against any.

// Only one tool is needed here.
#[allow(dead_code)]
#[path = "../../../tests/support/tools.rs"]
mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn write_pages(folder: &Path) -> Vec<PathBuf> {
    let output = Command::new(env!("CARGO_BIN_EXE_eniup-pages")).arg(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_page = |file: &PathBuf| file.extension().is_some_and(|section| section == "8" || section == "5");
    let mut pages: Vec<PathBuf> = files.filter(is_page).collect();
    pages.sort();
    pages
}

/// With every warning that there is.
fn render(page: &Path) -> Output {
    let mut command = Command::new("groff");
    command.env("PATH", tools::path_to("groff")).args(["-man", "-ww", "-Tutf8", "-rLL=100n", "-P-c"]).arg(page);
    command.output().unwrap()
}

/// Without what stands for bold on a terminal: a letter struck twice.
fn text(output: &Output) -> String {
    let mut text = String::new();
    for letter in String::from_utf8_lossy(&output.stdout).chars() {
        match letter {
            '\u{8}' => _ = text.pop(),
            letter => text.push(letter),
        }
    }
    text
}

#[test]
fn every_page_is_rendered_without_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let pages = write_pages(folder.path());
    let names: Vec<String> =
        pages.iter().map(|page| page.file_name().unwrap().to_string_lossy().into_owned()).collect();
    for command in eniup::cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
        let page = format!("eniup-{}.8", command.get_name());
        assert!(command.get_name() == "help" || names.contains(&page), "{page} is not among {names:?}");
    }
    assert!(names.contains(&"eniup.8".into()) && names.contains(&"eniup.toml.5".into()), "{names:?}");
    for page in pages {
        let output = render(&page);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{}: {said}", page.display());
        let text = text(&output);
        for heading in ["NAME", "DESCRIPTION"] {
            assert!(text.lines().any(|line| line == heading), "{}: no {heading}:\n{text}", page.display());
        }
    }
}

#[test]
fn examples_exit_codes_and_every_key_of_the_configuration_are_in_the_pages() {
    let folder = tempfile::tempdir().unwrap();
    write_pages(folder.path());
    let page = |name: &str| text(&render(&folder.path().join(name)));
    let plan = page("eniup-plan.8");
    assert!(plan.contains("  eniup plan --detailed-exitcode   ") && plan.contains("EXIT CODES"), "{plan}");
    let eniup = page("eniup.8");
    for code in ["0", "1", "2", "3", "64", "69", "75", "77", "78"] {
        let is_told = |line: &str| line.split_whitespace().next() == Some(code);
        assert!(eniup.lines().any(is_told), "exit code {code} is not in eniup(8)");
    }
    let toml = page("eniup.toml.5");
    for key in ["timeout", "table_base", "mtu", "[[ignore]]", "[[eni]]"] {
        assert!(toml.contains(key), "{key} is not in eniup.toml(5)");
    }
}

//! The .deb on whole machines: a Debian with its own kernel, systemd and udev, whose network cards really come and go, as an
//! instance of the VPC in a box. `tests/vm/run` prepares what is needed and calls this.

mod beside;
mod ground;
mod qemu;
mod scenarios;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use ground::{Row, Stage};
use scenarios::{SCENARIOS, Scenario};
use vpc_lab::sandbox;
use vpc_lab::table::{Align, Cell, Table};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match sandbox::is_inside() {
        true => child(&arguments).map(|()| true),
        false => parent(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:?}");
            ExitCode::FAILURE
        }
    }
}

/// Every scenario in a process and namespaces of its own, one after the other.
fn parent(arguments: &[String]) -> Result<bool> {
    let kernel = std::env::var("ENIUP_VM_KERNEL").unwrap_or_else(|_| "bookworm".into());
    let image = given("ENIUP_VM_IMAGE")?;
    let is_wanted = |scenario: &&Scenario| {
        arguments.is_empty() || arguments.iter().any(|word| scenario.name.contains(word.as_str()))
    };
    let wanted: Vec<&Scenario> = SCENARIOS.iter().filter(is_wanted).collect();
    ensure!(!wanted.is_empty(), "no scenario has such a name; there are: {}", names().join(", "));
    let scratch = tempfile::Builder::new().prefix("eniup-vm-").tempdir()?;
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for stage in scenarios::STAGES {
        if wanted.iter().any(|scenario| scenarios::needs(scenario, stage)) {
            let begun = Instant::now();
            spawn(&["stage", stage, &kernel], scratch.path(), &image, &mut rows)
                .with_context(|| format!("making {stage}"))?;
            eprintln!("== {stage} was ready after {:.0} s", begun.elapsed().as_secs_f64());
        }
    }
    for scenario in &wanted {
        let begun = Instant::now();
        let result = spawn(&["scenario", scenario.name, &kernel], scratch.path(), &image, &mut rows);
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        eprintln!("== {} {word} after {:.0} s", scenario.name, begun.elapsed().as_secs_f64());
        if let Err(error) = result {
            eprintln!("{error:#}");
            failures.push(scenario.name);
        }
    }
    print!("{}", table(&rows));
    println!("{} scenarios, {} failed {}", wanted.len(), failures.len(), failures.join(", "));
    Ok(failures.is_empty())
}

fn names() -> Vec<&'static str> {
    SCENARIOS.iter().map(|scenario| scenario.name).collect()
}

/// This very program in a sandbox; the lines of its table come back on its standard output.
fn spawn(arguments: &[&str], scratch: &Path, image: &Path, rows: &mut Vec<Row>) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).arg(scratch).arg(image).stdout(Stdio::piped());
    sandbox::prepare(&mut command);
    let output = command.spawn().and_then(|child| child.wait_with_output()).map_err(sandbox::explain)?;
    let told = String::from_utf8(output.stdout)?;
    rows.extend(told.lines().map(serde_json::from_str).collect::<Result<Vec<Row>, _>>()?);
    ensure!(output.status.success(), "{}", output.status);
    Ok(())
}

fn child(arguments: &[String]) -> Result<()> {
    let [job, name, kernel, scratch, image] = arguments else { bail!("not to be called by hand") };
    let (scratch, image) = (Path::new(scratch), Path::new(image));
    match job.as_str() {
        "stage" => {
            let disk = Stage { kernel: image.join(kernel), disk: image.join("disk.raw"), memory: None };
            scenarios::make(name, &disk, scratch)
        }
        _ => {
            let scenario =
                SCENARIOS.iter().find(|scenario| scenario.name == name).context("there is no such scenario")?;
            let (rows, result) = scenarios::play(scenario, scratch);
            for row in rows {
                println!("{}", serde_json::to_string(&row)?);
            }
            result
        }
    }
}

fn given(variable: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable).with_context(|| format!("{variable} is not set: run tests/vm/run"))?;
    Ok(path.into())
}

fn table(rows: &[Row]) -> Table {
    let header = ["scenario", "Linux", "step", "pings", "lost", "longest gap ms", ""];
    let mut table = Table::new(header.map(Cell::from).into(), Align::Left);
    for row in rows {
        let Row { scenario, kernel, step, sent, lost, gap, note } = row;
        let cells = [scenario, kernel, step, &sent.to_string(), &lost.to_string(), &gap.to_string(), note];
        table.push(cells.map(|cell| Cell::from(cell.as_str())).into());
    }
    table
}

//! What `--json` says, held against the schemas in docs/schema.

mod support;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use jsonschema::Validator;
use serde_json::{Value, json};
use support::machine::{Machine, inside, with_scenario};
use support::scenarios;

/// The schema of this name, which has to be a good one itself.
fn schema(name: &str) -> Result<Validator> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schema").join(format!("{name}.json"));
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let schema: Value = serde_json::from_str(&text)?;
    jsonschema::meta::validate(&schema).map_err(|error| error.to_owned()).context("it is no schema")?;
    ensure!(schema["$id"] == format!("urn:eniup:schema:{name}:1"), "{}", schema["$id"]);
    Ok(jsonschema::draft202012::new(&schema)?)
}

fn assert_valid(name: &str, value: &Value) -> Result<()> {
    let errors: Vec<String> =
        schema(name)?.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect();
    ensure!(errors.is_empty(), "{name}: {errors:#?}\n{value:#}");
    Ok(())
}

/// By schema: what gives such output.
const COMMANDS: [(&str, &str); 7] = [
    ("status", "status --json"),
    ("plan", "plan --json"),
    ("doctor", "doctor --json"),
    ("explain", "explain --json --to 192.0.2.9"),
    ("explain", "explain --json --from 10.0.0.10 --to 10.0.1.9"),
    ("explain", "explain --json --from 192.0.2.9"),
    ("config-show", "config show --json"),
];

fn assert_all(commands: &[(&str, &str)], machine: &Machine, config: &str) -> Result<()> {
    for (name, command) in commands {
        let run = machine.eniup(&format!("{command} {config}"))?;
        let value = serde_json::from_str(&run.stdout).with_context(|| format!("{command}: {}", run.stderr))?;
        assert_valid(name, &value).with_context(|| command.to_string())?;
    }
    Ok(())
}

#[test]
fn what_is_said_of_every_scenario_is_as_its_schema_says() {
    inside(|| {
        for scenario in scenarios()? {
            with_scenario(&scenario.name, |machine| {
                let file = scenario.folder.join("config.toml");
                let config = if file.exists() { format!("--config {}", file.display()) } else { String::new() };
                assert_all(&COMMANDS[..2], machine, &config).context("before a run")?;
                machine.eniup(&format!("reconcile --timeout 100ms {config}"))?;
                assert_all(&COMMANDS, machine, &config).context("after a run")
            })
            .with_context(|| scenario.name.clone())?;
        }
        Ok(())
    });
}

#[test]
fn what_the_schemas_do_not_know_is_an_error() {
    inside(|| {
        with_scenario("two-subnets-dual-stack", |machine| {
            let status: Value = serde_json::from_str(&machine.eniup("status --json")?.stdout)?;
            assert_valid("status", &status)?;
            let spoilt = |spoil: fn(&mut Value)| {
                let mut status = status.clone();
                spoil(&mut status);
                assert_valid("status", &status).is_err()
            };
            ensure!(spoilt(|status| status["surprise"] = 1.into()), "a key at the top");
            ensure!(spoilt(|status| status["enis"][0]["surprise"] = Value::Null), "a key of an ENI");
            ensure!(spoilt(|status| status["enis"][0]["link"]["surprise"] = Value::Null), "a key of a link");
            ensure!(spoilt(|status| status["enis"][0]["state"] = "unheard-of".into()), "a state");
            ensure!(spoilt(|status| status["schema"] = 2.into()), "another schema");
            ensure!(
                spoilt(|status| drop(status["enis"][0].as_object_mut().unwrap().remove("since"))),
                "a key is missing"
            );
            ensure!(
                spoilt(|status| status["trial"] = json!({"state": "waits", "why": null})),
                "a trial without its time"
            );
            Ok(())
        })
    });
}

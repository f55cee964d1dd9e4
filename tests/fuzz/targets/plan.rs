//! All the way from metadata to the plan, on a machine on which anything was done since the last run.
#![no_main]

use arbitrary::Arbitrary;
use eniup::config::{Config, File, read};
use eniup::metadata::attached;
use eniup::proof::{Taken, judge};
use eniup_fuzz::machine::Machine;
use eniup_fuzz::promises;
use eniup_fuzz::snapshot::Snapshot;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Case {
    before: Snapshot,
    metadata: Snapshot,
    machine: Machine,
    is_automatic: bool,
    choices: Vec<u8>,
}

fuzz_target!(|case: Case| {
    let Case { before, metadata, machine, is_automatic, choices } = case;
    let (Ok(before), tree) = (attached(&before.tree()), metadata.tree()) else { return };
    let Ok(mut told) = attached(&tree) else { return };
    let config = config(&choices);
    let observed = machine.observed(&before, &config);
    if is_automatic {
        let believed = judge(&told, &told, &observed, &Default::default(), Taken { begun: 0, ended: 0 }, &config).attached;
        promises::first_sight_takes_no_address(&tree, &told, &believed, &observed, &config);
        told = believed;
    }
    promises::one_run_converges(&tree, &told, &observed, &config);
});

/// Entries of a configuration file. (Links are not selected by name: with a name that eniup gives, the selection changes.)
const ENTRIES: [&str; 10] = [
    "[[eni]]\nid = 'eni-1'\nmain_routes = 'connected'\n",
    "[[eni]]\ndevice_number = [2, 3]\nmtu = 1400\n",
    "[[eni]]\nmac = '02:00:00:00:00:*'\nroutes = [{ to = '10.9.0.0/16' }, { to = '::/0', table = 'both' }]\n",
    "[[eni]]\nid = 'eni-2'\nroutes = [{ to = '10.0.1.0/24', table = 'main' }, { to = '0.0.0.0/0', via = '10.0.2.9' }]\n",
    "[[eni]]\nid = 'eni-3'\nrules = 'per-address'\n",
    "[[ignore]]\nid = 'eni-4'\n",
    "[[ignore]]\nnetwork_card = 1\n",
    "[[ignore]]\nsubnet_id = 'subnet-1'\n",
    "[[manage]]\nmac = '02:00:00:00:00:0[1-4]'\n",
    "[[manage]]\ndevice_number = 5\n",
];

fn config(choices: &[u8]) -> Config {
    let text: String = choices.iter().map(|choice| ENTRIES[usize::from(*choice) % ENTRIES.len()]).collect();
    read(&[File { name: "eniup.toml".into(), text: Ok(text) }]).unwrap_or_else(|problems| panic!("{problems}")).config
}

//! A saved snapshot, as `eniup plan --metadata FILE` takes it: any text.
#![no_main]

use eniup::config::Config;
use eniup::metadata::{Tree, attached, details};
use eniup::plan::fresh_machine;
use eniup_fuzz::promises;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(tree) = Tree::from_json(text) else { return };
    let Ok(attached) = attached(&tree) else { return };
    promises::every_eni_has_its_own(&attached);
    for mac in attached.ready.keys().chain(attached.pending.keys()) {
        details(&tree, *mac);
    }
    promises::one_run_converges(&tree, &attached, &fresh_machine(&attached), &Config::default());
});

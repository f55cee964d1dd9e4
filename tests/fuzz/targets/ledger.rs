//! A ledger with any notes, on a machine that is configured: what it says can claim nothing foreign.
#![no_main]

use eniup::config::Config;
use eniup::ledger::Ledger;
use eniup::release::release;
use eniup_fuzz::{machine, model::apply, promises};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(ledger) = serde_json::from_slice::<Ledger>(bytes) else { return };
    let text = serde_json::to_string(&ledger).expect("a ledger can be written");
    assert_eq!(serde_json::from_str::<Ledger>(&text).expect("what was written can be read"), ledger);

    let config = Config::default();
    let before = machine::configured();
    let ledger = ledger.of_machine(&before);
    // This kernel remembers whose its addresses are.
    assert_eq!(ledger.recall(before.clone(), config.mark), before);
    assert_eq!(ledger.noting(&[], &before).noting(&[], &before), ledger.noting(&[], &before));
    let plan = release(&before, None, &ledger, &config);
    let mut after = before.clone();
    apply(&mut after, &plan);
    promises::nothing_foreign_goes(&plan, &before, &config);
    assert_eq!(release(&after, None, &ledger, &config).steps, []);
});

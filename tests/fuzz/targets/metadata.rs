//! What the metadata service may answer, key by key: whole, half there, or wrong.
#![no_main]

use eniup::metadata::attached;
use eniup_fuzz::{promises, snapshot::Snapshot};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|snapshot: Snapshot| {
    let tree = snapshot.tree();
    let Ok(attached) = attached(&tree) else { return };
    promises::every_eni_has_its_own(&attached);
    promises::what_could_not_be_read_is_pending(&tree, &attached);
});

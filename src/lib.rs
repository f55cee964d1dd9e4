//! eniup makes every elastic network interface (ENI) of an EC2 instance work: a packet whose source address belongs to
//! an ENI leaves by that ENI, and attaching an ENI changes nothing for traffic that does not use its addresses.
//!
//! The modules stand in the order in which a run passes through them; `docs/ARCHITECTURE.md` tells the story.
//!
//! ```text
//! imds ─► metadata::Tree ─► eni::Attached ─► desired::Desired ─┐
//!                                                              ├─► plan::Plan ─► netlink::apply ─► plan again: empty
//! netlink::observe ─────────────────────────► net::Observed ───┘
//! ```

pub mod cli;
pub mod config;
pub mod config_files;
pub mod confirm;
pub mod container_network;
pub mod cover;
pub mod desired;
pub mod doctor;
pub mod doubt;
pub mod eni;
pub mod explain;
pub mod fib;
pub mod fights;
pub mod history;
pub mod holdings;
pub mod imds;
pub mod journal;
pub mod layout;
pub mod ledger;
pub mod lock;
pub mod machine_files;
pub mod markers;
pub mod metadata;
pub mod metrics;
pub mod metrics_file;
pub mod net;
pub mod netlink;
pub mod operation;
pub mod place;
pub mod plan;
pub mod policy;
pub mod precedence;
pub mod proof;
pub mod readiness;
pub mod reading;
pub mod reconcile;
pub mod release;
pub mod report;
pub mod rollback;
pub mod run;
pub mod selection;
pub mod service;
pub mod snapshot;
pub mod snapshot_file;
pub mod status;
pub mod stderr;
pub mod tally;
pub mod trial;
pub mod trouble;
pub mod typo;
pub mod undo;
pub mod wait;
pub mod watch;
pub mod whole_file;

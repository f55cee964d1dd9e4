//! What the fuzz targets share: metadata and machines out of a small alphabet, so that much of it clashes, overlaps or
//! agrees; and what eniup promises of whatever it is given.

pub mod machine;
#[path = "../../support/model.rs"]
pub mod model;
pub mod promises;
pub mod snapshot;

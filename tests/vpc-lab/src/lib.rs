//! A VPC in a box.

pub mod imds;
pub mod metadata;
pub mod sandbox;

pub use sandbox::inside;

//! The model of rules and routes against the kernel, and the promise itself as a property of it.

#[path = "../support/mod.rs"]
mod support;

mod kernel;
mod model;
mod promise;
mod vpc;

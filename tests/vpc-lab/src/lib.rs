//! A VPC in a box.

pub mod cable;
pub mod card;
pub mod check;
pub mod cost;
pub mod demo;
pub mod dhcp;
pub mod echo;
pub mod fabric;
pub mod figures;
pub mod flows;
pub mod forward;
pub mod ground;
pub mod imds;
pub mod interposer;
pub mod kernel;
pub mod lab;
pub mod layouts;
pub mod matrix;
pub mod metadata;
pub mod nat;
pub mod node;
pub mod overflow;
pub mod probe;
pub mod sandbox;
pub mod scene;
pub mod script;
pub mod shell;
pub mod storm;
pub mod table;
pub mod trials;
pub mod trouble;
pub mod vigil;
pub mod vpc;
pub mod wire;

pub use sandbox::inside;

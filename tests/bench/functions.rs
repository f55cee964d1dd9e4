//! What deciding costs, function by function: `cargo bench --bench functions`. No kernel and no network.

#[path = "../support/metadata_lab.rs"]
mod lab;
mod machine;
#[path = "../support/model.rs"]
mod model;

use divan::{Bencher, black_box};
use eniup::config::Config;
use eniup::cover::cover;
use eniup::desired::desired;
use eniup::metadata::attached;
use eniup::operation::Operation;
use ipnet::IpNet;
use machine::{Prepared, SIZES, Size};

fn main() {
    divan::main();
}

fn prepared(size: Size) -> Prepared {
    Prepared::new(size).expect("a machine that eniup configures")
}

/// From what the service said to ENIs.
#[divan::bench(args = SIZES)]
fn parse(bencher: Bencher, size: Size) {
    let prepared = prepared(size);
    bencher.bench_local(|| attached(black_box(&prepared.tree)));
}

/// From ENIs to what the kernel should have.
#[divan::bench(args = SIZES)]
fn desire(bencher: Bencher, size: Size) {
    let prepared = prepared(size);
    bencher.bench_local(|| desired(black_box(&prepared.attached), &prepared.config));
}

/// On a machine that has just booted: everything is to be done.
#[divan::bench(args = SIZES)]
fn plan_everything(bencher: Bencher, size: Size) {
    let prepared = prepared(size);
    bencher.bench_local(|| prepared.plan(black_box(&prepared.fresh)));
}

/// On a machine as eniup leaves it.
#[divan::bench(args = SIZES)]
fn plan_nothing(bencher: Bencher, size: Size) {
    let prepared = prepared(size);
    bencher.bench_local(|| prepared.plan(black_box(&prepared.configured)));
}

/// What a plan prints.
#[divan::bench(args = SIZES)]
fn print(bencher: Bencher, size: Size) {
    let prepared = prepared(size);
    let plan = prepared.plan(&prepared.fresh);
    let print = |operation: &Operation| operation.to_string().len();
    bencher.bench_local(|| black_box(&plan).steps.iter().map(|step| print(&step.operation)).sum::<usize>());
}

/// Every other address of a /16 is another ENI's: nothing can be put together.
#[divan::bench(args = [10, 100, 1000, 4000])]
fn cover_of_a_shared_subnet(bencher: Bencher, addresses: u32) {
    let within: IpNet = "10.0.0.0/16".parse().expect("a prefix");
    let nth = |n: u32| IpNet::from(std::net::IpAddr::from((0x0a00_0000 + n).to_be_bytes()));
    let own: Vec<IpNet> = (0..addresses).map(|n| nth(n * 2)).collect();
    let others: Vec<IpNet> = (0..addresses).map(|n| nth(n * 2 + 1)).collect();
    bencher.bench_local(|| cover(black_box(&own), black_box(&others), within));
}

/// Nothing else is in the subnet: one rule.
#[divan::bench(args = [10, 100, 1000, 4000])]
fn cover_of_an_own_subnet(bencher: Bencher, addresses: u32) {
    let within: IpNet = "10.0.0.0/16".parse().expect("a prefix");
    let own: Vec<IpNet> =
        (0..addresses).map(|n| IpNet::from(std::net::IpAddr::from((0x0a00_0000 + n).to_be_bytes()))).collect();
    bencher.bench_local(|| cover(black_box(&own), &[], within));
}

/// The built-in configuration alone.
#[divan::bench]
fn configuration() -> Config {
    Config::default()
}

//! Machines of so many ENIs and addresses, for what is measured without a kernel.
#![allow(dead_code)] // Each benchmark uses its own part.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use eniup::config::Config;
use eniup::desired::{Desired, desired};
use eniup::eni::Attached;
use eniup::metadata::{Tree, attached};
use eniup::net::Observed;
use eniup::plan::{Plan, fresh_machine, plan};
use vpc_lab::metadata::{EniView, render};

use super::lab::{dual_stack_eni, eni, machine};
use super::model::apply;

/// So many ENIs with so many addresses of each family; `15x50`, or `15x50+6` with both families.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size {
    pub enis: u8,
    pub addresses: u8,
    pub is_dual_stack: bool,
}

/// The sizes of the tables: from the smallest machine with eniup to more than any instance type has.
pub const SIZES: [Size; 9] = [
    Size::ipv4(1, 1),
    Size::ipv4(4, 10),
    Size::ipv4(15, 10),
    Size::ipv4(15, 50),
    Size::ipv4(24, 50),
    Size::ipv4(64, 50),
    Size::ipv4(80, 50),
    Size::dual_stack(15, 50),
    Size::dual_stack(80, 50),
];

/// The third byte of an address is its ENI's number.
const MOST_ENIS: u8 = 255;

/// From host 10 on; 250 is the one address more.
const MOST_ADDRESSES: u8 = 240;

impl Size {
    pub const fn ipv4(enis: u8, addresses: u8) -> Size {
        Size { enis, addresses, is_dual_stack: false }
    }

    pub const fn dual_stack(enis: u8, addresses: u8) -> Size {
        Size { is_dual_stack: true, ..Size::ipv4(enis, addresses) }
    }

    /// Each ENI in a subnet of its own, as many of them to a card as the lab's machines have.
    pub fn enis(self) -> Vec<EniView> {
        (0..self.enis).map(|n| self.eni(n)).collect()
    }

    fn eni(self, n: u8) -> EniView {
        let hosts = 10..10 + u16::from(self.addresses);
        let local_ipv4s = hosts.clone().map(|host| Ipv4Addr::new(10, 0, n, host as u8)).collect();
        let slot = dual_stack_eni(n);
        match self.is_dual_stack {
            false => {
                let EniView { network_card, device_number, .. } = slot;
                EniView { local_ipv4s, network_card, device_number, ..eni(n) }
            }
            true => {
                let ipv6s = hosts.map(|host| Ipv6Addr::new(0x2600, 0x1f16, 0x67f, n.into(), 0, 0, 0, host)).collect();
                EniView { local_ipv4s, ipv6s, ..slot }
            }
        }
    }

    /// As it is read when all of it is there.
    pub fn tree(self) -> Tree {
        let leaves = serde_json::json!({ "leaves": render(&machine(self.enis())) });
        Tree::from_json(&leaves.to_string()).expect("what the lab renders is a tree")
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Size { enis, addresses, is_dual_stack } = self;
        write!(f, "{enis}x{addresses}{}", if *is_dual_stack { "+6" } else { "" })
    }
}

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Size> {
        let (rest, is_dual_stack) = match text.strip_suffix("+6") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let (enis, addresses) = rest.split_once('x').context("a size is ENIS x ADDRESSES: 15x50, 15x50+6")?;
        let number = |text: &str, most: u8| {
            let number = text.parse().ok().filter(|number| (1..=most).contains(number));
            number.with_context(|| {
                format!("a machine has 1 to {MOST_ENIS} ENIs with 1 to {MOST_ADDRESSES} addresses each")
            })
        };
        Ok(Size { enis: number(enis, MOST_ENIS)?, addresses: number(addresses, MOST_ADDRESSES)?, is_dual_stack })
    }
}

/// All that lies between metadata and a plan, made once.
pub struct Prepared {
    pub tree: Tree,
    pub attached: Attached,
    pub desired: Desired,
    /// As the machine boots.
    pub fresh: Observed,
    /// As eniup leaves it.
    pub configured: Observed,
    pub config: Config,
}

impl Prepared {
    /// # Errors
    /// The machine is not one that eniup would configure whole: then the figures are of something else.
    pub fn new(size: Size) -> Result<Prepared> {
        let config = Config::default();
        let tree = size.tree();
        let attached = attached(&tree)?;
        ensure!(attached.ready.len() == usize::from(size.enis), "{size}: not every ENI is ready");
        let desired = desired(&attached, &config);
        let fresh = fresh_machine(&attached);
        let mut configured = fresh.clone();
        let primary = attached.primary;
        apply(&mut configured, &plan(&desired, &fresh, primary, &config));
        let prepared = Prepared { tree, attached, desired, fresh, configured, config };
        ensure!(prepared.plan(&prepared.configured).steps.is_empty(), "{size}: the second plan is not empty");
        Ok(prepared)
    }

    pub fn plan(&self, observed: &Observed) -> Plan {
        plan(&self.desired, observed, self.attached.primary, &self.config)
    }
}

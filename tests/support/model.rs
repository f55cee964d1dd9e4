//! A model of a machine to which plans are applied; the fuzz targets take this file in as well.

use eniup::net::Observed;
use eniup::operation::{LinkChange, Operation};
use eniup::plan::Plan;

/// Makes the plan's changes to a model of the machine. An add of what is there and a delete of what is not there are
/// faults of the plan.
pub fn apply(observed: &mut Observed, plan: &Plan) {
    for step in &plan.steps {
        match &step.operation {
            Operation::SetLink { link, change } | Operation::ResetLink { link, change } => {
                let link = observed.links.get_mut(&link.index).expect("a link that is there");
                match change {
                    LinkChange::AcceptRa(value) => {
                        link.ipv6.as_mut().expect("a link with IPv6").accept_ra = *value;
                    }
                    LinkChange::Mtu(mtu) => link.mtu = *mtu,
                    LinkChange::Group(group) => link.group = *group,
                    LinkChange::AddAltname(name) => assert!(link.altnames.insert(name.clone()), "{step}"),
                    LinkChange::DeleteAltname(name) => assert!(link.altnames.remove(name), "{step}"),
                    LinkChange::Up => link.is_up = true,
                    LinkChange::Down => link.is_up = false,
                }
            }
            Operation::AddRoute { link, route } => {
                assert!(observed.routes.insert((link.as_ref().map(|link| link.index), *route)), "{step}");
            }
            Operation::DeleteRoute { link, route } => {
                assert!(observed.routes.remove(&(link.as_ref().map(|link| link.index), *route)), "{step}");
            }
            Operation::AddRule { rule } => assert!(observed.rules.insert(rule.clone()), "{step}"),
            Operation::DeleteRule { rule } => assert!(observed.rules.remove(rule), "{step}"),
            Operation::AddAddress { link, address } => {
                assert!(observed.addresses.insert((link.index, *address)), "{step}");
            }
            Operation::ChangeAddress { link, address } => {
                observed.addresses.retain(|(on, old)| (*on, old.net) != (link.index, address.net));
                observed.addresses.insert((link.index, *address));
            }
            Operation::DeleteAddress { link, address } => {
                assert!(observed.addresses.remove(&(link.index, *address)), "{step}");
            }
        }
    }
}

//! Whether the machine has a container network that attaches and configures ENIs of its own. Which ENIs are its cannot be
//! told from inside: their tags are not in instance metadata.

use crate::markers::Files;
use crate::net::{Mark, Observed};
use crate::policy;

/// A container network, and what shows that it is here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ContainerNetwork {
    pub name: &'static str,
    pub sign: String,
}

const VPC_CNI: &str = "the Amazon VPC CNI";

/// `aws-node` puts its configuration away when it starts and back when it is ready, its program stays; an EKS node has its
/// folder before any of that (amazon-vpc-cni-k8s `cmd/aws-vpc-cni`, amazon-eks-ami).
const SIGNS: [(&str, &str); 5] = [
    (VPC_CNI, "/etc/cni/net.d/10-aws.conflist"),
    (VPC_CNI, "/opt/cni/bin/aws-cni"),
    ("Amazon EKS", "/etc/eks"),
    ("Cilium", "/etc/cni/net.d/05-cilium.conflist"),
    ("Amazon ECS", "/etc/ecs/ecs.config"),
];

/// Of the Amazon VPC CNI's: what has its mark goes to `main` (amazon-vpc-cni-k8s, `pkg/networkutils`).
const CNI_MARK: Mark = Mark { value: 0x80, mask: 0x80 };

/// The first of which there is a sign.
pub fn container_network(files: &Files, observed: &Observed) -> Option<ContainerNetwork> {
    let file = SIGNS.into_iter().find(|(_, path)| files.has(path));
    let file = file.map(|(name, path)| ContainerNetwork { name, sign: path.into() });
    file.or_else(|| {
        let is_its = |rule: &&crate::net::Rule| rule.mark == Some(CNI_MARK) && rule.table == policy::MAIN_TABLE;
        let rule = observed.rules.iter().find(is_its)?;
        Some(ContainerNetwork { name: VPC_CNI, sign: format!("its rule of priority {}", rule.priority) })
    })
}

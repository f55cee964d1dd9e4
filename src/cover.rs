//! Few rules: the smallest set of prefixes that covers some addresses and none of some others.
//! Which ENI's, and at which priority, is for `desired`.

use ipnet::IpNet;

use crate::net::{Family, HasFamily};

/// The smallest set of disjoint prefixes inside `within` that covers every member of `own` and nothing of `others`.
/// Addresses of neither are free to be covered. All must be of one family; members outside `within` stand for themselves.
///
/// It is found by descending from `within`: a prefix without any of `others` is taken whole, and no larger one could be.
pub fn cover(own: &[IpNet], others: &[IpNet], within: IpNet) -> Vec<IpNet> {
    let (inside, outside): (Vec<IpNet>, Vec<IpNet>) = own.iter().partition(|source| within.contains(*source));
    let others: Vec<IpNet> = others.iter().filter(|other| overlap(other, &within)).copied().collect();
    let mut prefixes = outside;
    descend(&inside, &others, within, &mut prefixes);
    prefixes.sort();
    prefixes.dedup();
    prefixes
}

/// Like [`cover`], but covers nothing that is not in `own`: for when it is not known what the others have.
pub fn exact(own: &[IpNet]) -> Vec<IpNet> {
    IpNet::aggregate(&own.to_vec())
}

fn descend(own: &[IpNet], others: &[IpNet], within: IpNet, prefixes: &mut Vec<IpNet>) {
    if own.is_empty() {
        return;
    }
    if others.is_empty() || own.contains(&within) || within.prefix_len() == within.family().bits() {
        prefixes.push(within);
        return;
    }
    for half in halves(within) {
        let own: Vec<IpNet> = own.iter().filter(|source| half.contains(*source)).copied().collect();
        let others: Vec<IpNet> = others.iter().filter(|other| overlap(other, &half)).copied().collect();
        descend(&own, &others, half, prefixes);
    }
}

fn halves(prefix: IpNet) -> Vec<IpNet> {
    prefix.subnets(prefix.prefix_len() + 1).map(Iterator::collect).unwrap_or_default()
}

/// Whether the two have an address in common.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// The family's sources of a list.
pub fn of_family(sources: &[IpNet], family: Family) -> Vec<IpNet> {
    sources.iter().filter(|source| source.family() == family).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn an_eni_alone_in_its_subnet_needs_one_prefix() {
        let own = nets(&["10.0.1.5/32", "10.0.1.77/32"]);
        assert_eq!(cover(&own, &[], "10.0.1.0/24".parse().unwrap()), nets(&["10.0.1.0/24"]));
    }

    #[test]
    fn neighbours_are_told_apart_by_their_last_bit() {
        let own = nets(&["10.0.1.4/32"]);
        let others = nets(&["10.0.1.5/32"]);
        assert_eq!(cover(&own, &others, "10.0.1.0/24".parse().unwrap()), nets(&["10.0.1.4/32"]));
    }

    #[test]
    fn exact_merges_full_halves_and_nothing_else() {
        let own = nets(&["10.0.1.4/32", "10.0.1.5/32", "10.0.1.7/32"]);
        assert_eq!(exact(&own), nets(&["10.0.1.4/31", "10.0.1.7/32"]));
    }

    const SUBNETS: [&str; 6] =
        ["10.9.8.0/24", "10.9.0.0/16", "10.9.8.48/28", "2001:db8:9:8::/64", "2001:db8:9::/56", "2001:db8:9:8::/124"];

    /// What is inside a subnet, single addresses and delegated prefixes, given to "own" or "other"; none overlap.
    fn split_subnet() -> impl Strategy<Value = (IpNet, Vec<IpNet>, Vec<IpNet>)> {
        let sources = prop::collection::vec((any::<u128>(), 0..5u8, 0..2usize), 0..200);
        (prop::sample::select(&SUBNETS[..]), sources).prop_map(|(subnet, sources)| {
            let subnet: IpNet = subnet.parse().unwrap();
            let mut split = [Vec::new(), Vec::new()];
            for (bits, rank, owner) in sources {
                let source = inside(subnet, bits, rank);
                if !split.iter().flatten().any(|taken| overlap(taken, &source)) {
                    split[owner].push(source);
                }
            }
            let [own, others] = split;
            (subnet, own, others)
        })
    }

    /// Addresses mostly, near to each other half of the time.
    fn inside(subnet: IpNet, bits: u128, rank: u8) -> IpNet {
        let width = subnet.family().bits();
        let free = u32::from(width - subnet.prefix_len());
        let host = if bits & 1 == 0 { bits >> 1 & 0xff } else { bits >> 1 } & ((1 << free) - 1);
        let delegated = if width == 32 { 28 } else { 80 };
        let length = if rank == 0 && delegated > subnet.prefix_len() { delegated } else { width };
        let address: std::net::IpAddr = match subnet.network() {
            std::net::IpAddr::V4(base) => std::net::Ipv4Addr::from(u32::from(base) | host as u32).into(),
            std::net::IpAddr::V6(base) => std::net::Ipv6Addr::from(u128::from(base) | host).into(),
        };
        IpNet::new(address, length).unwrap().trunc()
    }

    proptest! {
        #[test]
        fn a_cover_holds_all_of_its_own_and_nothing_of_the_others((subnet, own, others) in split_subnet()) {
            let prefixes = cover(&own, &others, subnet);
            for source in &own {
                prop_assert_eq!(prefixes.iter().filter(|prefix| prefix.contains(source)).count(), 1);
            }
            for other in &others {
                prop_assert!(!prefixes.iter().any(|prefix| overlap(prefix, other)));
            }
            // Each is as large as can be: its parent would hold one of the others, or is the subnet's own parent. None
            // overlap, so no smaller set does it.
            for prefix in &prefixes {
                let parent = prefix.supernet().unwrap();
                prop_assert!(parent.prefix_len() < subnet.prefix_len() || others.iter().any(|other| overlap(&parent, other)));
            }
        }
    }
}

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

    /// Hosts of 10.9.8.0/24 given to "own", "other" or neither.
    fn split_hosts() -> impl Strategy<Value = (Vec<IpNet>, Vec<IpNet>)> {
        prop::collection::vec(0..3u8, 256).prop_map(|owners| {
            let host = |n: usize| IpNet::from(std::net::IpAddr::from([10, 9, 8, n as u8]));
            let of =
                |owner: u8| owners.iter().enumerate().filter(|(_, o)| **o == owner).map(|(n, _)| host(n)).collect();
            (of(1), of(2))
        })
    }

    proptest! {
        #[test]
        fn a_cover_holds_all_of_its_own_and_nothing_of_the_others((own, others) in split_hosts()) {
            let prefixes = cover(&own, &others, "10.9.8.0/24".parse().unwrap());
            for source in &own {
                prop_assert_eq!(prefixes.iter().filter(|prefix| prefix.contains(source)).count(), 1);
            }
            for other in &others {
                prop_assert!(!prefixes.iter().any(|prefix| prefix.contains(other)));
            }
            // Each is as large as can be: its parent would hold one of the others, or is the subnet's own parent.
            for prefix in &prefixes {
                let parent = prefix.supernet().unwrap();
                prop_assert!(parent.prefix_len() < 24 || others.iter().any(|other| parent.contains(other)));
            }
        }
    }
}

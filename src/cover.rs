//! Few rules: the smallest set of prefixes that covers some addresses and none of some others.
//! Which ENI's, and at which priority, is for `desired`.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::net::{Family, HasFamily};

/// The smallest set of disjoint prefixes inside `within` that covers every member of `own` and nothing of `others`.
/// Addresses of neither are free to be covered. All must be of one family; members outside `within` stand for themselves.
///
/// Each member is widened until one more bit less would take in one of `others`: what shares the longest way with it among
/// those is next to it when they are sorted, so a thousand neighbours cost no more than a few.
pub fn cover(own: &[IpNet], others: &[IpNet], within: IpNet) -> Vec<IpNet> {
    let (inside, outside): (Vec<IpNet>, Vec<IpNet>) = own.iter().partition(|source| within.contains(*source));
    let near: Vec<IpNet> = others.iter().filter(|other| overlap(other, &within)).copied().collect();
    // Disjoint, or one that contains another would stand between it and its neighbours.
    let mut others = IpNet::aggregate(&near);
    others.sort();
    let widened: Vec<IpNet> = inside.into_iter().map(|source| widened(source, &others, within)).collect();
    let is_widest = |prefix: &IpNet| !widened.iter().any(|wider| wider != prefix && wider.contains(prefix));
    let mut prefixes: Vec<IpNet> = widened.iter().copied().filter(is_widest).chain(outside).collect();
    prefixes.sort();
    prefixes.dedup();
    prefixes
}

/// Like [`cover`], but covers nothing that is not in `own`: for when it is not known what the others have.
pub fn exact(own: &[IpNet]) -> Vec<IpNet> {
    IpNet::aggregate(&own.to_vec())
}

/// The widest prefix around a source that is in `within` and has nothing of `others`, which are sorted and disjoint; the source
/// itself if one of them has a part of it.
fn widened(source: IpNet, others: &[IpNet], within: IpNet) -> IpNet {
    let after = others.partition_point(|other| other.network() <= source.network());
    let neighbours = || others[after.saturating_sub(1)..].iter().take(2);
    if neighbours().any(|other| overlap(other, &source)) {
        return source;
    }
    let shared = neighbours().map(|other| shared_bits(source.network(), other.network())).max();
    let length = shared.map_or(0, |shared| shared + 1).clamp(within.prefix_len(), source.prefix_len());
    IpNet::new(source.network(), length).map_or(source, |net| net.trunc())
}

/// How many bits two addresses of one family have in common, from the left.
fn shared_bits(a: IpAddr, b: IpAddr) -> u8 {
    let bits = match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u32::from(a) ^ u32::from(b)).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a) ^ u128::from(b)).leading_zeros(),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => 0,
    };
    bits as u8
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

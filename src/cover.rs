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
    let mut widened: Vec<IpNet> = inside.into_iter().map(|source| widened(source, &others, within)).collect();
    widened.sort();
    // Sorted, a prefix comes right after the one it is inside of, if there is one: prefixes nest or are disjoint.
    widened.dedup_by(|prefix, wider| wider.contains(&*prefix));
    let mut prefixes: Vec<IpNet> = widened.into_iter().chain(outside).collect();
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

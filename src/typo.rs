//! What somebody meant who typed a name that is not there.

/// The one that is nearest, if it is so near that a slip of the fingers explains it: two letters at most, and no more than every
/// third one.
pub fn meant<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |name: &str| strsim::osa_distance(typed, name);
    let nearest = known.into_iter().min_by_key(|name| distance(name))?;
    (distance(nearest) <= 2.min(nearest.chars().count() / 3)).then_some(nearest)
}

/// What is said of it.
pub fn hint<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    meant(typed, known).map_or_else(String::new, |name| format!(" (did you mean {name}?)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_another_name_is_not() {
        let known = ["eni-0123456789abcdef0", "eni-0fedcba9876543210", "ens5", "enp40s0"];
        for (typed, expected) in [
            ("eni-0123456789abcdfe0", Some("eni-0123456789abcdef0")),
            ("eni-123456789abcdef0", Some("eni-0123456789abcdef0")),
            ("ens6", Some("ens5")),
            ("en5", Some("ens5")),
            ("enp4s0", Some("enp40s0")),
            ("eth0", None),
            ("eni-0aaaaaaaaaaaaaaa0", None),
            ("", None),
        ] {
            assert_eq!(meant(typed, known), expected, "{typed}");
        }
    }
}

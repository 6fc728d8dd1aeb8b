//! Finds the addresses of Debian's archive for this machine: from apt's own sources.

use super::{DebianError, MIRROR_VARIABLE};
use crate::command;

/// The fields that apt prints of each source: release, component, the archive's label (known once
/// its lists are fetched), address.
const FORMAT: &str = "$(RELEASE)|$(COMPONENT)|$(LABEL)|$(REPO_URI)";
/// The labels of Debian's archive and of its security archive. The latter's suites end with
/// `SECURITY`, and so does its address in most cases.
const LABEL: &str = "Debian";
const SECURITY_LABEL: &str = "Debian-Security";
const SECURITY: &str = "-security";

/// Returns addresses without a trailing slash, the most likely first. Downloads are checked by
/// signature or hash, so a wrong address costs only time.
pub(super) fn mirrors(suite: &str) -> Result<Vec<String>, DebianError> {
    if let Some(mirror) = std::env::var(MIRROR_VARIABLE)
        .ok()
        .filter(|named| !named.is_empty())
    {
        let mirror = mirror.trim_end_matches('/');
        let archive = match suite.ends_with(SECURITY) {
            true => format!("{mirror}{SECURITY}"),
            false => mirror.to_owned(),
        };
        return Ok(vec![archive]);
    }
    let mut apt = command::tool("apt-get");
    apt.args(["indextargets", "--format", FORMAT, "Created-By: Packages"]);
    let found = of_targets(&command::output(&mut apt)?, suite);
    if found.is_empty() {
        return Err(DebianError::NoMirror);
    }
    Ok(found)
}

fn of_targets(targets: &str, suite: &str) -> Vec<String> {
    let Some(release) = suite.strip_suffix(SECURITY) else {
        return labelled(targets, LABEL, suite);
    };
    let mut found = labelled(targets, SECURITY_LABEL, suite);
    // On a machine without security updates, their archive is mostly beside the main one.
    let beside = labelled(targets, LABEL, release).into_iter();
    for uri in beside.map(|uri| format!("{uri}{SECURITY}")) {
        if !found.contains(&uri) {
            found.push(uri);
        }
    }
    found
}

fn labelled(targets: &str, wanted: &str, suite: &str) -> Vec<String> {
    let mut found: Vec<(u8, &str)> = targets
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('|');
            let (release, component) = (fields.next()?, fields.next()?);
            let (label, uri) = (fields.next()?, fields.next()?);
            // apt prints a field that it does not know as its placeholder.
            let known = !label.starts_with("$(") && !label.is_empty();
            let rank = match (label == wanted, known, release == suite) {
                (true, _, true) => 0,
                (true, _, false) => 1,
                (false, false, true) => 2,
                _ => return None,
            };
            (component == "main").then_some((rank, uri.trim_end_matches('/')))
        })
        .collect();
    // The sort is stable: equal ranks keep apt's order.
    found.sort_by_key(|(rank, _)| *rank);
    let mut uris: Vec<String> = Vec::new();
    for (_, uri) in found {
        if !uris.iter().any(|known| known == uri) {
            uris.push(uri.to_owned());
        }
    }
    uris
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_s_own_source_is_found_and_no_other() {
        let targets = "\
bookworm|main|Vendor|https://vendor.example/debian/
bookworm-security|main|Debian-Security|http://mirror.example/debian-security/
bookworm-updates|main|Debian|http://mirror.example/debian/
bookworm|contrib|Debian|http://other.example/debian/
bookworm|main|Debian|http://mirror.example/debian/
nodistro|main|$(LABEL)|https://node.example/node/
";
        assert_eq!(
            of_targets(targets, "bookworm"),
            ["http://mirror.example/debian"]
        );
        // All suites share one pool.
        assert_eq!(
            of_targets(targets, "trixie"),
            ["http://mirror.example/debian"]
        );
        assert!(of_targets("", "bookworm").is_empty());
    }

    #[test]
    fn security_updates_are_in_an_archive_of_their_own() {
        let main = "bookworm|main|Debian|http://mirror.example/debian/\n";
        let security =
            "bookworm-security|main|Debian-Security|http://other.example/debian-security/\n";
        let beside = "http://mirror.example/debian-security";
        assert_eq!(of_targets(main, "bookworm-security"), [beside]);
        assert_eq!(
            of_targets(&format!("{main}{security}"), "bookworm-security"),
            ["http://other.example/debian-security", beside]
        );
        assert!(of_targets(security, "bookworm").is_empty());
    }

    #[test]
    fn before_the_first_update_the_release_decides() {
        let targets = "\
bookworm|main|$(LABEL)|http://mirror.example/debian/
nodistro|main|$(LABEL)|https://node.example/node/
";
        assert_eq!(
            of_targets(targets, "bookworm"),
            ["http://mirror.example/debian"]
        );
        assert!(of_targets(targets, "trixie").is_empty());
    }
}

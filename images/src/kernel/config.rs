//! Compares the configuration that Kconfig made with the requested one.
//!
//! `olddefconfig` silently drops options that it does not know or that have unmet dependencies.
//! Without this check, a missing console or missing cgroups would show only much later, in a guest.

use std::collections::HashMap;
use std::fmt;

/// An option with another value than requested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    option: String,
    asked: String,
    found: Option<String>,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            option,
            asked,
            found,
        } = self;
        match found {
            Some(found) => write!(f, "{option} should be {asked} and is {found}"),
            None => write!(f, "{option} should be {asked} and is not set"),
        }
    }
}

/// Parses a line: `CONFIG_X=value` gives the value, `# CONFIG_X is not set` gives "n". Other lines
/// are comments.
fn parse(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    if let Some(comment) = line.strip_prefix("# ") {
        return comment
            .strip_suffix(" is not set")
            .filter(|option| option.starts_with("CONFIG_"))
            .map(|option| (option, "n"));
    }
    line.split_once('=')
        .filter(|(option, _)| option.starts_with("CONFIG_"))
}

/// Returns every option of `asked` that `made` sets differently. An option that `made` does not
/// mention is off.
pub(super) fn check(asked: &str, made: &str) -> Vec<Wrong> {
    let made: HashMap<&str, &str> = made.lines().filter_map(parse).collect();
    asked
        .lines()
        .filter_map(parse)
        .filter_map(|(option, asked)| {
            let found = made.get(option).copied();
            (found.unwrap_or("n") != asked).then(|| Wrong {
                option: option.to_owned(),
                asked: asked.to_owned(),
                found: found.map(str::to_owned),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MADE: &str = "\
#
# Automatically generated file; DO NOT EDIT.
#
CONFIG_SMP=y
CONFIG_HZ=100
# CONFIG_PCI is not set
CONFIG_VT=y
CONFIG_NAME=\"a=b\"
";

    fn wrong(asked: &str) -> Vec<String> {
        check(asked, MADE).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_as_asked_passes() {
        let asked = "# a comment\n\nCONFIG_SMP=y\nCONFIG_HZ=100\n# CONFIG_PCI is not set\n\
                     # CONFIG_UNHEARD_OF is not set\nCONFIG_NAME=\"a=b\"\n";
        assert_eq!(wrong(asked), [""; 0]);
    }

    #[test]
    fn what_kconfig_dropped_or_changed_is_named() {
        assert_eq!(
            wrong("CONFIG_GONE=y\nCONFIG_PCI=y\nCONFIG_HZ=1000\n# CONFIG_VT is not set\n"),
            [
                "CONFIG_GONE should be y and is not set",
                "CONFIG_PCI should be y and is n",
                "CONFIG_HZ should be 1000 and is 100",
                "CONFIG_VT should be n and is y",
            ]
        );
    }

    #[test]
    fn our_fragment_asks_for_each_option_once_and_leaves_no_line_unread() {
        let mut seen = HashMap::new();
        for line in super::super::CONFIG.lines() {
            match parse(line) {
                Some((option, value)) => {
                    assert_eq!(seen.insert(option, value), None, "{option} twice");
                }
                None => assert!(
                    line.is_empty() || line.starts_with('#') && !line.contains("CONFIG_"),
                    "not understood: {line}"
                ),
            }
        }
        for needed in [
            "CONFIG_CGROUP_PIDS",
            "CONFIG_MEMCG",
            "CONFIG_VIRTIO_VSOCKETS",
        ] {
            assert_eq!(seen.get(needed), Some(&"y"));
        }
    }
}

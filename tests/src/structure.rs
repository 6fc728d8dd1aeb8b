//! The structure of this repository: which crate depends on which, and which modules of a crate
//! import each other in a circle.
//!
//! A module here is one below a crate's root, with all that is below it. Imports are found in the
//! text (`crate::name`, `super::name`), those of tests apart; a macro that writes one is not seen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// By importing module: the modules that it imports.
pub type Imports = BTreeMap<String, BTreeSet<String>>;

/// The root of the workspace.
#[must_use]
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// By crate of this workspace: its folder, and the crates of ours that it is built with.
#[must_use]
pub fn crates() -> BTreeMap<String, (PathBuf, BTreeSet<String>)> {
    let folders = fs::read_dir(workspace())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let manifests = folders.filter_map(|folder| {
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).ok()?;
        Some((folder, manifest))
    });
    manifests
        .map(|(folder, manifest)| {
            let name = manifest
                .lines()
                .find_map(|line| line.strip_prefix("name = "));
            let name = name.unwrap().trim_matches('"').to_owned();
            (name, (folder, built_with(&manifest)))
        })
        .collect()
}

fn built_with(manifest: &str) -> BTreeSet<String> {
    let mut section = "";
    let mut found = BTreeSet::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line;
        }
        let name = line.split(['.', ' ', '=']).next().unwrap_or("");
        // Those of one kind of machine, too.
        let counts = section.ends_with("dependencies]") && !section.ends_with("dev-dependencies]");
        if counts && name.starts_with("hearth-") {
            found.insert(name.to_owned());
        }
    }
    found
}

/// What the modules of the library in `source` import of each other.
#[must_use]
pub fn imports(source: &Path) -> Imports {
    let mut all = Imports::new();
    read(source, source, &mut vec![], &mut all);
    // Of the words behind `crate::`, only modules.
    let modules: BTreeSet<_> = all.keys().cloned().collect();
    for (module, imported) in &mut all {
        imported.retain(|name| name != module && modules.contains(name));
    }
    all
}

/// Reads the files of `folder`, which is the module at `path`.
fn read(source: &Path, folder: &Path, path: &mut Vec<String>, all: &mut Imports) {
    let own = ["lib.rs", "mod.rs"].map(|name| fs::read_to_string(folder.join(name)));
    let own = own.into_iter().find_map(Result::ok).unwrap_or_default();
    let tests = modules_of_tests(&own);
    if let Some(module) = path.first() {
        let imported = all.entry(module.clone()).or_default();
        imported.extend(imported_by(&own, path.len()));
    }
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap().path();
        let name = entry.file_stem().unwrap().to_str().unwrap().to_owned();
        let is_root = matches!(name.as_str(), "lib" | "mod" | "main");
        let is_program = folder == source && name == "bin";
        if is_root || is_program || tests.contains(&name) {
            continue;
        }
        path.push(name);
        if entry.is_dir() {
            read(source, &entry, path, all);
        } else if let Ok(text) = fs::read_to_string(&entry) {
            let imported = all.entry(path[0].clone()).or_default();
            imported.extend(imported_by(&text, path.len()));
        }
        path.pop();
    }
}

/// Modules that are compiled for tests alone.
fn modules_of_tests(text: &str) -> BTreeSet<String> {
    let lines = text.lines().zip(text.lines().skip(1));
    let marked = lines.filter(|(above, _)| above.starts_with("#[cfg(") && above.contains("test"));
    let names = marked.filter_map(|(_, line)| line.split("mod ").nth(1)?.strip_suffix(';'));
    names.map(str::to_owned).collect()
}

/// The names below the crate's root that a file imports, whose module is so deep.
fn imported_by(text: &str, depth: usize) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or("");
    let lines = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let code: Vec<&str> = lines.collect();
    let code = code.join("\n");
    let root = ["crate::".to_owned(), "super::".repeat(depth)];
    let mut names = BTreeSet::new();
    for root in root {
        for after in code.split(&root).skip(1) {
            // A list of names, each of which may be a path with a list of its own.
            match after.strip_prefix('{') {
                Some(list) => names.extend(heads(list)),
                None => names.extend(head(after)),
            }
        }
    }
    names
}

fn head(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
    Some(text[..end].to_owned())
}

/// The first name of each path of a list, up to the end of the list.
fn heads(list: &str) -> Vec<String> {
    let (mut depth, mut item, mut names) = (0, String::new(), vec![]);
    for c in list.chars() {
        match (c, depth) {
            ('}', 0) => break,
            (',', 0) => names.push(std::mem::take(&mut item)),
            ('{', _) => depth += 1,
            ('}', _) => depth -= 1,
            (_, 0) => item.push(c),
            _ => {}
        }
    }
    names.push(item);
    let heads = names
        .iter()
        .filter_map(|path| path.trim().split("::").next());
    heads.map(str::to_owned).collect()
}

/// Imports that are part of a circle: the imported module imports the importing one, or another
/// that does so in the end.
#[must_use]
pub fn circular(imports: &Imports) -> BTreeSet<(String, String)> {
    let reaches = |from: &str, to: &str| {
        let (mut seen, mut left) = (BTreeSet::new(), vec![from]);
        while let Some(at) = left.pop() {
            if at == to {
                return true;
            }
            if seen.insert(at) {
                left.extend(imports.get(at).into_iter().flatten().map(String::as_str));
            }
        }
        false
    };
    let edges = imports
        .iter()
        .flat_map(|(from, all)| all.iter().map(move |to| (from, to)));
    let circular = edges.filter(|(from, to)| reaches(to, from));
    circular
        .map(|(from, to)| (from.clone(), to.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_are_found_however_they_are_written() {
        let text = "use crate::one;\nuse crate::{two::X, three, four::{Y, five}};\n// crate::no\n\
                    fn f() { crate::six::g(); super::super::seven::h(); super::eight(); }\n\
                    #[cfg(test)]\nmod tests {\n    use crate::nine;\n}\n";
        let found = imported_by(text, 2);
        let wanted = ["four", "one", "seven", "six", "three", "two"].map(str::to_owned);
        assert_eq!(found, BTreeSet::from(wanted));
    }

    #[test]
    fn what_is_in_a_circle_is_told_from_what_leads_there() {
        let imports = [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")];
        let mut all = Imports::new();
        for (from, to) in imports {
            all.entry(from.into()).or_default().insert(to.into());
        }
        let wanted = [("b", "c"), ("c", "b")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(circular(&all), BTreeSet::from(wanted));
    }
}

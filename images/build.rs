//! Embeds the agent's sources in this crate, as a workspace that has the agent alone, so that an
//! installed program can build the matching agent without a checkout. There is no list of the files
//! to maintain: every file in the agent's source directory is included.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use toml::{Table, Value};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const AGENT: &str = "hearth-agent";
/// The agent's sources, without the workspace's manifest and lock: the agent gets a part of each.
const SOURCES: [&str; 3] = ["agent/Cargo.toml", "agent/build.rs", "agent/src"];
/// The profile that the agent is built with, and the profile that it inherits from.
const PROFILES: [&str; 2] = ["guest", "release"];

fn main() -> Result<()> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = here.parent().ok_or("there is nothing above this crate")?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo::rerun-if-changed=build.rs");
    for source in SOURCES.iter().chain(&["Cargo.toml", "Cargo.lock"]) {
        let path = workspace.join(source);
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let mut files = BTreeMap::new();
    for name in SOURCES {
        collect(&workspace.join(name), name, &mut files)?;
    }
    for (name, table) in [
        ("Cargo.toml", manifest(workspace)?),
        ("Cargo.lock", lock(workspace)?),
    ] {
        let path = out.join(name);
        fs::write(&path, toml::to_string(&table)?)?;
        files.insert(name.to_owned(), path);
    }
    let list: String = files
        .iter()
        .map(|(name, path)| format!("({name:?}, include_bytes!({path:?})),\n"))
        .collect();
    fs::write(out.join("agent-sources.rs"), format!("&[\n{list}]\n"))?;
    Ok(())
}

fn collect(path: &Path, name: &str, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.insert(name.to_owned(), path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let part = entry.file_name().into_string();
        let part = part.map_err(|name| format!("{} is no UTF-8", name.display()))?;
        collect(&entry.path(), &format!("{name}/{part}"), files)?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Table> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text.parse()?)
}

/// Returns the parts of the workspace's manifest that concern the agent.
fn manifest(workspace: &Path) -> Result<Table> {
    let mut whole = read(&workspace.join("Cargo.toml"))?;
    let agent = read(&workspace.join("agent/Cargo.toml"))?;
    let inherited: BTreeSet<&str> = ["dependencies", "dev-dependencies", "build-dependencies"]
        .iter()
        .filter_map(|kind| agent.get(*kind)?.as_table())
        .flatten()
        .filter(|(_, asked)| asked.get("workspace") == Some(&Value::Boolean(true)))
        .map(|(name, _)| name.as_str())
        .collect();
    let part = |table: &mut Table, name: &str| -> Result<Table> {
        match table.remove(name) {
            Some(Value::Table(part)) => Ok(part),
            _ => Err(format!("the workspace's manifest has no {name}").into()),
        }
    };
    let mut root = part(&mut whole, "workspace")?;
    let mut dependencies = part(&mut root, "dependencies")?;
    dependencies.retain(|name, _| inherited.contains::<str>(name));
    let mut profiles = part(&mut whole, "profile")?;
    profiles.retain(|name, _| PROFILES.contains(&name));
    root.remove("exclude");
    root.insert("members".to_owned(), Value::Array(vec!["agent".into()]));
    root.insert("dependencies".to_owned(), dependencies.into());
    Ok(Table::from_iter([
        ("workspace".to_owned(), root.into()),
        ("profile".to_owned(), profiles.into()),
    ]))
}

/// Returns the packages of the workspace's lock that the agent needs. They include dependencies of
/// features that only other members of the workspace enable.
fn lock(workspace: &Path) -> Result<Table> {
    let mut lock = read(&workspace.join("Cargo.lock"))?;
    let Some(Value::Array(mut packages)) = lock.remove("package") else {
        return Err("the workspace's lock has no packages".into());
    };
    let text = |package: &Value, key: &str| Some(package.get(key)?.as_str()?.to_owned());
    // A dependency is written as `NAME`, or as `NAME VERSION` where several versions are locked.
    let is = |package: &Value, wanted: &str| {
        let mut words = wanted.split(' ');
        text(package, "name").as_deref() == words.next()
            && words
                .next()
                .is_none_or(|version| text(package, "version").as_deref() == Some(version))
    };
    let mut wanted = vec![AGENT.to_owned()];
    let mut needed = BTreeSet::new();
    while let Some(name) = wanted.pop() {
        let found = packages.iter().position(|package| is(package, &name));
        let found = found.ok_or_else(|| format!("the workspace's lock has no {name}"))?;
        if needed.insert(found) {
            let needs = packages
                .get(found)
                .and_then(|found| found.get("dependencies"));
            let needs = needs.and_then(Value::as_array).into_iter().flatten();
            wanted.extend(needs.filter_map(|name| Some(name.as_str()?.to_owned())));
        }
    }
    let mut at = 0..;
    packages.retain(|_| at.next().is_some_and(|at| needed.contains(&at)));
    lock.insert("package".to_owned(), Value::Array(packages));
    Ok(lock)
}

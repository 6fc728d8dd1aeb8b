//! The fields of a recipe as in its file.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::cache::Key;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Text {
    pub(crate) name: String,
    pub(crate) suite: String,
    pub(crate) packages: Vec<String>,
    #[serde(default)]
    pub(crate) leave_out: Vec<String>,
    #[serde(default)]
    pub(crate) applets: bool,
    #[serde(default)]
    pub(crate) remove: Vec<String>,
    #[serde(default)]
    pub(crate) python: Vec<String>,
    #[serde(default)]
    pub(crate) commands: Vec<String>,
    #[serde(default, rename = "file")]
    pub(crate) files: Vec<FileText>,
    #[serde(default, rename = "user")]
    pub(crate) users: Vec<User>,
}

/// A file that the recipe adds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileText {
    pub(crate) path: String,
    pub(crate) content: Option<String>,
    pub(super) source: Option<PathBuf>,
    pub(crate) link: Option<String>,
    #[serde(default = "readable")]
    pub(crate) mode: u32,
    /// The content of the file that `source` names.
    #[serde(skip)]
    pub(crate) bytes: Vec<u8>,
}

fn readable() -> u32 {
    0o644
}

/// A user in addition to root, with a group of the same name and number.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u16,
    #[serde(default = "shell")]
    pub(crate) shell: String,
}

fn shell() -> String {
    "/bin/sh".to_owned()
}

impl User {
    pub(crate) fn home(&self) -> String {
        format!("/home/{}", self.name)
    }
}

impl Text {
    /// Returns the hash of all fields that decide which packages are used.
    pub(crate) fn asked(&self) -> String {
        let lists = [&self.packages, &self.leave_out, &self.python];
        let key = Key::default().part("suite", self.suite.as_bytes());
        let key = lists.iter().fold(key, |key, list| {
            list.iter().fold(key.part("list", b""), |key, word| {
                key.part("", word.as_bytes())
            })
        });
        key.name()
    }

    /// Returns the hash of all fields that decide what is done with the packages.
    pub(crate) fn key(&self) -> Key {
        let key = Key::default()
            .part("name", self.name.as_bytes())
            .part("applets", &[self.applets.into()]);
        let words = |key: Key, name: &str, list: &[String]| {
            list.iter()
                .fold(key, |key, word| key.part(name, word.as_bytes()))
        };
        let key = words(key, "remove", &self.remove);
        let key = words(key, "command", &self.commands);
        let key = self.files.iter().fold(key, |key, file| {
            key.part("path", file.path.as_bytes())
                .part("mode", &file.mode.to_le_bytes())
                .part("link", file.link.as_deref().unwrap_or_default().as_bytes())
                .part("content", file.content())
        });
        self.users.iter().fold(key, |key, user| {
            key.part("user", user.name.as_bytes())
                .part("uid", &user.uid.to_le_bytes())
                .part("shell", user.shell.as_bytes())
        })
    }

    /// Returns the first problem of the recipe.
    pub(super) fn problem(&self) -> Option<String> {
        let is_name = |text: &str| {
            let letters =
                |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
            !text.is_empty() && text.chars().all(letters) && !text.starts_with('-')
        };
        if !is_name(&self.name) || ["kernel", "base"].contains(&self.name.as_str()) {
            return Some(format!(
                "its name {:?}: use lower-case letters, digits, - and _; kernel and base are taken",
                self.name
            ));
        }
        let is_word = |text: &&String| {
            let letters = |c: char| c.is_ascii_alphanumeric() || "+-.:~=".contains(c);
            !text.is_empty() && text.chars().all(letters) && !text.starts_with('-')
        };
        let mut words = self.packages.iter().chain(&self.leave_out);
        if let Some(word) = words
            .find(|word| !is_word(word))
            .or(Some(&self.suite).filter(|s| !is_word(s)))
        {
            return Some(format!(
                "{word:?}: not the name of a Debian package or suite"
            ));
        }
        let files = self.files.iter().map(|file| &file.path);
        if let Some(path) = files.chain(&self.remove).find(|path| !is_path(path)) {
            return Some(format!("{path:?}: give a path from / without . and .."));
        }
        let one = |file: &&FileText| {
            let given = [
                file.content.is_some(),
                file.source.is_some(),
                file.link.is_some(),
            ];
            given.iter().filter(|given| **given).count() == 1
        };
        if let Some(file) = self.files.iter().find(|file| !one(file)) {
            return Some(format!(
                "{}: give one of content, source and link",
                file.path
            ));
        }
        if let Some(file) = self.files.iter().find(|file| file.mode > 0o7777) {
            return Some(format!(
                "{}: no mode of a file is {:o}",
                file.path, file.mode
            ));
        }
        let bad = |user: &&User| !is_name(&user.name) || user.uid == 0 || !is_path(&user.shell);
        self.users.iter().find(bad).map(|user| {
            format!(
                "user {:?}: give a name of lower-case letters, a uid from 1 up, and a path as shell",
                user.name
            )
        })
    }
}

impl FileText {
    /// Returns the content to write.
    pub(crate) fn content(&self) -> &[u8] {
        match &self.content {
            Some(content) => content.as_bytes(),
            None => &self.bytes,
        }
    }
}

/// Returns whether the path is absolute, names something below the root, and has no `..`, newline
/// or colon.
fn is_path(path: &str) -> bool {
    let mut components = Path::new(path).components();
    components.next() == Some(Component::RootDir)
        && components.clone().next().is_some()
        && components.all(|part| matches!(part, Component::Normal(_)))
        && !path.contains(['\n', ':'])
}

//! The code to run: its language, and where it comes from.

use std::ffi::OsString;
use std::io::Read;
use std::path::Path;

use hearth_agent::Command;

use crate::guest::{Code, RunError};

/// Larger code is refused: it is probably a mistake.
const MOST_BYTES: u64 = 16 << 20;
/// Directory of the code in the guest.
const PLACE: &str = "/tmp";

/// A language with an interpreter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Language {
    /// Run by python3
    #[value(alias = "py")]
    Python,
    /// Run by node
    #[value(aliases = ["js", "node"])]
    Javascript,
    /// Run by sh
    #[value(alias = "sh")]
    Shell,
}

impl Language {
    fn of(file: &Path) -> Option<Self> {
        match file.extension()?.to_str()? {
            "py" => Some(Self::Python),
            "js" | "mjs" | "cjs" => Some(Self::Javascript),
            "sh" => Some(Self::Shell),
            _ => None,
        }
    }

    /// Returns the interpreter, the image that has it, and the default name of a file with code.
    fn parts(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Python => ("python3", "python", "main.py"),
            Self::Javascript => ("node", "javascript", "main.js"),
            Self::Shell => ("sh", "shell", "main.sh"),
        }
    }
}

/// The code to run, and whether this process's stdin is left for it or was the code itself.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) command: Command,
    pub(super) code: Code,
    pub(super) stdin_is_free: bool,
}

/// Finds the code: the text itself if a language is given (stdin if there is no text, or it is
/// `-`), else a file.
pub(super) fn find(
    language: Option<Language>,
    text: Option<&OsString>,
    args: &[OsString],
) -> Result<Found, RunError> {
    let (language, name, content, stdin_is_free) = match (language, text) {
        (Some(language), Some(text)) if text != "-" => {
            let content = text.clone().into_encoded_bytes();
            (language, None, content, true)
        }
        (Some(language), _) => (language, None, read(std::io::stdin(), "stdin")?, false),
        (None, Some(file)) => {
            let path = Path::new(file);
            let language = Language::of(path).ok_or_else(|| RunError::NoLanguage(path.into()))?;
            let name = path.display().to_string();
            let opened = std::fs::File::open(path).map_err(|source| RunError::Code {
                name: name.clone(),
                source,
            })?;
            (language, path.file_name(), read(opened, &name)?, true)
        }
        (None, None) => return Err(RunError::NoProgram),
    };
    let (interpreter, image, usual_name) = language.parts();
    let place = Path::new(PLACE).join(name.unwrap_or(usual_name.as_ref()));
    Ok(Found {
        command: Command::new(interpreter).arg(&place).args(args),
        code: Code {
            place,
            content,
            interpreter,
            image,
        },
        stdin_is_free,
    })
}

fn read(from: impl Read, name: &str) -> Result<Vec<u8>, RunError> {
    let failed = |source| RunError::Code {
        name: name.to_owned(),
        source,
    };
    let mut content = Vec::new();
    let count = from.take(MOST_BYTES + 1).read_to_end(&mut content);
    if count.map_err(failed)? as u64 > MOST_BYTES {
        let reason = format!("more than {} MiB of code", MOST_BYTES >> 20);
        return Err(failed(std::io::Error::other(reason)));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn place(language: Option<Language>, text: &str) -> Result<PathBuf, RunError> {
        find(language, Some(&text.into()), &[]).map(|found| found.code.place)
    }

    #[test]
    fn the_language_is_given_or_known_by_the_files_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            std::fs::write(dir.path().join(name), "code").unwrap();
            dir.path().join(name).to_str().unwrap().to_owned()
        };
        for name in ["a.py", "b.js", "c.mjs", "d.sh"] {
            let found = place(None, &file(name)).unwrap();
            assert_eq!(found, Path::new(PLACE).join(name));
        }
        for name in ["a", "a.rb", ".py", "a.py.bak"] {
            let refused = place(None, &file(name));
            assert!(matches!(refused, Err(RunError::NoLanguage(_))), "{name}");
        }
        let missing = place(None, "/no/such/file.py");
        assert!(matches!(missing, Err(RunError::Code { .. })));
        // With a language, the text is always code, even if it looks like a path.
        let found = place(Some(Language::Shell), "/no/such/file.py").unwrap();
        assert_eq!(found, Path::new("/tmp/main.sh"));
        let nothing = find(None, None, &[]);
        assert!(matches!(nothing, Err(RunError::NoProgram)));
    }
}

//! Builds a stripped `vmlinux` from a source package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

use super::source::{self, Source};
use super::{FILE, KernelError, config, write};
use crate::cache::{CacheError, io_error};
use crate::command;
use crate::progress::{Event, Progress, Stage, stage};

/// The approximate number of lines that `make` prints for a build of our configuration.
const STEPS: u32 = 1_250;

/// Builds in `scratch`, an empty directory, and returns the directory to publish.
pub(super) fn build(
    scratch: &Path,
    package: &Source,
    fragment: &str,
    patches: &'static [(&'static str, &'static str)],
    progress: &dyn Progress,
) -> Result<PathBuf, KernelError> {
    let tree = Tree {
        source: scratch.join("source"),
        objects: scratch.join("objects"),
    };
    fs::create_dir(&tree.objects).map_err(io_error("create", &tree.objects))?;

    stage(progress, Stage::Unpack, || {
        source::unpack(package, scratch, &tree.source)
    })?;
    stage(progress, Stage::Patch, || {
        for (name, text) in patches {
            tree.patch(scratch, name, text, &package.version)?;
        }
        Ok::<_, KernelError>(())
    })?;
    stage(progress, Stage::Configure, || tree.configure(fragment))?;
    stage(progress, Stage::Compile, || tree.compile(progress))?;
    tree.collect(scratch, package)
}

struct Tree {
    source: PathBuf,
    objects: PathBuf,
}

impl Tree {
    fn patch(
        &self,
        scratch: &Path,
        name: &'static str,
        text: &str,
        version: &str,
    ) -> Result<(), KernelError> {
        let file = scratch.join(name);
        write(&file, text)?;
        // No fuzz: a patch that applies only approximately may do something else.
        command::run(
            command::tool("patch")
                .args([
                    "-p1",
                    "--batch",
                    "--fuzz=0",
                    "--no-backup-if-mismatch",
                    "-i",
                ])
                .arg(&file)
                .current_dir(&self.source),
            |_| {},
        )
        .map_err(|source| KernelError::Patch {
            patch: name,
            version: version.to_owned(),
            source,
        })
    }

    fn configure(&self, fragment: &str) -> Result<(), KernelError> {
        let file = self.objects.join(".config");
        command::run(self.make().arg("tinyconfig"), |_| {})?;
        let tiny = read(&file)?;
        // If an option has two lines, Kconfig takes the later one.
        write(&file, &format!("{tiny}\n{fragment}"))?;
        command::run(self.make().arg("olddefconfig"), |_| {})?;
        let wrong = config::check(fragment, &read(&file)?);
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(KernelError::Config { wrong })
        }
    }

    fn compile(&self, progress: &dyn Progress) -> Result<(), KernelError> {
        let jobs = available_parallelism().map_or(1, usize::from);
        let mut done = 0;
        command::run(
            self.make().arg(format!("-j{jobs}")).arg("vmlinux"),
            |line| {
                // "  CC      kernel/fork.o"
                if line.starts_with("  ") && done < STEPS {
                    done += 1;
                    progress.event(Event::Step {
                        stage: Stage::Compile,
                        done,
                        total: STEPS,
                    });
                }
            },
        )?;
        Ok(())
    }

    fn collect(&self, scratch: &Path, package: &Source) -> Result<PathBuf, KernelError> {
        let finished = scratch.join("entry");
        fs::create_dir(&finished).map_err(io_error("create", &finished))?;
        command::run(
            command::tool("strip")
                .arg("-o")
                .arg(finished.join(FILE))
                .arg(self.objects.join(FILE)),
            |_| {},
        )?;
        // For people: the symbols for a panic's addresses, and the configuration.
        for name in ["System.map", ".config"] {
            let from = self.objects.join(name);
            let to = finished.join(name.trim_start_matches('.'));
            fs::copy(&from, &to).map_err(io_error("copy", &from))?;
        }
        let compiler = command::output(command::tool("gcc").arg("--version"))?;
        write(
            &finished.join("built-from"),
            &format!(
                "linux-source-6.12 {}\n{}\n",
                package.version,
                compiler.lines().next().unwrap_or_default()
            ),
        )?;
        Ok(finished)
    }

    /// Returns `make` for our tree. The user, host and time of the build leave no trace in the
    /// kernel.
    fn make(&self) -> Command {
        let mut make = command::tool("make");
        make.arg("-C").arg(&self.source);
        make.arg(format!("O={}", self.objects.display()));
        make.arg("ARCH=x86_64");
        make.env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
            .env("KBUILD_BUILD_USER", "hearth")
            .env("KBUILD_BUILD_HOST", "hearth")
            .env("KBUILD_BUILD_VERSION", "1");
        make
    }
}

fn read(path: &Path) -> Result<String, CacheError> {
    fs::read_to_string(path).map_err(io_error("read", path))
}

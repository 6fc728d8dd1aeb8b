//! What a build tells its caller while it runs. The library prints nothing.

/// A part of the work that takes long enough to be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// Another process is building the same thing.
    Wait,
    /// The kernel's source package is downloaded (150 MB).
    Fetch,
    /// The source package is unpacked.
    Unpack,
    /// Our patches are applied.
    Patch,
    /// The kernel is configured and the result checked.
    Configure,
    /// The kernel is compiled.
    Compile,
    /// The agent is compiled.
    Agent,
    /// The initramfs is written.
    Initramfs,
    /// Debian's index is fetched (10 MB) and packages are chosen.
    Resolve,
    /// Debian packages are fetched.
    Packages,
    /// Python packages are chosen and fetched.
    Wheels,
    /// Packages are unpacked, and what the recipe changes is changed.
    Tree,
    /// A recipe's commands run.
    Commands,
    /// The image of a root file system is written.
    Root,
}

impl Stage {
    /// A few words for a progress line.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Wait => "waiting for another build",
            Self::Fetch => "fetching the kernel source",
            Self::Unpack => "unpacking the kernel source",
            Self::Patch => "patching the kernel",
            Self::Configure => "configuring the kernel",
            Self::Compile => "compiling the kernel",
            Self::Agent => "compiling the agent",
            Self::Initramfs => "writing the initramfs",
            Self::Resolve => "choosing packages",
            Self::Packages => "fetching packages",
            Self::Wheels => "fetching Python packages",
            Self::Tree => "unpacking packages",
            Self::Commands => "running the recipe's commands",
            Self::Root => "writing the root file system",
        }
    }
}

/// One thing that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A stage began. Stages do not nest.
    Begin(Stage),
    /// So much of the stage is done. `total` is an estimate; `done` does not
    /// exceed it.
    Step {
        /// The stage that goes on.
        stage: Stage,
        /// Steps done, from 1.
        done: u32,
        /// Steps expected.
        total: u32,
    },
    /// A stage ended well. A stage that fails ends with the error instead.
    End(Stage),
}

/// Hears what a build does. Called on the thread that builds.
pub trait Progress {
    /// Takes note of one event; must not block for long.
    fn event(&self, event: Event);
}

/// Hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: Event) {}
}

/// Runs `work` as one stage.
pub(crate) fn stage<T, E>(
    progress: &dyn Progress,
    stage: Stage,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    progress.event(Event::Begin(stage));
    let done = work()?;
    progress.event(Event::End(stage));
    Ok(done)
}

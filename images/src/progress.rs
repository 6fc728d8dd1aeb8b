//! Progress reports of a build to its caller. The library prints nothing.

/// A part of the work that takes long enough to be reported.
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
    /// Packages are unpacked, and the changes of the recipe are applied.
    Tree,
    /// A recipe's commands run.
    Commands,
    /// The image of a root file system is written.
    Root,
}

impl Stage {
    /// Returns a short text for a progress line.
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

/// A progress event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A stage began. Stages do not nest.
    Begin(Stage),
    /// A part of the stage is done. `total` is an estimate; `done` does not exceed it.
    Step {
        /// The stage in progress.
        stage: Stage,
        /// Steps done, from 1.
        done: u32,
        /// Steps expected.
        total: u32,
    },
    /// A stage succeeded. A failed stage has no `End`: the build returns its error instead.
    End(Stage),
}

/// Receives the events of a build, on the thread that builds.
pub trait Progress {
    /// Handles one event; must not block for long.
    fn event(&self, event: Event);
}

/// Ignores all events.
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

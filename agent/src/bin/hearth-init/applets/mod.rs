//! The only programs of a guest without a root file system of its own: small versions of common
//! ones, and a few that misbehave on purpose, for tests. A name that is not found in PATH falls
//! back to the applet of that name, so `echo hi` runs in a guest that holds only the agent.

mod agent;
mod cpu;
mod vsock;

use alloc::{
    ffi::CString,
    format,
    string::{String, ToString},
    vec,
    vec::Vec,
};
use core::{
    arch::{asm, global_asm},
    fmt::Write,
    time::Duration,
};

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Dir, Mode, OFlags, open},
    io::{Errno, read},
    process::{WaitOptions, getcwd, getpid, waitpid},
    system::{RebootCommand, reboot, uname},
};

use crate::{
    clock,
    plan::Plan,
    runtime,
    spawn::{Image, Start},
    sys::{self, stderr, stdin, stdout},
    text::{Stderr, joined, put, say},
};

/// Bytes that an applet reads or writes at once.
const CHUNK: usize = 64 * 1024;

/// An applet: takes its arguments and returns its exit code.
type Applet = fn(&[Vec<u8>]) -> Result<u8, Failure>;

/// The message of an applet that failed.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self(errno.to_string())
    }
}

impl From<&str> for Failure {
    fn from(reason: &str) -> Self {
        Self(reason.to_string())
    }
}

const APPLETS: [(&str, Applet); 30] = [
    ("true", |_| Ok(0)),
    ("false", |_| Ok(1)),
    ("echo", echo),
    ("cat", cat),
    ("checksum", checksum),
    ("env", env),
    ("pwd", pwd),
    ("uname", print_uname),
    ("id", id),
    ("ls", ls),
    ("sleep", sleep),
    ("exit", |args| number(args, 0)),
    ("kill-self", kill_self),
    ("ignore-term", ignore_term),
    ("background", background),
    ("both", both),
    ("fill", fill),
    ("alloc", alloc),
    ("work-on", cpu::work_on),
    ("jump-to", jump_to),
    ("panic", panic),
    ("wedge-agent", agent::wedge),
    ("crash-agent", agent::crash),
    ("starve-agent", agent::starve),
    ("poweroff", |_| reboot_with(RebootCommand::PowerOff)),
    ("reboot", |_| reboot_with(RebootCommand::Restart)),
    ("halt", |_| reboot_with(RebootCommand::Halt)),
    ("vsock-echo", vsock::echo),
    ("vsock-dial", vsock::dial),
    ("vsock-exchange", vsock::exchange),
];

/// Whether there is an applet of this name.
pub(crate) fn has(name: &[u8]) -> bool {
    find(name).is_some()
}

fn find(name: &[u8]) -> Option<Applet> {
    APPLETS
        .iter()
        .find(|(known, _)| known.as_bytes() == name)
        .map(|(_, applet)| *applet)
}

/// Runs the applet named by this process's name or else by its first argument.
pub(crate) fn run(args: &[Vec<u8>]) -> u8 {
    let name = args
        .first()
        .map(|path| path.rsplit(|&byte| byte == b'/').next().unwrap_or_default());
    let by_name = || Some((find(name?)?, args.get(1..)?));
    let by_argument = || Some((find(args.get(1)?)?, args.get(2..)?));
    let Some((applet, rest)) = by_name().or_else(by_argument) else {
        let names = APPLETS.map(|(name, _)| name).join(" ");
        let _ = writeln!(
            Stderr,
            "usage: hearth-init APPLET [ARGUMENT...]\napplets: {names}"
        );
        return 2;
    };
    applet(rest).unwrap_or_else(|Failure(reason)| {
        let name = String::from_utf8_lossy(name.unwrap_or_default());
        let _ = writeln!(Stderr, "{name}: {reason}");
        1
    })
}

fn word(args: &[Vec<u8>], index: usize) -> Result<&str, Failure> {
    let word = args.get(index).ok_or("an argument is missing")?;
    Ok(core::str::from_utf8(word).map_err(|_| "an argument is not text")?)
}

fn number<T: core::str::FromStr>(args: &[Vec<u8>], index: usize) -> Result<T, Failure> {
    Ok(word(args, index)?
        .parse()
        .map_err(|_| "a number is out of range")?)
}

/// `echo WORD...`
fn echo(args: &[Vec<u8>]) -> Result<u8, Failure> {
    say(joined(args, b' '))?;
    Ok(0)
}

/// `cat [FILE...]`: prints files; stdin if there is none.
fn cat(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let mut chunk = vec![0; CHUNK];
    let mut copy = |from: BorrowedFd<'_>| -> Result<(), Errno> {
        loop {
            match read(from, &mut chunk)? {
                0 => return Ok(()),
                count => put(stdout(), chunk.get(..count).unwrap_or_default())?,
            }
        }
    };
    if args.is_empty() {
        copy(stdin())?;
    }
    for path in args {
        copy(open_to_read(path)?.as_fd())?;
    }
    Ok(0)
}

/// `checksum BYTES FILE...`: FNV-1a, 64 bits, of the first bytes of each file. Reading a file this
/// way costs the kernel one copy.
fn checksum(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let limit: usize = number(args, 0)?;
    for path in args.get(1..).unwrap_or_default() {
        let (mut sum, mut left) = (0xcbf2_9ce4_8422_2325_u64, limit);
        let file = open_to_read(path)?;
        let mut chunk = vec![0; CHUNK];
        while left > 0 {
            let count = read(&file, chunk.get_mut(..left.min(CHUNK)).unwrap_or_default())?;
            if count == 0 {
                break;
            }
            left -= count;
            for byte in chunk.get(..count).unwrap_or_default() {
                sum = (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
        say(format!("{sum:016x}").as_bytes())?;
    }
    Ok(0)
}

fn open_to_read(path: &[u8]) -> Result<OwnedFd, Errno> {
    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// `env`: prints the environment.
fn env(_: &[Vec<u8>]) -> Result<u8, Failure> {
    for variable in runtime::environment() {
        say(variable)?;
    }
    Ok(0)
}

fn pwd(_: &[Vec<u8>]) -> Result<u8, Failure> {
    say(getcwd(Vec::new())?.as_bytes())?;
    Ok(0)
}

fn print_uname(_: &[Vec<u8>]) -> Result<u8, Failure> {
    let name = uname();
    let parts = [
        name.sysname(),
        name.nodename(),
        name.release(),
        name.version(),
        name.machine(),
    ];
    say(parts.map(|part| part.to_bytes()).join(&b' '))?;
    Ok(0)
}

/// `id`: prints user, group, supplementary groups, and whether it leads its session.
fn id(_: &[Vec<u8>]) -> Result<u8, Failure> {
    use rustix::process::{getgid, getgroups, getsid, getuid};
    let groups: Vec<_> = getgroups()?
        .iter()
        .map(|group| group.as_raw().to_string())
        .collect();
    let leads = getsid(None)?.as_raw_pid() == getpid().as_raw_pid();
    let (user, group, groups) = (getuid().as_raw(), getgid().as_raw(), groups.join(","));
    say(format!(
        "uid={user} gid={group} groups={groups} session-leader={leads}"
    ))?;
    Ok(0)
}

/// `ls [PATH...]`: prints sorted names; of several paths, each directory under its own name.
fn ls(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let here = [b".".to_vec()];
    let paths = if args.is_empty() { &here } else { args };
    let mut code = 0;
    for path in paths {
        if let Err(errno) = list(path, paths.len() > 1) {
            let path = String::from_utf8_lossy(path);
            let _ = writeln!(Stderr, "ls: {path}: {errno}");
            code = 1;
        }
    }
    Ok(code)
}

fn list(path: &[u8], titled: bool) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = match open(path, flags, Mode::empty()) {
        Err(Errno::NOTDIR) => return say(path),
        dir => Dir::new(dir?)?,
    };
    let names = dir.map(|entry| Ok(entry?.file_name().to_bytes().to_vec()));
    let mut names = names.collect::<Result<Vec<_>, Errno>>()?;
    names.retain(|name| name != b"." && name != b"..");
    names.sort_unstable();
    if titled {
        say([path, b":"].concat())?;
    }
    names.iter().try_for_each(say)
}

/// `sleep SECONDS`; decimal fractions are allowed.
fn sleep(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let (seconds, fraction) = word(args, 0)?
        .split_once('.')
        .unwrap_or((word(args, 0)?, ""));
    let seconds = seconds.parse().map_err(|_| "not a number of seconds")?;
    let nanos = format!("{fraction:0<9.9}")
        .parse()
        .map_err(|_| "not a number of seconds")?;
    clock::sleep(Duration::new(seconds, nanos));
    Ok(0)
}

/// `kill-self SIGNAL`
fn kill_self(args: &[Vec<u8>]) -> Result<u8, Failure> {
    sys::kill(getpid(), number(args, 0)?);
    Err("survived".into())
}

/// `ignore-term SECONDS`: sleeps and ignores SIGTERM.
fn ignore_term(args: &[Vec<u8>]) -> Result<u8, Failure> {
    sys::ignore_term();
    sleep(args)
}

/// `background COMMAND...`: starts an applet in a session of its own, prints its process id and
/// does not wait for it.
fn background(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let pid = start(args, true, stdout())?;
    say(pid.as_raw_pid().to_string())?;
    Ok(0)
}

/// `both COMMAND...`: runs an applet with its stdout on stderr, then prints its exit code or signal
/// on stdout.
fn both(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let pid = start(args, false, stderr())?;
    let Some((_, status)) = waitpid(Some(pid), WaitOptions::empty())? else {
        return Err("nothing to wait for".into());
    };
    say(status
        .exit_status()
        .or(status.terminating_signal())
        .unwrap_or(-1)
        .to_string())?;
    Ok(0)
}

/// Starts an applet.
fn start(
    args: &[Vec<u8>],
    session: bool,
    output: BorrowedFd<'_>,
) -> Result<rustix::process::Pid, Failure> {
    let strings = |words: &[Vec<u8>]| -> Result<Vec<_>, Failure> {
        words
            .iter()
            .map(|word| Ok(CString::new(word.as_slice()).map_err(|_| "NUL byte")?))
            .collect()
    };
    if !args.first().is_some_and(|name| has(name)) {
        return Err("not an applet".into());
    }
    let plan = Plan {
        candidates: vec![c"/proc/self/exe".into()],
        argv: strings(args)?,
        env: strings(&runtime::environment())?,
        cwd: c".".into(),
        limits: Vec::new(),
        user: None,
        no_new_privs: false,
    };
    let image = Image {
        plan,
        session,
        terminal: false,
        stdio: [stdin(), output, stderr()],
        results: None,
        cgroup: None,
    };
    Ok(Start::run(image)?)
}

/// `fill BYTES`: writes that many bytes, each the low byte of its offset.
fn fill(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let mut left: usize = number(args, 0)?;
    let pattern: Vec<u8> = (0..=u8::MAX).cycle().take(CHUNK).collect();
    while left > 0 {
        // Whole patterns except for the last write, so that bytes and offsets stay in step.
        let chunk = pattern.get(..left.min(CHUNK)).unwrap_or_default();
        put(stdout(), chunk)?;
        left -= chunk.len();
    }
    Ok(0)
}

/// `alloc MIB [SECONDS]`: allocates that much memory, touches all of it, and holds it for a time.
fn alloc(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let mib: usize = number(args, 0)?;
    let bytes = mib.checked_mul(1 << 20).ok_or("too much")?;
    let mut memory = Vec::new();
    memory
        .try_reserve_exact(bytes)
        .map_err(|_| "out of memory")?;
    memory.resize(bytes, 1_u8);
    say(memory
        .iter()
        .step_by(4096)
        .map(|&byte| usize::from(byte))
        .sum::<usize>()
        .to_string())?;
    match args.get(1..) {
        Some(seconds @ [_, ..]) => sleep(seconds),
        _ => Ok(0),
    }
}

global_asm!("hearth_jump_back:", "jmp rcx");

unsafe extern "C" {
    /// Does what a kernel that takes the jump of `jump-to` for a system call does: continues at
    /// RCX.
    fn hearth_jump_back();
}

/// `jump-to ADDRESS`: jumps there with registers set up as for a system call, with flags that no
/// program may set, and prints the result and the flags if it returns. `jump-to self` jumps to an
/// address of its own that returns, to check that the test itself works.
fn jump_to(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let address = match word(args, 0)? {
        "self" => hearth_jump_back as *const () as u64,
        word => {
            u64::from_str_radix(word.trim_start_matches("0x"), 16).map_err(|_| "not an address")?
        }
    };
    const GETPID: u64 = 39;
    // Reserved bit, IOPL 3, nested task; interrupts off.
    const WANTED: u64 = 0x7002;
    let (result, flags): (u64, u64);
    // SAFETY: unsound on purpose: this process may die of it. If the kernel treats the jump as the
    // system call that it imitates, execution continues at the label with only the registers named
    // here changed.
    unsafe {
        asm!(
            "lea rcx, [rip + 2f]",
            "jmp {address}",
            "2:",
            "pushfq",
            "pop {flags}",
            address = in(reg) address,
            flags = out(reg) flags,
            inout("rax") GETPID => result,
            inout("r11") WANTED => _,
            out("rcx") _,
            in("rdi") 0, in("rsi") 0, in("rdx") 0, in("r10") 0, in("r8") 0, in("r9") 0,
        );
    }
    let returned = result == u64::from(getpid().as_raw_pid().unsigned_abs());
    say(format!("returned={returned} flags={flags:#x}"))?;
    Ok(0)
}

/// `panic`: crashes the kernel.
fn panic(_: &[Vec<u8>]) -> Result<u8, Failure> {
    let trigger = open(
        "/proc/sysrq-trigger",
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    put(trigger.as_fd(), b"c")?;
    Err("survived".into())
}

fn reboot_with(command: RebootCommand) -> Result<u8, Failure> {
    reboot(command)?;
    Err("survived".into())
}

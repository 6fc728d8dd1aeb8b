//! The base image's only programs until a root file system comes: small stand-ins for the usual ones, and a few that behave
//! badly on purpose, for tests. A name that PATH does not have falls back to the applet of that name, so `echo hi` runs in a
//! guest that holds nothing but the agent.

mod vsock;

use std::{
    arch::{asm, global_asm},
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use rustix::{
    process::getpid,
    system::{RebootCommand, reboot, uname},
};

use crate::sys;

/// An applet gets its arguments and gives its exit code.
type Applet = fn(&[OsString]) -> io::Result<u8>;

const APPLETS: [(&str, Applet); 24] = [
    ("true", |_| Ok(0)),
    ("false", |_| Ok(1)),
    ("echo", echo),
    ("cat", cat),
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
    ("jump-to", jump_to),
    ("panic", panic),
    ("poweroff", |_| reboot_with(RebootCommand::PowerOff)),
    ("reboot", |_| reboot_with(RebootCommand::Restart)),
    ("halt", |_| reboot_with(RebootCommand::Halt)),
    ("vsock-echo", vsock::echo),
    ("vsock-dial", vsock::dial),
];

/// Whether there is an applet of this name.
pub(crate) fn has(name: &[u8]) -> bool {
    APPLETS.iter().any(|(known, _)| known.as_bytes() == name)
}

/// Runs the applet that the name of this process or its first argument says.
pub(crate) fn run(args: &[OsString]) -> u8 {
    let by_name = args
        .first()
        .and_then(|arg| Some((find(Path::new(arg).file_name()?)?, args.get(1..)?)));
    let by_argument = || {
        args.get(1)
            .and_then(|arg| Some((find(arg)?, args.get(2..)?)))
    };
    let Some((applet, rest)) = by_name.or_else(by_argument) else {
        let names: Vec<_> = APPLETS.iter().map(|(name, _)| *name).collect();
        eprintln!(
            "usage: hearth-init APPLET [ARGUMENT...]\napplets: {}",
            names.join(" ")
        );
        return 2;
    };
    match applet(rest) {
        Ok(code) => code,
        Err(error) => {
            eprintln!(
                "{}: {error}",
                args.first()
                    .map(|arg| arg.to_string_lossy())
                    .unwrap_or_default()
            );
            1
        }
    }
}

fn find(name: &OsStr) -> Option<Applet> {
    APPLETS
        .iter()
        .find(|(known, _)| OsStr::new(known) == name)
        .map(|(_, applet)| *applet)
}

fn number<T: std::str::FromStr>(args: &[OsString], index: usize) -> io::Result<T> {
    let word = args.get(index).and_then(|word| word.to_str());
    word.and_then(|word| word.parse().ok())
        .ok_or_else(|| io::Error::other("a number is missing or out of range"))
}

/// `echo WORD...`
fn echo(args: &[OsString]) -> io::Result<u8> {
    let mut line = args.join(OsStr::new(" ")).into_encoded_bytes();
    line.push(b'\n');
    io::stdout().write_all(&line)?;
    Ok(0)
}

/// `cat [FILE...]`; stdin without one.
fn cat(args: &[OsString]) -> io::Result<u8> {
    let mut chunk = vec![0; 64 * 1024];
    let mut copy = |from: &mut dyn Read| -> io::Result<()> {
        loop {
            let count = from.read(&mut chunk)?;
            if count == 0 {
                return Ok(());
            }
            let mut rest = chunk.get(..count).unwrap_or_default();
            while !rest.is_empty() {
                // Past the standard library's line buffer, which would split chunks at their last newline.
                let written = rustix::io::write(rustix::stdio::stdout(), rest)?;
                rest = rest.get(written..).unwrap_or_default();
            }
        }
    };
    match args {
        [] => copy(&mut io::stdin().lock())?,
        files => files
            .iter()
            .try_for_each(|file| copy(&mut fs::File::open(file)?))?,
    }
    Ok(0)
}

/// `env`: prints the environment.
fn env(_: &[OsString]) -> io::Result<u8> {
    for (key, value) in std::env::vars_os() {
        io::stdout().write_all(&[key.as_bytes(), b"=", value.as_bytes(), b"\n"].concat())?;
    }
    Ok(0)
}

fn pwd(_: &[OsString]) -> io::Result<u8> {
    println!("{}", std::env::current_dir()?.display());
    Ok(0)
}

fn print_uname(_: &[OsString]) -> io::Result<u8> {
    let name = uname();
    let parts = [
        name.sysname(),
        name.nodename(),
        name.release(),
        name.version(),
        name.machine(),
    ];
    println!("{}", parts.map(|part| part.to_string_lossy()).join(" "));
    Ok(0)
}

/// `id`: user, group, session, supplementary groups.
fn id(_: &[OsString]) -> io::Result<u8> {
    use rustix::process::{getgid, getgroups, getsid, getuid};
    let groups: Vec<_> = getgroups()?
        .iter()
        .map(|group| group.as_raw().to_string())
        .collect();
    let session = getsid(None)?.as_raw_pid() == getpid().as_raw_pid();
    println!(
        "uid={} gid={} groups={} session-leader={session}",
        getuid().as_raw(),
        getgid().as_raw(),
        groups.join(",")
    );
    Ok(0)
}

/// `ls [DIRECTORY]`
fn ls(args: &[OsString]) -> io::Result<u8> {
    let dir = args.first().map_or(Path::new("."), Path::new);
    let mut names = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    names.iter().for_each(|name| println!("{}", name.display()));
    Ok(0)
}

/// `sleep SECONDS`, fractions allowed.
fn sleep(args: &[OsString]) -> io::Result<u8> {
    let time = Duration::try_from_secs_f64(number(args, 0)?).map_err(io::Error::other)?;
    std::thread::sleep(time);
    Ok(0)
}

/// `kill-self SIGNAL`
fn kill_self(args: &[OsString]) -> io::Result<u8> {
    sys::kill(getpid(), number(args, 0)?);
    Err(io::Error::other("survived"))
}

/// `ignore-term SECONDS`: sleeps, deaf to SIGTERM.
fn ignore_term(args: &[OsString]) -> io::Result<u8> {
    sys::ignore_term();
    sleep(args)
}

/// `background COMMAND...`: starts it in a session of its own, says its process id and does not wait.
fn background(args: &[OsString]) -> io::Result<u8> {
    let mut command = this_applet(args)?;
    sys::in_own_session(&mut command);
    println!("{}", command.spawn()?.id());
    Ok(0)
}

/// `both COMMAND...`: runs it with its stdout on stderr, then says how it ended on stdout.
fn both(args: &[OsString]) -> io::Result<u8> {
    let status = this_applet(args)?.stdout(io::stderr()).status()?;
    println!("{}", status.code().or(status.signal()).unwrap_or(-1));
    Ok(0)
}

fn this_applet(args: &[OsString]) -> io::Result<Command> {
    let name = args
        .first()
        .ok_or_else(|| io::Error::other("a command is missing"))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name).args(args.get(1..).unwrap_or_default());
    Ok(command)
}

/// `fill BYTES`: writes so many bytes, each the low byte of its offset.
fn fill(args: &[OsString]) -> io::Result<u8> {
    let mut left: usize = number(args, 0)?;
    let pattern: Vec<u8> = (0..=u8::MAX).cycle().take(64 * 1024).collect();
    while let Some(chunk) = pattern
        .get(..left.min(pattern.len()))
        .filter(|chunk| !chunk.is_empty())
    {
        // Whole patterns but for the last write, so that offsets stay in step.
        io::Write::write_all(
            &mut fs::File::from(rustix::io::dup(rustix::stdio::stdout())?),
            chunk,
        )?;
        left -= chunk.len();
    }
    Ok(0)
}

/// `alloc MIB [SECONDS]`: takes so much memory, touches all of it, and holds it for a time.
fn alloc(args: &[OsString]) -> io::Result<u8> {
    let mib: usize = number(args, 0)?;
    let bytes = mib
        .checked_mul(1 << 20)
        .ok_or_else(|| io::Error::other("too much"))?;
    let mut memory = Vec::new();
    memory.try_reserve_exact(bytes).map_err(io::Error::other)?;
    memory.resize(bytes, 1_u8);
    println!(
        "{}",
        memory
            .iter()
            .step_by(4096)
            .map(|&byte| usize::from(byte))
            .sum::<usize>()
    );
    match args.get(1..) {
        Some(seconds @ [_, ..]) => sleep(seconds),
        _ => Ok(0),
    }
}

global_asm!("hearth_jump_back:", "jmp rcx");

unsafe extern "C" {
    /// What a kernel that is deceived would do with the jump of `jump-to`: go on where RCX says.
    fn hearth_jump_back();
}

/// `jump-to ADDRESS`: jumps there as if it were a system call, with flags that no program may set, and says what came of
/// it if it came back. `jump-to self` jumps to an address of its own that comes back, to see that it would.
fn jump_to(args: &[OsString]) -> io::Result<u8> {
    let word = args
        .first()
        .and_then(|word| word.to_str())
        .unwrap_or_default();
    let address = match word {
        "self" => hearth_jump_back as *const () as u64,
        _ => u64::from_str_radix(word.trim_start_matches("0x"), 16).map_err(io::Error::other)?,
    };
    const GETPID: u64 = 39;
    // Reserved bit, IOPL 3, nested task; interrupts off.
    const WANTED: u64 = 0x7002;
    let (result, flags): (u64, u64);
    // SAFETY: not safe at all, that is the point: this process may die of it. If the kernel treats it as the system call
    // that it imitates, execution continues at the label with only the registers named here changed.
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
    println!(
        "returned={} flags={flags:#x}",
        result == u64::from(getpid().as_raw_pid().unsigned_abs())
    );
    Ok(0)
}

/// `panic`: crashes the kernel.
fn panic(_: &[OsString]) -> io::Result<u8> {
    fs::write("/proc/sysrq-trigger", "c")?;
    Err(io::Error::other("survived"))
}

fn reboot_with(command: RebootCommand) -> io::Result<u8> {
    reboot(command)?;
    Err(io::Error::other("survived"))
}

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
//! Root file systems of our recipes in guests: their programs work for the image's user.

use std::f64::consts::TAU;
use std::path::PathBuf;

use hearth_agent::client::{Command, Output};
use hearth_agent::proto::{ExitStatus, ROOT_WORD, User};
use hearth_images::{DebianError, Images, ImagesError, Recipe, RootError, Silent, WheelsError};
use hearth_tests::{Guest, error_chain, kvm, not_measured, registers};

/// Returns the image of a recipe with Python packages. Reports the test as skipped if the image is
/// not cached and cannot be fetched here.
fn image(recipe: &str, packages: &[&str]) -> Option<PathBuf> {
    let recipe = Recipe::built_in(recipe).unwrap();
    let recipe = packages
        .iter()
        .fold(recipe, |recipe, package| recipe.python_package(*package));
    match Images::open(None).unwrap().root(&recipe, &Silent) {
        Ok(path) => Some(path),
        Err(error) => {
            let text = error_chain(&error);
            match error {
                ImagesError::Root(
                    RootError::Debian(DebianError::Fetch { .. } | DebianError::NoMirror)
                    | RootError::Wheels(WheelsError::NoPip(_) | WheelsError::Pip { .. }),
                ) => not_measured(&text),
                _ => panic!("{text}"),
            }
            None
        }
    }
}

async fn guest(image: &PathBuf, memory_mib: u64) -> Guest {
    Guest::prepared(|config| config.pmem(image).append(ROOT_WORD).memory_mib(memory_mib)).await
}

/// Returns a command that runs a program as the image's user.
fn command(program: &str, args: &[&str]) -> Command {
    let user = User {
        uid: 1000,
        gid: 1000,
        groups: Vec::new(),
    };
    let path = "/usr/local/bin:/usr/bin:/bin";
    let command = Command::new(program).args(args).user(user);
    command.env("HOME", "/home/user").env("PATH", path)
}

/// Returns the output of a program that must have succeeded without errors.
fn printed(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(text(&output.stderr), "");
    assert_eq!(output.status, ExitStatus::Code(0));
    text(&output.stdout)
}

const PYTHON: &str = "
import json, os, pwd, subprocess, sys
home = pwd.getpwuid(os.getuid()).pw_dir
with open(home + '/mine', 'w') as file:
    file.write('kept')
print(6 * 7, os.getuid(), home, os.stat(home).st_uid, open(home + '/mine').read())
# No guest compiles the library.
print(os.path.exists(json.__cached__), json.__cached__)
print(subprocess.run('echo $((6 * 7)) | cat', shell=True, capture_output=True).stdout)
";

#[tokio::test]
async fn python_runs_as_the_user_of_its_image() {
    if !kvm() {
        return;
    }
    let Some(image) = image("python", &[]) else {
        return;
    };
    let guest = guest(&image, 256).await;
    let output = guest.run(command("python3", &["-c", PYTHON])).await;
    assert_eq!(
        printed(&output),
        "42 1000 /home/user 1000 kept\n\
         True /usr/lib/python3.11/json/__pycache__/__init__.cpython-311.pyc\n\
         b'42\\n'\n"
    );
}

const JAVASCRIPT: &str = "
const { createHash } = require('node:crypto');
const fs = require('node:fs');
fs.writeFileSync(process.env.HOME + '/mine', 'kept');
console.log(6 * 7, process.getuid(), fs.readFileSync(process.env.HOME + '/mine', 'utf8'));
console.log(createHash('sha256').update('abc').digest('hex').slice(0, 8));
console.log(new Intl.NumberFormat('de').format(1234.5));
";

#[tokio::test]
#[ignore = "long: Node.js takes a minute to start where ring 0 is emulated"]
async fn node_runs_as_the_user_of_its_image() {
    if !kvm() {
        return;
    }
    let Some(image) = image("javascript", &[]) else {
        return;
    };
    let guest = guest(&image, 512).await;
    // Each has threads that take turns, with data in AVX registers.
    let run = || guest.run(command("node", &["-e", JAVASCRIPT]));
    let others = registers::keep(&guest, registers::widest(), 2, 200);
    let (one, other, ()) = tokio::join!(run(), run(), others);
    for output in [one, other] {
        // SHA-256 of abc: FIPS 180-2, appendix B.1.
        assert_eq!(printed(&output), "42 1000 kept\nba7816bf\n1.234,5\n");
    }
}

const SHELL: &str = r#"
set -o pipefail
declare -A ages=([b]=2 [a]=40)
echo $((ages[a] + ages[b])) "$(id -un)" "$HOME"
echo '{"answer": 42}' | jq .answer
printf '%s\n' one two three > ~/words && sort -r ~/words | tr '\n' ' '
tar -C ~ -cJf - words | tar -xJOf - | wc -l
"#;

#[tokio::test]
#[ignore = "long: a dozen programs start, each in half a second where ring 0 is emulated"]
async fn bash_and_its_tools_run_as_the_user_of_their_image() {
    if !kvm() {
        return;
    }
    let Some(image) = image("shell", &[]) else {
        return;
    };
    let guest = guest(&image, 128).await;
    let output = guest.run(command("bash", &["-c", SHELL])).await;
    assert_eq!(
        printed(&output),
        "42 user /home/user\n42\ntwo three one 3\n"
    );
}

/// Size of the matrices and length of the signal.
const SIZE: u16 = 24;
const LENGTH: u16 = 64;

/// Prints a product of two matrices of whole numbers and the spectrum of a signal, after many
/// rounds that must all give the same result.
const NUMPY: &str = "
import numpy as np
i, j = np.indices((24, 24))
a = (i * 7 + j * 3) % 11 - 5.0
b = (i * 5 + j * 2) % 13 - 6.0
k = np.arange(64)
signal = np.sin(k * 0.1) + (k * k) % 7
product, spectrum = a @ b, np.fft.fft(signal)
for _ in range(20000):
    assert np.array_equal(a @ b, product) and np.array_equal(np.fft.fft(signal), spectrum)
print(*map(repr, map(float, product.ravel())))
print(*(f'{float(value.real)!r} {float(value.imag)!r}' for value in spectrum))
";

fn product() -> Vec<f64> {
    let a = |i: u16, j: u16| f64::from((i * 7 + j * 3) % 11) - 5.0;
    let b = |i: u16, j: u16| f64::from((i * 5 + j * 2) % 13) - 6.0;
    let cells = (0..SIZE).flat_map(|i| (0..SIZE).map(move |j| (i, j)));
    cells
        .map(|(i, j)| (0..SIZE).map(|k| a(i, k) * b(k, j)).sum())
        .collect()
}

/// Computed by the definition of the discrete Fourier transform; real and imaginary parts
/// alternate.
fn spectrum() -> Vec<f64> {
    let signal = |k: u16| (f64::from(k) * 0.1).sin() + f64::from((k * k) % 7);
    let line = |n: u16| {
        let angle = move |k: u16| -TAU * f64::from(n) * f64::from(k) / f64::from(LENGTH);
        let real = (0..LENGTH).map(|k| signal(k) * angle(k).cos()).sum();
        let imaginary = (0..LENGTH).map(|k| signal(k) * angle(k).sin()).sum();
        [real, imaginary]
    };
    (0..LENGTH).flat_map(line).collect()
}

fn numbers(line: &str) -> Vec<f64> {
    line.split(' ').map(|word| word.parse().unwrap()).collect()
}

/// Several programs compute at once, so that each is preempted, and its registers are saved, in the
/// middle of its work; beside them other programs fill all registers.
#[tokio::test]
#[ignore = "long: importing numpy takes half a minute where ring 0 is emulated; fetches it"]
async fn numpy_computes_in_a_guest_what_the_host_does() {
    if !kvm() {
        return;
    }
    let Some(image) = image("python", &["numpy", "msgpack"]) else {
        return;
    };
    let guest = guest(&image, 512).await;
    let run = || guest.run(command("python3", &["-c", NUMPY]));
    let others = registers::keep(&guest, registers::widest(), 4, 200);
    let (one, two, three, four, ()) = tokio::join!(run(), run(), run(), run(), others);
    for output in [one, two, three, four] {
        let text = printed(&output);
        let (first, second) = text.trim_end().split_once('\n').unwrap();
        // Whole numbers are exact in whatever order they are summed.
        assert_eq!(numbers(first), product());
        let (said, wanted) = (numbers(second), spectrum());
        assert_eq!(said.len(), wanted.len());
        for (said, wanted) in said.iter().zip(&wanted) {
            assert!((said - wanted).abs() < 1e-9, "{said} {wanted}");
        }
    }
    let packed = "import msgpack; from msgpack import _cmsgpack; \
                  print(_cmsgpack.Packer().pack([1, 'a', {'b': 2.5}]).hex())";
    let output = guest.run(command("python3", &["-c", packed])).await;
    // An array of three elements; 1; a string of one byte; a map of one entry, to a double
    // (MessagePack specification).
    assert_eq!(printed(&output), "9301a16181a162cb4004000000000000\n");
}

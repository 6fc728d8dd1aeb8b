//! Root file systems of packages that are built here: no network is needed.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use sha2::{Digest, Sha256};

use super::*;
use crate::Event;
use crate::Silent;
use crate::command;
use crate::lock::Package;

pub(super) const RECIPE: &str = r#"
name = "tool"
suite = "bookworm"
packages = ["tool"]
remove = ["/etc/unwanted", "/usr/share/many"]

[[file]]
path = "/etc/deep/secret"
content = "of the recipe\n"
mode = 0o640

[[file]]
path = "/usr/bin/other"
link = "tool"

[[user]]
name = "user"
uid = 1000
"#;

pub(super) fn not_measured(reason: &str) {
    let line = format!("\nNOT MEASURED: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Builds a package that has a program in a directory that is a link in the tree, and this
/// machine's shell.
fn package(dir: &Path) -> Option<PathBuf> {
    let tree = dir.join("package");
    let write = |path: &str, mode: u32| {
        let path = tree.join(path);
        fs::create_dir_all(path.parent()?).ok()?;
        fs::write(&path, "of the package\n").ok()?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).ok()
    };
    write("bin/tool", 0o4755)?;
    write("etc/deep/secret", 0o644)?;
    write("etc/unwanted", 0o644)?;
    write("usr/share/many/files", 0o644)?;
    write("usr/share/doc/tool/copyright", 0o644)?;
    for file in with_libraries("/bin/sh")? {
        let to = tree.join(file.trim_start_matches('/'));
        fs::create_dir_all(to.parent()?).ok()?;
        fs::copy(file, to).ok()?;
    }
    built(dir, "package")
}

/// Returns the paths of a program of this machine and of its libraries.
pub(super) fn with_libraries(program: &str) -> Option<Vec<String>> {
    let libraries = command::output(command::tool("ldd").arg(program)).ok()?;
    let libraries = libraries.split_whitespace();
    let libraries = libraries.filter(|word| word.starts_with('/'));
    Some(libraries.chain([program]).map(str::to_owned).collect())
}

/// Builds a package of the files in the directory `name`.
pub(super) fn built(dir: &Path, name: &str) -> Option<PathBuf> {
    let tree = dir.join(name);
    let control = format!(
        "Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: none\nDescription: none\n"
    );
    fs::create_dir(tree.join("DEBIAN")).ok()?;
    fs::write(tree.join("DEBIAN/control"), control).ok()?;
    let file = dir.join(format!("{name}.deb"));
    let mut deb = command::tool("dpkg-deb");
    deb.args(["--root-owner-group", "--build"])
        .arg(&tree)
        .arg(&file);
    command::run(&mut deb, |_| {}).ok()?;
    Some(file)
}

/// Returns the recipe, and a cache that has its package.
pub(super) fn prepared(dir: &Path, text: &str) -> Option<(Recipe, Cache)> {
    prepared_of(dir, text, &[package(dir)?])
}

/// Like `prepared`, with these packages.
pub(super) fn prepared_of(dir: &Path, text: &str, files: &[PathBuf]) -> Option<(Recipe, Cache)> {
    command::output(command::tool("mkfs.erofs").arg("--help")).ok()?;
    let cache = Cache::open(Some(dir.join("cache"))).ok()?;
    let source = cache.dir("source").ok()?;
    let recipe = dir.join("tool.toml");
    fs::write(&recipe, text).ok()?;
    let mut recipe = Recipe::read(&recipe).unwrap();
    let mut packages = Vec::new();
    for file in files {
        let content = fs::read(file).ok()?;
        let sha256: String = Sha256::digest(content)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        fs::copy(file, source.join(format!("{sha256}.deb"))).ok()?;
        packages.push(Package {
            name: recipe.text.packages.first()?.clone(),
            version: "1".to_owned(),
            path: "none".to_owned(),
            sha256,
        });
    }
    recipe.lock = Some(Lock {
        asked: recipe.text.asked(),
        packages,
        wheels: Vec::new(),
    });
    Some((recipe, cache))
}

pub(super) fn mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().permissions().mode()
}

pub(super) fn fetched(sources: &Path, packages: &[Package]) -> Result<Vec<PathBuf>, DebianError> {
    let download = Download {
        suite: "bookworm",
        dir: sources,
        scratch: sources,
        stage: Stage::Packages,
    };
    download.fetch(packages, &Silent)
}

#[test]
fn a_tree_is_its_packages_as_the_recipe_changes_them() {
    let dir = tempfile::tempdir().unwrap();
    let Some((recipe, cache)) = prepared(dir.path(), RECIPE) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    let packages = &recipe.lock.as_ref().unwrap().packages;
    let sources = cache.dir("source").unwrap();
    let files = fetched(&sources, packages).unwrap();
    let tree = TreeRoot::create(&dir.path().join("tree")).unwrap();
    tree::fill(&tree, &files, &recipe.text, &Silent).unwrap();
    let at = |path: &str| tree.path().join(path);
    assert_eq!(fs::read_link(at("bin")).unwrap(), Path::new("usr/bin"));
    assert_eq!(mode(&at("usr/bin/tool")), 0o104_755);
    assert_eq!(fs::read(at("usr/bin/other")).unwrap(), b"of the package\n");
    assert_eq!(fs::read(at("etc/deep/secret")).unwrap(), b"of the recipe\n");
    assert_eq!(mode(&at("etc/deep/secret")), 0o100_640);
    for gone in ["etc/unwanted", "usr/share/many", "usr/share/doc"] {
        assert!(!at(gone).exists(), "{gone}");
    }
    assert_eq!(mode(&at("tmp")), 0o041_777);
    assert!(at("home/user").is_dir());
    let passwd = fs::read_to_string(at("etc/passwd")).unwrap();
    assert!(
        passwd.contains("\nuser:*:1000:1000::/home/user:/bin/sh\n"),
        "{passwd}"
    );
}

/// Counts the images that are written.
#[derive(Default)]
struct Written(AtomicU32);

impl Progress for Written {
    fn event(&self, event: Event) {
        if event == Event::End(Stage::Root) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[test]
fn it_is_built_once_and_is_the_same_wherever_it_is_built() {
    let dir = tempfile::tempdir().unwrap();
    let Some((recipe, cache)) = prepared(dir.path(), RECIPE) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    assert_eq!(cached(&cache, &recipe), None);
    let (written, first) = (Written::default(), cache.root().to_owned());
    let paths = std::thread::scope(|scope| {
        // Each build has its own locks, like a separate process.
        let builds = [(); 4].map(|()| {
            scope.spawn(|| {
                let cache = Cache::open(Some(first.clone())).unwrap();
                get(&cache, &recipe, &written).unwrap()
            })
        });
        builds.map(|build| build.join().unwrap())
    });
    assert_eq!(written.0.load(Ordering::SeqCst), 1);
    let [path, ..] = &paths;
    assert!(paths.iter().all(|other| other == path));
    assert_eq!(cached(&cache, &recipe).as_ref(), Some(path));
    let bytes = path.metadata().unwrap().len();
    let wanted = CachedRoot {
        name: "tool".to_owned(),
        path: path.clone(),
        bytes,
    };
    assert_eq!(all(&cache), [wanted]);
    let scratch = cache.root().join("work").join(KIND);
    assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);

    let elsewhere = Cache::open(Some(dir.path().join("a/longer/place"))).unwrap();
    let copied = elsewhere.dir("source").unwrap();
    for entry in fs::read_dir(cache.dir("source").unwrap()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copied.join(entry.file_name())).unwrap();
    }
    let other = get(&elsewhere, &recipe, &Silent).unwrap();
    assert!(fs::read(path).unwrap() == fs::read(other).unwrap());
}

/// Variables that programs of a build would obey: tar, mkfs.erofs, dpkg, xz, Python, the C library
/// and the shell.
const HOSTILE: [(&str, &str); 12] = [
    ("TAR_OPTIONS", "--exclude=*tool"),
    ("TAPE", "/dev/null"),
    ("SOURCE_DATE_EPOCH", "1000000000"),
    ("DPKG_ROOT", "/nowhere"),
    ("DPKG_DEB_THREADS_MAX", "none"),
    ("XZ_DEFAULTS", "--no-such-option"),
    ("PYTHONPATH", "/nowhere"),
    ("PYTHONHASHSEED", "7"),
    ("LC_ALL", "tr_TR.UTF-8"),
    ("TZ", "Pacific/Kiritimati"),
    ("ENV", "/dev/stdin"),
    ("POSIXLY_CORRECT", "1"),
];

#[test]
fn the_environment_changes_neither_a_key_nor_an_image() {
    let test = "root::tests::the_environment_changes_neither_a_key_nor_an_image";
    if command::tests::is_child() {
        // The child was started in the directory of the recipe, which a hostile user could write
        // to.
        let recipe = Recipe::read(Path::new("tool.toml")).unwrap();
        let cache = Cache::open(Some("elsewhere".into())).unwrap();
        get(&cache, &recipe, &Silent).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some((recipe, cache)) = prepared(dir.path(), RECIPE) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    let lock = recipe.lock.as_ref().unwrap();
    lock.write(&dir.path().join("tool.lock")).unwrap();
    let image = get(&cache, &recipe, &Silent).unwrap();
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::rename(cache.root().join("source"), elsewhere.join("source")).unwrap();
    let mut again = command::tests::again(test);
    again.envs(HOSTILE).current_dir(dir.path());
    command::run(&mut again, |_| {}).unwrap();
    let entry = image.strip_prefix(cache.root()).unwrap();
    assert!(fs::read(elsewhere.join(entry)).unwrap() == fs::read(&image).unwrap());
}

#[test]
fn commands_change_the_tree_and_see_nothing_of_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let Some((recipe, _)) = prepared(dir.path(), RECIPE) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    let sources = dir.path().join("cache/source");
    let packages = &recipe.lock.as_ref().unwrap().packages;
    let files = fetched(&sources, packages).unwrap();
    let tree = TreeRoot::create(&dir.path().join("tree")).unwrap();
    tree::fill(&tree, &files, &recipe.text, &Silent).unwrap();
    let look = format!(
        "test ! -e {} && echo $HOME > /etc/made",
        dir.path().display()
    );
    let run = |command: &str| commands::run(&tree, &[command.to_owned()]);
    if commands_refused().is_some() {
        return not_measured("no namespaces");
    }
    run(&look).unwrap();
    let at = |path: &str| tree.path().join(path);
    assert_eq!(fs::read(at("etc/made")).unwrap(), b"/root\n");
    assert_eq!(mode(&at("etc/made")), 0o100_644);
    run("echo lost > /dev/null && test ! -s /dev/null").unwrap();
    assert_eq!(fs::read_dir(at("dev")).unwrap().count(), 0);
    let error = run("echo why >&2; exit 3").unwrap_err();
    let RootError::Command {
        command,
        source: CommandError::Failed { status, tail, .. },
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((status.code(), tail.as_str()), (Some(3), "why"));
    assert!(command.ends_with("exit 3"));
}

#[test]
fn what_a_recipe_lacks_is_said_before_anything_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(Some(dir.path().to_owned())).unwrap();
    let file = dir.path().join("new.toml");
    fs::write(
        &file,
        "name = 'new'\nsuite = 'bookworm'\npackages = ['jq']\n",
    )
    .unwrap();
    let recipe = Recipe::read(&file).unwrap();
    let error = get(&cache, &recipe, &Silent).unwrap_err();
    let said = format!("hearth image lock {}", file.display());
    assert!(error.to_string().contains(&said), "{error}");
    let shell = Recipe::built_in("shell").unwrap().python_package("six");
    let error = get(&cache, &shell, &Silent).unwrap_err();
    assert!(
        matches!(error, RootError::Wheels(WheelsError::NoPython { .. })),
        "{error}"
    );
    let python = Recipe::built_in("python").unwrap().python_package("./six");
    let error = get(&cache, &python, &Silent).unwrap_err();
    assert!(
        matches!(error, RootError::Wheels(WheelsError::Requirement(_))),
        "{error}"
    );
}

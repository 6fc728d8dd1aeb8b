#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
//! Wakers of the embedding program, which may do anything. There is only one test, because it needs
//! the first VM that its process drops.

use std::pin::pin;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use hearth_vmm::{Exit, Vm, VmConfig};

/// The timeout after which no answer is expected any more.
const STUCK: Duration = Duration::from_secs(30);

fn kvm() -> bool {
    let there = std::path::Path::new("/dev/kvm").exists();
    if !there {
        // Past the test harness's output capture: the summary of `make test` counts these lines.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"\nNOT MEASURED: no /dev/kvm\n");
    }
    there
}

/// `mov al, 1; mov dx, 0x5f0; out dx, al; hlt`: powers off.
const POWER_OFF: [u8; 8] = [0xb0, 1, 0x66, 0xba, 0xf0, 0x05, 0xee, 0xf4];

fn create(code: impl Into<Vec<u8>>) -> Vm {
    Vm::create(&VmConfig::flat(code).memory_mib(32).build().unwrap()).unwrap()
}

/// Sends a message when it is dropped.
struct Told(Sender<&'static str>);

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.0.send("all is released");
    }
}

/// Calls its closure at the first wake, then sends a message.
struct Once(
    Mutex<Option<Box<dyn FnOnce() + Send>>>,
    Mutex<Sender<&'static str>>,
);

impl Wake for Once {
    fn wake(self: Arc<Self>) {
        let act = self.0.lock().unwrap().take();
        if let Some(act) = act {
            act();
            self.1.lock().unwrap().send("woken").unwrap();
        }
    }
}

/// Regression: the waker ran on the vCPU thread, whose seccomp filter refused everything that this
/// waker does. The VM that it dropped could not be queued for teardown: the drop waited 5 s for the
/// thread that it ran on, and the VM leaked.
#[test]
fn a_waker_that_drops_the_last_vm_of_the_process_is_on_a_thread_of_its_own() {
    if !kvm() {
        return;
    }
    let (said, told) = mpsc::channel();
    let vm = create(POWER_OFF);
    vm.on_drop(Told(said.clone()));
    let mut exited = pin!(vm.exited());
    let vm = Arc::new(Mutex::new(Some(vm)));
    let owned = Arc::clone(&vm);
    let act = move || {
        let file = std::fs::read("/proc/self/stat").map_err(|e| e.to_string());
        let thread = std::thread::Builder::new()
            .spawn(|| ())
            .map_err(|e| e.to_string());
        drop(owned.lock().unwrap().take());
        file.unwrap();
        thread.unwrap().join().unwrap();
    };
    let once = Once(Mutex::new(Some(Box::new(act))), Mutex::new(said));
    let waker = Waker::from(Arc::new(once));
    let mut cx = Context::from_waker(&waker);
    assert!(exited.as_mut().poll(&mut cx).is_pending());
    if let Some(vm) = &*vm.lock().unwrap() {
        vm.resume().unwrap();
    }
    let mut heard = [
        told.recv_timeout(STUCK).unwrap(),
        told.recv_timeout(STUCK).unwrap(),
    ];
    heard.sort_unstable();
    assert_eq!(heard, ["all is released", "woken"]);
    assert_eq!(exited.as_mut().poll(&mut cx), Poll::Ready(Exit::PowerOff));
    assert_eq!(hearth_vmm::leaked_vms(), 0);

    // A waker that panics does not keep other tasks from being woken.
    let vm = create(POWER_OFF);
    let mut exited = pin!(vm.exited());
    let (said, told) = mpsc::channel();
    let panics = Once(
        Mutex::new(Some(Box::new(|| panic!("expected")))),
        Mutex::new(said),
    );
    let waker = Waker::from(Arc::new(panics));
    assert!(
        exited
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    vm.resume().unwrap();
    drop(waker);
    let gone = told.recv_timeout(STUCK);
    assert_eq!(gone, Err(mpsc::RecvTimeoutError::Disconnected));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let next = create(POWER_OFF);
    next.resume().unwrap();
    let end = runtime.block_on(async { tokio::time::timeout(STUCK, next.exited()).await });
    assert_eq!(end, Ok(Exit::PowerOff));
    next.destroy();
    vm.destroy();
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}

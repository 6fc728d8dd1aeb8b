//! Boots a kernel with an initramfs and prints its console: `boot KERNEL [INITRAMFS [WORDS...]]`.

use std::io::Write;

use hearth_vmm::{Vm, VmConfig};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = args
        .next()
        .ok_or("usage: boot KERNEL [INITRAMFS [WORDS...]]")?;
    let mut config = VmConfig::builder(kernel).console(true);
    if let Some(initramfs) = args.next() {
        config = config.initramfs(initramfs);
    }
    let vm = Vm::boot(&config.append(&args.collect::<Vec<_>>().join(" ")).build()?)?;
    let mut at = 0;
    loop {
        let chunk = vm.console().read(at).await;
        std::io::stdout().write_all(&chunk.bytes)?;
        at = chunk.next;
        if chunk.end {
            println!("[{}]", vm.exited().await);
            return Ok(());
        }
    }
}

//! The shortest program that takes a guest from a warm pool and prints a program's output.

use std::error::Error;

use hearth_agent::client::OutputLimits;

mod base;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = base::pool(1).await?;
    let guest = pool.acquire(base::BASE)?;
    let program = guest.exec(guest.command("echo").arg("hello")).await?;
    let output = program.output(OutputLimits::default()).await?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    if !output.status.success() {
        return Err(format!("echo ended with {}", output.status).into());
    }
    guest.release().await;
    pool.stop().await;
    Ok(())
}

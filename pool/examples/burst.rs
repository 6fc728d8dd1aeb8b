//! Sends more requests at once than there are warm guests: the first are served at once, the others
//! in the order in which they came, as the pool refills. `burst [REQUESTS] [WARM]`

use std::error::Error;
use std::time::{Duration, Instant};

use hearth_pool::Pool;
use hearth_pool::kvm::KvmBackend;

mod base;

/// How long a request waits for a guest.
const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut numbers = std::env::args().skip(1).map(|number| number.parse());
    let requests: usize = numbers.next().unwrap_or(Ok(8))?;
    let warm: usize = numbers.next().unwrap_or(Ok(4))?;
    let pool = base::pool(warm).await?;

    let burst = Instant::now();
    let tasks: Vec<_> = (0..requests)
        .map(|_| tokio::spawn(request(pool.clone(), burst)))
        .collect();
    for (number, task) in tasks.into_iter().enumerate() {
        let (served, answered) = task.await?.map_err(|error| error.to_string())?;
        println!(
            "request {number:>3}: served after {served:>10.1?}, answered after {answered:.1?}"
        );
    }
    pool.stop().await;
    Ok(())
}

/// Gets a guest, ready or about to be, and pings it; both times are measured from the burst's
/// beginning.
async fn request(
    pool: Pool<KvmBackend>,
    burst: Instant,
) -> Result<(Duration, Duration), Box<dyn Error + Send + Sync>> {
    let guest = pool.acquire_timeout(base::BASE, PATIENCE).await?;
    let served = burst.elapsed();
    guest.ping().await?;
    Ok((served, burst.elapsed()))
}

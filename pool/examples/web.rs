//! A web server that runs each request's program in a separate guest, which is destroyed
//! afterwards.
//!
//! ```sh
//! cargo run --example web -- 127.0.0.1:8080
//! curl --data 'echo hello' http://127.0.0.1:8080/run
//! ```
//! Without an address it sends itself one request and ends.

use std::error::Error;
use std::fmt::Display;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use hearth_agent::client::OutputLimits;
use hearth_pool::Pool;
use hearth_pool::kvm::KvmBackend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

mod base;

/// How long a request waits for a guest when none is ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a request's program may run.
const LIMIT: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1);
    let pool = base::pool(2).await?;
    let app = Router::new()
        .route("/run", post(run))
        .with_state(pool.clone());
    let listener = TcpListener::bind(address.as_deref().unwrap_or("127.0.0.1:0")).await?;
    println!("http://{}/run", listener.local_addr()?);
    let asked = listener.local_addr()?;
    let serving = async { axum::serve(listener, app).await };
    match address {
        Some(_) => serving.await?,
        None => tokio::select! {
            served = serving => served?,
            answer = ask(asked) => {
                let answer = answer?;
                println!("{answer}");
                if !answer.starts_with("HTTP/1.1 200") {
                    return Err("the request was not served".into());
                }
            }
        },
    }
    pool.stop().await;
    Ok(())
}

/// The body is a command line, split at spaces; the answer is what the program printed.
async fn run(
    State(pool): State<Pool<KvmBackend>>,
    body: String,
) -> Result<Vec<u8>, (StatusCode, String)> {
    let mut words = body.split_whitespace();
    let program = words.next().ok_or_else(|| bad("no program"))?;
    let guest = pool.acquire_timeout(base::BASE, PATIENCE).await;
    // Without a guest the client should come again later: the pool refills by itself.
    let guest = guest.map_err(|error| (StatusCode::SERVICE_UNAVAILABLE, error.to_string()))?;
    let command = guest.command(program).args(words).timeout(LIMIT);
    let exec = guest.exec(command).await.map_err(bad)?;
    let output = exec.output(OutputLimits::default()).await.map_err(bad)?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(bad(output.status))
    }
    // The lease is dropped here, and its guest with it.
}

fn bad(why: impl Display) -> (StatusCode, String) {
    (StatusCode::BAD_REQUEST, format!("{why}\n"))
}

/// Sends one HTTP request, written by hand.
async fn ask(address: std::net::SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let body = "echo hello from a guest of my own";
    let request = format!(
        "POST /run HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

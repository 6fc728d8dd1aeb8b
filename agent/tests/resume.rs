//! Connections that outlive their client, and two requests in one round trip.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use common::Agent;
use hearth_agent::client::{AgentClient, Command, OutputLimits, PingError};
use hearth_agent::proto::{ExitStatus, InstanceId, Refresh};
use tokio::net::UnixStream;

#[tokio::test]
async fn a_client_goes_on_with_the_connection_of_another() {
    let agent = Agent::start().await;
    // The end of the first client does not close the connection, as the end of a template's client
    // does not close a clone's.
    let stream = agent.stream().await.unwrap().into_std().unwrap();
    let share = || UnixStream::from_std(stream.try_clone().unwrap()).unwrap();
    let mut first = AgentClient::handshake(share()).await.unwrap();
    let instance = first.hello().unwrap().instance;
    first.ping(1).await.unwrap();
    drop(first);

    let mut second = AgentClient::resume(share());
    assert!(second.hello().is_none());
    // The same nonce is allowed: this is another client.
    assert_eq!(second.ping(1).await.unwrap().instance, instance);
    let exec = second.exec(Command::new("echo").arg("on")).await.unwrap();
    let output = exec.output(OutputLimits::default()).await.unwrap();
    assert_eq!(output.status, ExitStatus::Code(0));
    assert_eq!(output.stdout, b"on\n");
}

#[tokio::test]
async fn the_ping_behind_a_refresh_is_answered_by_the_refreshed_guest() {
    let agent = Agent::start().await;
    let mut client = agent.client().await;
    let refresh = Refresh {
        instance: Some(InstanceId([7; 16])),
        ..Refresh::default()
    };
    client.refresh_and_ping(refresh, 5).await.unwrap();
    let in_use = client.ping(5).await;
    assert!(
        matches!(in_use, Err(PingError::NonceInUse(5))),
        "{in_use:?}"
    );
    let pong = client.pong(5).await.unwrap();
    assert_eq!(pong.instance, InstanceId([7; 16]));
    let again = client.pong(5).await;
    assert!(matches!(again, Err(PingError::NotAsked(5))), "{again:?}");
    assert_eq!(client.ping(5).await.unwrap().instance, pong.instance);
}

//! Reaching a guest's agent without a pool.

use std::time::Duration;

use hearth_agent::AgentClient;
use hearth_agent::proto::AGENT_PORT;
use hearth_vmm::VsockHost;
use hearth_vmm::virtio::vsock::VsockStream;

use super::ScenarioError;

/// A connection to an agent.
pub(super) type Agent = AgentClient<VsockStream>;

/// Dials the agent.
pub(super) async fn dial(vsock: &VsockHost) -> Result<Agent, ScenarioError> {
    let stream = vsock.connect(AGENT_PORT).await;
    greet(stream.map_err(ScenarioError::at("connect"))?).await
}

/// The agent at the other end.
pub(super) async fn greet(stream: VsockStream) -> Result<Agent, ScenarioError> {
    let agent = AgentClient::handshake(stream).await;
    agent.map_err(ScenarioError::at("handshake"))
}

/// Waits until the agent has prepared everything, as a pool does before it makes a template. `pause` lies
/// between two pings.
pub(super) async fn prepared(agent: &mut Agent, pause: Duration) -> Result<(), ScenarioError> {
    // The nonce before the first may have been used.
    for nonce in 2.. {
        let pong = agent.ping(nonce).await;
        if pong.map_err(ScenarioError::at("preparation"))?.prepared {
            break;
        }
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

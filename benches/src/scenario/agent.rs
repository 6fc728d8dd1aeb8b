//! Connects to a guest's agent without a pool, and makes a template as a pool does.

use std::time::{Duration, SystemTime};

use hearth_agent::AgentClient;
use hearth_agent::proto::{AGENT_PORT, InstanceId, READY_PORT, Refresh};
use hearth_vmm::virtio::vsock::VsockStream;
use hearth_vmm::{Template, Vm, VmConfigBuilder, VsockHost};

use super::ScenarioError;
use super::boot::Files;

/// A connection to an agent.
pub(super) type Agent = AgentClient<VsockStream>;

/// Pause between two pings while a template's guest prepares itself.
const PREPARE_PAUSE: Duration = Duration::from_millis(20);
/// How often a template's guest is warmed up with the first steps of a clone.
const REHEARSALS: u64 = 2;
/// How long the guest may then take to become idle.
const REST: Duration = Duration::from_secs(10);

/// Connects to the agent.
pub(super) async fn dial(vsock: &VsockHost) -> Result<Agent, ScenarioError> {
    let stream = vsock.connect(AGENT_PORT).await;
    greet(stream.map_err(ScenarioError::at("connect"))?).await
}

/// Performs the handshake with the agent at the other end.
pub(super) async fn greet(stream: VsockStream) -> Result<Agent, ScenarioError> {
    let agent = AgentClient::handshake(stream).await;
    agent.map_err(ScenarioError::at("handshake"))
}

/// Waits until the agent has prepared everything, as a pool does before it makes a template.
async fn prepared(agent: &mut Agent) -> Result<(), ScenarioError> {
    // Not from 1: an earlier ping may have used it.
    for nonce in 2.. {
        let pong = agent.ping(nonce).await;
        if pong.map_err(ScenarioError::at("preparation"))?.prepared {
            break;
        }
        tokio::time::sleep(PREPARE_PAUSE).await;
    }
    Ok(())
}

/// Makes a guest a template as a pool does: prepared, warmed up, idle, and with its connection to
/// the agent kept for the clones.
pub(super) async fn freeze(vm: Vm, mut agent: Agent) -> Result<Template, ScenarioError> {
    prepared(&mut agent).await?;
    for nonce in 0..REHEARSALS {
        renew(&mut agent, nonce).await?;
    }
    agent.stream().mark_durable();
    let at_rest = vm.pause_at_rest(REST);
    at_rest.map_err(ScenarioError::at("rest"))?;
    let template = vm.into_template();
    template.map_err(ScenarioError::at("template"))
}

/// Boots a guest and makes it a template.
pub(super) async fn template(files: Files<'_>) -> Result<Template, ScenarioError> {
    template_of(files.config()).await
}

/// Boots a guest of this configuration and makes it a template.
pub(super) async fn template_of(config: VmConfigBuilder) -> Result<Template, ScenarioError> {
    let config = config.build();
    let config = config.map_err(ScenarioError::at("configuration"))?;
    let vm = Vm::create(&config).map_err(ScenarioError::at("create"))?;
    let listener = vm.vsock().listen(READY_PORT);
    let mut listener = listener.map_err(ScenarioError::at("listen"))?;
    vm.resume().map_err(ScenarioError::at("resume"))?;
    let stream = listener.accept().await;
    let agent = greet(stream.map_err(ScenarioError::at("agent"))?).await?;
    freeze(vm, agent).await
}

/// Returns the connection that a clone has from its template.
pub(super) fn resume(vm: &Vm) -> Result<Agent, ScenarioError> {
    let stream = vm.vsock().reattach_all().pop();
    let stream = stream.ok_or("the clone has no connection of its template");
    let stream = stream.map_err(ScenarioError::at("control connection"))?;
    Ok(AgentClient::resume(stream))
}

/// Refreshes a clone and pings it in one round trip, as is done before it is parked.
pub(super) async fn renew(agent: &mut Agent, nonce: u64) -> Result<(), ScenarioError> {
    let refreshed = agent.refresh_and_ping(refresh(), nonce).await;
    refreshed.map_err(ScenarioError::at("reseed"))?;
    let pong = agent.pong(nonce).await;
    pong.map(drop).map_err(ScenarioError::at("ping"))
}

/// Returns a refresh of the right size. Its entropy is constant: these guests have no use for it.
pub(super) fn refresh() -> Refresh {
    Refresh {
        entropy: vec![0; 80],
        wall_clock: Some(SystemTime::now().into()),
        instance: Some(InstanceId([0; 16])),
        hostname: Some("vm-0".into()),
    }
}

//! The persistent connection to a guest's agent, on which the pool checks the guest's health.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};

use hearth_agent::AgentClient;
use hearth_agent::client::{ConnectionError, PingError, Pong};
use hearth_agent::proto::InstanceId;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;

use crate::backend::ProbeError;

/// One probe runs at a time. Each ping has its own nonce, so that the client can tell a late answer
/// from a false one.
pub(super) struct Control<S> {
    line: Mutex<Line<S>>,
    nonce: AtomicU64,
    instance: InstanceId,
}

struct Line<S> {
    /// `None` after the connection was lost: the next probe connects again.
    client: Option<AgentClient<S>>,
    /// The nonce of a ping that was already sent, whose answer the next probe waits for.
    asked: Option<u64>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Control<S> {
    /// The only ping sent on this connection so far, if any, had the nonce `asked`.
    pub(super) fn new(client: AgentClient<S>, instance: InstanceId, asked: Option<u64>) -> Self {
        let client = Some(client);
        Self {
            line: Mutex::new(Line { client, asked }),
            nonce: AtomicU64::new(asked.map_or(1, |nonce| nonce.wrapping_add(1))),
            instance,
        }
    }

    /// Takes the connection away, including any unanswered pings.
    pub(super) async fn take(&self) -> Option<AgentClient<S>> {
        self.line.lock().await.client.take()
    }

    /// Sends one ping. Cancel-safe: if the future is dropped, a late answer is discarded.
    pub(super) async fn probe(
        &self,
        dial: impl Future<Output = Option<AgentClient<S>>>,
    ) -> Result<(), ProbeError> {
        let mut line = self.line.lock().await;
        let Line { client, asked } = &mut *line;
        if client.is_none() {
            *asked = None;
            *client = dial.await;
        }
        let agent = client.as_mut().ok_or(ProbeError::Lost)?;
        let pong = match asked.take() {
            Some(nonce) => agent.pong(nonce).await,
            None => agent.ping(self.nonce.fetch_add(1, Ordering::Relaxed)).await,
        };
        match pong {
            Ok(Pong { instance, .. }) if instance == self.instance => Ok(()),
            Ok(_) => Err(ProbeError::Wrong("it says that it is another guest")),
            Err(error) if error.is_protocol() => {
                Err(ProbeError::Wrong("it sent what no healthy agent sends"))
            }
            Err(PingError::Connection(ConnectionError::Closed | ConnectionError::Io(_))) => {
                *client = None;
                Err(ProbeError::Lost)
            }
            Err(PingError::Connection(_)) => {
                Err(ProbeError::Wrong("it does not speak the protocol"))
            }
            // Too many pings are unanswered (their probes were dropped) to trust this connection.
            Err(_) => {
                *client = None;
                Err(ProbeError::Lost)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hearth_agent::proto::{self, FrameBuffer, Hello, Memory, Request, Response};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::timeout;

    use super::*;

    /// The guest's end of the connection, driven by the test.
    struct Agent(DuplexStream, FrameBuffer);

    impl Agent {
        async fn pinged(&mut self) -> u64 {
            loop {
                while let Some(payload) = self.1.next_frame().unwrap() {
                    // The host's hello comes first and is not a request.
                    if let Ok(Request::Ping { nonce }) = Request::decode(payload) {
                        return nonce;
                    }
                }
                let count = self.0.read(self.1.spare().unwrap()).await.unwrap();
                assert!(count > 0, "the host hung up");
                self.1.filled(count);
            }
        }

        async fn pong(&mut self, nonce: u64, instance: InstanceId) {
            let pong = proto::Pong {
                nonce,
                instance,
                uptime_us: 1,
                memory: Memory::default(),
                execs: 0,
                prepared: true,
            };
            let mut out = Vec::new();
            proto::encode(&Response::Pong(pong), &mut out).unwrap();
            self.0.write_all(&out).await.unwrap();
        }
    }

    const ME: InstanceId = InstanceId([0; 16]);

    async fn connected() -> (Control<DuplexStream>, Agent) {
        let (host, mut guest) = duplex(64 * 1024);
        let mut out = Vec::new();
        Hello::default().encode(&mut out).unwrap();
        guest.write_all(&out).await.unwrap();
        let client = AgentClient::handshake(host).await.unwrap();
        (
            Control::new(client, ME, None),
            Agent(guest, FrameBuffer::new()),
        )
    }

    async fn nobody() -> Option<AgentClient<DuplexStream>> {
        None
    }

    /// The next probe connects again, and succeeds.
    async fn is_well_when_dialled_again(control: &Control<DuplexStream>) {
        let (fresh, mut agent) = connected().await;
        let client = fresh.take().await;
        let answers = async {
            let nonce = agent.pinged().await;
            agent.pong(nonce, ME).await;
        };
        let (verdict, ()) = tokio::join!(control.probe(async { client }), answers);
        assert_eq!(verdict, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_to_an_earlier_nonce_is_discarded() {
        let (control, mut agent) = connected().await;
        let lost = timeout(Duration::from_secs(5), control.probe(nobody())).await;
        assert!(lost.is_err());
        let answers = async {
            let first = agent.pinged().await;
            let second = agent.pinged().await;
            agent.pong(first, ME).await;
            agent.pong(second, ME).await;
        };
        let (verdict, ()) = tokio::join!(control.probe(nobody()), answers);
        assert_eq!(verdict, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_nonce_never_sent_or_answered_twice_garbage_and_a_foreign_guest_are_wrong() {
        for case in ["never sent", "twice", "garbage", "foreign"] {
            let (control, mut agent) = connected().await;
            let answers = async {
                let nonce = agent.pinged().await;
                match case {
                    "never sent" => agent.pong(nonce + 7, ME).await,
                    "twice" => {
                        agent.pong(nonce, ME).await;
                        agent.pong(nonce, ME).await;
                    }
                    "garbage" => agent.0.write_all(&[0xff; 64]).await.unwrap(),
                    _ => agent.pong(nonce, InstanceId([9; 16])).await,
                }
            };
            let (mut verdict, ()) = tokio::join!(control.probe(nobody()), answers);
            if case == "twice" {
                assert_eq!(verdict, Ok(()), "the second answer is not there yet");
                verdict = control.probe(nobody()).await;
            }
            let wrong = verdict.expect_err(case);
            assert!(!wrong.is_transient(), "{case}: {wrong}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_on_which_too_many_probes_were_dropped_is_replaced() {
        let (control, _silent) = connected().await;
        for _ in 0..64 {
            let dropped = timeout(Duration::from_millis(1), control.probe(nobody())).await;
            assert!(dropped.is_err());
        }
        assert_eq!(control.probe(nobody()).await, Err(ProbeError::Lost));
        is_well_when_dialled_again(&control).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_connection_is_dialled_again() {
        let (control, agent) = connected().await;
        drop(agent);
        assert_eq!(control.probe(nobody()).await, Err(ProbeError::Lost));
        assert_eq!(control.probe(nobody()).await, Err(ProbeError::Lost));
        is_well_when_dialled_again(&control).await;
    }
}

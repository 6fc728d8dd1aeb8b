//! Flow control of one connection (virtio 1.2 section 5.10.6.3): each side announces how large its
//! buffer is and how much it has consumed, in counters that wrap at 2^32.

use super::packet::{Header, MAX_PAYLOAD};

/// The guest's credit: how much it may still send to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inbound {
    /// Bytes that the host promised to buffer.
    window: u32,
    /// Bytes that the guest sent.
    received: u32,
    /// Bytes that the host's reader took.
    consumed: u32,
    /// `consumed` as last announced to the guest.
    announced: u32,
}

impl Inbound {
    pub(super) fn new(window: u32) -> Self {
        Self::resume(window, 0, 0)
    }

    /// Resumes where all received bytes are consumed, but not all of them are announced.
    pub(super) fn resume(window: u32, consumed: u32, announced: u32) -> Self {
        Self {
            window,
            received: consumed,
            consumed,
            announced,
        }
    }

    pub(super) fn window(&self) -> u32 {
        self.window
    }

    /// Counts `len` more bytes from the guest. Returns false, without counting them, if they exceed
    /// the window.
    #[must_use]
    pub(super) fn receive(&mut self, len: u32) -> bool {
        let held = self.received.wrapping_sub(self.consumed);
        let fits = len <= self.window.saturating_sub(held);
        if fits {
            self.received = self.received.wrapping_add(len);
        }
        fits
    }

    /// Counts `len` bytes as taken by the host's reader.
    pub(super) fn consume(&mut self, len: usize) {
        // At most the window, so it fits the counter.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.consumed = self.consumed.wrapping_add(len);
    }

    /// Whether to send a credit update unasked: the reader has freed a quarter of the window or
    /// [`MAX_PAYLOAD`] bytes, or it has freed some and the guest believes that no space is left.
    pub(super) fn update_due(&self) -> bool {
        let freed = self.consumed.wrapping_sub(self.announced);
        let believed = self.received.wrapping_sub(self.announced);
        freed >= (self.window / 4).min(MAX_PAYLOAD) || (freed > 0 && believed >= self.window)
    }

    /// Writes the host's credit into an outgoing header.
    pub(super) fn announce(&mut self, header: &mut Header) {
        self.announced = self.consumed;
        header.buf_alloc = self.window;
        header.fwd_cnt = self.consumed;
    }

    /// The counters to resume from (consumed, announced), if nothing is buffered.
    pub(super) fn settled(&self) -> Option<(u32, u32)> {
        (self.received == self.consumed).then_some((self.consumed, self.announced))
    }
}

/// The host's credit: how much it may still send to the guest. A guest that announces false values
/// stalls only its own connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outbound {
    /// Bytes that the host sent.
    pub(super) sent: u32,
    /// Size of the guest's buffer, as last announced.
    pub(super) allocated: u32,
    /// Bytes that the guest consumed, as last announced.
    pub(super) forwarded: u32,
}

impl Outbound {
    pub(super) fn new(header: &Header) -> Self {
        Self {
            sent: 0,
            allocated: header.buf_alloc,
            forwarded: header.fwd_cnt,
        }
    }

    /// Takes the guest's credit values from one of its packets.
    pub(super) fn update(&mut self, header: &Header) {
        self.allocated = header.buf_alloc;
        self.forwarded = header.fwd_cnt;
    }

    /// Bytes that fit the guest's buffer now: none for a guest that shrank its buffer below the
    /// bytes in flight, until it catches up.
    pub(super) fn room(&self) -> u32 {
        self.allocated
            .saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    /// Counts `len` bytes as sent, at most [`Outbound::room`].
    pub(super) fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }

    #[test]
    fn a_guest_that_shrinks_its_buffer_stalls_itself_only() {
        let mut out = Outbound::new(&says(1000, 0));
        out.send(800);
        out.update(&says(100, 0));
        assert_eq!(out.room(), 0);
        out.update(&says(100, 750));
        assert_eq!(out.room(), 50);
    }

    #[test]
    fn a_guest_that_consumed_more_than_was_sent_gets_nothing() {
        let out = Outbound::new(&says(u32::MAX - 1, 1));
        assert_eq!(out.room(), 0);
    }

    #[test]
    fn counters_wrap() {
        let mut out = Outbound {
            sent: u32::MAX - 9,
            allocated: 100,
            forwarded: u32::MAX - 9,
        };
        out.send(60);
        assert_eq!((out.sent, out.room()), (50, 40));
        let mut inbound = Inbound::resume(100, u32::MAX - 9, u32::MAX - 9);
        assert!(inbound.receive(60));
        assert!(!inbound.receive(41));
        inbound.consume(60);
        assert!(inbound.receive(100));
        assert_eq!(inbound.settled(), None);
        inbound.consume(100);
        assert_eq!(inbound.settled(), Some((150, u32::MAX - 9)));
    }

    #[test]
    fn a_blocked_guest_hears_of_the_first_free_byte() {
        let mut inbound = Inbound::new(100_000);
        assert!(inbound.receive(100_000));
        inbound.consume(1);
        assert!(inbound.update_due());
        let mut header = Header::default();
        inbound.announce(&mut header);
        assert_eq!((header.buf_alloc, header.fwd_cnt), (100_000, 1));
        assert!(!inbound.update_due());
    }

    #[test]
    fn a_guest_with_room_hears_only_of_much() {
        let mut inbound = Inbound::new(100_000);
        assert!(inbound.receive(50_000));
        inbound.consume(24_999);
        assert!(!inbound.update_due());
        inbound.consume(1);
        assert!(inbound.update_due());
    }
}

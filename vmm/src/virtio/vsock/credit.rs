//! Flow control of one connection (virtio 1.2 section 5.10.6.3): each side says how large its
//! buffer is and how much it has consumed, in counters that wrap at 2^32.

use super::packet::{Header, MAX_PAYLOAD};

/// What the guest may still send to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inbound {
    /// Bytes that we promised to buffer.
    window: u32,
    /// Bytes that the guest sent.
    received: u32,
    /// Bytes that the host's reader took.
    consumed: u32,
    /// `consumed` as the guest last heard it.
    announced: u32,
}

impl Inbound {
    pub(super) fn new(window: u32) -> Self {
        Self::resume(window, 0, 0)
    }

    /// Goes on where all that was received was consumed, but not all of that announced.
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

    /// Takes `len` more bytes from the guest, or refuses: it may not send more than the window.
    #[must_use]
    pub(super) fn receive(&mut self, len: u32) -> bool {
        let held = self.received.wrapping_sub(self.consumed);
        let fits = len <= self.window.saturating_sub(held);
        if fits {
            self.received = self.received.wrapping_add(len);
        }
        fits
    }

    /// The host's reader took `len` bytes.
    pub(super) fn consume(&mut self, len: usize) {
        // Never more than the window holds, so the counter's width is enough.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.consumed = self.consumed.wrapping_add(len);
    }

    /// Whether the guest should hear of freed space without asking: it freed a good part of the
    /// window, or the guest believes that there is none left.
    pub(super) fn update_due(&self) -> bool {
        let freed = self.consumed.wrapping_sub(self.announced);
        let believed = self.received.wrapping_sub(self.announced);
        freed >= (self.window / 4).min(MAX_PAYLOAD) || (freed > 0 && believed >= self.window)
    }

    /// Writes our side into an outgoing header.
    pub(super) fn announce(&mut self, header: &mut Header) {
        self.announced = self.consumed;
        header.buf_alloc = self.window;
        header.fwd_cnt = self.consumed;
    }

    /// The counters to resume at (consumed, announced), when nothing is buffered.
    pub(super) fn settled(&self) -> Option<(u32, u32)> {
        (self.received == self.consumed).then_some((self.consumed, self.announced))
    }
}

/// What we may still send to the guest. The guest can lie; then only its own connection stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outbound {
    /// Bytes that we sent.
    pub(super) sent: u32,
    /// Size of the guest's buffer, as it said last.
    pub(super) allocated: u32,
    /// Bytes that the guest consumed, as it said last.
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

    /// Hears what a packet from the guest says.
    pub(super) fn update(&mut self, header: &Header) {
        self.allocated = header.buf_alloc;
        self.forwarded = header.fwd_cnt;
    }

    /// Bytes that fit the guest's buffer now. A guest that shrank its buffer below what is in
    /// flight gets nothing until it caught up.
    pub(super) fn room(&self) -> u32 {
        self.allocated
            .saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    /// `len` bytes go out, at most [`Outbound::room`].
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

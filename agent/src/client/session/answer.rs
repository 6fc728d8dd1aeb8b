//! Answers of an interpreter's driver to a call: a line of kind, length and number of bytes cut
//! off, then text.

/// Most bytes of text in an answer; the drivers use the same number.
pub(super) const MAX_TEXT: usize = 1 << 20;
/// Limit on the line before the text (a letter and two numbers), in bytes.
const MAX_LINE: usize = 48;

/// An answer of the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) kind: Kind,
    pub(super) text: String,
    /// The number of bytes of the text beyond its limit, which were cut off.
    pub(super) cut: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Nothing,
    Value,
    Error,
}

/// The bytes are not an answer of Hearth's drivers: code in the guest wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Garbled;

/// Reassembles answers from the bytes of the third output.
#[derive(Debug, Default)]
pub(super) struct Answers(Vec<u8>);

impl Answers {
    pub(super) fn extend(&mut self, bytes: impl IntoIterator<Item = u8>) {
        self.0.extend(bytes);
    }

    /// Returns the next answer, if it is complete.
    pub(super) fn next(&mut self) -> Result<Option<Answer>, Garbled> {
        let Some(end) = self.0.iter().take(MAX_LINE).position(|&byte| byte == b'\n') else {
            return if self.0.len() < MAX_LINE {
                Ok(None)
            } else {
                Err(Garbled)
            };
        };
        let (line, rest) = self.0.split_at_checked(end + 1).ok_or(Garbled)?;
        let (kind, length, cut) = parse(line.trim_ascii_end()).ok_or(Garbled)?;
        let Some(text) = rest.get(..length) else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(text).into_owned();
        self.0.drain(..end + 1 + length);
        Ok(Some(Answer { kind, text, cut }))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

fn parse(line: &[u8]) -> Option<(Kind, usize, u64)> {
    let mut words = str::from_utf8(line).ok()?.split(' ');
    let kind = match words.next()? {
        "n" => Kind::Nothing,
        "v" => Kind::Value,
        "e" => Kind::Error,
        _ => return None,
    };
    let length = words
        .next()?
        .parse()
        .ok()
        .filter(|&length| length <= MAX_TEXT)?;
    let cut = words.next()?.parse().ok()?;
    words.next().is_none().then_some((kind, length, cut))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(bytes: &[u8]) -> Answers {
        Answers(bytes.to_vec())
    }

    #[test]
    fn an_answer_comes_in_any_pieces_and_the_next_one_behind_it() {
        let bytes = b"v 2 0\n42n 0 7\n";
        for piece in 1..bytes.len() {
            let (mut answers, mut got) = (Answers::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                answers.extend(piece.iter().copied());
                while let Some(answer) = answers.next().unwrap() {
                    got.push((answer.kind, answer.text, answer.cut));
                }
            }
            let wanted = [
                (Kind::Value, "42".to_owned(), 0),
                (Kind::Nothing, String::new(), 7),
            ];
            assert_eq!(got, wanted, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_no_driver_says_is_garbled_and_never_waited_for_without_end() {
        for bytes in [
            &b"x 2 0\nab"[..],
            b"v two 0\n",
            b"v 2\nab",
            b"v 2 0 0\nab",
            b"v 1048577 0\n",
            b"v -1 0\n",
            b"\xff 1 0\n",
            &[b'7'; MAX_LINE],
        ] {
            assert_eq!(answers(bytes).next(), Err(Garbled), "{bytes:?}");
        }
        assert_eq!(answers(b"v 1048576 0\nab").next(), Ok(None));
        assert_eq!(answers(b"v 10").next(), Ok(None));
    }

    #[test]
    fn text_that_is_none_is_made_one() {
        let answer = answers(b"e 2 0\n\xffa").next().unwrap().unwrap();
        assert_eq!(answer.text, "\u{fffd}a");
    }
}

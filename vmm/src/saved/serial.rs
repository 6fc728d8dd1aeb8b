//! The serial port's registers, as a template's manifest holds them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vm_superio::serial::SerialState;

#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// Content longer than the port's FIFO is refused when a port is restored from it.
    in_buffer: Vec<u8>,
}

#[derive(Serialize)]
struct Borrowed<'a>(#[serde(with = "Registers")] &'a SerialState);

#[derive(Deserialize)]
struct Owned(#[serde(with = "Registers")] SerialState);

pub(super) fn serialize<S: Serializer>(
    state: &Option<SerialState>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    state.as_ref().map(Borrowed).serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<SerialState>, D::Error> {
    Ok(Option::<Owned>::deserialize(deserializer)?.map(|owned| owned.0))
}

//! TensorBoard's event files: TFRecords of `Event` messages. The few fields that scalars need are written by hand, as no
//! maintained crate writes them.
//!
//! A record is its length, the length's checksum, the message, and the message's checksum, all little-endian.
//!
//! ```text
//! message Event   { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5; }
//! message Summary { message Value { string tag = 1; float simple_value = 2; }  repeated Value value = 1; }
//! ```

/// A number under a tag.
#[derive(Clone, Debug, PartialEq)]
pub struct Scalar {
    pub tag: String,
    pub step: i64,
    pub value: f64,
}

/// The content of an event file. `wall_time`: seconds since 1970 for all events, as artifacts do not store the times of
/// single steps.
pub fn event_file(wall_time: f64, scalars: &[Scalar]) -> Vec<u8> {
    let mut file = Vec::new();
    record(&mut file, &event(wall_time, 0, 3, b"brain.Event:2"));
    for Scalar { tag, step, value } in scalars {
        let mut content = Vec::new();
        bytes_field(&mut content, 1, tag.as_bytes());
        content.push(tag_byte(2, FIXED_32));
        content.extend((*value as f32).to_le_bytes());
        let mut summary = Vec::new();
        bytes_field(&mut summary, 1, &content);
        record(&mut file, &event(wall_time, *step, 5, &summary));
    }
    file
}

const VARINT: u8 = 0;
const FIXED_64: u8 = 1;
const LENGTH_DELIMITED: u8 = 2;
const FIXED_32: u8 = 5;

/// An `Event` with one field of bytes besides its time and step.
fn event(wall_time: f64, step: i64, field: u8, content: &[u8]) -> Vec<u8> {
    let mut event = vec![tag_byte(1, FIXED_64)];
    event.extend(wall_time.to_le_bytes());
    event.push(tag_byte(2, VARINT));
    varint(&mut event, step as u64);
    bytes_field(&mut event, field, content);
    event
}

/// The byte before a field with a number below 16.
fn tag_byte(field: u8, wire_type: u8) -> u8 {
    field << 3 | wire_type
}

fn bytes_field(message: &mut Vec<u8>, field: u8, content: &[u8]) {
    message.push(tag_byte(field, LENGTH_DELIMITED));
    varint(message, content.len() as u64);
    message.extend(content);
}

fn varint(message: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        message.push(n as u8 | 0x80);
        n >>= 7;
    }
    message.push(n as u8);
}

fn record(file: &mut Vec<u8>, message: &[u8]) {
    let length = (message.len() as u64).to_le_bytes();
    file.extend(length);
    file.extend(masked_crc(&length).to_le_bytes());
    file.extend(message);
    file.extend(masked_crc(message).to_le_bytes());
}

/// The checksum of TFRecords: CRC-32C, rotated and shifted so that a checksum of data with checksums differs.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: event files are small.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message's fields: number and content.
    fn fields(mut message: &[u8]) -> Vec<(u8, Vec<u8>)> {
        fn read_varint(message: &mut &[u8]) -> u64 {
            let mut n = 0;
            for shift in (0..).step_by(7) {
                let byte = message[0];
                *message = &message[1..];
                n |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    break;
                }
            }
            n
        }
        let mut fields = Vec::new();
        while !message.is_empty() {
            let tag = read_varint(&mut message) as u8;
            let length = match tag & 7 {
                0 => {
                    let n = read_varint(&mut message);
                    fields.push((tag >> 3, n.to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                5 => 4,
                2 => read_varint(&mut message) as usize,
                other => panic!("wire type {other}"),
            };
            fields.push((tag >> 3, message[..length].to_vec()));
            message = &message[length..];
        }
        fields
    }

    /// The messages of a file whose checksums hold.
    fn messages(mut file: &[u8]) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
            assert_eq!(crc(8), masked_crc(&file[..8]));
            assert_eq!(crc(12 + length), masked_crc(&file[12..12 + length]));
            messages.push(file[12..12 + length].to_vec());
            file = &file[16 + length..];
        }
        messages
    }

    fn of(fields: &[(u8, Vec<u8>)], number: u8) -> &[u8] {
        &fields.iter().find(|(field, _)| *field == number).unwrap().1
    }

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, appendix B.4, and the check value of CRC-32/ISCSI.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn a_file_reads_back() {
        let scalars = [
            Scalar { tag: "phases/kl".into(), step: 0, value: 0.25 },
            Scalar { tag: "x".repeat(300), step: 40_000, value: -1e-3 },
        ];
        let messages = messages(&event_file(1.5e9, &scalars));
        assert_eq!(of(&fields(&messages[0]), 3), b"brain.Event:2");
        assert_eq!(messages.len(), 3);
        for (message, scalar) in messages[1..].iter().zip(&scalars) {
            let event = fields(message);
            assert_eq!(of(&event, 1), 1.5e9_f64.to_le_bytes());
            assert_eq!(of(&event, 2), scalar.step.to_le_bytes());
            let value = fields(of(&fields(of(&event, 5)), 1));
            assert_eq!(of(&value, 1), scalar.tag.as_bytes());
            assert_eq!(of(&value, 2), (scalar.value as f32).to_le_bytes());
        }
    }
}

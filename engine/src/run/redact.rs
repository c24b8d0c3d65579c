//! Takes secrets out of text as it passes. Knows no process.

use std::path::Path;

use crate::kind::Signature;
use crate::text;

/// What stands in a secret's place.
const MASK: &str = "[redacted]";

/// The values that must not be kept anywhere.
#[derive(Clone, Debug, Default)]
pub struct Secrets(Vec<String>);

impl Secrets {
    /// Empty values hide nothing and are left out.
    pub fn new(values: impl IntoIterator<Item = String>) -> Self {
        let mut values: Vec<String> = values.into_iter().filter(|v| !v.is_empty()).collect();
        // A secret that holds another one goes first, or its rest would stay.
        values.sort_by_key(|v| std::cmp::Reverse(v.len()));
        Self(values)
    }

    /// Those that an attempt of a kind may see: the values of its secret variables, and the texts of the files that others of
    /// its variables name. A file that cannot be read holds nothing that the attempt could tell.
    pub fn of(signature: &Signature) -> Self {
        let values = signature.secrets.iter().filter_map(|name| std::env::var(name).ok());
        let files = signature.secret_files.iter().filter_map(std::env::var_os);
        let texts = files.filter_map(|path| text::read(Path::new(&path)).ok()).map(|text| text.trim().to_owned());
        Self::new(values.chain(texts))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn redact(&self, text: &str) -> String {
        let mut stream = Stream::new(self);
        let mut clean = stream.pass(text.as_bytes());
        clean.extend(stream.end());
        String::from_utf8_lossy(&clean).into_owned()
    }
}

/// Redacts bytes that come in pieces, whatever the pieces' borders.
pub struct Stream<'a> {
    secrets: &'a Secrets,
    /// What may be the beginning of a secret.
    held: Vec<u8>,
}

impl<'a> Stream<'a> {
    pub fn new(secrets: &'a Secrets) -> Self {
        Self { secrets, held: Vec::new() }
    }

    /// What can be let through after this piece.
    pub fn pass(&mut self, piece: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(piece);
        let mut clean = Vec::with_capacity(self.held.len());
        let mut at = 0;
        while at < self.held.len() {
            let rest = &self.held[at..];
            let whole = self.secrets.0.iter().find(|s| rest.starts_with(s.as_bytes()));
            let begun = self.secrets.0.iter().any(|s| s.len() > rest.len() && s.as_bytes().starts_with(rest));
            if begun {
                break;
            }
            match whole {
                Some(secret) => {
                    clean.extend_from_slice(MASK.as_bytes());
                    at += secret.len();
                }
                None => {
                    clean.push(rest[0]);
                    at += 1;
                }
            }
        }
        self.held.drain(..at);
        clean
    }

    /// The rest, when no more will come.
    pub fn end(mut self) -> Vec<u8> {
        // What was held back begins a longer secret; it may still hold a shorter one.
        let mut clean = Vec::new();
        let mut rest = std::mem::take(&mut self.held);
        while !rest.is_empty() {
            match self.secrets.0.iter().find(|s| rest.starts_with(s.as_bytes())) {
                Some(secret) => {
                    clean.extend_from_slice(MASK.as_bytes());
                    rest.drain(..secret.len());
                }
                None => clean.push(rest.remove(0)),
            }
        }
        clean
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_secret_is_masked_wherever_the_pieces_break() {
        let secrets = Secrets::new(["sk-abc".to_owned(), "sk-abcdef".to_owned(), String::new()]);
        let text = b"key sk-abcdef, sk-abc, sk-ab and sk-abcde";
        for cut in 0..text.len() {
            let mut stream = Stream::new(&secrets);
            let mut clean = stream.pass(&text[..cut]);
            clean.extend(stream.pass(&text[cut..]));
            clean.extend(stream.end());
            let clean = String::from_utf8(clean).unwrap();
            assert_eq!(clean, "key [redacted], [redacted], sk-ab and [redacted]de", "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn no_secret_passes(secret in "[ab]{2,5}", pieces in proptest::collection::vec("[abc]{0,6}", 0..8)) {
            let secrets = Secrets::new([secret.clone()]);
            let mut stream = Stream::new(&secrets);
            let mut clean = Vec::new();
            for piece in &pieces {
                clean.extend(stream.pass(piece.as_bytes()));
            }
            clean.extend(stream.end());
            let clean = String::from_utf8(clean).unwrap();
            prop_assert!(clean.split(MASK).all(|part| !part.contains(&secret)), "{clean}");
        }
    }
}

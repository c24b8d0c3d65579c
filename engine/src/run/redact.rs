//! Redacts secrets in streams of text.

use std::collections::BTreeSet;
use std::path::Path;

use base64::Engine;
use base64::prelude::{BASE64_STANDARD_NO_PAD as STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD as URL_SAFE_NO_PAD};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::attempt::FinalMessage;
use crate::context::StageEvent;
use crate::error::Error;
use crate::kind::Signature;
use crate::text;

/// Replacement for a secret.
const MASK: &str = "[redacted]";

/// The secret values that must not be kept anywhere, in all their forms.
#[derive(Clone, Debug, Default)]
pub struct Secrets(Vec<String>);

impl Secrets {
    /// Takes the values, each of their lines, and the encodings of both: JSON, URL, base64, upper and lower case.
    /// Ignores empty values.
    pub fn new(values: impl IntoIterator<Item = String>) -> Self {
        let mut forms = BTreeSet::new();
        for value in values.into_iter().filter(|value| !value.is_empty()) {
            let lines = value.lines().map(str::trim).filter(|line| line.len() >= MIN_ENCODED_BYTES);
            for part in lines.chain([value.as_str()]) {
                forms.insert(part.to_owned());
                if part.len() >= MIN_ENCODED_BYTES {
                    forms.extend(encodings(part));
                }
            }
        }
        let mut forms = Vec::from_iter(forms);
        // Longest first: a secret that contains another one must be replaced as a whole.
        forms.sort_by_key(|form| std::cmp::Reverse(form.len()));
        Self(forms)
    }

    /// The secrets that attempts of these kinds may see: the values of secret variables, and the texts of files named
    /// by `secret_files` variables. Unreadable files are ignored, because an attempt cannot read them either.
    pub fn of<'a>(signatures: impl IntoIterator<Item = &'a Signature>) -> Self {
        let (mut values, mut files) = (BTreeSet::new(), BTreeSet::new());
        for signature in signatures {
            values.extend(&signature.secrets);
            files.extend(&signature.secret_files);
        }
        let values = values.into_iter().filter_map(|name| std::env::var(name).ok());
        let files = files.into_iter().filter_map(std::env::var_os);
        let texts = files.filter_map(|path| text::read(Path::new(&path)).ok()).map(|text| text.trim().to_owned());
        Self::new(values.chain(texts))
    }

    pub fn redact(&self, text: &str) -> String {
        let mut stream = RedactingStream::new(self);
        let mut clean = stream.push(text.as_bytes());
        clean.extend(stream.end());
        String::from_utf8_lossy(&clean).into_owned()
    }

    pub fn redact_event(&self, event: StageEvent) -> StageEvent {
        match event {
            StageEvent::Progress { done, total, unit, headline } => {
                let headline = headline.map(|(name, value)| (self.redact(&name), value));
                StageEvent::Progress { done, total, unit: self.redact(&unit), headline }
            }
            StageEvent::Activity { what } => StageEvent::Activity { what: self.redact(&what) },
            StageEvent::Timing { what, seconds } => {
                let seconds = seconds.into_iter().map(|(name, value)| (self.redact(&name), value)).collect();
                StageEvent::Timing { what: self.redact(&what), seconds }
            }
            StageEvent::Checkpoint { done, total, unit } => {
                StageEvent::Checkpoint { done, total, unit: self.redact(&unit) }
            }
            StageEvent::Resumed { done, total, unit } => StageEvent::Resumed { done, total, unit: self.redact(&unit) },
            StageEvent::Paid(paid) => StageEvent::Paid(paid),
            StageEvent::Warning { message } => StageEvent::Warning { message: self.redact(&message) },
        }
    }

    pub fn redact_final(&self, message: FinalMessage) -> FinalMessage {
        match message {
            FinalMessage::Done { .. } => message,
            FinalMessage::Failed { error } => {
                let (message, help) = (self.redact(&error.message), error.help.map(|help| self.redact(&help)));
                FinalMessage::Failed { error: Error { message, help, ..error } }
            }
        }
    }
}

/// Shorter secrets are redacted only literally: their encoded forms would occur in ordinary text.
const MIN_ENCODED_BYTES: usize = 6;

const UNRESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
const PATH: AsciiSet = UNRESERVED.remove(b'/');

/// The encodings of a secret.
fn encodings(secret: &str) -> Vec<String> {
    let json = serde_json::Value::from(secret).to_string();
    let mut forms = vec![json[1..json.len() - 1].to_owned(), secret.to_uppercase(), secret.to_lowercase()];
    for set in [NON_ALPHANUMERIC, &UNRESERVED, &PATH] {
        let upper = utf8_percent_encode(secret, set).to_string();
        // Escapes may have upper-case or lower-case digits.
        let parts = upper.split('%').enumerate().map(|(n, part)| match part.split_at_checked(2) {
            Some((digits, rest)) if n > 0 => format!("{}{rest}", digits.to_lowercase()),
            _ => part.to_owned(),
        });
        let lower = parts.collect::<Vec<_>>().join("%");
        forms.extend([upper.replace("%20", "+"), lower.replace("%20", "+"), upper, lower]);
    }
    // In the base64 of a longer text, such as `user:secret`, the secret starts at one of three positions of a group;
    // its first and last characters also depend on the neighbouring bytes, so they are left out.
    for before in 0..3 {
        let bytes = [&b"000"[..before], secret.as_bytes()].concat();
        let shared = [0, 2, 3][before]..(bytes.len() * 8).div_euclid(6);
        forms.extend(
            [STANDARD_NO_PAD.encode(&bytes), URL_SAFE_NO_PAD.encode(&bytes)]
                .map(|text| text[shared.clone()].to_owned()),
        );
    }
    forms
}

/// Redacts bytes that arrive in arbitrary pieces.
pub struct RedactingStream<'a> {
    secrets: &'a Secrets,
    /// Bytes that may be the beginning of a secret.
    pending: Vec<u8>,
}

impl<'a> RedactingStream<'a> {
    pub fn new(secrets: &'a Secrets) -> Self {
        Self { secrets, pending: Vec::new() }
    }

    /// Adds a piece and returns the redacted bytes that are final.
    pub fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        self.pending.extend_from_slice(piece);
        let mut clean = Vec::with_capacity(self.pending.len());
        let mut at = 0;
        while at < self.pending.len() {
            let rest = &self.pending[at..];
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
        self.pending.drain(..at);
        clean
    }

    /// Returns the rest at the end of the stream.
    pub fn end(mut self) -> Vec<u8> {
        // The held bytes are the beginning of a longer secret, but may contain a shorter one.
        let mut clean = Vec::new();
        let mut rest = std::mem::take(&mut self.pending);
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
    fn a_secret_is_masked_wherever_the_text_is_split() {
        let secrets = Secrets::new(["sk-abc".to_owned(), "sk-abcdef".to_owned(), String::new()]);
        let text = b"key sk-abcdef, sk-abc, sk-ab and sk-abcde";
        for cut in 0..text.len() {
            let mut stream = RedactingStream::new(&secrets);
            let mut clean = stream.push(&text[..cut]);
            clean.extend(stream.push(&text[cut..]));
            clean.extend(stream.end());
            let clean = String::from_utf8(clean).unwrap();
            assert_eq!(clean, "key [redacted], [redacted], sk-ab and [redacted]de", "cut at {cut}");
        }
    }

    #[test]
    fn a_secret_is_masked_however_programs_write_it() {
        let secret = "sk/ant+03 \"Q\"=é_Zz";
        let pem = format!("-----BEGIN KEY-----\nMIIabc123def\n{secret}\n");
        let secrets = Secrets::new([pem.clone(), "Basic-p4ssw0rd".into(), "abc".into()]);
        let base64 = |text: &str| STANDARD_NO_PAD.encode(text);
        for text in [
            pem.clone(),
            "MIIabc123def".into(),
            "MIIABC123DEF".into(),
            serde_json::json!({ "key": pem }).to_string(),
            serde_json::json!({ "key": secret }).to_string(),
            format!("?key={}", utf8_percent_encode(secret, NON_ALPHANUMERIC)),
            "sk%2fant%2b03%20%22Q%22%3d%c3%a9_Zz".into(),
            "sk%2Fant%2B03+%22Q%22%3D%C3%A9_Zz".into(),
            base64("Basic-p4ssw0rd"),
            base64("u:Basic-p4ssw0rd:more"),
            base64("us:Basic-p4ssw0rd"),
            URL_SAFE_NO_PAD.encode(format!("user:{secret}")),
            "BASIC-P4SSW0RD".into(),
        ] {
            let clean = secrets.redact(&text);
            // Only characters from neighbours may remain of the base64.
            let left = clean.replace(MASK, "");
            for part in
                ["MIIabc", "MIIABC", "ant", "\"Q", "p4ssw0rd", "P4SSW0RD", "YXNpYy1wNHNzdzByZ", "CYXNpYy1wNHNzdzByZ"]
            {
                assert!(!left.contains(part), "`{part}` of `{text}` passed: {clean}");
            }
            assert!(clean.contains(MASK), "{text}");
        }
        assert_eq!(secrets.redact("ABC abc 616263 YWJj"), format!("ABC {MASK} 616263 YWJj"));
    }

    proptest! {
        #[test]
        fn no_secret_is_left_in_base64(secret in "[ -~]{6,20}", before in "[ -~]{0,4}", after in "[ -~]{0,4}") {
            let secrets = Secrets::new([secret.clone()]);
            for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
                let clean = secrets.redact(&engine.encode(format!("{before}{secret}{after}")));
                let left = clean.replace(MASK, "").len();
                prop_assert!(clean.contains(MASK) && left <= (before.len() + after.len() + 4) * 4 / 3 + 3, "{clean}");
            }
        }

        #[test]
        fn no_secret_is_left_after_redaction(secret in "[ab]{2,5}", pieces in proptest::collection::vec("[abc]{0,6}", 0..8)) {
            let secrets = Secrets::new([secret.clone()]);
            let mut stream = RedactingStream::new(&secrets);
            let mut clean = Vec::new();
            for piece in &pieces {
                clean.extend(stream.push(piece.as_bytes()));
            }
            clean.extend(stream.end());
            let clean = String::from_utf8(clean).unwrap();
            prop_assert!(clean.split(MASK).all(|part| !part.contains(&secret)), "{clean}");
        }
    }
}

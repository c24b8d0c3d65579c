//! Any bytes as a gguf file: an error or a model, never a panic, never more memory than the limit.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = lm::files::check_gguf(bytes);
});

//! Arbitrary bytes as a safetensors file give an error or a model, never a panic or more memory than the limit.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = lm::io::check_safetensors(bytes);
});

//! Rotary frequencies and their scaling in a config file: `default`, `linear`, `llama3`.

use serde::{Deserialize, Serialize};

const THETA: f64 = 10_000.0;

/// The widest head that is accepted: a config file is untrusted.
const MAX_DIM: usize = 1 << 16;

/// Radians per position: theta^(-2i/dim) for each of the dim/2 pairs. Rounds to f32 wherever transformers does: the
/// rounding error grows with the position, and models were trained with it. Errors: a width beyond all models.
pub fn frequencies(theta: f64, dim: usize) -> Result<Vec<f32>, String> {
    if dim > MAX_DIM {
        return Err(format!("rotary embeddings over {dim} columns of a head; at most {MAX_DIM} are supported"));
    }
    let base = f64::from(theta as f32);
    let power = |i: usize| base.powf(f64::from((2 * i) as f32 / dim as f32)) as f32;
    Ok((0..dim / 2).map(|i| 1.0 / power(i)).collect())
}

/// The rotary part of a config file: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`, which
/// holds both. Contradictions are resolved as in transformers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeScaling>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
    /// Overrides the one in the scaling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<u32>,
}

/// Scaling of the frequencies for longer sequences than a model was first trained on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RopeScaling {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_type: Option<String>,
    /// The former name of `rope_type`; many files have both.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub former_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
}

impl RopeConfig {
    /// The frequencies for heads with `dim` rotated columns. Errors: an unsupported scaling, or one that lacks a
    /// number.
    pub fn frequencies(&self, dim: usize) -> Result<Vec<f32>, String> {
        let given = |scaling: &&RopeScaling| **scaling != RopeScaling::default();
        let scaling = self.rope_scaling.as_ref().filter(given).or(self.rope_parameters.as_ref());
        let theta = scaling.and_then(|s| s.rope_theta).or(self.rope_theta).unwrap_or(THETA);
        if !(theta > 0.0 && theta.is_finite()) {
            return Err(format!("rope_theta is {theta}, expected a positive number"));
        }
        let partial = scaling.and_then(|s| s.partial_rotary_factor).or(self.partial_rotary_factor);
        if let Some(part) = partial.filter(|&part| part != 1.0) {
            return Err(format!("partial_rotary_factor is {part}; only 1 is supported"));
        }
        let plain = frequencies(theta, dim)?;
        match scaling {
            None => Ok(plain),
            Some(scaling) => scaling.scale(plain, self.original_max_position_embeddings),
        }
    }
}

impl RopeScaling {
    /// `original_length` is `original_max_position_embeddings` from outside the scaling, if the file has it there.
    fn scale(&self, plain: Vec<f32>, original_length: Option<u32>) -> Result<Vec<f32>, String> {
        let positive = |name: &str, value: Option<f64>| match value {
            Some(value) if value > 0.0 && value.is_finite() => Ok(value),
            _ => Err(format!("rope_scaling: `{name}` is missing or not a positive number")),
        };
        match self.rope_type.as_deref().or(self.former_type.as_deref()).unwrap_or("default") {
            "default" => Ok(plain),
            "linear" => {
                let factor = positive("factor", self.factor)?;
                Ok(plain.into_iter().map(|f| f / factor as f32).collect())
            }
            "llama3" => {
                let factor = positive("factor", self.factor)?;
                let low = positive("low_freq_factor", self.low_freq_factor)?;
                let high = positive("high_freq_factor", self.high_freq_factor)?;
                let original_length = original_length.or(self.original_max_position_embeddings).map(f64::from);
                let original_length = positive("original_max_position_embeddings", original_length)?;
                if low >= high {
                    return Err(format!("rope_scaling: low_freq_factor {low} is not below high_freq_factor {high}"));
                }
                Ok(plain.into_iter().map(|f| llama3_frequency(f, factor, low, high, original_length)).collect())
            }
            other => Err(format!("rope_scaling has type `{other}`, expected `default`, `linear` or `llama3`")),
        }
    }
}

/// Llama 3.1's rule: wavelengths below `original_length / high` stay, those above `original_length / low` are stretched
/// by `factor`, and in between the two are interpolated. Every step rounds as in transformers, which rounds 1 / x
/// before it multiplies.
pub(crate) fn llama3_frequency(frequency: f32, factor: f64, low: f64, high: f64, original_length: f64) -> f32 {
    let wavelength = 1.0 / frequency * std::f32::consts::TAU;
    if wavelength > (original_length / low) as f32 {
        return frequency / factor as f32;
    }
    if wavelength < (original_length / high) as f32 {
        return frequency;
    }
    let kept = (1.0 / wavelength * original_length as f32 - low as f32) / (high - low) as f32;
    (1.0 - kept) * frequency / factor as f32 + kept * frequency
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(json: serde_json::Value) -> Result<Vec<f32>, String> {
        serde_json::from_value::<RopeConfig>(json).expect("rotary settings").frequencies(4)
    }

    #[test]
    fn both_spellings_of_theta_and_scaling_are_read() {
        let old = rope(serde_json::json!({ "rope_theta": 100.0, "rope_scaling": { "type": "linear", "factor": 2.0 } }));
        let new = rope(
            serde_json::json!({ "rope_parameters": { "rope_theta": 100.0, "rope_type": "linear", "factor": 2.0 } }),
        );
        assert_eq!(old, Ok(vec![0.5, 0.05]));
        assert_eq!(new, old);
        assert_eq!(rope(serde_json::json!({})), Ok(vec![1.0, 0.01]));
    }

    #[test]
    fn duplicate_settings_are_resolved_as_in_transformers() {
        let linear = serde_json::json!({ "type": "linear", "rope_type": "linear", "factor": 2.0 });
        let plain = serde_json::json!({ "rope_type": "default", "rope_theta": 100.0 });
        let both = rope(serde_json::json!({ "rope_theta": 1.0, "rope_parameters": plain.clone() }));
        assert_eq!(both, Ok(vec![1.0, 0.1]), "the inner theta");
        let both = rope(serde_json::json!({ "rope_theta": 100.0, "rope_scaling": linear, "rope_parameters": plain }));
        assert_eq!(both, Ok(vec![0.5, 0.05]), "rope_scaling");
        let both = rope(serde_json::json!({ "rope_scaling": {}, "rope_parameters": plain }));
        assert_eq!(both, Ok(vec![1.0, 0.1]), "rope_scaling is empty");

        let llama3 = |inner: u32, outer: Option<u32>| {
            rope(serde_json::json!({
                "rope_scaling": { "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": inner },
                "original_max_position_embeddings": outer,
            }))
        };
        assert_eq!(llama3(4096, Some(16)), llama3(16, None));
        assert_ne!(llama3(4096, None), llama3(16, None));
    }

    #[test]
    fn frequencies_equal_pytorchs_bit_for_bit() {
        // 1 / 500000 ** (torch.arange(0, 14, 2).float() / 14)
        let expected = [0x3f800000, 0x3e1d183a, 0x3cc0cd72, 0x3b6ca07f, 0x3a1134d0, 0x38b23646, 0x375ab850];
        assert_eq!(frequencies(500_000.0, 14), Ok(expected.map(f32::from_bits).to_vec()));
        // transformers' own, of heads of 16.
        let llama3 = serde_json::json!({ "rope_type": "llama3", "rope_theta": 1e4, "factor": 7.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64 });
        let rope: RopeConfig =
            serde_json::from_value(serde_json::json!({ "rope_parameters": llama3 })).expect("rotary settings");
        let expected = [0x3f800000, 0x3e7bc04e, 0x3c72c29a, 0x3b9407df, 0x3abb3ee7, 0x39ecd965, 0x3915cbed, 0x383d7ab7];
        assert_eq!(rope.frequencies(16), Ok(expected.map(f32::from_bits).to_vec()));
    }

    #[test]
    fn a_scaling_that_is_unknown_or_incomplete_is_refused() {
        let yarn = rope(serde_json::json!({ "rope_scaling": { "rope_type": "yarn", "factor": 2.0 } }));
        assert!(yarn.is_err_and(|e| e.contains("yarn")));
        let bare = rope(serde_json::json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0 } }));
        assert!(bare.is_err_and(|e| e.contains("low_freq_factor")));
        assert!(rope(serde_json::json!({ "rope_theta": -1.0 })).is_err());
        let partial = rope(serde_json::json!({ "partial_rotary_factor": 0.5 }));
        assert!(partial.is_err_and(|e| e.contains("partial_rotary_factor")));
        assert!(rope(serde_json::json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } })).is_err());
        assert_eq!(rope(serde_json::json!({ "partial_rotary_factor": 1.0 })), rope(serde_json::json!({})));
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_stretches_long_ones() {
        let scaled = |f| llama3_frequency(f, 8.0, 1.0, 4.0, 8192.0);
        assert_eq!(scaled(1.0), 1.0);
        assert_eq!(scaled(1e-5), 1e-5 / 8.0);
        let between = std::f32::consts::TAU * 2.5 / 8192.0;
        assert!((scaled(between) / between - 0.5625).abs() < 1e-6);
    }
}

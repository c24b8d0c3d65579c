//! Rotary frequencies and how a config file scales them: `default`, `linear`, `llama3`. Knows no model.

use serde::{Deserialize, Serialize};

const THETA: f64 = 10_000.0;

/// The widest head that is believed: a config file is untrusted.
const WIDEST: usize = 1 << 16;

/// The angles of one position: theta^(-2i/dim) for each of the dim/2 pairs. Errors: a width beyond all models.
pub fn frequencies(theta: f64, dim: usize) -> Result<Vec<f64>, String> {
    if dim > WIDEST {
        return Err(format!("rotary positions over {dim} columns of a head; at most {WIDEST} are supported"));
    }
    Ok((0..dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim as f64)).collect())
}

/// The rotary part of a config file: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`, which holds both.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<Scaling>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<Scaling>,
}

/// How the frequencies are scaled for longer sequences than a model was first trained on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Scaling {
    #[serde(default, alias = "type", skip_serializing_if = "Option::is_none")]
    pub rope_type: Option<String>,
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
}

impl Rope {
    /// For heads whose first `dim` columns turn. Errors: a scaling that is not known here, or one that lacks a number.
    pub fn frequencies(&self, dim: usize) -> Result<Vec<f64>, String> {
        let scaling = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = self.rope_theta.or(scaling.and_then(|s| s.rope_theta)).unwrap_or(THETA);
        if !(theta > 0.0 && theta.is_finite()) {
            return Err(format!("rope_theta is {theta}; expected a positive number"));
        }
        let plain = frequencies(theta, dim)?;
        match scaling {
            None => Ok(plain),
            Some(scaling) => scaling.scale(plain),
        }
    }
}

impl Scaling {
    fn scale(&self, plain: Vec<f64>) -> Result<Vec<f64>, String> {
        let need = |name: &str, value: Option<f64>| match value {
            Some(value) if value > 0.0 && value.is_finite() => Ok(value),
            _ => Err(format!("rope_scaling: `{name}` is missing or not a positive number")),
        };
        match self.rope_type.as_deref().unwrap_or("default") {
            "default" => Ok(plain),
            "linear" => {
                let factor = need("factor", self.factor)?;
                Ok(plain.into_iter().map(|f| f / factor).collect())
            }
            "llama3" => {
                let factor = need("factor", self.factor)?;
                let low = need("low_freq_factor", self.low_freq_factor)?;
                let high = need("high_freq_factor", self.high_freq_factor)?;
                let length = self.original_max_position_embeddings.map(f64::from);
                let length = need("original_max_position_embeddings", length)?;
                if low >= high {
                    return Err(format!("rope_scaling: low_freq_factor {low} is not below high_freq_factor {high}"));
                }
                Ok(plain.into_iter().map(|f| llama3(f, factor, low, high, length)).collect())
            }
            other => Err(format!("rope_scaling of type `{other}`; `default`, `linear` and `llama3` are supported")),
        }
    }
}

/// Llama 3.1's rule: waves that fit the original length often stay, those that hardly fit are stretched by `factor`, and in
/// between the two are mixed.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, length: f64) -> f64 {
    let fits = length * frequency / std::f64::consts::TAU;
    let kept = ((fits - low) / (high - low)).clamp(0.0, 1.0);
    (1.0 - kept) * frequency / factor + kept * frequency
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(json: serde_json::Value) -> Result<Vec<f64>, String> {
        serde_json::from_value::<Rope>(json).expect("a rotary part").frequencies(4)
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
    fn a_scaling_that_is_unknown_or_incomplete_is_refused() {
        let yarn = rope(serde_json::json!({ "rope_scaling": { "rope_type": "yarn", "factor": 2.0 } }));
        assert!(yarn.is_err_and(|e| e.contains("yarn")));
        let bare = rope(serde_json::json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0 } }));
        assert!(bare.is_err_and(|e| e.contains("low_freq_factor")));
        assert!(rope(serde_json::json!({ "rope_theta": -1.0 })).is_err());
    }

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        let scaled = |f| llama3(f, 8.0, 1.0, 4.0, 8192.0);
        assert_eq!(scaled(1.0), 1.0);
        assert_eq!(scaled(1e-5), 1e-5 / 8.0);
        let between = std::f64::consts::TAU * 2.5 / 8192.0;
        assert!((scaled(between) / between - 0.5625).abs() < 1e-12);
    }
}

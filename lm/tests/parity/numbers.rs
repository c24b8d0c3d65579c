//! Numbers that other implementations computed, and when ours count as the same. Knows no model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

/// How far numbers may lie apart.
#[derive(Debug, Clone, Copy)]
pub enum Within {
    /// Every entry, absolutely.
    Each(f64),
    /// The norm of the difference: a share of the expected norm, and something absolute for tensors that should be zero.
    Norm { share: f64, slack: f64 },
}

/// Whether `ours` is `expected` within the tolerance; if not, how far it is from that.
pub fn agrees(ours: &[f64], expected: &[f64], within: Within) -> Result<(), String> {
    assert_eq!(ours.len(), expected.len(), "numbers that cannot be compared");
    assert!(!ours.is_empty(), "nothing to compare");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let differences = || ours.iter().zip(expected).map(|(a, b)| a - b);
    let (distance, allowed) = match within {
        // In the total order a NaN is as far as can be; `f64::max` would hide it.
        Within::Each(each) => (differences().map(f64::abs).max_by(f64::total_cmp).unwrap_or(f64::NAN), each),
        Within::Norm { share, slack } => {
            (norm(&mut differences()), share * norm(&mut expected.iter().copied()) + slack)
        }
    };
    if distance <= allowed { Ok(()) } else { Err(format!("{distance:.3e} apart; {allowed:.1e} is allowed")) }
}

/// (comparison, the mutants that must fail it): what the fixtures hold of wrong implementations.
pub type Mutants = &'static [(&'static str, &'static [&'static str])];

/// A file of expected numbers by name; under `mutants/MUTANT/NAME` what a wrong implementation has for NAME.
pub struct Numbers {
    label: String,
    tensors: BTreeMap<String, Tensor>,
    mutants: Mutants,
}

impl Numbers {
    /// Reads a safetensors file. Panics if its mutants are not those of the table, each and all.
    pub fn load(file: &Path, mutants: Mutants) -> Self {
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let numbers = Self { label: file.display().to_string(), tensors: tensors.into_iter().collect(), mutants };
        let written: BTreeSet<String> = numbers
            .names("mutants/")
            .into_iter()
            // A gradient is many tensors and one comparison.
            .map(|name| name.split_inclusive("/gradient").next().unwrap_or_default().to_owned())
            .collect();
        let told: BTreeSet<String> =
            mutants.iter().flat_map(|(what, of)| of.iter().map(move |mutant| format!("{mutant}/{what}"))).collect();
        assert_eq!(written, told, "{}", numbers.label);
        numbers
    }

    /// Names under `prefix`, without it.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        self.tensors.keys().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect()
    }

    /// What the reference computed, flat.
    pub fn expected(&self, name: &str) -> Vec<f64> {
        floats(self.tensors.get(name).unwrap_or_else(|| panic!("{}: no `{name}`", self.label)))
    }

    /// The mutants that must fail the comparison `what`.
    pub fn mutants(&self, what: &str) -> &'static [&'static str] {
        self.mutants.iter().find(|(name, _)| *name == what).map_or(&[], |(_, mutants)| mutants)
    }

    /// Claims that `ours` is `expected(name)` and is none of the mutants' `name`.
    pub fn claim(&self, name: &str, ours: &[f64], within: Within) {
        self.claim_by(name, |theirs| agrees(ours, theirs, within));
    }

    /// The same with the comparison `agrees`.
    pub fn claim_by(&self, name: &str, agrees: impl Fn(&[f64]) -> Result<(), String>) {
        if let Err(why) = agrees(&self.expected(name)) {
            panic!("{}: {name}: {why}", self.label);
        }
        for mutant in self.mutants(name) {
            let told = agrees(&self.expected(&format!("mutants/{mutant}/{name}"))).is_err();
            assert!(told, "{}: {name}: `{mutant}` passes", self.label);
        }
    }

    /// Claims the gradients under `what` (`gradient`, `last/gradient`), by tensor: the norm of the difference is at most
    /// `share` of the norm and 1e-7 of the norm of all tensors together. A mutant must miss some tensor.
    pub fn claim_gradients(&self, what: &str, ours: &BTreeMap<String, Vec<f64>>, share: f64) {
        let names = self.names(&format!("{what}/"));
        assert_eq!(ours.keys().cloned().collect::<Vec<_>>(), names, "{}: {what}", self.label);
        let all: Vec<f64> = names.iter().flat_map(|name| self.expected(&format!("{what}/{name}"))).collect();
        let norm = all.iter().map(|g| g * g).sum::<f64>().sqrt();
        let within = Within::Norm { share, slack: 1e-7 * norm };
        for (name, ours) in ours {
            if let Err(why) = agrees(ours, &self.expected(&format!("{what}/{name}")), within) {
                panic!("{}: {what} of {name}: {why}", self.label);
            }
        }
        for mutant in self.mutants(what) {
            let prefix = format!("mutants/{mutant}/{what}/");
            let told = self
                .names(&prefix)
                .iter()
                .any(|name| agrees(&ours[name], &self.expected(&format!("{prefix}{name}")), within).is_err());
            assert!(told, "{}: {what}: `{mutant}` passes on every tensor", self.label);
        }
    }
}

/// A tensor's entries, flat.
pub fn floats(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// The linear maps that GPT-J and Llama keep as `[out, in]`; in memory all are `[in, out]`, as GPT-2's files have them.
const TRANSPOSED: [&str; 10] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc_in", "fc_out"];

/// The gradients of `variables` by name, flat, each as its file has the tensor. Panics where there is none.
pub fn gradients(variables: &[lm::Variable], grads: &candle_core::backprop::GradStore) -> BTreeMap<String, Vec<f64>> {
    let of = |v: &lm::Variable| {
        let grad = grads.get(v.var.as_tensor()).unwrap_or_else(|| panic!("no gradient of {}", v.name));
        let module = v.name.strip_suffix(".weight").and_then(|name| name.rsplit('.').next());
        if module.is_some_and(|module| TRANSPOSED.contains(&module)) {
            floats(&grad.t().unwrap())
        } else {
            floats(grad)
        }
    };
    variables.iter().map(|v| (v.name.clone(), of(v))).collect()
}

#[test]
fn a_nan_agrees_with_nothing() {
    for within in [Within::Each(1.0), Within::Norm { share: 1.0, slack: 1.0 }] {
        assert!(agrees(&[f64::NAN, 0.0], &[0.0, 0.0], within).is_err());
        assert!(agrees(&[0.0, f64::NAN], &[0.0, 0.0], within).is_err());
        assert!(agrees(&[0.5, 0.5], &[0.0, 0.5], within).is_ok());
    }
}

//! Numbers computed by other implementations, and comparison of ours with them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

/// The tolerance of a comparison.
#[derive(Debug, Clone, Copy)]
pub enum Within {
    /// Absolute, for every entry.
    Each(f64),
    /// The norm of the difference is at most a share of the expected norm plus an absolute slack for tensors that
    /// should be zero.
    Norm { share: f64, slack: f64 },
}

/// Whether `ours` equals `expected` within the tolerance. Errors: the distance.
pub fn agrees(ours: &[f64], expected: &[f64], within: Within) -> Result<(), String> {
    assert_eq!(ours.len(), expected.len(), "numbers that cannot be compared");
    assert!(!ours.is_empty(), "nothing to compare");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let differences = || ours.iter().zip(expected).map(|(a, b)| a - b);
    let (distance, allowed) = match within {
        // In the total order a NaN is the largest distance; `f64::max` would hide it.
        Within::Each(each) => (differences().map(f64::abs).max_by(f64::total_cmp).unwrap_or(f64::NAN), each),
        Within::Norm { share, slack } => {
            (norm(&mut differences()), share * norm(&mut expected.iter().copied()) + slack)
        }
    };
    if distance <= allowed { Ok(()) } else { Err(format!("{distance:.3e} apart; {allowed:.1e} is allowed")) }
}

/// (comparison, the names of the mutants that must fail it).
pub type Mutants = &'static [(&'static str, &'static str)];

/// A file of expected numbers by name; `mutants/MUTANT/NAME` holds a wrong implementation's numbers for NAME.
pub struct Numbers {
    label: String,
    tensors: BTreeMap<String, Tensor>,
    mutants: Vec<(&'static str, &'static str)>,
}

impl Numbers {
    /// Reads a safetensors file. Panics unless its mutants are exactly those of the table.
    pub fn load(file: &Path, mutants: &[(&'static str, &'static str)]) -> Self {
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let named = |(what, names): &(&str, &'static str)| {
            let what = (*what).to_owned();
            names.split_whitespace().map(move |mutant| format!("{mutant}/{what}"))
        };
        let listed: BTreeSet<String> = mutants.iter().flat_map(named).collect();
        let (label, mutants) = (file.display().to_string(), mutants.to_vec());
        let numbers = Self { label, tensors: tensors.into_iter().collect(), mutants };
        let written: BTreeSet<String> = numbers
            .names("mutants/")
            .into_iter()
            // A gradient is many tensors but one comparison.
            .map(|name| name.split_inclusive("/gradient").next().unwrap_or_default().to_owned())
            .collect();
        assert_eq!(written, listed, "{}", numbers.label);
        numbers
    }

    /// Names that begin with `prefix`, without it.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        self.tensors.keys().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect()
    }

    /// The reference's numbers, flat.
    pub fn expected(&self, name: &str) -> Vec<f64> {
        floats(self.tensors.get(name).unwrap_or_else(|| panic!("{}: no `{name}`", self.label)))
    }

    /// The mutants that must fail the comparison `what`.
    pub fn mutants(&self, what: &str) -> impl Iterator<Item = &'static str> {
        let found = self.mutants.iter().find(|(name, _)| *name == what);
        found.map_or("", |(_, names)| names).split_whitespace()
    }

    /// Asserts that `ours` agrees with `expected(name)` and with none of the mutants' `name`.
    pub fn claim(&self, name: &str, ours: &[f64], within: Within) {
        self.claim_by(name, |theirs| agrees(ours, theirs, within));
    }

    /// Like [`Numbers::claim`], with the comparison `agrees`.
    pub fn claim_by(&self, name: &str, agrees: impl Fn(&[f64]) -> Result<(), String>) {
        if let Err(why) = agrees(&self.expected(name)) {
            panic!("{}: {name}: {why}", self.label);
        }
        for mutant in self.mutants(name) {
            let rejected = agrees(&self.expected(&format!("mutants/{mutant}/{name}"))).is_err();
            assert!(rejected, "{}: {name}: `{mutant}` passes", self.label);
        }
    }

    /// Asserts the gradients under `what` (`gradient`, `last/gradient`), by tensor: the norm of the difference is at
    /// most `share` of the tensor's norm plus 1e-7 of the norm of all tensors together. A mutant must fail on some
    /// tensor.
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
            let rejected = self
                .names(&prefix)
                .iter()
                .any(|name| agrees(&ours[name], &self.expected(&format!("{prefix}{name}")), within).is_err());
            assert!(rejected, "{}: {what}: `{mutant}` passes on every tensor", self.label);
        }
    }
}

/// A tensor's entries, flat.
pub fn floats(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// The linear layers that GPT-J's and Llama's files hold as `[out, in]`; in memory all are `[in, out]`, as in GPT-2's
/// files.
const TRANSPOSED: [&str; 10] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc_in", "fc_out"];

/// The gradients of `variables` by name, flat, in the orientation of the file. Panics if one is missing.
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

use candle_core::{Device, Var};

use super::*;

fn variable(name: &str, values: &[f32], decays: bool) -> Variable {
    let var = Var::from_slice(values, values.len(), &Device::Cpu).expect("a small variable");
    Variable { name: name.into(), var, decays }
}

fn values(v: &Variable) -> Vec<f32> {
    v.var.to_vec1().expect("a flat variable")
}

/// A gradient store with the given gradient of each variable.
fn gradients(of: &[(&Variable, &[f32])]) -> GradStore {
    let mut grads = GradStore::default();
    for (v, g) in of {
        grads.insert(&v.var, Tensor::from_slice(g, g.len(), &Device::Cpu).expect("a small gradient"));
    }
    grads
}

/// AdamW as PyTorch's documentation states it, in f64.
struct ReferenceAdamW {
    p: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
}

impl ReferenceAdamW {
    fn step(&mut self, g: &[f64], lr: f64, t: i32, c: AdamWConfig, decay: bool) {
        for (i, &g) in g.iter().enumerate() {
            if decay {
                self.p[i] -= lr * c.weight_decay * self.p[i];
            }
            self.m[i] = c.beta1 * self.m[i] + (1.0 - c.beta1) * g;
            self.v[i] = c.beta2 * self.v[i] + (1.0 - c.beta2) * g * g;
            let m = self.m[i] / (1.0 - c.beta1.powi(t));
            let v = self.v[i] / (1.0 - c.beta2.powi(t));
            self.p[i] -= lr * m / (v.sqrt() + c.eps);
        }
    }
}

fn wave(n: usize, t: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + t * 101) as f32 * 0.7).sin() * 10f32.powi((i % 5) as i32 - 3)).collect()
}

#[test]
fn many_steps_agree_with_a_textbook_adamw() -> Result<()> {
    let n = 40_000;
    let config = AdamWConfig { beta1: 0.8, beta2: 0.95, eps: 1e-7, weight_decay: 0.1 };
    for (decays, portable) in [(true, false), (false, false), (true, true), (false, true)] {
        let v = variable("w", &wave(n, 0), decays);
        let p: Vec<f64> = wave(n, 0).into_iter().map(f64::from).collect();
        let mut plain = ReferenceAdamW { p, m: vec![0.0; n], v: vec![0.0; n] };
        let mut adam = AdamW::with_operations(vec![v.clone()], config, portable)?;
        for t in 1..=20 {
            let g = wave(n, t);
            let norm = g.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let before = plain.p.clone();
            // Every other step is clipped to half of its norm.
            let clip = (t % 2 == 0).then_some(norm / 2.0);
            let factor = clip.map_or(1.0, |c| c / (norm + 1e-6));
            let lr = 1e-2 / t as f64;
            let norms = adam.step(&gradients(&[(&v, &g)]), lr, clip)?;
            let g: Vec<f64> = g.iter().map(|&g| f64::from(g) * factor).collect();
            plain.step(&g, lr, t as i32, config, decays);
            let moved = before.iter().zip(&plain.p).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            assert!((norms.grad_norm / norm - 1.0).abs() < if portable { 1e-5 } else { 1e-9 });
            assert!((norms.update_norm / moved - 1.0).abs() < 1e-4, "{} against {moved}", norms.update_norm);
        }
        for (a, b) in values(&v).iter().zip(&plain.p) {
            assert!((f64::from(*a) - b).abs() < 1e-6 * b.abs().max(1.0), "{a} against {b}");
        }
    }
    Ok(())
}

#[test]
fn the_first_step_moves_every_entry_by_the_learning_rate() -> Result<()> {
    let (w, b) = (variable("w", &[1.0, -2.0, 3.0], true), variable("b", &[5.0], false));
    let config = AdamWConfig { weight_decay: 0.5, ..AdamWConfig::default() };
    let mut adam = AdamW::new(vec![w.clone(), b.clone()], config)?;
    let norms = adam.step(&gradients(&[(&w, &[3.0, -1e-3, 4.0]), (&b, &[0.0])]), 0.1, None)?;
    // m / sqrt(v) is the sign at step 1; decay takes 5% of each matrix entry, nothing of the bias.
    for (actual, expected) in values(&w).iter().zip([1.0 - 0.05 - 0.1, -2.0 + 0.1 + 0.1, 3.0 - 0.15 - 0.1]) {
        assert!((actual - expected).abs() < 2e-6, "{actual} against {expected}");
    }
    assert_eq!(values(&b), [5.0]);
    assert!((norms.grad_norm - 5.0).abs() < 1e-6);
    assert_eq!(adam.steps(), 1);
    Ok(())
}

#[test]
fn decay_can_pull_towards_a_reference() -> Result<()> {
    let config = AdamWConfig { weight_decay: 0.5, ..AdamWConfig::default() };
    for portable in [false, true] {
        let (w, b) = (variable("w", &[1.0, -2.0], true), variable("b", &[4.0, 1.0], true));
        let mut adam = AdamW::with_operations(vec![w.clone(), b.clone()], config, portable)?;
        let target = Tensor::new(&[3f32, -2.0], &Device::Cpu)?;
        adam.decay_towards(|name| (name == "w").then(|| target.clone()))?;
        adam.step(&gradients(&[(&w, &[0.0, 0.0]), (&b, &[0.0, 0.0])]), 0.1, None)?;
        assert!((values(&w)[0] - 1.1).abs() < 1e-6 && values(&w)[1] == -2.0);
        assert!((values(&b)[0] - 3.8).abs() < 1e-6, "towards zero");
        assert!(adam.decay_towards(|_| Tensor::new(&[3f32], &Device::Cpu).ok()).is_err());
    }
    Ok(())
}

#[test]
fn a_missing_or_non_finite_gradient_names_the_variable_and_changes_nothing() -> Result<()> {
    for portable in [false, true] {
        let (w, b) = (variable("h.0.w", &[1.0], true), variable("h.0.b", &[2.0], false));
        let mut adam = AdamW::with_operations(vec![w.clone(), b.clone()], AdamWConfig::default(), portable)?;
        let missing = adam.step(&gradients(&[(&w, &[1.0])]), 0.1, None).expect_err("b has no gradient").to_string();
        assert!(missing.contains("h.0.b has no gradient"), "{missing}");
        for bad in [f32::NAN, f32::INFINITY] {
            let error = adam.step(&gradients(&[(&w, &[bad]), (&b, &[1.0])]), 0.1, Some(1.0)).expect_err("not finite");
            assert!(matches!(&error, Error::NonFinite { quantity } if quantity.contains("h.0.w")), "{error}");
        }
        assert_eq!((values(&w), values(&b), adam.steps()), (vec![1.0], vec![2.0], 0));
    }
    Ok(())
}

#[test]
fn a_restored_optimiser_continues_as_if_uninterrupted() -> Result<()> {
    [false, true].into_iter().try_for_each(restore)
}

fn restore(portable: bool) -> Result<()> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("adam.safetensors");
    let grads = |v: &[Variable], t| gradients(&[(&v[0], &wave(50, t)), (&v[1], &wave(3, t + 9))]);
    let fresh = || vec![variable("a", &wave(50, 0), true), variable("b", &wave(3, 0), false)];
    let (whole, first) = (fresh(), fresh());
    let mut uninterrupted = AdamW::with_operations(whole.clone(), AdamWConfig::default(), portable)?;
    let mut adam = AdamW::with_operations(first.clone(), AdamWConfig::default(), portable)?;
    for t in 0..5 {
        uninterrupted.step(&grads(&whole, t), 1e-2, Some(1.0))?;
        adam.step(&grads(&first, t), 1e-2, Some(1.0))?;
    }
    adam.save(&path)?;
    let second = fresh();
    let mut adam = AdamW::with_operations(second.clone(), AdamWConfig::default(), portable)?;
    adam.check(&path)?;
    assert_eq!((adam.steps(), values(&second[0])), (0, wave(50, 0)), "looking changes nothing");
    adam.load(&path)?;
    assert_eq!(adam.steps(), 5);
    for t in 5..9 {
        assert_eq!(
            uninterrupted.step(&grads(&whole, t), 1e-2, Some(1.0))?,
            adam.step(&grads(&second, t), 1e-2, Some(1.0))?
        );
    }
    assert_eq!(whole.iter().map(values).collect::<Vec<_>>(), second.iter().map(values).collect::<Vec<_>>());
    let bytes = std::fs::read(&path).expect("the file just written");
    adam.save(&path)?;
    uninterrupted.save(&folder.path().join("other"))?;
    assert_eq!(std::fs::read(&path).ok(), std::fs::read(folder.path().join("other")).ok(), "equal states, equal bytes");
    for kept in [0, 7, 40, bytes.len() - 4] {
        std::fs::write(&path, &bytes[..kept]).expect("a truncated copy");
        assert!(matches!(adam.load(&path), Err(Error::BadModel { .. })), "{kept} bytes");
    }
    Ok(())
}

#[test]
fn a_state_of_other_variables_is_refused() -> Result<()> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("adam.safetensors");
    AdamW::new(vec![variable("a", &[1.0, 2.0], true)], AdamWConfig::default())?.save(&path)?;
    let refused = |variables: Vec<Variable>| -> String {
        let mut adam = AdamW::new(variables, AdamWConfig::default()).expect("unique names");
        adam.load(&path).expect_err("another model's state").to_string()
    };
    assert!(refused(vec![variable("b", &[1.0, 2.0], true)]).contains("w.b is missing"));
    assert!(refused(vec![variable("a", &[1.0], true)]).contains("expected F32 [1]"));
    assert!(refused(vec![]).contains("expected 0"));
    Ok(())
}

#[test]
fn duplicate_variable_names_are_refused() {
    let twins = vec![variable("a", &[1.0], true), variable("a", &[1.0], true)];
    assert!(AdamW::new(twins, AdamWConfig::default()).is_err());
}

#[test]
fn norms_and_updates_do_not_depend_on_the_number_of_threads() {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a small pool");
        pool.install(|| -> Result<_> {
            let v = variable("w", &wave(100_000, 0), true);
            let mut adam = AdamW::new(vec![v.clone()], AdamWConfig::default())?;
            let norms = adam.step(&gradients(&[(&v, &wave(100_000, 1))]), 1e-2, Some(0.1))?;
            Ok((norms.grad_norm.to_bits(), norms.update_norm.to_bits(), values(&v)))
        })
    };
    let (one, two) = (run(1).expect("one thread"), run(2).expect("two threads"));
    assert!(one == two);
}

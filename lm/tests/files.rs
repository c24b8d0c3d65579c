//! Models and adapters on disk.

mod common;

use std::fs;
use std::path::Path;

use candle_core::{DType, Tensor};
use common::*;
use lm::{Batch, CausalLm, Error, LoraConfig, ScalarHead, WeightType};

const LORA: LoraConfig = LoraConfig { r: 3, alpha: 6.0, dropout: 0.1 };

fn hidden(lm: &CausalLm) -> Vec<f32> {
    let rows = sequences();
    let batch = Batch::new(&refs(&rows)).unwrap();
    floats(&lm.hidden_for_responses(&batch, None).unwrap())
}

fn adapted(base: &CausalLm) -> CausalLm {
    let lm = base.with_adapter(&LORA, &mut rng(50)).unwrap();
    randomise(&lm.variables(), 0.2, 51);
    lm
}

fn bytes(folder: &Path, file: &str) -> Vec<u8> {
    fs::read(folder.join(file)).unwrap()
}

#[test]
fn a_model_folder_round_trips_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    for config in families() {
        let lm = model(config, 1);
        for dtype in [WeightType::F32, WeightType::F16] {
            lm.save(&a, dtype).unwrap();
            let again = CausalLm::load(&a).unwrap();
            again.save(&b, dtype).unwrap();
            assert_eq!(again.config(), lm.config());
            assert!(again.variables().is_empty(), "a loaded model is frozen");
            for file in ["config.json", "model.safetensors"] {
                assert_eq!(bytes(&a, file), bytes(&b, file), "{file}");
            }
            if dtype == WeightType::F32 {
                assert_eq!(hidden(&lm), hidden(&again));
            } else {
                assert_close(&hidden(&lm), &hidden(&again), 1e-2);
            }
        }
    }
}

#[test]
fn a_model_folder_has_hugging_faces_layout() {
    let folder = tempfile::tempdir().unwrap();
    model(tiny_config(), 2).save(folder.path(), WeightType::F32).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&bytes(folder.path(), "config.json")).unwrap();
    assert_eq!(config["architectures"][0], "GPT2LMHeadModel");
    assert_eq!((&config["n_embd"], &config["eos_token_id"]), (&12.into(), &0.into()));
    let file = bytes(folder.path(), "model.safetensors");
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(tensors.tensor("transformer.h.1.attn.c_attn.weight").unwrap().shape(), [12, 36]);
    assert_eq!(tensors.tensor("transformer.h.0.mlp.c_proj.bias").unwrap().shape(), [12]);
    assert_eq!(tensors.len(), 2 + 2 * 12 + 2);

    let names = |at: usize| -> Vec<(String, Vec<usize>)> {
        model(families()[at].clone(), 2).save(folder.path(), WeightType::F32).unwrap();
        let file = bytes(folder.path(), "model.safetensors");
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let shape = |name: &String| (name.clone(), tensors.tensor(name).unwrap().shape().to_vec());
        tensors.names().iter().map(|n| (*n).to_owned()).map(|n| shape(&n)).collect()
    };
    let has = |all: &[(String, Vec<usize>)], name: &str, shape: &[usize]| {
        assert!(all.iter().any(|(n, s)| n == name && s == shape), "{name} {shape:?} is not among {all:?}");
    };
    let gptj = names(1);
    assert_eq!(gptj.len(), 1 + 2 * 10 + 2 + 2);
    has(&gptj, "transformer.h.1.attn.q_proj.weight", &[12, 12]);
    has(&gptj, "transformer.h.0.mlp.fc_in.weight", &[20, 12]);
    has(&gptj, "lm_head.bias", &[31]);
    let llama = names(2);
    assert_eq!(llama.len(), 1 + 2 * 9 + 1 + 1);
    has(&llama, "model.layers.1.self_attn.q_proj.weight", &[24, 12]);
    has(&llama, "model.layers.0.self_attn.k_proj.weight", &[12, 12]);
    has(&llama, "model.layers.0.mlp.down_proj.weight", &[12, 20]);
    has(&llama, "lm_head.weight", &[31, 12]);
}

#[test]
fn an_eos_id_beyond_the_vocabulary_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny_config();
    config.eos_token_id = vec![50_256];
    model(config, 2).save(folder.path(), WeightType::F32).unwrap();
    let again = CausalLm::load(folder.path()).unwrap();
    assert_eq!(again.config().eos(), None);
}

/// Writes the model's tensors under other names and types, as other tools do.
fn rewrite(lm: &CausalLm, folder: &Path, dtype: DType, rename: impl Fn(&str) -> Option<String>) {
    lm.save(folder, WeightType::F32).unwrap();
    let tensors: std::collections::HashMap<String, Tensor> = lm
        .variables()
        .iter()
        .filter_map(|v| Some((rename(&v.name)?, v.var.as_detached_tensor().to_dtype(dtype).unwrap())))
        .collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

#[test]
fn names_without_prefix_and_half_precision_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let lm = model(tiny_config(), 3);
    for (dtype, tolerance) in [(DType::F32, 0.0), (DType::F16, 1e-2), (DType::BF16, 1e-1)] {
        for prefix in ["", "transformer."] {
            rewrite(&lm, folder.path(), dtype, |name| Some(name.replace("transformer.", prefix)));
            assert_close(&hidden(&CausalLm::load(folder.path()).unwrap()), &hidden(&lm), tolerance);
        }
    }
}

#[track_caller]
fn assert_bad(result: lm::Result<CausalLm>, parts: &[&str]) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::BadModel { .. }), "{error:?}");
    for part in parts {
        assert!(error.to_string().contains(part), "`{error}` does not say `{part}`");
    }
}

#[test]
fn a_broken_folder_is_refused_with_file_tensor_and_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let lm = model(tiny_config(), 4);
    let load = || CausalLm::load(path);

    rewrite(&lm, path, DType::F32, |name| (!name.contains("h.1.mlp.c_fc.bias")).then(|| name.to_owned()));
    assert_bad(load(), &["model.safetensors", "transformer.h.1.mlp.c_fc.bias", "missing", "[48]"]);

    rewrite(&lm, path, DType::F32, |name| Some(name.to_owned()));
    let text = fs::read_to_string(path.join("config.json")).unwrap();
    let config = |from: &str, to: &str| fs::write(path.join("config.json"), text.replace(from, to)).unwrap();
    config("\"n_positions\": 24", "\"n_positions\": 25");
    assert_bad(load(), &["model.safetensors", "transformer.wpe.weight", "[24, 12]", "[25, 12]"]);
    config("\"n_head\": 3", "\"n_head\": 5");
    assert_bad(load(), &["config.json", "n_embd 12", "n_head 5"]);
    config("\"gelu_new\"", "\"relu\"");
    assert_bad(load(), &["config.json", "relu", "gelu_new"]);
    config("\"n_layer\": 2,", "");
    assert_bad(load(), &["config.json", "n_layer"]);
    config("\"model_type\": \"gpt2\"", "\"model_type\": \"bert\"");
    assert_bad(load(), &["config.json", "bert", "gpt2"]);

    config("", "");
    rewrite(&lm, path, DType::F64, |name| Some(name.to_owned()));
    assert_bad(load(), &["F64", "F32, F16 or BF16"]);

    let whole = {
        lm.save(path, WeightType::F32).unwrap();
        bytes(path, "model.safetensors")
    };
    fs::write(path.join("model.safetensors"), &whole[..whole.len() - 1]).unwrap();
    assert_bad(load(), &["model.safetensors", "the file is truncated"]);

    fs::remove_file(path.join("model.safetensors")).unwrap();
    assert_bad(load(), &["neither model.safetensors nor pytorch_model.bin"]);
    fs::remove_file(path.join("config.json")).unwrap();
    assert!(matches!(load(), Err(Error::Io { .. })));
}

#[test]
fn a_setting_that_would_change_the_numbers_is_refused() {
    for (family, key, value) in [
        (0, "per_layer_config", serde_json::json!({ "0": { "layer_norm_epsilon": 0.5 } })),
        (0, "quantization_config", serde_json::json!({ "quant_method": "compressed-tensors" })),
        (1, "tie_word_embeddings", true.into()),
        (1, "rotary_dim", 0.into()),
        (2, "sliding_window", 4.into()),
        (2, "partial_rotary_factor", 0.5.into()),
        (3, "use_sliding_window", true.into()),
        (3, "layer_types", serde_json::json!(["full_attention", "sliding_attention"])),
    ] {
        let folder = tempfile::tempdir().unwrap();
        model(families()[family].clone(), 4).save(folder.path(), WeightType::F32).unwrap();
        let path = folder.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (value, refused) in [
            (value, true),
            (serde_json::Value::Null, ["tie_word_embeddings", "rotary_dim", "use_sliding_window"].contains(&key)),
        ] {
            config[key] = value;
            fs::write(&path, config.to_string()).unwrap();
            match CausalLm::load(folder.path()) {
                Ok(_) => assert!(!refused, "{config}"),
                bad => assert_bad(bad, &if refused { vec!["config.json"] } else { vec!["never"] }),
            }
        }
    }
}

/// Writes a model with additional tensors in its file.
fn with_more(lm: &CausalLm, folder: &Path, more: &[&str]) {
    lm.save(folder, WeightType::F32).unwrap();
    let file = folder.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
    let other = Tensor::ones(12, DType::F32, &candle_core::Device::Cpu).unwrap();
    tensors.extend(more.iter().map(|name| ((*name).to_owned(), other.clone())));
    candle_core::safetensors::save(&tensors, &file).unwrap();
}

#[test]
fn an_unexpected_tensor_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (family, name) in [
        (0, "transformer.h.2.ln_1.weight"),
        (0, "transformer.h.0.attn.c_attn.scale"),
        (0, "score.weight"),
        (0, "lm_head.bias"),
        (1, "transformer.h.0.attn.q_proj.bias"),
        (2, "model.layers.0.self_attn.q_proj.bias"),
        (2, "model.layers.1.mlp.down_proj.bias"),
        (2, "model.layers.2.input_layernorm.weight"),
        (2, "model.layers.0.self_attn.q_norm.weight"),
        (2, "v_head.summary.weight"),
    ] {
        let lm = model(families()[family].clone(), 4);
        with_more(&lm, folder.path(), &[name]);
        assert_bad(CausalLm::load(folder.path()), &[&format!("has tensor `{name}`, not part of the model")]);
        with_more(&lm, folder.path(), &[name, "zzz", "zz"]);
        assert_bad(CausalLm::load(folder.path()), &[&format!("has tensor `{name}` and 2 others, not part")]);
    }
    for (family, names) in [
        (0, &["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"][..]),
        (1, &["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "transformer.h.1.attn.embed_positions"]),
        (2, &["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
    ] {
        let lm = model(families()[family].clone(), 4);
        with_more(&lm, folder.path(), names);
        assert_eq!(hidden(&CausalLm::load(folder.path()).unwrap()), hidden(&lm));
    }
}

#[test]
fn eos_ids_come_from_config_and_generation_config() {
    let folder = tempfile::tempdir().unwrap();
    for config in families() {
        model(config, 2).save(folder.path(), WeightType::F32).unwrap();
        let path = folder.path().join("config.json");
        let text = fs::read(&path).unwrap();
        let eos = |own: serde_json::Value, generation: Option<serde_json::Value>| {
            let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
            (config["eos_token_id"], config["bos_token_id"]) = (own, (-1).into());
            fs::write(&path, config.to_string()).unwrap();
            let generation_config = folder.path().join("generation_config.json");
            match generation {
                Some(ids) => {
                    fs::write(&generation_config, serde_json::json!({ "eos_token_id": ids }).to_string()).unwrap()
                }
                None => drop(fs::remove_file(&generation_config)),
            }
            let config = CausalLm::load(folder.path())?.config().clone();
            Ok::<_, Error>(config.eos().map_or_else(Vec::new, |eos| eos.ids().to_vec()))
        };
        let list = |ids: &[i64]| serde_json::json!(ids);
        assert_eq!(eos(3.into(), None).unwrap(), [3]);
        assert_eq!(eos(list(&[5, 3]), Some(list(&[3, 7]))).unwrap(), [5, 3, 7]);
        assert_eq!(eos((-1).into(), Some(4.into())).unwrap(), [4]);
        assert_eq!(eos(serde_json::Value::Null, Some(serde_json::Value::Null)).unwrap(), [0; 0]);
        assert_eq!(eos(list(&[-1, 99, 3]), None).unwrap(), [3], "99 is not in the vocabulary");
        assert!(eos("</s>".into(), None).unwrap_err().to_string().contains("a token id, a list of them, or null"));
        // The loaded config, saved again, holds all ids.
        assert_eq!(eos(list(&[5, 3]), Some(list(&[3, 7]))).unwrap(), [5, 3, 7]);
        let again = tempfile::tempdir().unwrap();
        CausalLm::load(folder.path()).unwrap().save(again.path(), WeightType::F32).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&bytes(again.path(), "config.json")).unwrap();
        assert_eq!((&config["eos_token_id"], &config["bos_token_id"]), (&list(&[5, 3, 7]), &serde_json::Value::Null));
        fs::remove_file(folder.path().join("generation_config.json")).unwrap();
    }
}

#[test]
fn a_tied_model_with_another_output_layer_in_its_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let lm = model(tiny_config(), 4);
    let with_head = |change: f64| {
        lm.save(folder.path(), WeightType::F32).unwrap();
        let mut tensors: std::collections::HashMap<String, Tensor> =
            lm.variables().iter().map(|v| (v.name.clone(), v.var.as_detached_tensor())).collect();
        let head = (&tensors["transformer.wte.weight"] + change).unwrap();
        tensors.insert("lm_head.weight".to_owned(), head);
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
        CausalLm::load(folder.path())
    };
    assert_eq!(hidden(&with_head(0.0).unwrap()), hidden(&lm));
    assert_bad(with_head(0.5), &["lm_head.weight", "tie_word_embeddings"]);
}

#[test]
fn oversized_and_irregular_config_files_are_refused_before_reading() {
    let folder = tempfile::tempdir().unwrap();
    let base = model(tiny_config(), 4).frozen();
    adapted(&base).save_adapter(folder.path(), "x").unwrap();
    for name in ["config.json", "adapter_config.json", "tokenizer.json"] {
        base.save(folder.path(), WeightType::F32).unwrap();
        let path = folder.path().join(name);
        let refusal = || match name {
            "config.json" => CausalLm::load(folder.path()).unwrap_err(),
            "tokenizer.json" => lm::Tokenizer::load(folder.path()).unwrap_err(),
            _ => base.load_adapter(folder.path()).unwrap_err(),
        };
        // A sparse file: no bytes on disk, a terabyte to read.
        fs::write(&path, "").unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(refusal().to_string().contains("has 1099511627776 bytes; at most"), "{name}");
        fs::remove_file(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(refusal().to_string().contains("not a file"), "{name}");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn non_finite_weights_are_neither_written_nor_read() {
    let folder = tempfile::tempdir().unwrap();
    let lm = model(tiny_config(), 5);
    let v = lm.variables().remove(0);
    let mut values = floats(&v.var);
    values[7] = f32::NAN;
    v.var.set(&Tensor::from_vec(values, v.var.shape(), v.var.device()).unwrap()).unwrap();
    let error = lm.save(folder.path(), WeightType::F32).unwrap_err();
    assert!(error.to_string().contains("transformer.wte.weight"), "{error}");
    rewrite_nan(&lm, folder.path());
    assert_bad(CausalLm::load(folder.path()), &["transformer.wte.weight", "NaN", "index 7"]);
}

fn rewrite_nan(lm: &CausalLm, folder: &Path) {
    model(tiny_config(), 6).save(folder, WeightType::F32).unwrap();
    let tensors: std::collections::HashMap<String, Tensor> =
        lm.variables().iter().map(|v| (v.name.clone(), v.var.as_detached_tensor())).collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

#[test]
fn merged_equals_adapter_on_and_base_equals_adapter_off() {
    for config in families() {
        let base = model(config, 7).frozen();
        let lm = adapted(&base);
        assert_close(&hidden(&lm.merged().unwrap()), &hidden(&lm), 1e-5);
        assert_close(&hidden(&lm.base()), &hidden(&base), 0.0);
        assert_close(&hidden(&lm.frozen()), &hidden(&lm), 0.0);
        let moved = hidden(&lm).iter().zip(hidden(&base)).any(|(a, b)| (a - b).abs() > 1e-2);
        assert!(moved, "the adapter does something");
        let fresh = base.with_adapter(&LORA, &mut rng(8)).unwrap();
        assert_close(&hidden(&fresh), &hidden(&base), 0.0);
    }
}

#[test]
fn training_an_adapter_or_a_copy_leaves_the_base_unchanged() {
    let base = model(tiny_config(), 9).frozen();
    let before = hidden(&base);
    adapted(&base);
    randomise(&base.clone().with_full_training().unwrap().variables(), 1.0, 10);
    assert_eq!(hidden(&base), before);
}

#[test]
fn an_adapter_folder_round_trips_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    let base = model(tiny_config(), 11).frozen();
    let lm = adapted(&base);
    lm.save_adapter(&a, "blake3:abc").unwrap();
    let again = base.load_adapter(&a).unwrap();
    assert!(again.variables().is_empty(), "a loaded adapter is frozen");
    assert_eq!(again.lora(), Some(&LORA));
    assert_eq!(hidden(&again), hidden(&lm));
    let trainable = again.with_trainable_adapter().unwrap();
    assert_eq!(trainable.variables().len(), lm.variables().len());
    trainable.save_adapter(&b, "blake3:abc").unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        assert_eq!(bytes(&a, file), bytes(&b, file), "{file}");
    }
    let config: serde_json::Value = serde_json::from_slice(&bytes(&a, "adapter_config.json")).unwrap();
    assert_eq!(config["fan_in_fan_out"], true);
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["target_modules"], serde_json::json!(["c_attn", "c_fc", "c_proj"]));
    let file = bytes(&a, "adapter_model.safetensors");
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let shape = |name: &str| tensors.tensor(name).unwrap().shape().to_vec();
    assert_eq!(shape("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"), [3, 12]);
    assert_eq!(shape("base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"), [36, 3]);
    assert_eq!(shape("base_model.model.transformer.h.1.mlp.c_proj.lora_A.weight"), [3, 48]);

    for (config, targets) in families().into_iter().skip(1).zip([
        serde_json::json!(["fc_in", "fc_out", "k_proj", "out_proj", "q_proj", "v_proj"]),
        serde_json::json!(["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        serde_json::json!(["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ]) {
        let base = model(config, 11).frozen();
        let lm = adapted(&base);
        lm.save_adapter(&a, "x").unwrap();
        assert_eq!(hidden(&base.load_adapter(&a).unwrap()), hidden(&lm));
        let config: serde_json::Value = serde_json::from_slice(&bytes(&a, "adapter_config.json")).unwrap();
        assert_eq!((&config["fan_in_fan_out"], &config["target_modules"]), (&false.into(), &targets));
    }
}

/// A file of f32 tensors as `torch.save` writes a state dict.
fn torch_file(tensors: &[(String, Tensor)]) -> Vec<u8> {
    use std::io::Write;
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let int = |int: usize| [b"J", &(int as i32).to_le_bytes()[..]].concat();
    let ints = |values: &[usize]| [b"(", &values.iter().flat_map(|&v| int(v)).collect::<Vec<_>>()[..], b"t"].concat();
    let mut pickle = b"\x80\x02}(".to_vec();
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut put = |name: &str, bytes: &[u8]| {
        zip.start_file(format!("adapter_model/{name}"), stored).unwrap();
        zip.write_all(bytes).unwrap();
    };
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        let values = floats(tensor);
        let (rows, columns) = tensor.dims2().unwrap();
        let (key, hooks) = (text(&i.to_string()), b"\x89ccollections\nOrderedDict\n)RtR");
        let storage =
            [b"(", &text("storage")[..], b"ctorch\nFloatStorage\n", &key, &text("cpu"), &int(values.len()), b"tQ"];
        pickle.extend([&text(name)[..], b"ctorch._utils\n_rebuild_tensor_v2\n(", &storage.concat()].concat());
        pickle.extend([&int(0)[..], &ints(&[rows, columns]), &ints(&[columns, 1]), hooks].concat());
        put(&format!("data/{i}"), &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    }
    pickle.extend(b"u.");
    put("data.pkl", &pickle);
    put("byteorder", b"little");
    put("version", b"3\n");
    zip.finish().unwrap().into_inner()
}

#[test]
fn an_adapter_in_a_pickle_is_read_like_one_in_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let base = model(tiny_config(), 11).frozen();
    let lm = adapted(&base);
    lm.save_adapter(folder.path(), "x").unwrap();
    let file = folder.path().join("adapter_model.safetensors");
    let mut tensors: Vec<_> =
        candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap().into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    fs::remove_file(&file).unwrap();
    assert_bad(base.load_adapter(folder.path()), &["neither adapter_model.safetensors nor adapter_model.bin"]);
    fs::write(folder.path().join("adapter_model.bin"), torch_file(&tensors)).unwrap();
    assert_eq!(hidden(&base.load_adapter(folder.path()).unwrap()), hidden(&lm));
    tensors.push(("base_model.model.lm_head.lora_A.weight".to_owned(), tensors[0].1.clone()));
    fs::write(folder.path().join("adapter_model.bin"), torch_file(&tensors)).unwrap();
    assert_bad(base.load_adapter(folder.path()), &["adapter_model.bin", "lm_head.lora_A"]);
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    adapted(&model(tiny_config(), 12)).save_adapter(folder.path(), "x").unwrap();
    let mut config = tiny_config();
    config.n_layer = 1;
    assert_bad(
        model(config.clone(), 13).load_adapter(folder.path()),
        &["adapter_model.safetensors", "h.1.attn.c_attn"],
    );
    config.n_layer = 2;
    config.n_embd = 24;
    assert_bad(model(config, 14).load_adapter(folder.path()), &["lora_A", "[3, 12]", "[3, 24]"]);
    let path = folder.path().join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"use_dora\": false", "\"use_dora\": true")).unwrap();
    assert_bad(model(tiny_config(), 15).load_adapter(folder.path()), &["use_dora"]);
}

#[test]
fn adapter_settings_are_harmless_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let base = model(tiny_config(), 12).frozen();
    adapted(&base).save_adapter(folder.path(), "x").unwrap();
    let path = folder.path().join("adapter_config.json");
    let plain: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let load = |key: &str, value: serde_json::Value| {
        let mut config = plain.clone();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        base.load_adapter(folder.path())
    };
    for (key, value) in [
        ("alora_invocation_tokens", serde_json::json!([1, 2])),
        ("layer_replication", serde_json::json!([[0, 1], [0, 2]])),
        ("lora_bias", true.into()),
        ("arrow_config", serde_json::json!({ "top_k": 3 })),
        ("something_new", "on".into()),
        ("init_lora_weights", "pissa_niter_4".into()),
        ("init_lora_weights", "olora".into()),
    ] {
        assert_bad(load(key, value), &["adapter_config.json", key]);
        load(key, serde_json::Value::Null).unwrap();
    }
    for (key, value) in [
        ("layers_to_transform", serde_json::json!([0, 1])),
        ("peft_version", "0.21.2".into()),
        ("qalora_group_size", 16.into()),
        ("init_lora_weights", "gaussian".into()),
        ("init_lora_weights", true.into()),
        ("loftq_config", serde_json::json!({})),
        ("lora_bias", false.into()),
    ] {
        load(key, value).unwrap();
    }
}

#[test]
fn a_scalar_head_file_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("head.safetensors");
    let head = ScalarHead::init(12, 0.3, &mut rng(16)).unwrap();
    randomise(&head.variables(), 0.4, 17);
    head.save(&file).unwrap();
    let again = ScalarHead::load(&file, 12).unwrap();
    assert!(again.variables().is_empty());
    let x = Tensor::randn(0f32, 1f32, (5, 12), &candle_core::Device::Cpu).unwrap();
    assert_eq!(floats(&head.forward(&x).unwrap()), floats(&again.forward(&x).unwrap()));
    let error = ScalarHead::load(&file, 13).unwrap_err().to_string();
    assert!(error.contains("`weight` has shape [1, 12], expected [1, 13]"), "{error}");
    let zero = ScalarHead::zeros(12).unwrap();
    assert_eq!(floats(&zero.forward(&x).unwrap()), [0.0; 5]);
}

//! Mistakes that an operation of the portable path could have, each through a wrong description of what it computes. The
//! comparisons with the fused kernels must notice every one.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::block::{GPT2, LLAMA, QWEN3, Style};
use super::{FORWARD, distance, head, noise, norm};
use crate::Precision;
use crate::exec::portable;
use crate::exec::train::{self, BlockPass, LmHead, RotaryTable, TargetTokens};
use crate::model::block::{Block, Heads, Pairing, Rotary};

fn assert_noticed(mistake: &str, right: &Tensor, wrong: &Tensor) {
    let off = distance(wrong, right);
    assert!(off > 5.0 * FORWARD, "{mistake}: off by {off:e} only");
}

type Mutation = fn(&mut Block, &mut BlockPass);

const BLOCKS: [(&str, Style, Mutation); 21] = [
    ("a norm without its weight", GPT2, |b, _| b.norm_1.weight = b.norm_1.weight.ones_like().expect("ones")),
    ("a norm with another epsilon", GPT2, |b, _| b.norm_1.eps = 1e-3),
    ("an RMS norm instead of a layer norm", GPT2, |b, _| b.norm_1.bias = None),
    ("attention and MLP in parallel", GPT2, |b, _| b.norm_2 = None),
    ("no bias of queries, keys and values", GPT2, |b, _| b.attention.qkv[0].bias = None),
    ("no bias after attention", GPT2, |b, _| b.attention.out.bias = None),
    ("no bias in the MLP", GPT2, |b, _| b.mlp.down.bias = None),
    ("no adapter", GPT2, |b, _| b.mlp.up[0].adapter = None),
    ("an adapter's scale", GPT2, |b, _| b.attention.out.adapter.as_mut().expect("an adapter").scale *= 2.0),
    ("products in bf16", GPT2, |_, pass| pass.precision = Precision::Bf16),
    ("no dropout of adapters", GPT2, |_, pass| pass.adapter_dropout.clear()),
    ("the mask of another adapter", LLAMA, |_, pass| pass.adapter_dropout.swap(0, 1)),
    ("the other branch's mask", GPT2, |_, pass| pass.residual_dropout.swap(0, 1)),
    ("other rows", GPT2, |_, pass| pass.output_rows.iter_mut().flatten().for_each(|row| *row -= 1)),
    ("attention across sequences", GPT2, |_, pass| pass.time *= 3),
    ("one wide head", GPT2, |b, _| {
        b.attention.heads = Heads { query: 1, key_value: 1, width: GPT2.width * GPT2.heads }
    }),
    ("keys for values", LLAMA, |b, _| b.attention.qkv.swap(1, 2)),
    ("value for gate", LLAMA, |b, _| b.mlp.up.swap(0, 1)),
    ("no norms of queries and keys", QWEN3, |b, _| b.attention.qk_norm = None),
    ("the norms of queries and keys swapped", QWEN3, |b, _| {
        b.attention.qk_norm.as_mut().expect("two norms").swap(0, 1);
    }),
    ("other pairs of columns", LLAMA, |b, _| {
        let rotary = b.attention.rotary.as_ref().expect("positions");
        b.attention.rotary = Some(Arc::new(Rotary { pairing: Pairing::Interleaved, ..Rotary::clone(rotary) }));
    }),
];

#[test]
fn a_mistake_in_a_part_of_a_block_is_noticed() -> Result<()> {
    let (time, rows, inner) = (5, 15, 10);
    for (mistake, style, mutate) in BLOCKS {
        let (x, block) = (noise(&[rows, style.d()], 1), style.block(inner, true, 7));
        let output_rows = Some((1..rows as u32).step_by(2).collect());
        let pass = BlockPass { output_rows, ..style.pass(time, true, [rows, rows / 2], inner) };
        let right = train::transformer_block(&x, &block, pass.clone())?;
        let (mut wrong, mut wrong_pass) = (Block::clone(&block), pass.clone());
        mutate(&mut wrong, &mut wrong_pass);
        assert_noticed(mistake, &right, &portable::transformer_block(&x, &Arc::new(wrong), wrong_pass)?);
        assert!(distance(&portable::transformer_block(&x, &block, pass)?, &right) < FORWARD);
    }
    // Angles of other positions, which no description of a block has.
    let (x, block, pass) = (noise(&[10, 24], 1), LLAMA.block(inner, true, 7), LLAMA.pass(time, false, [10, 10], inner));
    let mut rotary = Rotary::clone(block.attention.rotary.as_ref().expect("positions"));
    rotary.frequencies.iter_mut().for_each(|frequency| *frequency *= 2.0);
    let wrong = BlockPass { rotary: Some(Arc::new(RotaryTable::new(&rotary, time))), ..pass.clone() };
    let right = train::transformer_block(&x, &block, pass)?;
    assert_noticed("other angles", &right, &portable::transformer_block(&x, &block, wrong)?);
    Ok(())
}

#[test]
fn a_mistake_around_the_blocks_is_noticed() -> Result<()> {
    let (n, d, v) = (6, 10, 9);
    let (x, w, b) = (noise(&[n, d], 1), noise(&[d], 2), noise(&[d], 3));
    let right = train::norm(&x, &norm(&w, Some(&b)))?;
    assert_noticed("no bias", &right, &portable::norm(&x, &norm(&w, None))?);
    assert_noticed("bias for weight", &right, &portable::norm(&x, &norm(&b, Some(&w)))?);

    let ids = |ids: [u32; 2]| Tensor::new(&ids, x.device());
    assert_noticed("the next row", &train::embedding(&ids([1, 4])?, &x)?, &portable::embedding(&ids([2, 5])?, &x)?);

    let (weight, bias) = (noise(&[v, d], 4), noise(&[v], 5));
    let masked = [true, false, true, false, false, true];
    let rows = TargetTokens { targets: &[1, 2, 3, 4, 5, 7], forbidden: Some((&[0, 6], &masked)) };
    let lm_head = head(&weight, Some(&bias));
    let stats = |f: &dyn Fn(&Tensor, &LmHead, &TargetTokens, bool) -> Result<train::TokenStats>, h, rows: &_| {
        let stats = f(&x, h, rows, true)?;
        Result::Ok([stats.logprob, stats.entropy.expect("asked for")])
    };
    let [logprob, entropy] = stats(&train::token_stats, &lm_head, &rows)?;
    let others = TargetTokens { targets: &[2, 3, 4, 5, 7, 1], ..rows };
    let all_rows = TargetTokens { forbidden: Some((&[0, 6], &[true; 6])), ..rows };
    let bf16 = LmHead { precision: Precision::Bf16, ..lm_head.clone() };
    let mistakes = [
        ("allowed tokens", &lm_head, TargetTokens { forbidden: None, ..rows }),
        ("all rows masked", &lm_head, all_rows),
        ("no bias", &head(&weight, None), rows),
        ("logits in bf16", &bf16, rows),
    ];
    for (mistake, lm_head, rows) in mistakes {
        let [wrong_logprob, wrong_entropy] = stats(&portable::token_stats, lm_head, &rows)?;
        assert_noticed(mistake, &logprob, &wrong_logprob);
        assert_noticed(mistake, &entropy, &wrong_entropy);
    }
    assert_noticed("another row's token", &logprob, &stats(&portable::token_stats, &lm_head, &others)?[0]);

    let (other, other_head) = (noise(&[n, d], 6), head(&noise(&[v, d], 7), None));
    let (p, q) = ((&x, &lm_head), (&other, &other_head));
    let kl = |kl: Vec<f32>| Tensor::new(kl, x.device());
    let right = kl(train::kl_divergence(p, q, &rows)?)?;
    assert_noticed("KL(q || p)", &right, &kl(portable::kl_divergence(q, p, &rows)?)?);
    assert_noticed(
        "KL over all",
        &right,
        &kl(portable::kl_divergence(p, q, &TargetTokens { forbidden: None, ..rows })?)?,
    );
    Ok(())
}

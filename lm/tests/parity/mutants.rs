//! The wrong implementations (mutants) that each comparison must reject, family by family. They are defined in
//! `tests/fixtures/{mutants,training,lora,values}.py`.

use crate::numbers::Mutants;

/// The mutants of each family's log-probabilities and gradients.
pub const FAMILIES: &[(&str, [&str; 2])] = &[
    (
        "gpt2",
        [
            "attention_not_scaled cached_positions_off_by_one gelu_erf norm_bias_dropped norm_eps_1e-6 \
             padding_attended positions_count_padding positions_off_by_one",
            "attention_not_scaled gelu_erf mean_of_row_means norm_bias_dropped norm_eps_1e-6 output_layer_held \
             padding_in_the_loss",
        ],
    ),
    (
        "gptj",
        [
            "cached_positions_off_by_one gelu_erf head_bias_dropped norm_eps_1e-6 padding_attended \
             rotary_over_the_whole_head rotary_swapped",
            "gelu_erf head_bias_dropped mean_of_row_means norm_eps_1e-6 padding_in_the_loss \
             rotary_over_the_whole_head",
        ],
    ),
    (
        "llama",
        [
            "cached_positions_off_by_one gelu_for_silu keys_by_remainder norm_eps_1e-6 padding_attended \
             rope_theta_10000 rotary_swapped",
            "gelu_for_silu keys_by_remainder mean_of_row_means norm_eps_1e-6 padding_in_the_loss rope_theta_10000",
        ],
    ),
    (
        "llama_tied",
        [
            "cached_positions_off_by_one gelu_for_silu norm_eps_1e-6 padding_attended rope_not_scaled rotary_swapped",
            "gelu_for_silu mean_of_row_means norm_eps_1e-6 output_layer_held padding_in_the_loss rope_not_scaled",
        ],
    ),
    (
        "qwen3",
        [
            "cached_positions_off_by_one norm_eps_1e-6 padding_attended qk_norms_dropped qk_norms_over_all_heads \
             qk_norms_swapped rotary_swapped",
            "mean_of_row_means norm_eps_1e-6 padding_in_the_loss qk_norms_dropped qk_norms_over_all_heads \
             qk_norms_swapped",
        ],
    ),
];

/// Those of training, adapters and sampling, which are the same in every family.
pub const SHARED: Mutants = &[
    ("losses", "adam_eps_1e-6 bias_correction_off decay_in_the_gradient decay_on_vectors schedule_a_step_late"),
    ("lora/logprobs", "b_at_zero scale_by_root_r scale_dropped"),
    ("lora/losses", "adam_eps_1e-6 bias_correction_off decay_in_the_gradient schedule_a_step_late"),
    ("sampling/1", "eos_not_masked"),
    ("sampling/2", "temperature_dropped temperature_inverted"),
    ("sampling/3", "top_p_dropped"),
    ("sampling/4", "eos_not_masked nucleus_before_temperature temperature_dropped temperature_inverted top_p_dropped"),
];

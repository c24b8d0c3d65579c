//! The wrong implementations (mutants) that each comparison must reject, family by family. They are defined in
//! `tests/fixtures/{mutants,training,lora,values}.py`.

use crate::numbers::Mutants;

pub const FAMILIES: &[(&str, Mutants)] =
    &[("gpt2", GPT2), ("gptj", GPTJ), ("llama", LLAMA), ("llama_tied", LLAMA_TIED)];

const LOSSES: (&str, &[&str]) = (
    "losses",
    &["adam_eps_1e-6", "bias_correction_off", "decay_in_the_gradient", "decay_on_vectors", "schedule_a_step_late"],
);
const LORA_LOGPROBS: (&str, &[&str]) = ("lora/logprobs", &["b_at_zero", "scale_by_root_r", "scale_dropped"]);
const LORA_LOSSES: (&str, &[&str]) =
    ("lora/losses", &["adam_eps_1e-6", "bias_correction_off", "decay_in_the_gradient", "schedule_a_step_late"]);
const MASKED: (&str, &[&str]) = ("sampling/1", &["eos_not_masked"]);
const TEMPERED: (&str, &[&str]) = ("sampling/2", &["temperature_dropped", "temperature_inverted"]);
const NUCLEUS: (&str, &[&str]) = ("sampling/3", &["top_p_dropped"]);
const ALL_AT_ONCE: (&str, &[&str]) = (
    "sampling/4",
    &["eos_not_masked", "nucleus_before_temperature", "temperature_dropped", "temperature_inverted", "top_p_dropped"],
);

const GPT2: Mutants = &[
    (
        "logprobs",
        &[
            "attention_not_scaled",
            "cached_positions_off_by_one",
            "gelu_erf",
            "norm_bias_dropped",
            "norm_eps_1e-6",
            "padding_attended",
            "positions_count_padding",
            "positions_off_by_one",
        ],
    ),
    (
        "gradient",
        &[
            "attention_not_scaled",
            "gelu_erf",
            "mean_of_row_means",
            "norm_bias_dropped",
            "norm_eps_1e-6",
            "output_layer_held",
            "padding_in_the_loss",
        ],
    ),
    LOSSES,
    LORA_LOGPROBS,
    LORA_LOSSES,
    MASKED,
    TEMPERED,
    NUCLEUS,
    ALL_AT_ONCE,
];

const GPTJ: Mutants = &[
    (
        "logprobs",
        &[
            "cached_positions_off_by_one",
            "gelu_erf",
            "head_bias_dropped",
            "norm_eps_1e-6",
            "padding_attended",
            "rotary_over_the_whole_head",
            "rotary_swapped",
        ],
    ),
    (
        "gradient",
        &[
            "gelu_erf",
            "head_bias_dropped",
            "mean_of_row_means",
            "norm_eps_1e-6",
            "padding_in_the_loss",
            "rotary_over_the_whole_head",
        ],
    ),
    LOSSES,
    LORA_LOGPROBS,
    LORA_LOSSES,
    MASKED,
    TEMPERED,
    NUCLEUS,
    ALL_AT_ONCE,
];

const LLAMA: Mutants = &[
    (
        "logprobs",
        &[
            "cached_positions_off_by_one",
            "gelu_for_silu",
            "keys_by_remainder",
            "norm_eps_1e-6",
            "padding_attended",
            "rope_theta_10000",
            "rotary_swapped",
        ],
    ),
    (
        "gradient",
        &[
            "gelu_for_silu",
            "keys_by_remainder",
            "mean_of_row_means",
            "norm_eps_1e-6",
            "padding_in_the_loss",
            "rope_theta_10000",
        ],
    ),
    LOSSES,
    LORA_LOGPROBS,
    LORA_LOSSES,
    MASKED,
    TEMPERED,
    NUCLEUS,
    ALL_AT_ONCE,
];

const LLAMA_TIED: Mutants = &[
    (
        "logprobs",
        &[
            "cached_positions_off_by_one",
            "gelu_for_silu",
            "norm_eps_1e-6",
            "padding_attended",
            "rope_not_scaled",
            "rotary_swapped",
        ],
    ),
    (
        "gradient",
        &[
            "gelu_for_silu",
            "mean_of_row_means",
            "norm_eps_1e-6",
            "output_layer_held",
            "padding_in_the_loss",
            "rope_not_scaled",
        ],
    ),
    LOSSES,
    LORA_LOGPROBS,
    LORA_LOSSES,
    MASKED,
    TEMPERED,
    NUCLEUS,
    ALL_AT_ONCE,
];

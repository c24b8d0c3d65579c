"""GPT-2 from transformers and LoRA from peft."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

logging.disable_progress_bar()

ASSETS = Path(__file__).resolve().parents[3] / "assets"


def base(shape):
    """The asset's model, or a random one, in f32, without dropout."""
    torch.manual_seed(1)
    # The same function as GPT-2's own `gelu_new`, as one operation instead of eight.
    settings = dict(activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if "asset" in shape:
        return GPT2LMHeadModel.from_pretrained(
            ASSETS / shape["asset"], attn_implementation="sdpa", dtype=torch.float32, **settings
        )
    config = GPT2Config(
        vocab_size=shape["vocab"],
        n_positions=shape["positions"],
        n_embd=shape["d"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
        **settings,
    )
    return GPT2LMHeadModel(config)


def with_adapter(model, lora, dropout=0.0):
    """A peft model with a fresh adapter on every linear layer of a copy of the model."""
    config = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=dropout,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(copy.deepcopy(model), config)


def gpt2(model):
    """The GPT2LMHeadModel within a peft model, or the model itself."""
    return model.base_model.model if hasattr(model, "peft_config") else model


def hidden(model, ids):
    """The hidden states after the last norm, `[batch, time, d]`. Sequences are padded on the right and results at padding are
    not used, so that no mask is needed and attention takes its causal path."""
    return gpt2(model).transformer(input_ids=ids, use_cache=False).last_hidden_state


def merged(model):
    """The tensors for decoding, by name, with the adapter merged. Weights without an adapter share the model's storage."""
    lm = gpt2(model)
    transformer = lm.transformer

    def linear(layer):
        if not hasattr(layer, "base_layer"):
            return layer.weight.detach(), layer.bias.detach()
        weight = layer.base_layer.weight.detach()
        return weight + layer.get_delta_weight("default").detach(), layer.base_layer.bias.detach()

    def norm(layer):
        return layer.weight.detach(), layer.bias.detach()

    layers = [
        dict(
            ln_1=norm(block.ln_1),
            c_attn=linear(block.attn.c_attn),
            attn_proj=linear(block.attn.c_proj),
            ln_2=norm(block.ln_2),
            c_fc=linear(block.mlp.c_fc),
            mlp_proj=linear(block.mlp.c_proj),
        )
        for block in transformer.h
    ]
    return dict(
        wte=transformer.wte.weight.detach(),
        wpe=transformer.wpe.weight.detach(),
        layers=layers,
        ln_f=norm(transformer.ln_f),
        heads=lm.config.n_head,
        eps=lm.config.layer_norm_epsilon,
    )

"""The figures by name: each is prepared once and then measured once per request."""

import random
import time

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList

import decode
import models
import ppo
from scoring import Scoring


def prepare(figure, settings, shape, request):
    """Returns a function that measures once and returns (seconds, tokens). `request` has the inputs of a shape with an asset."""
    prompts = request.get("prompts")
    if figure.startswith("phase_"):
        _, trained, members = figure.split("_")
        return ppo.Phase(settings, shape, prompts or random_prompts(shape, shape["rollouts"]), trained, int(members)).run
    lora = settings["lora"]
    prompts = prompts or random_prompts(shape, shape["decode_batch"])
    match figure:
        case "full_step":
            return training_step(models.base(shape), settings, shape)
        case "lora_step":
            return training_step(models.with_adapter(models.base(shape), lora), settings, shape)
        case "lora_dropout_step":
            return training_step(models.with_adapter(models.base(shape), lora, 0.1), settings, shape)
        case "full_step_bf16":
            return training_step(models.base(shape), settings, shape, bf16=True)
        case "lora_step_bf16":
            return training_step(models.with_adapter(models.base(shape), lora), settings, shape, bf16=True)
        case "score":
            return scoring(shape, request, torch.float32).run
        case "score_bf16":
            return scoring(shape, request, torch.bfloat16).run
        case "prefill":
            return static_cache(models.with_adapter(models.base(shape), lora), shape, prompts, decode_all=False)
        case "decode_loop":
            return static_cache(models.with_adapter(models.base(shape), lora), shape, prompts, decode_all=True)
        case "decode_generate":
            return transformers_generate(models.with_adapter(models.base(shape), lora), shape, prompts)
    raise SystemExit(f"no figure `{figure}`")


def random_prompts(shape, n):
    """Random ids, all prompts of one length."""
    return random_ids(shape, n, shape["prompt"])


def random_ids(shape, n, length):
    ids = random.Random(3)
    return [[ids.randrange(shape["vocab"]) for _ in range(length)] for _ in range(n)]


def scoring(shape, request, dtype):
    """As many sequences as a phase has rollouts."""
    n, new = shape["rollouts"], shape["max_new"]
    random_ones = ((ids[:-new], ids[-new:]) for ids in random_ids(shape, n, shape["prompt"] + new))
    return Scoring(shape, request.get("sequences") or list(random_ones), dtype)


def training_step(model, settings, shape, bf16=False):
    """Runs consecutive optimiser steps on the loss of the response tokens; reports the cost of one step. The LM head is applied
    to their positions only. With `bf16`, that is with autocast, weights, gradients and the softmax stay in f32."""
    optimiser = settings["optimiser"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=optimiser["lr"], weight_decay=optimiser["weight_decay"], fused=True)
    n, prompt, new = shape["train_batch"], shape["prompt"], shape["max_new"]
    ids = torch.randint(shape["vocab"], (n, prompt + new), generator=torch.Generator().manual_seed(5))
    model.train()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = models.hidden(model, ids)[:, prompt - 1 : -1].flatten(0, 1)
            logits = models.gpt2(model).lm_head(states)
        loss = F.cross_entropy(logits.float(), ids[:, prompt:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optimiser["clip"])
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    def run():
        clock = time.perf_counter()
        for _ in range(shape["steps"]):
            step()
        return (time.perf_counter() - clock) / shape["steps"], ids.numel()

    return run


def static_cache(model, shape, prompts, decode_all):
    """Times sampling up to the first token, including merging the adapter, or all further tokens."""
    new = shape["max_new"]

    def run():
        clock = time.perf_counter()
        with torch.inference_mode():
            weights = models.merged(model)
        merging = time.perf_counter() - clock
        _, prefill, rest = decode.generate(weights, prompts, new, new if decode_all else 1, eos=0)
        if decode_all:
            return rest, len(prompts) * (new - 1)
        return merging + prefill, sum(map(len, prompts))

    return run


class FirstLogitsTime(LogitsProcessor):
    """Records when the first logits have been computed."""

    def __init__(self):
        self.first = None

    def __call__(self, ids, scores):
        if self.first is None:
            self.first = time.perf_counter()
        return scores


def transformers_generate(model, shape, prompts):
    """Times all tokens after the first in `generate`, with the adapter merged into the model beforehand."""
    model = model.merge_and_unload().eval()
    new = shape["max_new"]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def run():
        first_logits = FirstLogitsTime()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=real,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=0,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([first_logits]),
            )
        return time.perf_counter() - first_logits.first, len(prompts) * (new - 1)

    return run

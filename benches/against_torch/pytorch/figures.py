"""The figures by name: each is prepared once and then measured as often as it is asked for. Knows no protocol."""

import random
import time

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList

import decode
import models
import ppo
from scoring import Scoring


def prepare(figure, settings, shape, given):
    """A function that measures once and gives (seconds, tokens). `given` holds the texts of an asset."""
    prompts = given.get("prompts")
    if figure.startswith("phase_"):
        _, trains, members = figure.split("_")
        return ppo.Phase(settings, shape, prompts or prompts_of(shape, shape["rollouts"]), trains, int(members)).run
    lora = settings["lora"]
    prompts = prompts or prompts_of(shape, shape["decode_batch"])
    match figure:
        case "full_step":
            return training_step(models.base(shape), settings, shape)
        case "lora_step":
            return training_step(models.with_adapter(models.base(shape), lora), settings, shape)
        case "lora_dropout_step":
            return training_step(models.with_adapter(models.base(shape), lora, 0.1), settings, shape)
        case "full_step_bf16":
            return training_step(models.base(shape), settings, shape, rounds=True)
        case "lora_step_bf16":
            return training_step(models.with_adapter(models.base(shape), lora), settings, shape, rounds=True)
        case "score":
            return scoring(shape, given, torch.float32).run
        case "score_bf16":
            return scoring(shape, given, torch.bfloat16).run
        case "prefill":
            return static_cache(models.with_adapter(models.base(shape), lora), shape, prompts, decodes=False)
        case "decode_loop":
            return static_cache(models.with_adapter(models.base(shape), lora), shape, prompts, decodes=True)
        case "decode_generate":
            return by_generate(models.with_adapter(models.base(shape), lora), shape, prompts)
    raise SystemExit(f"no figure `{figure}`")


def prompts_of(shape, n):
    """Random ids, all prompts of one length."""
    return random_ids(shape, n, shape["prompt"])


def random_ids(shape, n, length):
    ids = random.Random(3)
    return [[ids.randrange(shape["vocab"]) for _ in range(length)] for _ in range(n)]


def scoring(shape, given, dtype):
    """As many sequences as a phase has rollouts."""
    n, new = shape["rollouts"], shape["max_new"]
    random_ones = ((ids[:-new], ids[-new:]) for ids in random_ids(shape, n, shape["prompt"] + new))
    return Scoring(shape, given.get("sequences") or list(random_ones), dtype)


def training_step(model, settings, shape, rounds=False):
    """Optimiser steps on the response tokens' loss, one after the other; gives what one took. The output layer sees their
    positions alone. If it `rounds`, by autocast to bf16, weights, their gradients and the softmax stay in f32."""
    rule = settings["optimiser"]
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=rule["lr"], weight_decay=rule["weight_decay"], fused=True)
    n, prompt, new = shape["train_batch"], shape["prompt"], shape["max_new"]
    ids = torch.randint(shape["vocab"], (n, prompt + new), generator=torch.Generator().manual_seed(5))
    model.train()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            states = models.hidden(model, ids)[:, prompt - 1 : -1].flatten(0, 1)
            logits = models.gpt2(model).lm_head(states)
        loss = F.cross_entropy(logits.float(), ids[:, prompt:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, rule["clip"])
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    def run():
        clock = time.perf_counter()
        for _ in range(shape["steps"]):
            step()
        return (time.perf_counter() - clock) / shape["steps"], ids.numel()

    return run


def static_cache(model, shape, prompts, decodes):
    """Up to the first token with the adapter's merging, or what all further tokens take."""
    new = shape["max_new"]

    def run():
        clock = time.perf_counter()
        with torch.inference_mode():
            weights = models.merged(model)
        merging = time.perf_counter() - clock
        _, prefill, rest = decode.generate(weights, prompts, new, new if decodes else 1, eos=0)
        if decodes:
            return rest, len(prompts) * (new - 1)
        return merging + prefill, sum(map(len, prompts))

    return run


class Clock(LogitsProcessor):
    """Notes when the first logits are there."""

    def __init__(self):
        self.first = None

    def __call__(self, ids, scores):
        if self.first is None:
            self.first = time.perf_counter()
        return scores


def by_generate(model, shape, prompts):
    """What all tokens after the first take in `generate`, the adapter merged into the model beforehand."""
    model = model.merge_and_unload().eval()
    new = shape["max_new"]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def run():
        note = Clock()
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
                logits_processor=LogitsProcessorList([note]),
            )
        return time.perf_counter() - note.first, len(prompts) * (new - 1)

    return run

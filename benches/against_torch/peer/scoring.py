"""Log-probabilities of given tokens without gradients, in f32 and in bf16. Knows no protocol."""

import time

import torch
import torch.nn.functional as F

import models
from ppo import SCORING_BATCH, Packed, Row


class Scoring:
    """A model and the sequences whose response tokens it scores, in one way: `f32`, `autocast`, or `copy`, of which all is
    bf16 but the softmax."""

    def __init__(self, shape, sequences, way):
        self.shape, self.sequences, self.way = shape, sequences, way
        self.model = models.base(shape)
        if way == "copy":
            self.model.bfloat16()

    def run(self):
        clock = time.perf_counter()
        self.logprobs()
        return time.perf_counter() - clock, sum(len(p) + len(r) for p, r in self.sequences)

    @torch.inference_mode()
    def logprobs(self):
        """Of all response tokens, one sequence after the other; computed in batches of similar length."""
        rows = [Row(p, r) for p, r in self.sequences]
        found = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -rows[i].length)
        for start in range(0, len(order), SCORING_BATCH):
            batch = order[start : start + SCORING_BATCH]
            packed = Packed([rows[i] for i in batch])
            with torch.autocast("cpu", torch.bfloat16, enabled=self.way == "autocast"):
                logits = models.gpt2(self.model).lm_head(packed.predicting(models.hidden(self.model, packed.ids)))
            logprob = -F.cross_entropy(logits.float(), packed.targets, reduction="none")
            for i, row in enumerate(batch):
                found[row] = logprob[packed.part(i)]
        return torch.cat(found)

    def error(self):
        """How far the log-probabilities are from those in f32, in nats."""
        errors = (self.logprobs() - Scoring(self.shape, self.sequences, "f32").logprobs()).double()
        return {"rms": errors.square().mean().sqrt().item(), "largest": errors.abs().max().item()}

"""Log-probabilities of given tokens without gradients, in f32 or in bf16. Knows no protocol."""

import time

import torch
import torch.nn.functional as F

import models
from ppo import SCORING_BATCH, Packed, Row


class Scoring:
    """A model in f32, or a copy in bf16, whose logits alone become f32 again, and the sequences that it scores."""

    def __init__(self, shape, sequences, dtype):
        self.shape, self.sequences = shape, sequences
        self.model = models.base(shape).to(dtype)

    def run(self):
        """Measures once. Gives (seconds, tokens)."""
        clock = time.perf_counter()
        self.logprobs()
        return time.perf_counter() - clock, sum(len(p) + len(r) for p, r in self.sequences)

    @torch.inference_mode()
    def logprobs(self):
        """Of all response tokens, one sequence after the other; computed in batches of similar length."""
        rows = [Row(p, r) for p, r in self.sequences]
        order = sorted(range(len(rows)), key=lambda i: -rows[i].length)
        found = [None] * len(rows)
        for start in range(0, len(order), SCORING_BATCH):
            batch = order[start : start + SCORING_BATCH]
            packed = Packed([rows[i] for i in batch])
            states = packed.predicting(models.hidden(self.model, packed.ids))
            logits = self.model.lm_head(states).float()
            logprob = -F.cross_entropy(logits, packed.targets, reduction="none")
            for place, i in enumerate(batch):
                found[i] = logprob[packed.part(place)]
        return torch.cat(found)

    def error(self):
        """How far the log-probabilities are from those in f32, in nats."""
        exact = Scoring(self.shape, self.sequences, torch.float32).logprobs()
        errors = (self.logprobs() - exact).double().abs()
        return {"rms": errors.square().mean().sqrt().item(), "largest": errors.max().item()}

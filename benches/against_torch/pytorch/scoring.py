"""Log-probabilities of given tokens without gradients, in f32 or in bf16."""

import time

import torch
import torch.nn.functional as F

import models
from ppo import SCORING_BATCH, PaddedBatch, Row


class Scoring:
    """A model in f32 or bf16, and the sequences that it scores. Logits in bf16 are converted to f32 before the softmax."""

    def __init__(self, shape, sequences, dtype):
        self.shape, self.sequences = shape, sequences
        self.model = models.base(shape).to(dtype)

    def run(self):
        """Measures once. Returns (seconds, tokens)."""
        clock = time.perf_counter()
        self.logprobs()
        return time.perf_counter() - clock, sum(len(p) + len(r) for p, r in self.sequences)

    @torch.inference_mode()
    def logprobs(self):
        """Log-probabilities of all response tokens, in the order of the sequences; computed in batches of similar length."""
        rows = [Row(p, r) for p, r in self.sequences]
        order = sorted(range(len(rows)), key=lambda i: -rows[i].length)
        found = [None] * len(rows)
        for start in range(0, len(order), SCORING_BATCH):
            indices = order[start : start + SCORING_BATCH]
            batch = PaddedBatch([rows[i] for i in indices])
            states = batch.response_states(models.hidden(self.model, batch.ids))
            logits = self.model.lm_head(states).float()
            logprob = -F.cross_entropy(logits, batch.targets, reduction="none")
            for position, i in enumerate(indices):
                found[i] = logprob[batch.response_range(position)]
        return torch.cat(found)

    def error(self):
        """The difference of the log-probabilities from those in f32, in nats."""
        exact = Scoring(self.shape, self.sequences, torch.float32).logprobs()
        errors = (self.logprobs() - exact).double().abs()
        return {"rms": errors.square().mean().sqrt().item(), "largest": errors.max().item()}

"""A complete phase of PPO."""

import copy
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F

import decode
import models

# The fastest size: larger batches exceed the CPU caches.
SCORING_BATCH = 16


class Phase:
    """The policy, its reference, the value head, the reward models and the prompts of one shape."""

    def __init__(self, settings, shape, prompts, trained, members):
        self.settings, self.shape, self.prompts, self.trained = settings, shape, prompts, trained
        self.base = models.base(shape)
        self.members = []
        for _ in range(members):
            # A reward model with its adapter merged scores faster than one with a separate adapter.
            lm = copy.deepcopy(self.base).requires_grad_(False)
            head = torch.nn.Linear(shape["d"], 1).requires_grad_(False)
            self.members.append((lm, head))

    def run(self):
        """Measures the first phase of a run. Returns (seconds, response tokens)."""
        if self.trained == "lora":
            policy = models.with_adapter(self.base, self.settings["lora"])
            reference, without_adapter = policy, policy.disable_adapter
        else:
            policy = copy.deepcopy(self.base)
            reference, without_adapter = self.base, nullcontext
        head = torch.nn.Linear(self.shape["d"], 1)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        trained = [p for p in policy.parameters() if p.requires_grad] + list(head.parameters())
        optimiser = self.settings["optimiser"]
        adamw = torch.optim.AdamW(trained, lr=optimiser["lr"], weight_decay=optimiser["weight_decay"], fused=True)

        clock = time.perf_counter()
        shape = self.shape
        responses, _, _ = decode.generate(
            models.merged(policy), self.prompts, shape["min_new"], shape["max_new"], eos=0
        )
        rollout = [Row(p, r) for p, r in zip(self.prompts, responses)]
        self.score(rollout, policy, reference, without_adapter, head)
        self.compute_advantages(rollout)
        for _ in range(shape["epochs"]):
            order = torch.randperm(len(rollout)).tolist()
            for start in range(0, len(order), shape["minibatch"]):
                batch = [rollout[i] for i in order[start : start + shape["minibatch"]]]
                loss = self.loss(batch, policy, head)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, optimiser["clip"])
                adamw.step()
                adamw.zero_grad(set_to_none=True)
        return time.perf_counter() - clock, sum(len(row.response) for row in rollout)

    @torch.inference_mode()
    def score(self, rollout, policy, reference, without_adapter, head):
        """Computes log-probabilities, values and rewards of the responses, in batches of similar length."""
        order = sorted(range(len(rollout)), key=lambda i: -rollout[i].length)
        for start in range(0, len(order), SCORING_BATCH):
            rows = [rollout[i] for i in order[start : start + SCORING_BATCH]]
            batch = PaddedBatch(rows)
            states = batch.response_states(models.hidden(policy, batch.ids))
            logps = self.log_softmax(policy, states, batch)
            logprob = logps.gather(1, batch.targets[:, None])[:, 0]
            entropy = -(logps.exp() * logps).sum(-1)
            value = head(states)[:, 0]
            with without_adapter():
                states = batch.response_states(models.hidden(reference, batch.ids))
                reference_logprob = self.logprob(reference, states, batch)
            scores = torch.stack([h(batch.last_states(models.hidden(lm, batch.ids)))[:, 0] for lm, h in self.members])
            mean = scores.mean(0)
            for i, row in enumerate(rows):
                part = batch.response_range(i)
                row.old, row.value, row.entropy = logprob[part], value[part], entropy[part]
                row.log_ratio = logprob[part] - reference_logprob[part]
                row.reward = mean[i]

    def compute_advantages(self, rollout):
        """Generalised advantage estimates with gamma 1, normalised over the phase, and returns."""
        ppo = self.settings["ppo"]
        for row in rollout:
            rewards = -ppo["kl"] * row.log_ratio
            rewards[-1] += row.reward
            rewards, values = rewards.tolist(), row.value.tolist()
            advantages, running, following = [0.0] * len(rewards), 0.0, 0.0
            for t in reversed(range(len(rewards))):
                running = rewards[t] + following - values[t] + ppo["gae_lambda"] * running
                advantages[t], following = running, values[t]
            row.advantage = torch.tensor(advantages)
            row.returns = row.advantage + row.value.clone()
        every = torch.cat([row.advantage for row in rollout])
        mean, std = every.mean(), every.std().clamp_(min=1e-8)
        for row in rollout:
            row.advantage = (row.advantage - mean) / std

    def loss(self, rows, policy, head):
        """The clipped policy loss and the clipped value loss of a minibatch."""
        ppo = self.settings["ppo"]
        batch = PaddedBatch(rows)
        states = batch.response_states(models.hidden(policy, batch.ids))
        logprob = self.logprob(policy, states, batch)
        value = head(states)[:, 0]
        old, old_value = torch.cat([r.old for r in rows]).clone(), torch.cat([r.value for r in rows]).clone()
        advantage, returns = torch.cat([r.advantage for r in rows]), torch.cat([r.returns for r in rows])
        ratio = (logprob - old).exp()
        clipped = ratio.clamp(1 - ppo["clip"], 1 + ppo["clip"])
        policy_loss = torch.max(-advantage * ratio, -advantage * clipped).mean()
        bounded = old_value + (value - old_value).clamp(-ppo["value_clip"], ppo["value_clip"])
        value_loss = 0.5 * torch.max((value - returns) ** 2, (bounded - returns) ** 2).mean()
        return policy_loss + ppo["value_coefficient"] * value_loss

    def logits(self, model, states, batch):
        logits = models.gpt2(model).lm_head(states)
        # EOS is impossible in the first tokens of a response, as it was when they were sampled.
        # Not -infinity, whose product with a probability of 0 is NaN.
        logits[batch.early, 0] = -1e30
        return logits

    def log_softmax(self, model, states, batch):
        batch.mask_eos(self.shape["min_new"])
        return F.log_softmax(self.logits(model, states, batch), -1)

    def logprob(self, model, states, batch):
        batch.mask_eos(self.shape["min_new"])
        return -F.cross_entropy(self.logits(model, states, batch), batch.targets, reduction="none")


class Row:
    """A prompt, its response, and values for each token of the response."""

    def __init__(self, prompt, response):
        self.prompt, self.response = prompt, response
        self.length = len(prompt) + len(response)


class PaddedBatch:
    """Rows padded on the right, and the positions of their response tokens."""

    def __init__(self, rows):
        time_ = max(row.length for row in rows)
        self.rows = rows
        self.ids = torch.tensor([r.prompt + r.response + [0] * (time_ - r.length) for r in rows])
        self.positions = torch.tensor(
            [i * time_ + t for i, r in enumerate(rows) for t in range(len(r.prompt) - 1, r.length - 1)]
        )
        self.ends = torch.tensor([i * time_ + r.length - 1 for i, r in enumerate(rows)])
        self.targets = torch.tensor([t for r in rows for t in r.response])
        self.starts = [0]
        for row in rows:
            self.starts.append(self.starts[-1] + len(row.response))
        self.early = None

    def response_states(self, states):
        return states.flatten(0, 1)[self.positions]

    def last_states(self, states):
        return states.flatten(0, 1)[self.ends]

    def response_range(self, i):
        return slice(self.starts[i], self.starts[i + 1])

    def mask_eos(self, min_new):
        if self.early is None:
            early = [s + t for s, r in zip(self.starts, self.rows) for t in range(min(min_new, len(r.response)))]
            self.early = torch.tensor(early)

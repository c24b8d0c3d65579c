"""Sampling with a static key-value cache, in plain PyTorch without transformers or peft."""

import time

import torch
import torch.nn.functional as F


def layer_norm(x, norm, eps):
    return F.layer_norm(x, (x.shape[-1],), norm[0], norm[1], eps)


def linear(x, layer):
    weight, bias = layer
    return torch.addmm(bias, x, weight)


class KvCache:
    """Keys and values `[layer][rows, heads, max_len, width]`; prompts are padded on the left."""

    def __init__(self, layers, rows, heads, max_len, width):
        self.keys = [torch.empty(rows, heads, max_len, width) for _ in range(layers)]
        self.values = [torch.empty(rows, heads, max_len, width) for _ in range(layers)]

    def select_rows(self, rows):
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


def block(x, layer, n, heads, eps, attend):
    """One block over `x` `[n * time, d]`; `attend(q, k, v)` takes `[n, heads, time, width]`."""
    qkv = linear(layer_norm(x, layer["ln_1"], eps), layer["c_attn"])
    q, k, v = qkv.view(n, -1, 3, heads, qkv.shape[1] // 3 // heads).permute(2, 0, 3, 1, 4)
    mixed = attend(q, k, v).transpose(1, 2).reshape(x.shape)
    x = x + linear(mixed, layer["attn_proj"])
    wide = linear(layer_norm(x, layer["ln_2"], eps), layer["c_fc"])
    return x + linear(F.gelu(wide, approximate="tanh"), layer["mlp_proj"])


def sample(logits, forbidden):
    """Samples one token per row, never `forbidden`."""
    if forbidden is not None:
        logits[:, forbidden] = float("-inf")
    # The largest of the probabilities divided by exponential draws is a sample, and faster than `multinomial`.
    probabilities = torch.softmax(logits, -1)
    return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(-1)


@torch.inference_mode()
def generate(weights, prompts, min_new, max_new, eos):
    """Samples one response per prompt, including EOS. Returns the responses and the seconds up to the first token and after
    it."""
    clock = time.perf_counter()
    heads, eps, layers = weights["heads"], weights["eps"], weights["layers"]
    wte, wpe = weights["wte"], weights["wpe"]
    n, d = len(prompts), wte.shape[1]
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(p) for p in prompts])
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    padded = bool(padding.any())
    cache = KvCache(len(layers), n, heads, longest + max_new, d // heads)
    positions = (torch.arange(longest) - padding[:, None]).clamp_(min=0)
    mask = None
    if padded:
        real = torch.arange(longest + max_new) >= padding[:, None]
        # A padded query attends to itself, so that no row of the softmax is empty.
        causal = torch.ones(longest, longest, dtype=torch.bool).tril_()
        mask = (causal & real[:, None, None, :longest]) | torch.eye(longest, dtype=torch.bool)
    x = (wte[ids] + wpe[positions]).view(-1, d)
    for layer, keys, values in zip(layers, cache.keys, cache.values):

        def attend(q, k, v):
            keys[:, :, :longest], values[:, :, :longest] = k, v
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

        x = block(x, layer, n, heads, eps, attend)
    x = x.view(n, longest, d)[:, -1]

    responses = [[] for _ in prompts]
    live = torch.arange(n)
    done = torch.zeros(n, dtype=torch.bool)
    prefill = None
    for step in range(max_new):
        logits = layer_norm(x, weights["ln_f"], eps) @ wte.T
        tokens = sample(logits, eos if step < min_new else None)
        if prefill is None:
            prefill = time.perf_counter() - clock
        for row, token, ended in zip(live.tolist(), tokens.tolist(), done.tolist()):
            if not ended:
                responses[row].append(token)
        done = done | (tokens == eos)
        if step + 1 == max_new or bool(done.all()):
            break
        # Finished rows are removed once they are half of the batch, because moving the cache takes time.
        if 2 * int(done.sum()) >= len(live):
            rows = (~done).nonzero()[:, 0]
            live, tokens, padding, done = live[rows], tokens[rows], padding[rows], done[rows]
            if padded:
                real = real[rows]
            cache.select_rows(rows)
            n = len(live)
        at = longest + step
        x = wte[tokens] + wpe[at - padding]
        mask = real[:, None, None, : at + 1] if padded else None
        for layer, keys, values in zip(layers, cache.keys, cache.values):

            def attend(q, k, v):
                keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
                return F.scaled_dot_product_attention(
                    q, keys[:, :, : at + 1], values[:, :, : at + 1], attn_mask=mask
                )

            x = block(x, layer, n, heads, eps, attend)
    return responses, prefill, time.perf_counter() - clock - prefill

"""Judges prompts by llama.cpp, as annotate.local does: log p("1") - log p("2") where the answer names its choice.

    llama_cpp_judge.py MODEL.gguf PROMPTS.jsonl ANSWER THREADS

Reads lines of {"messages": […]}. For each of two ways, prints a line of JSON with seconds and differences: every prompt
alone, and with the cache of what it shares with the prompt before it, as llama.cpp's server does.
"""

import json
import sys
import time

from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def main(model: str, prompts: str, answer: str, threads: str) -> None:
    llama = Llama(model, n_ctx=8192, n_batch=512, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
    token = lambda token_id: llama._model.token_get_text(token_id) if token_id >= 0 else ""
    template = Jinja2ChatFormatter(
        llama.metadata["tokenizer.chat_template"], eos_token=token(llama.token_eos()), bos_token=token(llama.token_bos())
    )
    with open(prompts, encoding="utf-8") as lines:
        texts = [template(messages=json.loads(line)["messages"]).prompt + answer for line in lines]
    tokens = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    one, two = (llama.tokenize(text, add_bos=False, special=False)[-1] for text in (b"1", b"2"))
    for cached in (False, True):
        llama.reset()
        held, differences, started = [], [], time.perf_counter()
        for ids in tokens:
            shared = 0
            while cached and shared < min(len(held), len(ids) - 1) and held[shared] == ids[shared]:
                shared += 1
            llama.n_tokens = shared
            llama._ctx.kv_cache_seq_rm(-1, shared, -1)
            llama.eval(ids[shared:])
            # `llama.scores` is filled with `logits_all` alone, which computes those of every token.
            logits = llama._ctx.get_logits_ith(-1)
            differences.append(float(logits[one] - logits[two]))
            held = ids
        seconds = time.perf_counter() - started
        print(json.dumps({"cached": cached, "seconds": seconds, "differences": differences}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

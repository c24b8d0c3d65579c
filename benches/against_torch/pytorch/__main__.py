"""PyTorch's side of the comparison: a process that is asked for figures on standard input and measures each once.
Knows neither the other side nor the table.

Arguments: the path of `shapes.json` and the number of threads. Each line of input is
`{"figure": …, "shape": …, "prompts": …, "sequences": …}`, the last two being those of an asset; each line of output
`{"seconds", "tokens", "start_rss", "peak_rss"}`, the last two in bytes. The figure `score_bf16_error` is answered with
`{"rms", "largest"}`, in nats."""

import json
import sys
from pathlib import Path

import torch

import figures

ERROR = "score_bf16_error"


def memory(field):
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status holds no {field}")


def main():
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(sys.argv[2]))
    start = memory("VmRSS:")
    asked, run = None, None
    for line in sys.stdin:
        question = json.loads(line)
        shape = settings["shapes"][question["shape"]]
        if question["figure"] == ERROR:
            print(json.dumps(figures.scoring(shape, question, torch.bfloat16).error()), flush=True)
            continue
        if question != asked:
            run = figures.prepare(question["figure"], settings, shape, question)
            asked = question
        seconds, tokens = run()
        answer = {"seconds": seconds, "tokens": tokens, "start_rss": start, "peak_rss": memory("VmHWM:")}
        print(json.dumps(answer), flush=True)


main()

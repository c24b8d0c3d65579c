"""PyTorch's side of the comparison: a process that reads figure names from standard input and measures each once.

Arguments: the path of `shapes.json` and the number of threads. Each line of input is
`{"figure": …, "shape": …, "prompts": …, "sequences": …}`, the last two only for a shape with an asset; each line of output
`{"seconds", "tokens", "start_rss", "peak_rss"}`, the last two in bytes. The figure `score_bf16_error` is answered with
`{"rms", "largest"}`, in nats."""

import json
import sys
from pathlib import Path

import torch

import figures

SCORE_BF16_ERROR = "score_bf16_error"


def memory(field):
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def main():
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(sys.argv[2]))
    start = memory("VmRSS:")
    prepared, run = None, None
    for line in sys.stdin:
        request = json.loads(line)
        shape = settings["shapes"][request["shape"]]
        if request["figure"] == SCORE_BF16_ERROR:
            print(json.dumps(figures.scoring(shape, request, torch.bfloat16).error()), flush=True)
            continue
        if request != prepared:
            run = figures.prepare(request["figure"], settings, shape, request)
            prepared = request
        seconds, tokens = run()
        reply = {"seconds": seconds, "tokens": tokens, "start_rss": start, "peak_rss": memory("VmHWM:")}
        print(json.dumps(reply), flush=True)


main()

"""Runs both sides in turn and prints the table.

Each figure has its own process on each side, which lives as long as the figure's pairs are measured: start-up time is not
counted, and the process's peak memory is the figure's. While one side computes, the other waits for its next request; if
it uses the processor meanwhile, a warning is printed."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHAPES = HERE / "shapes.json"


class Side:
    """A process that replies to requests."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
        )

    def measure(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise SystemExit(f"{' '.join(self.process.args)} ended at {request['figure']}, with exit code {self.process.wait()}")
        return json.loads(reply)

    def processor_seconds(self):
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def processors():
    """User and system seconds of all processes so far, over all processors."""
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def build():
    """Builds our side and returns the path of its program."""
    command = ["cargo", "bench", "--bench", "against_torch", "--no-run", "--message-format=json-render-diagnostics"]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for message in map(json.loads, out.splitlines()):
        if message.get("executable") and message["target"]["name"] == "against_torch":
            return message["executable"]
    raise SystemExit("cargo built no program named against_torch")


def ours(program, threads):
    # As `temper run` sets it for the stages.
    environment = {"MIMALLOC_PURGE_DELAY": "-1", "RAYON_NUM_THREADS": threads}
    return Side([program, str(SHAPES), threads], environment)


def pytorch(threads):
    # Silences deprecation warnings of the libraries.
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    return Side([sys.executable, str(HERE / "pytorch"), str(SHAPES), threads], {"OMP_NUM_THREADS": threads} | quiet)


def measure_one(side, other, request):
    """Measures one side while the other should be idle."""
    before, clock = other.processor_seconds(), time.monotonic()
    reply = side.measure(request)
    used = other.processor_seconds() - before
    # The clock of processor time ticks every 10 ms.
    if used > max(0.05, 0.02 * (time.monotonic() - clock)):
        print(f"warning: the idle side used {used:.2f} s of processor time: {request}", file=sys.stderr)
    return reply


def measure_pairs(row, program, threads, pairs):
    """Measures interleaved pairs after one warm-up round and returns lists by name of measurement. Before each pair of training
    steps, also measures the fastest matrix product; for rows with `has_error`, also the error of the log-probabilities."""
    our_request = {"figure": row.ours, "shape": row.shape}
    our_side, their_side = ours(program, threads), pytorch(threads)
    their_request = {"figure": row.pytorch, "shape": row.shape}
    if "asset" in json.loads(SHAPES.read_text())["shapes"][row.shape]:
        input_source = ours(program, threads)
        their_request |= input_source.measure({"figure": "inputs", "shape": row.shape})
        input_source.end()
    # The warm-up round creates models, caches and threads.
    our_side.measure(our_request)
    their_side.measure(their_request)
    sides, found = [our_side, their_side], {"ours": {}, "pytorch": {}}
    if row.is_training_step:
        matmul_side = ours(program, threads)
        sides.append(matmul_side)
        found["fastest_matmul"] = {}

    def others():
        return processors() - sum(side.processor_seconds() for side in sides)

    before, clock = others(), time.monotonic()
    for _ in range(pairs):
        replies = {"fastest_matmul": matmul_side.measure({"figure": "fastest_matmul", "shape": row.shape})} if row.is_training_step else {}
        replies |= {"ours": measure_one(our_side, their_side, our_request), "pytorch": measure_one(their_side, our_side, their_request)}
        for side, reply in replies.items():
            for name, value in reply.items():
                found[side].setdefault(name, []).append(value)
    found["others"] = (others() - before) / ((time.monotonic() - clock) * os.cpu_count())
    if row.has_error:
        # Last, because it takes memory that the figure does not need.
        for name, side, request in (("ours", our_side, our_request), ("pytorch", their_side, their_request)):
            found[name]["error"] = side.measure(request | {"figure": f"{request['figure']}_error"})
    for side in sides:
        side.end()
    return found


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pairs", type=int, default=7, help="pairs of each row (default 7)")
    arguments.add_argument("--slow-pairs", type=int, help="pairs of each row of shape G (default: as for other rows)")
    arguments.add_argument("--threads", default="2", help="threads of each side (default 2)")
    arguments.add_argument("--only", default="", help="a regular expression that selects rows, such as 'M (full|lora)_step'")
    arguments.add_argument("--results", type=Path, help="a JSON file that collects the rows of several runs")
    arguments.add_argument("--print", action="store_true", help="measure nothing, print the rows in --results")
    options = arguments.parse_args()
    results = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    if not options.print:
        program = build()
        for row in table.ROWS:
            if re.search(options.only, table.key(row)):
                pairs = options.slow_pairs if row.shape == "G" and options.slow_pairs else options.pairs
                print(f"{row.shape}: {row.name}", file=sys.stderr)
                results[table.key(row)] = measure_pairs(row, program, options.threads, pairs)
                if options.results:
                    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table.lines(results)))


main()

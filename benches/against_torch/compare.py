"""Runs both sides in turn and prints the table. Knows no model.

Each figure has a process of its own on either side, which lives over all of the figure's pairs: start-up costs nothing,
and its peak memory is the figure's. While one side computes, the other waits for its question; if it is found to use the
processor meanwhile, that is told."""

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
    """A process that answers questions."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
        )

    def ask(self, question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(self.process.args)} ended at {question['figure']}, with exit code {self.process.wait()}")
        return json.loads(answer)

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
    """Builds our side and gives the path of its program."""
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


def peer(threads):
    # What its libraries say about their own future is of no use here.
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    return Side([sys.executable, str(HERE / "peer"), str(SHAPES), threads], {"OMP_NUM_THREADS": threads} | quiet)


def watched(side, other, question):
    """Asks one side while the other should rest."""
    before, clock = other.processor_seconds(), time.monotonic()
    answer = side.ask(question)
    used = other.processor_seconds() - before
    # The clock of processor time ticks every 10 ms.
    if used > max(0.05, 0.02 * (time.monotonic() - clock)):
        print(f"warning: the resting side used {used:.2f} s of processor time: {question}", file=sys.stderr)
    return answer


def measure(row, program, threads, pairs):
    """Interleaved pairs after one unmeasured round, as lists by name of measurement; of a training step, before each pair the
    fastest product; and the error of a row that rounds."""
    mine = {"figure": row.ours, "shape": row.shape}
    us, them = ours(program, threads), peer(threads)
    theirs = {"figure": row.peer, "shape": row.shape}
    if "asset" in json.loads(SHAPES.read_text())["shapes"][row.shape]:
        teller = ours(program, threads)
        theirs |= teller.ask({"figure": "texts", "shape": row.shape})
        teller.end()
    # A round that does not count makes models, caches and threads.
    us.ask(mine)
    them.ask(theirs)
    sides, found = [us, them], {"ours": {}, "peer": {}}
    if row.efficiency:
        fastest = ours(program, threads)
        sides.append(fastest)
        found["fastest"] = {}

    def others():
        return processors() - sum(side.processor_seconds() for side in sides)

    before, clock = others(), time.monotonic()
    for _ in range(pairs):
        answers = {"fastest": fastest.ask({"figure": "fastest", "shape": row.shape})} if row.efficiency else {}
        answers |= {"ours": watched(us, them, mine), "peer": watched(them, us, theirs)}
        for side, answer in answers.items():
            for name, value in answer.items():
                found[side].setdefault(name, []).append(value)
    found["others"] = (others() - before) / ((time.monotonic() - clock) * os.cpu_count())
    if row.rounds:
        # Last: it takes memory that is not the figure's.
        for name, side, question in (("ours", us, mine), ("peer", them, theirs)):
            found[name]["error"] = side.ask(question | {"figure": f"{question['figure']}_error"})
    for side in sides:
        side.end()
    return found


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pairs", type=int, default=7, help="pairs of each row (default 7)")
    arguments.add_argument("--slow-pairs", type=int, help="pairs of the rows of shape G (default: as the others)")
    arguments.add_argument("--threads", default="2", help="threads of each side (default 2)")
    arguments.add_argument("--only", default="", help="a pattern of rows, such as 'M (full|lora)_step'")
    arguments.add_argument("--results", type=Path, help="a JSON file that keeps rows, for a table made in several runs")
    arguments.add_argument("--print", action="store_true", help="measure nothing, print what --results holds")
    options = arguments.parse_args()
    results = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    if not options.print:
        program = build()
        for row in table.ROWS:
            if re.search(options.only, table.key(row)):
                pairs = options.slow_pairs if row.shape == "G" and options.slow_pairs else options.pairs
                print(f"{row.shape}: {row.name}", file=sys.stderr)
                results[table.key(row)] = measure(row, program, options.threads, pairs)
                if options.results:
                    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table.lines(results)))


main()

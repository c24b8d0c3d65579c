"""Times temper and its peers on the same chain of cheap commands, kills each in the middle, and prints the tables."""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BIN = HERE / ".venv" / "bin"
ROOT = HERE.parent.parent

# The text that a stage adds to that of the stage before it, written to `$out`; `log` counts how often it was executed.
COMMAND = "echo {n} >> {log}; {{ {read}; {slow}echo {n} {value}; }} > {out}"
# A stage that is killed while it writes.
SLOW = "for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i; sleep 0.1; done; "


class Chain:
    """A chain of n stages. The value of the middle one can be changed, and it can be slow."""

    def __init__(self, folder, n, slow=False, value="a"):
        self.folder, self.n, self.slow, self.value = Path(folder), n, slow, value
        self.log = self.folder / "log"
        self.log.touch()

    @property
    def middle(self):
        return self.n // 2

    def command(self, n, source, out):
        value = self.value if n == self.middle else "a"
        slow = SLOW if self.slow and n == self.middle else ""
        return COMMAND.format(n=n, log=self.log, read=f"cat {source}" if source else "true", slow=slow, value=value, out=out)

    def commands(self):
        """Number, input, output and command of each stage, with paths relative to the folder."""
        for n in range(self.n):
            source = f"out/{n - 1}" if n else None
            yield n, source, f"out/{n}", self.command(n, source, f"out/{n}")

    def expected(self):
        lines = []
        for n in range(self.n):
            if self.slow and n == self.middle:
                lines += [f"line {i}" for i in range(1, 11)]
            lines.append(f"{n} {self.value if n == self.middle else 'a'}")
        return "\n".join(lines) + "\n"

    def executed(self):
        return len(self.log.read_text().split())


class Peer:
    """How one tool is given the chain, and run."""

    after_kill = ()

    def prepare(self, chain):
        """Called once, in an empty folder."""
        (chain.folder / "out").mkdir()

    def run(self):
        raise NotImplementedError

    def write(self, chain):
        raise NotImplementedError

    def result(self, chain):
        return (chain.folder / f"out/{chain.n - 1}").read_text()

    def reached(self, chain):
        """Whether the middle stage is at work."""
        return str(chain.middle) in chain.log.read_text().split()


class Temper(Peer):
    name = "temper"
    program = os.environ.get("TEMPER") or str(ROOT / "target" / "release" / "temper")

    def prepare(self, chain):
        pass

    def write(self, chain):
        lines = ["version: 1", "stages:"]
        for n in range(chain.n):
            command = chain.command(n, "$TEMPER_INPUT_x/x" if n else None, "$TEMPER_OUTPUT/x")
            needs = f" needs: {{ x: s{n - 1} }}," if n else ""
            lines.append(f"  s{n}: {{ uses: command,{needs} with: {{ run: [sh, -c, '{command}'], output: Files, access: {{ write: [{chain.log}] }} }} }}")
        (chain.folder / "chain.yaml").write_text("\n".join(lines) + "\n")

    def run(self):
        return [self.program, "run", "chain.yaml", "-j", "1"]

    def result(self, chain):
        found = subprocess.run([self.program, "path", "chain.yaml", f"s{chain.n - 1}"], cwd=chain.folder, text=True, capture_output=True)
        return (Path(found.stdout.strip()) / "x").read_text()


class Ninja(Peer):
    name = "ninja"
    program = str(BIN / "ninja")

    def write(self, chain):
        lines = ["rule run", "  command = $command"]
        for n, source, out, command in chain.commands():
            lines += [f"build {out}: run {source or ''}", "  command = " + command.replace("$", "$$")]
        (chain.folder / "build.ninja").write_text("\n".join(lines) + "\n")

    def run(self):
        return [self.program, "-j1", "--quiet"]


class Doit(Peer):
    name = "doit"
    program = str(BIN / "doit")

    def write(self, chain):
        # doit compares files; the command is compared as a configuration.
        tasks = [(str(n), command, out, [source] if source else []) for n, source, out, command in chain.commands()]
        text = f"from doit.tools import config_changed\n\nTASKS = {tasks!r}\n\n\ndef task_chain():\n"
        text += "    for name, command, out, sources in TASKS:\n"
        text += "        yield {'name': name, 'actions': [command.replace('%', '%%')], 'targets': [out],\n"
        text += "               'file_dep': sources, 'uptodate': [config_changed(command)]}\n"
        (chain.folder / "dodo.py").write_text(text)

    def run(self):
        return [self.program, "-v0"]


class Snakemake(Peer):
    name = "snakemake"
    program = str(BIN / "snakemake")
    # It locks its folder, and refuses outputs that it does not know to be complete.
    after_kill = (["--unlock"],)

    def write(self, chain):
        rules = [f"rule all:\n    input: 'out/{chain.n - 1}'\n"]
        for n, source, out, command in chain.commands():
            shell = command.replace("{", "{{").replace("}", "}}")
            inputs = f"    input: '{source}'\n" if source else ""
            rules.append(f"rule s{n}:\n{inputs}    output: '{out}'\n    shell: {shell!r}\n")
        (chain.folder / "Snakefile").write_text("\n".join(rules))

    def run(self):
        return [self.program, "--cores", "1", "--quiet", "all", "--rerun-incomplete"]


class Dvc(Peer):
    name = "dvc"
    program = str(BIN / "dvc")

    def prepare(self, chain):
        super().prepare(chain)
        subprocess.run([self.program, "init", "--no-scm", "--quiet"], cwd=chain.folder, check=True)
        subprocess.run([self.program, "config", "core.analytics", "false"], cwd=chain.folder, check=True)

    def write(self, chain):
        lines = ["stages:"]
        for n, source, out, command in chain.commands():
            lines += [f"  s{n}:", f"    cmd: {command!r}".replace("\\'", "''")]
            lines += [f"    deps: [{source}]"] if source else []
            lines += [f"    outs: [{out}]"]
        (chain.folder / "dvc.yaml").write_text("\n".join(lines) + "\n")

    def run(self):
        return [self.program, "repro", "--quiet"]


def start(peer, chain, arguments=()):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
    return subprocess.Popen([*peer.run(), *arguments], cwd=chain.folder, **quiet)


def timed(peer, chain, arguments=()):
    """Seconds of a run."""
    clock = time.perf_counter()
    process = start(peer, chain, arguments)
    _, stderr = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: {stderr.decode(errors='replace').strip()[-300:]}")
    return time.perf_counter() - clock


def check(peer, chain):
    if peer.result(chain) != chain.expected():
        raise RuntimeError("the result is wrong")


def times(peer, n, repeats):
    """Seconds by figure: the first run, nothing to do, and the middle stage changed."""
    found = {"cold": [], "nothing to do": [], "one changed": []}
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            chain = Chain(folder, n)
            peer.prepare(chain)
            peer.write(chain)
            found["cold"].append(timed(peer, chain))
            check(peer, chain)
            found["nothing to do"] += [timed(peer, chain) for _ in range(3)]
            changed = Chain(folder, n, value=f"b{repeat}")
            before = changed.executed()
            peer.write(changed)
            found["one changed"].append(timed(peer, changed))
            check(peer, changed)
            if changed.executed() - before != n - n // 2:
                raise RuntimeError(f"one changed: {changed.executed() - before} commands instead of {n - n // 2}")
    return {figure: statistics.median(seconds) for figure, seconds in found.items()}


def killed(peer, n):
    """Kills the tool with signal 9 while the middle stage writes, and runs it again at once."""
    folder = tempfile.mkdtemp()
    try:
        chain = Chain(folder, n, slow=True)
        peer.prepare(chain)
        peer.write(chain)
        process = start(peer, chain)
        while not peer.reached(chain):
            if process.poll() is not None:
                raise RuntimeError(f"it ended before the kill: {process.stderr.read().decode(errors='replace')[-300:]}")
            time.sleep(0.005)
        time.sleep(0.35)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        clock = time.perf_counter()
        for arguments in peer.after_kill:
            timed(peer, chain, arguments)
        try:
            timed(peer, chain)
            outcome = "right" if peer.result(chain) == chain.expected() else "WRONG, exit code 0"
        except RuntimeError as error:
            outcome = f"fails: {str(error).splitlines()[-1][:60]}"
        seconds = time.perf_counter() - clock
        return {"seconds": seconds, "twice": chain.executed() - n, "result": outcome}
    finally:
        # A process that outlived its tool may still write.
        time.sleep(1.5)
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=100, help="length of the chain [default: 100]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each figure; the table has medians [default: 3]")
    parser.add_argument("--only", help="a peer's name")
    arguments = parser.parse_args()
    peers = [peer() for peer in (Temper, Ninja, Doit, Snakemake, Dvc)]
    peers = [peer for peer in peers if arguments.only in (None, peer.name) or peer.name == "temper"]
    rows, kills = {}, {}
    for peer in peers:
        if not Path(peer.program).exists():
            rows[peer.name] = kills[peer.name] = "absent"
            continue
        print(f"{peer.name} …", file=sys.stderr)
        for table, measure in [(rows, lambda: times(peer, arguments.stages, arguments.repeats)), (kills, lambda: killed(peer, 10))]:
            try:
                table[peer.name] = measure()
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                table[peer.name] = " ".join(str(error).split())[-120:]
    print_tables(arguments.stages, rows, kills)


def print_tables(stages, rows, kills):
    figures = ["cold", "nothing to do", "one changed"]
    ours = rows["temper"]
    print(f"\nA chain of {stages} commands, one at a time: seconds, and how many times temper's.\n")
    print("| | " + " | ".join(figures) + " |\n|---|" + "---|" * len(figures))
    for name, row in rows.items():
        if isinstance(row, str):
            print(f"| {name} | {row} |" + " |" * (len(figures) - 1))
            continue
        ratio = lambda figure: f" ({row[figure] / ours[figure]:.1f}x)" if isinstance(ours, dict) else ""
        print(f"| {name} | " + " | ".join(f"{row[figure]:.3f} s{ratio(figure)}" for figure in figures) + " |")
    print("\nKilled by signal 9 while a command writes its output, and run again at once: a chain of 10.\n")
    print("| | until done | commands executed again | result |\n|---|---|---|---|")
    for name, row in kills.items():
        cells = [row, "", ""] if isinstance(row, str) else [f"{row['seconds']:.1f} s", str(row["twice"]), row["result"]]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

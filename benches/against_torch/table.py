"""The rows of the comparison and how they are printed. Knows no process."""

from dataclasses import dataclass
from statistics import median, quantiles

# A bar is met if the lower quartile of the ratios reaches this share of it.
NEARLY = 0.95


@dataclass(frozen=True)
class Row:
    """One figure at one shape against one of PyTorch's."""

    name: str
    shape: str
    ours: str
    peer: str
    bar: float | None = None
    # Whether log-probabilities in bf16 are held against those in f32, each side's against its own.
    rounds: bool = False

    @property
    def efficiency(self):
        """Whether it is held against our fastest product of matrices."""
        return self.ours.endswith("_step")


ROWS = [
    Row("full training step", "M", "full_step", "full_step", 1.0),
    Row("full training step", "G", "full_step", "full_step", 1.0),
    Row("LoRA training step", "M", "lora_step", "lora_step", 1.5),
    Row("LoRA training step", "G", "lora_step", "lora_step", 1.2),
    Row("LoRA training step, dropout 0.1", "M", "lora_dropout_step", "lora_dropout_step", 1.5),
    Row("LoRA training step, dropout 0.1", "G", "lora_dropout_step", "lora_dropout_step", 1.2),
    Row("decode, against generate", "M", "decode", "decode_generate", 3.0),
    Row("decode, against a static cache", "M", "decode", "decode_loop", 1.3),
    Row("decode, against generate", "G", "decode", "decode_generate", 1.5),
    Row("decode, against a static cache", "G", "decode", "decode_loop", 1.5),
    Row("prefill", "M", "prefill", "prefill", 1.0),
    Row("prefill", "G", "prefill", "prefill", 1.0),
    Row("PPO phase", "M", "phase_lora_1", "phase_lora_1", 1.5),
    Row("PPO phase", "G", "phase_lora_1", "phase_lora_1", 1.2),
    Row("PPO phase, five reward models", "T", "phase_lora_5", "phase_lora_5", 2.0),
    Row("PPO phase, five reward models", "M", "phase_lora_5", "phase_lora_5"),
    Row("PPO phase, all weights", "M", "phase_full_1", "phase_full_1"),
    Row("PPO phase, all weights, five reward models", "M", "phase_full_5", "phase_full_5"),
    Row("scoring", "M", "score", "score"),
    Row("scoring", "G", "score", "score"),
    Row("full training step, bf16", "M", "full_step_bf16", "full_step_bf16"),
    Row("full training step, bf16", "G", "full_step_bf16", "full_step_bf16"),
    Row("LoRA training step, bf16", "M", "lora_step_bf16", "lora_step_bf16"),
    Row("LoRA training step, bf16", "G", "lora_step_bf16", "lora_step_bf16"),
    Row("scoring, bf16", "T", "score_bf16", "score_bf16", rounds=True),
    Row("scoring, bf16", "M", "score_bf16", "score_bf16", rounds=True),
    Row("scoring, bf16", "G", "score_bf16", "score_bf16", rounds=True),
]

# The share of the processors that others may take while a row is measured: two threads that wait for each other at
# every step, as PyTorch's do, lose far more by it than two that do not.
QUIET = 0.03
# What five reward models may add: this many times what the operations add.
SHARING = 1.1
# The share of the peak that a training step must reach.
EFFICIENCY = 0.6


def spread(values):
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, low, high


def seconds(side):
    return f"{median(side['seconds']) * 1e3:,.0f} ms"


def peak(side):
    """The most memory the figure took, in MiB: without what the process held before, mostly libraries."""
    return (max(side["peak_rss"]) - side["start_rss"][0]) / 2**20


def verdict(bar, lower):
    if bar is None:
        return "", ""
    return f"{bar:g}", "met" if lower >= NEARLY * bar else "not met"


def lines(results):
    """The whole table, from `{row's key: {"ours": side, "peer": side}}`, a side being lists by name of measurement and of
    rows that round the `error`."""
    yield "| figure | shape | ours | PyTorch | times faster [quartiles] | bar | | memory: ours | PyTorch | | pairs |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in ROWS:
        if key(row) not in results:
            continue
        ours, peer = results[key(row)]["ours"], results[key(row)]["peer"]
        ratio = [p / o for o, p in zip(ours["seconds"], peer["seconds"])]
        middle, low, high = spread(ratio)
        bar, met = verdict(row.bar, low)
        memory = [peak(ours), peak(peer)]
        smaller = "met" if memory[0] <= memory[1] else "not met"
        yield (
            f"| {row.name} | {row.shape} | {seconds(ours)} | {seconds(peer)} | {middle:.2f} [{low:.2f}, {high:.2f}] "
            f"| {bar} | {met} | {memory[0]:,.0f} MiB | {memory[1]:,.0f} MiB | {smaller} | {len(ratio)} |"
        )
    yield ""
    yield from efficiency(results)
    yield ""
    yield from ensembles(results)
    yield ""
    yield from errors(results)
    yield ""
    yield from notes(results)


def key(row):
    return f"{row.shape} {row.ours} {row.peer}"


def efficiency(results):
    """What share of the fastest product, measured right before it, a training step reaches; operations as `flops.rs` counts
    them."""
    yield "| training step | shape | ours, GFLOP/s | PyTorch | our fastest product | ours / fastest [quartiles] | bar | |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in ROWS:
        if not row.efficiency or key(row) not in results:
            continue
        ours, peer, fastest = (results[key(row)][side] for side in ("ours", "peer", "fastest"))
        rates = [f / s for f, s in zip(ours["flops"], ours["seconds"])]
        best = [f / s for f, s in zip(fastest["flops"], fastest["seconds"])]
        theirs = median(f / s for f, s in zip(ours["flops"], peer["seconds"]))
        middle, low, high = spread([r / b for r, b in zip(rates, best)])
        bar, met = verdict(EFFICIENCY, low)
        yield (
            f"| {row.name} | {row.shape} | {median(rates) / 1e9:.0f} | {theirs / 1e9:.0f} | {median(best) / 1e9:.0f} "
            f"| {middle:.2f} [{low:.2f}, {high:.2f}] | {bar} | {met} |"
        )


def ensembles(results):
    """What five reward models add to a phase with one, beside what their operations add."""
    yield "| five reward models instead of one | shape | operations add | ours adds | at most | | PyTorch adds |"
    yield "|---|---|---|---|---|---|---|"
    for trains, name in (("lora", "LoRA"), ("full", "all weights")):
        for shape in ("M", "G"):
            one, five = (results.get(f"{shape} phase_{trains}_{n} phase_{trains}_{n}") for n in (1, 5))
            if one is None or five is None:
                continue
            predicted = five["ours"]["flops"][0] / one["ours"]["flops"][0] - 1
            ours, theirs = (
                median(five[side]["seconds"]) / median(one[side]["seconds"]) - 1 for side in ("ours", "peer")
            )
            met = "met" if ours * NEARLY <= SHARING * predicted else "not met"
            yield (
                f"| {name} | {shape} | {predicted:+.0%} | {ours:+.0%} | {SHARING * predicted:+.0%} | {met} | {theirs:+.0%} |"
            )


def errors(results):
    """What bf16 changes of log-probabilities, each side's held against its own in f32."""
    yield "| error of log-probabilities in bf16, nats | shape | ours: rms | largest | PyTorch: rms | largest |"
    yield "|---|---|---|---|---|---|"
    for row in ROWS:
        if row.rounds and key(row) in results:
            ours, peer = (results[key(row)][side]["error"] for side in ("ours", "peer"))
            found = " | ".join(f"{error[of]:.4f}" for error in (ours, peer) for of in ("rms", "largest"))
            yield f"| {row.name} | {row.shape} | {found} |"


def notes(results):
    """What the processes held before they began, and how many tokens each side made where lengths are sampled."""
    for row in ROWS:
        sides = results.get(key(row))
        if sides is None:
            continue
        ours, peer = (sum(sides[side]["tokens"]) / len(sides[side]["tokens"]) for side in ("ours", "peer"))
        if ours != peer:
            yield f"{row.shape}, {row.name}: responses of {ours:,.0f} tokens in all against {peer:,.0f}."
    busy = {row.shape + " " + row.name: results[key(row)]["others"] for row in ROWS if key(row) in results}
    for name, share in busy.items():
        if share > QUIET:
            yield f"{name}: **not to be trusted**, other processes took {share:.0%} of the processors meanwhile."
    starts = [max(s[side]["start_rss"][0] for s in results.values()) / 2**20 for side in ("ours", "peer")]
    yield (
        f"Memory is the process's peak above what it held before the first figure: {starts[0]:,.0f} MiB ours, "
        f"{starts[1]:,.0f} MiB PyTorch."
    )

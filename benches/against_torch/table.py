"""The rows of the comparison, and the tables printed from their results."""

from dataclasses import dataclass
from statistics import median, quantiles

# A target is met if the lower quartile of the ratios reaches this share of it.
TOLERANCE = 0.95


@dataclass(frozen=True)
class Row:
    """One figure at one shape against one of PyTorch's."""

    name: str
    shape: str
    ours: str
    pytorch: str
    target: float | None = None
    # Whether log-probabilities in bf16 are compared with those in f32, for each side.
    has_error: bool = False

    @property
    def is_training_step(self):
        """Whether it is compared with our fastest matrix product."""
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
    Row("scoring, bf16", "T", "score_bf16", "score_bf16", has_error=True),
    Row("scoring, bf16", "M", "score_bf16", "score_bf16", has_error=True),
    Row("scoring, bf16", "G", "score_bf16", "score_bf16", has_error=True),
]

# The share of the processors that other processes may use while a row is measured: two threads that wait for each other
# at every step, as PyTorch's do, lose far more by it than two that do not.
MAX_BUSY = 0.03
# The time that four more reward models may add, as a multiple of the operations that they add.
MAX_ADDED = 1.1
# The share of the fastest matrix product's rate that a training step must reach.
MIN_EFFICIENCY = 0.6


def spread(values):
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, low, high


def seconds(side):
    return f"{median(side['seconds']) * 1e3:,.0f} ms"


def peak(side):
    """The figure's peak memory in MiB, without the memory of the process before, which is mostly libraries."""
    return (max(side["peak_rss"]) - side["start_rss"][0]) / 2**20


def verdict(target, lower):
    if target is None:
        return "", ""
    return f"{target:g}", "met" if lower >= TOLERANCE * target else "not met"


def lines(results):
    """All tables, from `{row's key: {"ours": side, "pytorch": side}}`. A side has a list of values by name of measurement and,
    for rows with `has_error`, the `error`."""
    yield "| figure | shape | ours | PyTorch | times faster [quartiles] | target | | memory: ours | PyTorch | | pairs |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in ROWS:
        if key(row) not in results:
            continue
        ours, pytorch = results[key(row)]["ours"], results[key(row)]["pytorch"]
        ratio = [p / o for o, p in zip(ours["seconds"], pytorch["seconds"])]
        middle, low, high = spread(ratio)
        target, met = verdict(row.target, low)
        memory = [peak(ours), peak(pytorch)]
        smaller = "met" if memory[0] <= memory[1] else "not met"
        yield (
            f"| {row.name} | {row.shape} | {seconds(ours)} | {seconds(pytorch)} | {middle:.2f} [{low:.2f}, {high:.2f}] "
            f"| {target} | {met} | {memory[0]:,.0f} MiB | {memory[1]:,.0f} MiB | {smaller} | {len(ratio)} |"
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
    return f"{row.shape} {row.ours} {row.pytorch}"


def efficiency(results):
    """The rate of a training step as a share of the fastest matrix product's, measured right before it, with operations
    counted by `flops.rs`."""
    yield "| training step | shape | ours, GFLOP/s | PyTorch | our fastest matmul | ours / fastest [quartiles] | target | |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in ROWS:
        if not row.is_training_step or key(row) not in results:
            continue
        ours, pytorch, fastest = (results[key(row)][side] for side in ("ours", "pytorch", "fastest_matmul"))
        rates = [f / s for f, s in zip(ours["flops"], ours["seconds"])]
        best = [f / s for f, s in zip(fastest["flops"], fastest["seconds"])]
        theirs = median(f / s for f, s in zip(ours["flops"], pytorch["seconds"]))
        middle, low, high = spread([r / b for r, b in zip(rates, best)])
        target, met = verdict(MIN_EFFICIENCY, low)
        yield (
            f"| {row.name} | {row.shape} | {median(rates) / 1e9:.0f} | {theirs / 1e9:.0f} | {median(best) / 1e9:.0f} "
            f"| {middle:.2f} [{low:.2f}, {high:.2f}] | {target} | {met} |"
        )


def ensembles(results):
    """The time that five reward models add to a phase with one, beside the operations that they add."""
    yield "| five reward models instead of one | shape | operations add | ours adds | at most | | PyTorch adds |"
    yield "|---|---|---|---|---|---|---|"
    for trained, name in (("lora", "LoRA"), ("full", "all weights")):
        for shape in ("M", "G"):
            one, five = (results.get(f"{shape} phase_{trained}_{n} phase_{trained}_{n}") for n in (1, 5))
            if one is None or five is None:
                continue
            predicted = five["ours"]["flops"][0] / one["ours"]["flops"][0] - 1
            ours, theirs = (
                median(five[side]["seconds"]) / median(one[side]["seconds"]) - 1 for side in ("ours", "pytorch")
            )
            met = "met" if ours * TOLERANCE <= MAX_ADDED * predicted else "not met"
            yield (
                f"| {name} | {shape} | {predicted:+.0%} | {ours:+.0%} | {MAX_ADDED * predicted:+.0%} | {met} | {theirs:+.0%} |"
            )


def errors(results):
    """The error of log-probabilities in bf16, relative to the same side's in f32."""
    yield "| error of log-probabilities in bf16, nats | shape | ours: rms | largest | PyTorch: rms | largest |"
    yield "|---|---|---|---|---|---|"
    for row in ROWS:
        if row.has_error and key(row) in results:
            ours, pytorch = (results[key(row)][side]["error"] for side in ("ours", "pytorch"))
            found = " | ".join(f"{error[of]:.4f}" for error in (ours, pytorch) for of in ("rms", "largest"))
            yield f"| {row.name} | {row.shape} | {found} |"


def notes(results):
    """Token counts where sampled lengths differ, rows disturbed by other processes, and memory before the first figure."""
    for row in ROWS:
        sides = results.get(key(row))
        if sides is None:
            continue
        ours, pytorch = (sum(sides[side]["tokens"]) / len(sides[side]["tokens"]) for side in ("ours", "pytorch"))
        if ours != pytorch:
            yield f"{row.shape}, {row.name}: responses of {ours:,.0f} tokens in total (ours) and {pytorch:,.0f} (PyTorch)."
    busy = {row.shape + " " + row.name: results[key(row)]["others"] for row in ROWS if key(row) in results}
    for name, share in busy.items():
        if share > MAX_BUSY:
            yield f"{name}: **unreliable**, other processes used {share:.0%} of the processors."
    starts = [max(s[side]["start_rss"][0] for s in results.values()) / 2**20 for side in ("ours", "pytorch")]
    yield (
        f"Memory is the process's peak above its memory before the first figure: {starts[0]:,.0f} MiB ours, "
        f"{starts[1]:,.0f} MiB PyTorch."
    )

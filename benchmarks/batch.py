"""Many rows: bytes per second of 1 to 64 sequences side by side, of equal and of different lengths.

A step of many rows reads the weights once. Of each number of rows: bytes per second over one row's,
the time of a step over one row's, the rate of the products over that of one large float32 product
measured beside it, and ragged rows over equal ones. Then `generate_batch`: prompts and results of
any lengths in 64 rows, over sessions of 64 equal rows that take in and generate as many bytes.
Towards its end some rows have nothing left to do, in whatever order the prompts come. It is
therefore also compared with 64 equal rows that end one after the other, as its own do. The time for
prompts is included. All take turns in one process.

    python benchmarks/batch.py
    python benchmarks/batch.py --prompts 512 --weights float32
"""

import random
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import torch
from decode import BYTES, MODELS, build, clock
from side_by_side import at_least, new_figures, parser, positive, write_json

from mblm.inference.session import Session

ROWS = (1, 2, 4, 8, 16, 32, 64)
MOST = ROWS[-1]
CONTEXT = 64  # bytes fed before


def products(model: Any) -> float:
    """Products of weights and values that a byte of one row takes."""
    upper: Any = (model.stage_models[0], model.to_next_stage_proj[0], model.token_embs_rev[1]._post)
    local: Any = (model.stage_models[1], model.to_logits)

    def size(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters() if p.dim() == 2)

    return size(*local) + size(*upper) / model.seq_lens[-1]


def session(model: Any, weights: str, rows: int, ragged: bool) -> Session:
    """One that has taken in some bytes; ragged rows are at every phase of their patches."""
    made = Session(model, rows, weights=weights)
    ids = torch.randint(0, 256, (rows, CONTEXT + rows))
    ends = [CONTEXT + (row if ragged else 0) for row in range(rows)]
    return made.feed([row[:end] for row, end in zip(ids, ends, strict=True)])


def rate_of_product(size: int = 2048) -> float:
    """Products per second of one large float32 product of PyTorch."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    layer = torch.nn.Linear(size, size, bias=False)
    with torch.inference_mode():
        seconds = [min(clock(lambda: a @ b), clock(lambda: layer(a))) for _ in range(5)]
    return size**3 / median(seconds)


def measure(model: Any, weights: str, count: int, runs: int) -> dict[str, list[float]]:
    """Seconds of ``count`` bytes of each number of rows, and products per second, alternating."""
    kinds = [(rows, ragged) for rows in ROWS for ragged in (False, True) if rows > 1 or not ragged]
    sessions = {kind: session(model, weights, *kind) for kind in kinds}
    result: dict[str, list[float]] = {"rate": []}
    for turn in range(1 + runs):
        if turn:
            result["rate"].append(rate_of_product())
        for (rows, ragged), own in sessions.items():
            seconds = clock(lambda own=own: own.generate(count))
            if turn:
                name = f"{rows}{' ragged' if ragged else ''}"
                result.setdefault(name, []).append(seconds / count)
    return result


def measure_batch(
    model: Any, weights: str, prompts: int, runs: int, now: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of so many prompts by `generate_batch`, and by sessions of equal rows.

    Those of "equal" end all at once, the last of "ending" when the rows of `generate_batch` do.
    """
    numbers = random.Random(0)
    lengths = [numbers.randint(0, 200) for _ in range(prompts)]
    counts = [numbers.randint(16, 112) for _ in range(prompts)]
    texts = [numbers.randbytes(length) for length in lengths]
    equal = [numbers.randbytes(round(mean(lengths))) for _ in range(MOST)]
    sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}

    def batch() -> None:
        options = {"max_rows": MOST, "weights": weights, "enable_progress": False}
        model.generate_batch(texts, max_bytes=counts, seeds=0, **options, **sampling)

    rounds, count = prompts // MOST, round(mean(counts))
    # What each row generates when a prompt goes to the row that comes free first.
    ends = [0] * MOST
    for own in counts:
        ends[ends.index(min(ends))] += own

    def feed() -> Session:
        return Session(model, MOST, weights=weights).feed(equal)

    def all_at_once() -> None:
        for _ in range(rounds):
            feed().generate(count, **sampling)

    def one_by_one() -> None:
        for _ in range(rounds - 1):
            feed()
        feed().generate(ends, **sampling)

    # "equal" generates a few bytes more or less than the others, since the mean is rounded.
    same = sum(counts) / (rounds * MOST * count)
    kinds = {"equal": (all_at_once, same), "ending": (one_by_one, 1.0), "batch": (batch, 1.0)}
    result: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(1 + runs):
        for name, (work, scale) in kinds.items():
            begin = now()
            work()
            if turn:
                result[name].append((now() - begin) * scale)
    return result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bytes", type=positive, default=80, help="of a run, ten patches")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[:1])
    options.add_argument("--weights", nargs="+", choices=BYTES, default=list(BYTES))
    options.add_argument(
        "--prompts", type=at_least(0), default=4 * MOST, help="of generate_batch; 0 leaves it out"
    )
    options.add_argument(
        "--cpu-time", action="store_true", help="of generate_batch, where others use the machine"
    )
    arguments = options.parse_args()
    if 0 < arguments.prompts < MOST:
        options.error(f"argument --prompts: expected 0, or a number >= {MOST}, the rows")
    figures = new_figures(arguments)
    for name in arguments.models:
        model = build(*MODELS[name])
        for weights in arguments.weights:
            print(f"{name}, {weights}")
            print("  rows   bytes/s  over one  step over one  of a product  ragged")
            result = measure(model, weights, arguments.bytes, arguments.runs)
            one, rate = median(result["1"]), median(result["rate"])
            for rows in ROWS:
                step = median(result[str(rows)])
                ragged = step / median(result[f"{rows} ragged"]) if rows > 1 else 1.0
                of_product = rows * products(model) / step / rate
                print(
                    f"  {rows:>4}  {rows / step:8.1f}  {rows * one / step:8.2f}  {step / one:13.2f}"
                    f"  {of_product:12.2f}  {ragged:6.2f}",
                    flush=True,
                )
            figures[f"{name}, {weights}"] = result
            if not arguments.prompts:
                continue
            now = time.process_time if arguments.cpu_time else time.perf_counter
            batch = measure_batch(model, weights, arguments.prompts, arguments.runs, now)
            for kind, words in (("equal", "equal rows"), ("ending", "those that end as it does")):
                ratios = [f / b for f, b in zip(batch[kind], batch["batch"], strict=True)]
                print(f"  generate_batch over {words}: {median(ratios):.2f}")
            figures[f"generate_batch, {name}, {weights}"] = batch
        del model
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

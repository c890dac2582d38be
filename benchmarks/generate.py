"""Generation speed at growing contexts, this package and the reference side by side.

The quickstart model: two stages of 5 layers, width 1024, seq_lens [1024, 8], once
Transformer over Transformer and once Mamba-1 over Transformer; random weights, float32, CPU.
A byte's time is the interval between two writes to the stream, so that the prompt's is not in it.

    python benchmarks/generate.py
"""

import json
import sys
import time
from statistics import median
from typing import Any

from side_by_side import machine_line, parser, reference_python, run_worker, spread, write_json

CONTEXTS = (64, 512, 2048, 8184)
BYTES = 64  # that this package generates per run; whole patches, so that upper stages count
MODELS = {"transformer": "Transformer/Transformer", "mamba1": "Mamba-1/Transformer"}


def build(kind: str) -> Any:
    """The quickstart model with a stage 1 of this kind."""
    import torch

    from mblm import MBLM, MambaBlock, MBLMModelConfig, TransformerBlock

    def transformer() -> TransformerBlock:
        return TransformerBlock(
            attn_head_dims=64,
            attn_num_heads=16,
            attn_use_rot_embs=True,
            use_flash_attn=True,
            pos_emb_type="fixed",
        )

    first = transformer()
    if kind == "mamba1":
        first = MambaBlock(
            d_state=128, d_conv=4, expand=2, headdim=64, pos_emb_type=None, block_type="mamba1"
        )
    torch.manual_seed(0)
    return MBLM(
        MBLMModelConfig(
            num_tokens=257,
            pad_token_id=256,
            hidden_dims=[1024, 1024],
            num_layers=[5, 5],
            seq_lens=[1024, 8],
            train_checkpoint_chunks=None,
            block=[first, transformer()],
        )
    ).eval()


class Clock:
    """Stands in for a ByteStreamer and notes when each byte comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def write(self, byte: int) -> None:
        self.times.append(time.perf_counter())

    def flush(self) -> None:
        pass


def work(job: dict[str, Any]) -> list[float]:
    """Seconds per byte of each run, after ``context`` bytes."""
    import torch

    torch.set_num_threads(job["threads"])
    model = build(job["kind"])
    prompt = torch.randint(0, 256, (job["context"],))
    seconds = []
    for _ in range(job["runs"]):
        clock = Clock()
        model.generate(prompt, stream=clock, num_tokens_to_generate=1 + job["bytes"])
        seconds.append((clock.times[-1] - clock.times[0]) / job["bytes"])
    return seconds


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = options.parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    python = reference_python(arguments.reference)
    figures: dict[str, Any] = {"machine": machine_line(arguments.threads), "seconds_per_byte": {}}
    print(figures["machine"])
    for kind in arguments.models:
        print(f"\n{MODELS[kind]}: bytes/s, median (range); speed relative to the first context")
        print(f"{'context':>8}  {'mblm':>28}  {'reference':>32}  {'ratio':>7}  {'relative':>8}")
        first = None
        for context in arguments.contexts:
            job = {"kind": kind, "threads": arguments.threads, "runs": arguments.runs}
            # Ours are the BYTES that lead up to the context, within the model's limit.
            ours = run_worker(
                sys.executable,
                __file__,
                {**job, "context": max(1, min(context, 8192 - BYTES - 1)), "bytes": BYTES},
            )
            # The reference's bytes all cost the same; at long contexts one takes minutes.
            runs = arguments.runs if context <= 512 else 1
            theirs = run_worker(
                python, __file__, {**job, "context": context, "bytes": 2, "runs": runs}
            )
            ratio = median(theirs) / median(ours)
            first = first or median(ours)
            print(
                f"{context:>8}  {spread([1 / s for s in ours]):>28}  "
                f"{spread([1 / s for s in theirs]):>32}  {ratio:>6.0f}x  "
                f"{first / median(ours):>8.2f}",
                flush=True,
            )
            figures["seconds_per_byte"][f"{kind} {context}"] = {"ours": ours, "reference": theirs}
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

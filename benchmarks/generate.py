"""Generation speed at growing contexts, this package and the reference side by side.

The quickstart model: two stages of 5 layers, width 1024, seq_lens [1024, 8], once
Transformer over Transformer and once Mamba-1 over Transformer; random weights, float32, CPU.
A byte's time is the interval between two writes to the stream, so that the prompt's is not in it.
The floor is the time to read the weights that a byte needs, at the bandwidth measured beside it.

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


def floor(model: Any) -> float:
    """Seconds that reading the weights of one byte takes, caches left out.

    Those of the local stage and the logits for every byte, those of stage 1, its embedding and
    its projected context once per patch. The bandwidth is that of a sum over as many values.
    """
    import torch

    upper = (model.stage_models[0], model.to_next_stage_proj[0], model.token_embs_rev[1]._post)
    local = (model.stage_models[1], model.to_logits)
    per_patch = sum(p.numel() for module in upper for p in module.parameters())
    per_byte = sum(p.numel() for module in local for p in module.parameters())
    buffer = torch.ones(per_byte + per_patch // model.seq_lens[1])
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds per byte of each run after ``context`` bytes, and the floor where asked for."""
    import torch

    torch.set_num_threads(job["threads"])
    model = build(job["kind"])
    prompt = torch.randint(0, 256, (job["context"],))
    seconds = []
    for _ in range(job["runs"]):
        clock = Clock()
        model.generate(prompt, stream=clock, num_tokens_to_generate=1 + job["bytes"])
        seconds.append((clock.times[-1] - clock.times[0]) / job["bytes"])
    return {"seconds": seconds, "floor": floor(model) if job["floor"] else None}


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
        print(
            f"{'context':>8}  {'mblm':>28}  {'reference':>32}  {'ratio':>7}  {'relative':>8}"
            f"  {'of floor':>8}"
        )
        first = None
        for context in arguments.contexts:
            job = {"kind": kind, "threads": arguments.threads, "runs": arguments.runs}
            length = max(1, min(context, 8192 - BYTES - 1))
            # Ours are the BYTES that lead up to the context, within the model's limit.
            here = run_worker(
                sys.executable,
                __file__,
                {**job, "context": length, "bytes": BYTES, "floor": True},
            )
            # The reference spends seconds to minutes on every byte of a long context.
            runs = arguments.runs if context <= 2048 and kind == "transformer" else 1
            there = run_worker(
                python,
                __file__,
                {**job, "context": context, "bytes": 2, "runs": runs, "floor": False},
            )
            ours, theirs = here["seconds"], there["seconds"]
            ratio = median(theirs) / median(ours)
            first = first or median(ours)
            print(
                f"{context:>8}  {spread([1 / s for s in ours]):>28}  "
                f"{spread([1 / s for s in theirs]):>32}  {ratio:>6.0f}x  "
                f"{first / median(ours):>8.2f}  {here['floor'] / median(ours):>8.2f}",
                flush=True,
            )
            figures["seconds_per_byte"][f"{kind} {context}"] = {
                "ours": ours,
                "reference": theirs,
                "floor": here["floor"],
            }
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

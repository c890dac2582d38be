"""One training step, this package and the reference side by side: time and peak memory.

Two Transformer stages of 4 layers, width 512, seq_lens [1024, 8], 8,192 bytes, CPU, float32:
forward, backward and Adam's update. Peak memory is the process's largest resident set, less what
it was after the imports, so it holds weights, gradients, Adam's moments and activations.

    python benchmarks/train_step.py
"""

import json
import resource
import sys
import time
from statistics import median
from typing import Any

from side_by_side import machine_line, parser, reference_python, run_worker, spread, write_json


def build() -> Any:
    import torch

    from mblm import MBLM, MBLMModelConfig, TransformerBlock

    torch.manual_seed(0)
    return MBLM(
        MBLMModelConfig(
            num_tokens=257,
            pad_token_id=256,
            hidden_dims=[512, 512],
            num_layers=[4, 4],
            seq_lens=[1024, 8],
            train_checkpoint_chunks=None,
            block=[
                TransformerBlock(
                    attn_head_dims=64,
                    attn_num_heads=8,
                    attn_use_rot_embs=True,
                    pos_emb_type="fixed",
                )
                for _ in range(2)
            ],
        )
    ).train()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step and peak memory in MB, after a step that is not counted."""
    import torch

    import mblm  # noqa: F401

    torch.set_num_threads(job["threads"])
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    ids = torch.randint(0, 256, (1, 8192))
    seconds, losses = [], []
    for _ in range(1 + job["runs"]):
        begin = time.perf_counter()
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(loss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds[1:], "peak_mb": peak - imported, "total_mb": peak, "losses": losses}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    job = {"threads": arguments.threads, "runs": arguments.runs}
    figures: dict[str, Any] = {"machine": machine_line(arguments.threads)}
    print(figures["machine"])
    figures["ours"] = ours = run_worker(sys.executable, __file__, job)
    theirs = run_worker(reference_python(arguments.reference), __file__, job)
    figures["reference"] = theirs
    for name, side in (("mblm", ours), ("reference", theirs)):
        print(
            f"{name:>10}: {spread(side['seconds'])} s a step, {side['peak_mb']:.0f} MB above the "
            f"imports ({side['total_mb']:.0f} MB in all), loss {side['losses'][-1]:.6f}"
        )
    print(
        f"mblm takes 1/{median(theirs['seconds']) / median(ours['seconds']):.2f} of the time, "
        f"{ours['peak_mb'] / theirs['peak_mb']:.2f} of the memory "
        f"({ours['total_mb'] / theirs['total_mb']:.2f} with the imports)"
    )
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

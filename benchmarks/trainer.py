"""What the trainer adds to a step, and its steps a second beside the reference's trainer.

A small model, so that the overhead shows: two Transformer stages of 2 layers, widths 256 and 128,
seq_lens [16, 32], two sequences of 512 random bytes a step, CPU, no validation but the first and
the last. The bare loop is the same model on the same data: forward, backward, clipping, Adam. Both
run in one process, in turns; a step is the time between two forward passes, medians are compared.
A shared machine moves such steps by more than the trainer adds. So the same is measured with a
model of width 16, whose steps are so short that what is added shows as milliseconds.
The reference's trainer computes under autocast to half precision on a CPU too, where that is slow:
its bare loop shows what its model takes in float32.

    python benchmarks/trainer.py
"""

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

from side_by_side import new_figures, reference_python, run_worker, side_by_side, spread, write_json

SEQ_LEN = 512
BATCH_SIZE = 2


def experiment(folder: str, steps: int, is_tiny: bool = False) -> Any:
    """The configuration, of fields that both packages know."""
    from mblm import TransformerBlock
    from mblm.train.core.config import CoreTrainConfig
    from mblm.train.mblm import TrainEntryConfig, TrainMBLMIoConfig, TrainMBLMParams

    return TrainEntryConfig(
        params=TrainMBLMParams(
            input_seq_len=SEQ_LEN,
            num_tokens=257,
            pad_token_id=256,
            hidden_dims=[16, 16] if is_tiny else [256, 128],
            num_layers=[1, 1] if is_tiny else [2, 2],
            seq_lens=[16, 32],
            train_checkpoint_chunks=None,
            block=[
                TransformerBlock(
                    attn_head_dims=4 if is_tiny else 64,
                    attn_num_heads=4,
                    attn_use_rot_embs=True,
                    pos_emb_type="fixed",
                )
                for _ in range(2)
            ],
        ),
        train=CoreTrainConfig(
            target_elements=steps * BATCH_SIZE * SEQ_LEN,
            target_elements_strategy="sequence",
            batch_size=BATCH_SIZE,
            learning_rate=1e-3,
            gradient_clipping=1.0,
            gradient_accumulate_every=1,
        ),
        io=TrainMBLMIoConfig(
            name_model="benchmark",
            output_dir=folder,
            num_models_to_save=1,
            validate_amount=2,
            log_train_loss_amount=10,
            dataset_dir="",
            dataset_id="random",
        ),
    )


def random_bytes(sequences: int) -> Any:
    """A dataset of both packages' kind, in memory."""
    import torch

    from mblm.data.datasets import DistributedDataset

    class RandomBytes(DistributedDataset):
        def __init__(self) -> None:
            self.ids = torch.randint(0, 256, (sequences * SEQ_LEN,))
            super().__init__(
                data_size=len(self.ids),
                is_sequential=True,
                seq_len=SEQ_LEN,
                worker_id=0,
                num_workers=1,
            )

        def get_sample(self, from_idx: int) -> Any:
            ids = self.ids[from_idx : from_idx + self.seq_len]
            return ids, torch.ones_like(ids, dtype=torch.float16)

    return RandomBytes()


def time_trainer(steps: int, is_tiny: bool, run_vars: Any) -> list[float]:
    """Seconds between the forward passes of a training run."""
    from mblm.train.mblm import MegabyteTrainer

    begins: list[float] = []

    class Timed(MegabyteTrainer):
        def model_forward(self, model: Any, batch: Any, device: Any) -> Any:
            if model.training:
                begins.append(time.perf_counter())
            return super().model_forward(model, batch, device)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(experiment(folder, steps, is_tiny), run_vars=run_vars)
        trainer.train(random_bytes(steps * BATCH_SIZE + BATCH_SIZE), random_bytes(BATCH_SIZE))
    return differences(begins)


def time_bare_loop(steps: int, is_tiny: bool, _: Any) -> list[float]:
    """The same of a loop that does nothing but train."""
    import torch
    from torch.utils.data import DataLoader

    from mblm import MBLM, MBLMModelConfig

    params = experiment("", steps, is_tiny).params.model_dump()
    params.pop("input_seq_len")
    model = MBLM(MBLMModelConfig.model_validate(params)).train()
    # Fused, as in this package's trainer: what it adds is not to be hidden by a faster optimizer.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    begins = []
    for ids, mask in DataLoader(random_bytes(steps * BATCH_SIZE), batch_size=BATCH_SIZE):
        begins.append(time.perf_counter())
        loss = model(ids, loss_mask=mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return differences(begins)


def differences(begins: list[float]) -> list[float]:
    """Steps' durations, the first few, which allocate, left out."""
    return [later - earlier for earlier, later in pairwise(begins)][5:]


def work(job: dict[str, Any]) -> dict[str, list[float]]:
    """Median seconds of a step, per run, of the trainer and of the bare loop."""
    import torch

    from mblm.utils.distributed import process_group

    torch.set_num_threads(job["threads"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    single = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(single, MASTER_ADDR="localhost", MASTER_PORT=port)
    measured: dict[str, list[float]] = {"trainer": [], "bare loop": []}
    ways: dict[str, Callable[[int, bool, Any], list[float]]] = {
        "trainer": time_trainer,
        "bare loop": time_bare_loop,
    }
    with process_group(backend="gloo") as run_vars:
        for _ in range(job["runs"]):
            for name, way in ways.items():
                measured[name].append(median(way(job["steps"], job["is_tiny"], run_vars)))
    return measured


def main() -> None:
    options = side_by_side(__doc__)
    options.add_argument("--steps", type=int, default=60, help="training steps of each run")
    arguments = options.parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    job = {
        "threads": arguments.threads,
        "runs": arguments.runs,
        "steps": arguments.steps,
        "is_tiny": False,
    }
    figures = new_figures(arguments)
    figures["ours"] = ours = run_worker(sys.executable, __file__, job)
    tiny_job = {**job, "is_tiny": True, "steps": 4 * arguments.steps}
    figures["tiny"] = tiny = run_worker(sys.executable, __file__, tiny_job)
    added = median(a - b for a, b in zip(tiny["trainer"], tiny["bare loop"], strict=True))
    print(
        f"the trainer adds {added * 1e3:.2f} ms to a step of the tiny model's "
        f"{median(tiny['bare loop']) * 1e3:.2f} ms, which is "
        f"{added / median(ours['bare loop']):.1%} of a step of the small one",
        flush=True,
    )
    theirs = run_worker(reference_python(arguments.reference), __file__, job)
    figures["reference"] = theirs
    for name, side in (("mblm", ours), ("reference", theirs)):
        for way, seconds in side.items():
            print(f"{name:>10}, {way:9}: {spread(seconds)} s a step")
    overhead = median(ours["trainer"]) / median(ours["bare loop"]) - 1
    print(
        f"the trainer adds {overhead:.1%} to a step of the bare loop; it makes "
        f"{median(theirs['trainer']) / median(ours['trainer']):.2f} steps while the reference's "
        "makes one"
    )
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

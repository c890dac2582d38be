"""Tiles on several workers: the gradients of a plain pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mblm import MBLM
from mblm.train.core.parallel import ParallelModel, Workers
from mblm.utils.distributed import process_group
from tests.models import mamba, model, transformer
from tests.train.core import jobs

LENGTH = 50


def build(**fields: Any) -> MBLM:
    torch.manual_seed(0)
    blocks = mamba("mamba2"), transformer(), transformer()
    m = model(*blocks, seq_lens=[5, 3, 4]).train()
    m.config = m.config.model_copy(update=fields)
    return m


def ids_of(worker: int, step: int = 0) -> Tensor:
    return torch.randint(0, 18, (2, LENGTH), generator=torch.Generator().manual_seed(worker + step))


def assert_gradients(m: nn.Module, expected: dict[str, Tensor | None]) -> None:
    for name, p in m.named_parameters():
        gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        if expected[name] is not None:
            torch.testing.assert_close(
                gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
            )


def train_in_tiles(strategy: str) -> None:
    """Two steps of two accumulated passes; the mean over the workers is what one would compute."""
    with process_group(backend="gloo") as run_vars:
        workers = Workers(run_vars)
        plain = build()
        m = build(tile=4, checkpoint_global=True)
        how = jobs.config(Path(), strategy=strategy).train
        parallel = ParallelModel(m, workers, how, m.stage_models)
        for step in range(2):
            plain.zero_grad()
            m.zero_grad()
            for part in range(2):
                with parallel.accumulate(is_last=part == 1):
                    parallel.call(ids_of(workers.rank, 10 * step + 100 * part)).backward()
                for worker in range(workers.world_size):
                    loss = plain(ids_of(worker, 10 * step + 100 * part))
                    (loss / workers.world_size).backward()
            assert_gradients(parallel.base, {n: p.grad for n, p in plain.named_parameters()})


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers(strategy: str) -> None:
    assert jobs.join(jobs.start(train_in_tiles, 2, strategy)) == [0, 0]

"""Join the process group of a program started with torchrun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed
from pydantic import BaseModel

# What torchrun sets and the process group needs.
_TORCHRUN_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ElasticRunVars(BaseModel):
    """This process among those torchrun started: its index on the machine and their number."""

    local_rank: int
    world_size: int
    is_cuda: bool


@contextmanager
def process_group(*, backend: Literal["gloo", "nccl"] | None = None) -> Iterator[ElasticRunVars]:
    """Join the default process group for the length of the block.

        with process_group() as run_vars:
            print(run_vars.local_rank, run_vars.world_size)

    Args:
        backend: ``"nccl"`` for CUDA devices, one per process, which becomes the current device,
            or ``"gloo"``. By default nccl where CUDA is available.

    Raises:
        ValueError: A variable that torchrun sets is missing or no integer, or nccl is asked for
            without CUDA.
    """
    if backend is None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    is_cuda = backend == "nccl"
    if is_cuda and not torch.cuda.is_available():
        raise ValueError("backend 'nccl' needs CUDA, which torch does not find; use 'gloo'")

    missing = [name for name in _TORCHRUN_VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"environment variables not set: {', '.join(missing)}; start the program with "
            "`torchrun --standalone --nproc-per-node=1 program.py`"
        )
    run_vars = ElasticRunVars.model_validate(
        {
            "local_rank": os.environ["LOCAL_RANK"],
            "world_size": os.environ["WORLD_SIZE"],
            "is_cuda": is_cuda,
        }
    )
    if is_cuda:
        torch.cuda.set_device(run_vars.local_rank)
    torch.distributed.init_process_group(backend=backend)
    try:
        yield run_vars
    finally:
        torch.distributed.destroy_process_group()

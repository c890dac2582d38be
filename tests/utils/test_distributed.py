"""process_group: two processes that sum over gloo, and what it says when torchrun is missing."""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from mblm.utils.distributed import ElasticRunVars, process_group


@pytest.fixture
def torchrun(monkeypatch):
    """The environment that torchrun gives a single process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "LOCAL_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


def sum_ranks(rank, variables, folder):
    os.environ |= {**variables, "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    with process_group(backend="gloo") as run_vars:
        assert run_vars == ElasticRunVars(local_rank=rank, world_size=2, is_cuda=False, rank=rank)
        total = torch.tensor(run_vars.local_rank + 1)
        torch.distributed.all_reduce(total)
    assert not torch.distributed.is_initialized()
    (folder / f"rank {rank}").write_text(str(total.item()))


def test_processes_find_each_other(torchrun, tmp_path):
    torch.multiprocessing.start_processes(
        sum_ranks, args=(torchrun, tmp_path), nprocs=2, start_method="forkserver"
    )
    assert [(tmp_path / f"rank {rank}").read_text() for rank in range(2)] == ["3", "3"]


def test_the_group_is_left_after_an_error(torchrun):
    with pytest.raises(KeyError), process_group(backend="gloo"):
        assert torch.distributed.get_world_size() == 1
        raise KeyError
    assert not torch.distributed.is_initialized()


def test_without_torchrun_the_process_is_a_group_of_its_own(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_group(backend="gloo") as run_vars:
        assert run_vars == ElasticRunVars(local_rank=0, world_size=1, is_cuda=False, rank=0)
        torch.distributed.all_reduce(total := torch.tensor(3))
    assert total.item() == 3
    assert not torch.distributed.is_initialized()


def test_waits_no_longer_than_asked(torchrun, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # the other never comes
    with (
        pytest.raises(torch.distributed.DistError),
        process_group(backend="gloo", timeout=timedelta(seconds=0.1)),
    ):
        pytest.fail("joined")


def test_missing_variables_are_named(torchrun, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("WORLD_SIZE", "")
    message = r"not set: LOCAL_RANK, WORLD_SIZE; .*torchrun"
    with pytest.raises(ValueError, match=message), process_group(backend="gloo"):
        pytest.fail("joined")


def test_a_variable_that_is_no_number_is_named(torchrun, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ValueError, match="local_rank"), process_group(backend="gloo"):
        pytest.fail("joined")
    assert not torch.distributed.is_initialized()


def test_nccl_needs_cuda(torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'nccl' needs CUDA"), process_group(backend="nccl"):
        pytest.fail("joined")

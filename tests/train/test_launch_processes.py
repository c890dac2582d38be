"""Train in several processes, on several nodes, by every command there is; stop and go on."""

import itertools
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mblm.train.core.interrupt import EXIT_INTERRUPTED
from mblm.train.launch import launch
from mblm.train.mblm import MegabyteTrainer
from mblm.train.plot import read_curves
from tests.cli.program import Run
from tests.train.core.jobs import same
from tests.train.experiments import ENVIRONMENT, ROOT, run_of, start, summary_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def mblm_train(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mblm", "train", *map(str, arguments)]


def test_every_worker_imports_a_users_module(experiment: Path) -> None:
    """Registered there: a block, and a dataset, which the workers look up by name."""
    (experiment.parent / "my_parts_for_a_test.py").write_text(
        "from typing import Literal\n"
        "from mblm import TransformerBlock\n"
        "from mblm.data.dataset.byte_files import ByteFiles\n"
        "from mblm.model.config import block_registry\n"
        "from mblm.train.mblm import dataset_registry\n"
        "@block_registry.register()\n"
        "class MyBlock(TransformerBlock):\n"
        "    block_type: Literal['mine'] = 'mine'\n"
        "@dataset_registry.register('my-bytes')\n"
        "class MyBytes(ByteFiles): pass\n"
    )
    settings = ["--set", "io.dataset_id=my-bytes", "--set", "params.block.block_type=mine"]
    command = mblm_train(experiment, "--nproc", 2, *settings, "--import", "my_parts_for_a_test")
    done = start(*command, PYTHONPATH=f"{ROOT}:{experiment.parent}")
    assert done.returncode == 0, done.stderr
    assert "my-bytes" in (run_of(experiment.parent) / "config.yaml").read_text()
    assert summary_of(run_of(experiment.parent))["num_workers"] == 2


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.mark.slow
def test_torchrun_starts_the_workers_too(experiment: Path) -> None:
    settings = ["--set", "train.gradient_clipping=0.5", "--set", "train.seed="]
    done = start(*TORCHRUN, "-m", "mblm", "train", experiment, *settings)
    assert done.returncode == 0, done.stderr
    folder = run_of(experiment.parent)
    assert summary_of(folder)["num_workers"] == 2
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["train"]["gradient_clipping"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("numbered", [True, False])
def test_two_nodes_that_meet(experiment: Path, numbered: bool) -> None:
    meet = ["--nnodes", 2, "--rdzv-endpoint", f"localhost:{free_port()}"]
    arguments = ["--nproc", 1, "--set", "train.seed=", *meet]
    nodes = [
        subprocess.Popen(
            mblm_train(experiment, *arguments, *(["--node-rank", rank] if numbered else [])),
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert summary_of(run_of(experiment.parent))["num_workers"] == 2


@pytest.mark.slow
def test_a_failure_of_workers_has_their_message_and_status(experiment: Path) -> None:
    absent = experiment.parent / "absent"
    done = start(*mblm_train(experiment, "--nproc", 2, "--set", f"io.dataset_dir={absent}"))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert any(line.startswith("mblm: error: ") and str(absent) in line for line in lines), lines
    # They may lose one another before they come to their own error.
    assert lines[-1].startswith("mblm: error: rank ")


# -- Stop and resume -------------------------------------------------------------------------------


def stop_here(run: Run, patch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Train in this process, which gets a signal in its 40th step: exit status and what is said."""
    forward, calls = MegabyteTrainer.model_forward, itertools.count(1)

    def forward_and_stop(*args: Any) -> torch.Tensor:
        if next(calls) == 40:
            signal.raise_signal(signal.SIGTERM)
        return forward(*args)

    with patch.context() as now:
        now.setattr(MegabyteTrainer, "model_forward", forward_and_stop)
        done = run("train", *arguments)
    return done.status, done.err


def stop_elsewhere(experiment: Path, *arguments: object) -> tuple[int, str]:
    """The same in a process of its own, which passes a signal on to its workers."""
    stopped = subprocess.Popen(
        mblm_train(*arguments), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while time.monotonic() < until:
        logs = list((experiment.parent / "out").glob("tiny_*/loss.csv"))
        if logs and logs[0].read_text().count("\n") > 5:
            break
        time.sleep(0.01)
    stopped.send_signal(signal.SIGUSR1)
    said = stopped.communicate(timeout=120)[1]
    return stopped.returncode, said


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been(
    experiment: Path, run: Run, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    # 60 steps, or what lasts until another process is told to stop.
    length = f"train.target_elements={1920 if processes == 1 else 6400}"
    output = f"io.output_dir={experiment.parent / 'whole'}"
    launch(experiment, settings=[length, output], nproc=processes)
    (whole,) = (experiment.parent / "whole").glob("tiny_*")

    arguments = [experiment, "--nproc", processes, "--set", length]
    if processes == 1:
        status, said = stop_here(run, monkeypatch, *arguments)
    else:
        status, said = stop_elsewhere(experiment, *arguments)
    assert "--resume latest" in said and "Traceback" not in said
    assert status == EXIT_INTERRUPTED
    interrupted = run_of(experiment.parent)
    assert len(read_curves(interrupted).train) < len(read_curves(whole).train)

    launch(experiment, settings=[length], resume="latest", nproc=processes)
    assert run_of(experiment.parent) == interrupted
    assert read_curves(interrupted).train == read_curves(whole).train
    assert same(*(torch.load(of / "tiny_top1.pth") for of in (interrupted, whole)))


# -- The guide -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_guides_dataset_in_two_processes(tmp_path: Path) -> None:
    """In one it is run with all that the documents show, in tests/test_readme.py."""
    guide = (ROOT / "docs" / "guide-train.md").read_text()
    (program,) = [
        code
        for code in re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
        if 'register("mydataset")' in code
    ]
    (tmp_path / "train_my_mblm.py").write_text(program)
    done = start(*TORCHRUN, "train_my_mblm.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "data" / "output").glob("my-model_*")
    curves = read_curves(folder)
    assert summary_of(folder)["num_workers"] == 2
    assert curves.valid[-1][1] < curves.valid[0][1]

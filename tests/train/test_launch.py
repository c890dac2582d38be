"""Start training: in one process, in several, on several nodes, by every command there is."""

import gzip
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.elastic.multiprocessing import SignalException

from mblm.train.core.interrupt import TrainingInterrupted
from mblm.train.experiment import load_experiment, train_experiment
from mblm.train.launch import launch
from mblm.train.mblm import MegabyteTrainer
from mblm.train.plot import read_curves
from tests.cli.program import Run

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
INTERRUPTED = 75
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.endswith("JOB_ID")},
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
    "PYTHON": sys.executable,
}
BLOCK = {
    "attn_head_dims": 8,
    "attn_num_heads": 2,
    "attn_use_rot_embs": True,
    "pos_emb_type": "fixed",
}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A tiny experiment on a file of text: 24 batches of 2 sequences of 16 bytes."""
    (tmp_path / "text").write_bytes(b"The cat sat on the mat.\n" * 100)
    config = {
        "params": {
            "input_seq_len": 16,
            "num_tokens": 257,
            "pad_token_id": 256,
            "hidden_dims": [16, 16],
            "num_layers": [1, 1],
            "seq_lens": [4, 4],
            "train_checkpoint_chunks": None,
            "block": BLOCK,
        },
        "train": {
            "target_elements": 24 * 2 * 16,
            "target_elements_strategy": "sequence",
            "batch_size": 2,
            "shuffle_train": True,
            "learning_rate": 0.01,
            "gradient_accumulate_every": 1,
            "max_eval_steps": 2,
            "seed": 0,
        },
        "io": {
            "name_model": "tiny",
            "output_dir": str(tmp_path / "out"),
            "dataset_dir": str(tmp_path / "text"),
            "dataset_id": "bytes",
            "num_models_to_save": 1,
            "validate_amount": 2,
            "log_train_loss_amount": 24,
        },
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def the_run(experiment: Path) -> Path:
    """The folder of the only run."""
    (run,) = (experiment.parent / "out").glob("tiny_*")
    return run


def summary(run: Path) -> dict[str, object]:
    said: dict[str, object] = yaml.safe_load((run / "config.yaml").read_text())["summary"]
    return said


def start(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        env=ENVIRONMENT | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def mblm_train(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mblm", "train", *map(str, arguments)]


# -- One process -----------------------------------------------------------------------------------


def test_trains_in_this_process(experiment: Path) -> None:
    launch(experiment, settings=["train.batch_size=4"], nproc=1)
    folder = the_run(experiment)
    assert summary(folder)["num_workers"] == 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["batch_size"] == 4
    assert len(read_curves(folder).train) == 12
    assert (folder / "tiny_top1.pth").is_file()


def test_says_what_it_does_and_what_came_out(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(experiment, nproc=1)
    lines = capsys.readouterr().err.splitlines()
    folder = the_run(experiment)
    assert lines[0].startswith("Model: ") and "stage 2" in lines[0]
    assert lines[1] == "Data: text, 2,400 bytes; 2,160 bytes to train on, 120 to validate"
    assert lines[2] == f"Plan: 24 steps of 32 bytes, 2 validations; writes to {folder}"
    assert lines[3].startswith("  4% ") and lines[3].endswith(" bits per byte")
    assert lines[4].startswith("100% ")
    best = min(bits for _, bits in read_curves(folder).valid)
    assert lines[5].startswith(f"Best validation: {best:.3f} bits per byte; test: ")
    assert lines[5].endswith(f"; the run is in {folder}")
    assert lines[6] == f"Next: mblm generate {folder} --prompt 'The '"
    assert len(lines) == 7


def test_the_script_passes_all_on_and_every_worker_imports_a_users_module(experiment: Path) -> None:
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
    command = ["bash", "scripts/train_mblm.sh", "-c", experiment, "--nproc", 2, *settings]
    done = start(
        *command, "--import", "my_parts_for_a_test", PYTHONPATH=f"{ROOT}:{experiment.parent}"
    )
    assert done.returncode == 0, done.stderr
    assert "my-bytes" in (the_run(experiment) / "config.yaml").read_text()
    assert summary(the_run(experiment))["num_workers"] == 2


def test_profiles_some_steps(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(experiment, nproc=1, profile=3)
    profile = the_run(experiment) / "profile"
    assert f"Profiled 3 steps: {profile}/trace.json.gz for" in capsys.readouterr().err
    trace = json.loads(gzip.decompress((profile / "trace.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#") for name in names) == 3
    assert "aten::" in (profile / "operators.txt").read_text()


def test_a_profile_longer_than_the_run_is_refused_before_it_trains(experiment: Path) -> None:
    with pytest.raises(ValueError, match=r"profile: expected at most 22 steps, .* got 23"):
        launch(experiment, nproc=1, profile=23)
    assert not list((experiment.parent / "out").glob("tiny_*"))


def test_what_watches_a_run_does_not_change_it(experiment: Path) -> None:
    pytest.importorskip("tensorboard")
    plain, watched = (
        [f"io.output_dir={experiment.parent / name}"] for name in ("plain", "watched")
    )
    launch(experiment, settings=plain, nproc=1)
    watched += ["io.loggers=[tensorboard]", "io.sample_amount=2", 'io.sample_prompts=["The ", ""]']
    launch(experiment, settings=watched, nproc=1, profile=1)
    runs = [next((experiment.parent / name).glob("tiny_*")) for name in ("plain", "watched")]
    assert losses_of(runs[0]) == losses_of(runs[1])
    weights = [torch.load(run / "tiny_top1.pth", weights_only=True)["MODEL"] for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    first, last = sorted((runs[1] / "samples").iterdir())
    assert last.read_bytes().startswith(b"The ") and first.read_bytes() != last.read_bytes()


def test_refuses_before_anything_is_written(experiment: Path) -> None:
    for arguments, message in (
        ({"settings": ["train.colour=1"]}, "train.colour"),
        ({"settings": ["train.colour=1"], "nproc": 2}, "train.colour"),
        ({"resume": "latest"}, "no run"),
        ({"nproc": 0}, "nproc and nnodes must be at least 1"),
        ({"nnodes": 2}, "rdzv_endpoint"),
        ({"nnodes": 2, "node_rank": 2, "rdzv_endpoint": "a:1"}, "node_rank: expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            launch(experiment, **arguments)  # type: ignore[arg-type]
    assert not (experiment.parent / "out").exists()


def test_a_masked_experiment_trains_an_encoder(experiment: Path) -> None:
    (experiment.parent / "train").mkdir()
    (experiment.parent / "validation").mkdir()
    (experiment.parent / "test").mkdir()
    for part in ("train", "validation", "test"):
        (experiment.parent / part / "1.txt").write_text("The cat sat on the mat.\n" * 40)
    fields = yaml.safe_load(experiment.read_text())
    params = fields["params"]
    length = params.pop("input_seq_len")
    params["block"] = {**BLOCK, "block_type": "transformerEncoder"}
    fields["params"] = {"input_seq_len": length, "mask_token_id": 255, "mblm_config": params}
    fields["train"]["masking_proba"] = 0.2
    fields["io"] |= {"dataset_id": "pg19masked", "dataset_dir": str(experiment.parent)}
    experiment.write_text(yaml.safe_dump(fields))
    launch(experiment, nproc=1)
    assert read_curves(the_run(experiment)).valid


# -- Several processes -----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "mblm", "train", "CONFIG", "--nproc", "2"],
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "mblm.train", "CONFIG"],
    ],
    ids=["mblm", "torchrun"],
)
def test_two_processes_by_any_command(experiment: Path, command: list[str]) -> None:
    words = [str(experiment) if word == "CONFIG" else word for word in command]
    done = start(*words, "--set", "train.gradient_clipping=0.5")
    assert done.returncode == 0, done.stderr
    folder = the_run(experiment)
    assert summary(folder)["num_workers"] == 2
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["train"]["gradient_clipping"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("numbered", [True, False])
def test_two_nodes_that_meet(experiment: Path, numbered: bool) -> None:
    meet = ["--nnodes", 2, "--rdzv-endpoint", f"localhost:{free_port()}"]
    nodes = [
        subprocess.Popen(
            mblm_train(
                experiment, "--nproc", 1, *meet, *(["--node-rank", rank] if numbered else [])
            ),
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert summary(the_run(experiment))["num_workers"] == 2


def test_a_failure_is_one_line(experiment: Path, run: Run) -> None:
    absent = experiment.parent / "absent"
    done = run("train", experiment, "--nproc", 1, "--set", f"io.dataset_dir={absent}")
    assert done.status == 1 and str(absent) in done.error


@pytest.mark.slow
def test_a_failure_of_workers_has_their_message_and_status(experiment: Path) -> None:
    absent = experiment.parent / "absent"
    done = start(*mblm_train(experiment, "--nproc", 2, "--set", f"io.dataset_dir={absent}"))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert any(line.startswith("mblm: error: ") and str(absent) in line for line in lines), lines
    # They may lose one another before they come to their own error.
    assert lines[-1].startswith("mblm: error: rank ")


def test_a_loss_that_is_not_finite_ends_in_a_line(experiment: Path) -> None:
    settings = ["train.learning_rate=1e30", "train.max_non_finite_steps=2", "io.validate_amount=1"]
    with pytest.raises(ValueError, match="2 in a row"):
        launch(experiment, settings=settings, nproc=1)


# -- Stop and resume -------------------------------------------------------------------------------


def losses_of(run: Path) -> list[tuple[float, float]]:
    return read_curves(run).train


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


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=SLOW)])
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
    assert status == INTERRUPTED
    interrupted = the_run(experiment)
    assert len(losses_of(interrupted)) < len(losses_of(whole))

    launch(experiment, settings=[length], resume="latest", nproc=processes)
    assert the_run(experiment) == interrupted
    assert losses_of(interrupted) == losses_of(whole)
    weights = [torch.load(r / "tiny_top1.pth", weights_only=True) for r in (interrupted, whole)]
    assert weights[0]["LOSS"] == weights[1]["LOSS"]
    for name, tensor in weights[0]["MODEL"].items():
        assert torch.equal(tensor, weights[1]["MODEL"][name]), name


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_only_what_was_saved_ends_as_interrupted(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, saved: bool, number: signal.Signals
) -> None:
    def launcher(*_: object) -> Callable[..., None]:
        def run(*_: object) -> None:
            if saved:
                monkeypatch.setattr("mblm.train.mblm.train_mblm", stopped)
                with pytest.raises(TrainingInterrupted):
                    train_experiment(load_experiment(experiment))
            raise SignalException("as torchrun does when all its workers have ended", number)

        return run

    def stopped(*_: object) -> None:
        raise TrainingInterrupted("Stopped")

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launcher)
    with pytest.raises(SystemExit) as ended:
        launch(experiment, nproc=2)
    assert ended.value.code == (INTERRUPTED if saved else 128 + number)


def test_a_checkpoint_begins_another_run(experiment: Path) -> None:
    launch(experiment, nproc=1)
    first = the_run(experiment)
    settings = [f"io.output_dir={experiment.parent / 'next'}"]
    launch(experiment, settings=settings, resume=str(first / "tiny_top1.pth"), nproc=1)
    (second,) = (experiment.parent / "next").glob("tiny_*")
    assert "weights" in (second / "train.log").read_text()
    assert read_curves(second).train[0][1] < read_curves(first).train[0][1]


# -- The guide -------------------------------------------------------------------------------------


def test_the_guides_dataset_in_two_processes(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guide-train.md").read_text()
    (program,) = [
        code
        for code in re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
        if 'register("mydataset")' in code
    ]
    (tmp_path / "train_my_mblm.py").write_text(program)
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "train_my_mblm.py"],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "data" / "output").glob("my-model_*")
    curves = read_curves(folder)
    assert summary(folder)["num_workers"] == 2
    assert curves.valid[-1][1] < curves.valid[0][1]

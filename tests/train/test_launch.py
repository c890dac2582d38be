"""Train by a configuration in this process: what is said and written, refused and gone on with."""

import gzip
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.elastic.multiprocessing import SignalException

from mblm.train.core.interrupt import EXIT_INTERRUPTED, TrainingInterrupted
from mblm.train.launch import launch
from mblm.train.plot import read_curves
from tests.cli.program import Run
from tests.train.experiments import TEXT, as_encoder, run_of, summary_of


def test_says_what_it_does_and_what_came_out(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(experiment, settings=["train.gradient_clipping=0.5"], nproc=1)
    lines = capsys.readouterr().err.splitlines()
    folder = run_of(experiment.parent)
    assert lines[0].startswith("Model: ") and "stage 2" in lines[0]
    assert lines[1] == "Data: text, 2,400 bytes; 2,160 bytes to train on, 120 to validate"
    assert lines[2] == f"Plan: 24 steps of 32 bytes, 2 validations, seed 0; writes to {folder}"
    assert lines[3].startswith("  4% ") and lines[3].endswith(" bits per byte")
    assert lines[4].startswith("100% ")
    best = min(bits for _, bits in read_curves(folder).valid)
    assert lines[5].startswith(f"Best validation: {best:.3f} bits per byte; test: ")
    assert lines[5].endswith(f"; the run is in {folder}")
    assert lines[6] == f"Next: mblm generate {folder} --prompt 'The '"
    assert len(lines) == 7
    assert summary_of(folder)["num_workers"] == 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["gradient_clipping"] == 0.5
    assert len(read_curves(folder).train) == 24


def test_profiles_some_steps(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(experiment, nproc=1, profile=3)
    profile = run_of(experiment.parent) / "profile"
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
    assert read_curves(runs[0]).train == read_curves(runs[1]).train
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


@pytest.mark.parametrize("arguments", [{"nproc": 2}, {"nnodes": 2, "rdzv_endpoint": "a:1"}])
def test_what_torchrun_has_started_starts_no_processes_in_turn(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("mblm.train.launch._run_workers", lambda *_: pytest.fail("started"))
    with pytest.raises(ValueError, match="nproc, nnodes: expected neither, since torchrun"):
        launch(experiment, **arguments)


def test_a_masked_experiment_trains_an_encoder(experiment: Path) -> None:
    for part in ("train", "validation", "test"):
        (experiment.parent / part).mkdir()
        (experiment.parent / part / "1.txt").write_bytes(TEXT)
    fields = as_encoder(yaml.safe_load(experiment.read_text()))
    fields["io"] |= {"dataset_id": "pg19masked", "dataset_dir": str(experiment.parent)}
    experiment.write_text(yaml.safe_dump(fields))
    launch(experiment, nproc=1)
    (_, first), (_, last) = read_curves(run_of(experiment.parent)).valid
    assert last < first


def test_a_failure_is_one_line(experiment: Path, run: Run) -> None:
    absent = experiment.parent / "absent"
    done = run("train", experiment, "--nproc", 1, "--set", f"io.dataset_dir={absent}")
    assert done.status == 1 and str(absent) in done.error


def test_a_loss_that_is_not_finite_ends_in_a_line(experiment: Path) -> None:
    settings = ["train.learning_rate=1e30", "train.max_non_finite_steps=2", "io.validate_amount=1"]
    with pytest.raises(ValueError, match="2 in a row"):
        launch(experiment, settings=settings, nproc=1)


# -- Stop and resume -------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_only_what_was_saved_ends_as_interrupted(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, saved: bool, number: signal.Signals
) -> None:
    def launcher(*_: object) -> Callable[..., None]:
        def run(*_: object) -> None:
            if saved:
                monkeypatch.setattr("mblm.train.launch.train_mblm", stopped)
                with pytest.raises(TrainingInterrupted):
                    launch(experiment, nproc=1)
            raise SignalException("as torchrun does when all its workers have ended", number)

        return run

    def stopped(*_: object) -> None:
        raise TrainingInterrupted("Stopped")

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launcher)
    with pytest.raises(SystemExit) as ended:
        launch(experiment, nproc=2)
    assert ended.value.code == (EXIT_INTERRUPTED if saved else 128 + number)


def test_a_seed_is_drawn_by_which_a_run_goes_on_and_can_be_repeated(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sources = experiment.parent, "{text: 0.5, experiment.yaml: 0.5}"
    data = [f"io.dataset_dir={folder}", f"io.dataset_args={{sources: {sources}}}"]
    unseeded = [*data, "train.seed="]
    launch(experiment, settings=unseeded, nproc=1)
    first = run_of(folder)
    seed = yaml.safe_load((first / "config.yaml").read_text())["train"]["seed"]
    assert f", seed {seed}; writes to" in capsys.readouterr().err

    settings = ["resume=", f"io.output_dir={folder / 'again'}"]
    launch(first / "config.yaml", settings=settings, nproc=1)
    (second,) = (folder / "again").glob("tiny_*")
    assert read_curves(first).train == read_curves(second).train
    launch(experiment, settings=[*unseeded, "io.save_every_minutes=9"], resume="latest", nproc=1)
    (change,) = re.findall("has changed: (.*)", (first / "train.log").read_text())
    assert change.startswith("io.save_every_minutes: ")


def test_a_checkpoint_begins_another_run(experiment: Path) -> None:
    launch(experiment, nproc=1)
    first = run_of(experiment.parent)
    settings = [f"io.output_dir={experiment.parent / 'next'}"]
    launch(experiment, settings=settings, resume=str(first / "tiny_top1.pth"), nproc=1)
    (second,) = (experiment.parent / "next").glob("tiny_*")
    assert "weights" in (second / "train.log").read_text()
    assert read_curves(second).train[0][1] < read_curves(first).train[0][1]

"""A run that is killed or starved of disk leaves what it can go on from."""

import errno
import os
import random
import signal
import time

import pytest
import torch

from mblm.train.core import run_folder, training_state
from mblm.train.core.parallel import Workers
from mblm.train.core.training_state import find_latest_state, list_states
from mblm.utils import atomic
from mblm.utils.distributed import ElasticRunVars

from . import jobs
from .jobs import EVERYTHING, train_alone


def test_a_full_disk_leaves_the_last_state_and_says_so(tmp_path, monkeypatch, finished):
    write, written = training_state.save_tensors, []

    def disk_of_four_files(path, content):
        if len(written) == 4:
            path = "/dev/full"
            with open(path, "wb") as full:
                torch.save(content, full)
        written.append(path)
        write(path, content)

    monkeypatch.setattr(training_state, "save_tensors", disk_of_four_files)
    with pytest.raises(OSError, match=r"No space left on device; the last good .*step_00000004"):
        train_alone(jobs.Trainer, jobs.config(tmp_path, validate_amount=4))
    monkeypatch.undo()
    run = jobs.run_of(tmp_path)
    state = find_latest_state(run)
    assert [f.name for f in (run / "state").iterdir() if f.name.startswith(".")] == []
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=state))
    jobs.assert_same_runs(run, finished)


def test_a_full_disk_leaves_the_best_models_and_says_so(tmp_path, monkeypatch):
    alone = Workers(ElasticRunVars(local_rank=0, world_size=1, is_cuda=False))
    models = run_folder.BestModels(tmp_path, "tiny", 2, alone)
    weights = {"w": torch.zeros(4)}
    models.add(run_folder.Ranked(0, 0.5), weights)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "save_model_state", full)
    before = (tmp_path / "tiny_top1.pth").read_bytes()
    with pytest.raises(OSError, match="No space left on device"):
        models.add(run_folder.Ranked(0, 0.1), weights)
    assert (tmp_path / "tiny_top1.pth").read_bytes() == before
    assert models.entries == [(0, 0.5)]


def test_a_state_that_cannot_be_removed_is_not_in_the_way(tmp_path, ended, finished, monkeypatch):
    monkeypatch.setattr(training_state.shutil, "rmtree", lambda *_, **options: None)
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=list_states(ended)[0]))
    jobs.assert_same_runs(ended, finished)
    monkeypatch.undo()
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=find_latest_state(ended)))
    names = {file.name for file in (ended / "state").iterdir()}
    assert names == {"lock", "step_00000008", "step_00000012"}


def rows_written(folder):
    """How many rows of losses the runs in a folder have."""
    return sum(len(file.read_bytes().splitlines()) for file in folder.glob("*/loss.csv"))


def kill_until_done(folder, kills, workers, seed, dataset=jobs.Ids):
    """Kill all workers at random moments, resume, and compare with a run that went through."""
    everything = {**EVERYTHING, "workers": workers, "validate_amount": 17}
    what = jobs.Trainer, dataset
    whole = jobs.train_by(workers, jobs.config(folder / "whole", **everything), *what)
    cut = folder / "cut"
    generator = random.Random(seed)
    moments = sorted(generator.sample(range(3, rows_written(folder / "whole") - 3), kills))
    state = None
    for moment in [*moments, None]:
        cfg = jobs.config(cut, **everything, resume=state)
        processes = jobs.start(jobs.train, workers, cfg, *what)
        if moment is not None:
            deadline = time.monotonic() + 60
            while rows_written(cut) < moment and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(generator.uniform(0, 0.03))  # within a batch, a validation or a save
            for process in processes:
                process.kill()
        codes = jobs.join(processes)
        run = jobs.run_of(cut)
        state = find_latest_state(run)
    assert codes == [0] * workers
    assert list(cut.iterdir()) == [run]
    jobs.assert_same_runs(run, whole)


def test_killed_at_a_random_moment(tmp_path):
    kill_until_done(tmp_path, kills=1, workers=2, seed=1)


@pytest.mark.slow
def test_a_mixture_is_killed_twice(tmp_path):
    kill_until_done(tmp_path, kills=2, workers=2, seed=3, dataset=jobs.mixed)


@pytest.mark.slow
def test_killed_ten_times_over(tmp_path):
    kill_until_done(tmp_path, kills=10, workers=2, seed=2)


def train_and_die_in(module, function, call, cfg):
    """Train, but be killed when a function has half done what it does for the nth time."""
    replaced, calls = getattr(module, function), 0

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            if function == "save_tensors":
                args[0].write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return replaced(*args, **kwargs)

    setattr(module, function, dies)
    jobs.train(cfg)


def dies_writing(call, cfg):
    train_and_die_in(training_state, "save_tensors", call, cfg)


def dies_publishing(call, cfg):
    train_and_die_in(run_folder.Path, "replace", call, cfg)


def dies_renaming(call, cfg):
    train_and_die_in(atomic.os, "replace", call, cfg)


def dies_pruning(call, cfg):
    train_and_die_in(training_state.shutil, "rmtree", call, cfg)


@pytest.mark.parametrize(
    ("die", "call"),
    [
        *((dies_writing, 5), (dies_writing, 6), (dies_publishing, 5), (dies_pruning, 1)),
        *((dies_renaming, 9), (dies_renaming, 12)),
    ],
)
def test_killed_while_saving(tmp_path, finished, die, call):
    assert jobs.join(jobs.start(die, 1, call, jobs.config(tmp_path))) == [-signal.SIGKILL]
    run = jobs.run_of(tmp_path)
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=find_latest_state(run)))
    jobs.assert_same_runs(run, finished)
    for folder in ("", "state"):
        names = ({file.name for file in (of / folder).iterdir()} for of in (run, finished))
        assert next(names) == next(names)

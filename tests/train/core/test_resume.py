"""A run that is stopped, killed or starved goes on as if nothing had been."""

import errno
import os
import random
import signal
import time
from typing import Any

import pytest
import torch

from mblm.train.core import output, training_state
from mblm.train.core.interrupt import EXIT_INTERRUPTED, TrainingInterrupted
from mblm.train.core.training_state import find_latest_state, list_states

from . import jobs

# Three epochs; steps of four batches that do not end with the epochs; dropout and shuffling.
EVERYTHING: dict[str, Any] = {
    "batches": 34,
    "dropout": 0.3,
    "shuffle_train": True,
    "gradient_accumulate_every": 4,
    "gradient_clipping": 0.5,
}


class StopsItself(jobs.Trainer):
    """Asks itself to stop while it computes a batch."""

    stop_in = 0

    def model_forward(self, model, batch, device):
        if model.training:
            type(self).stop_in -= 1
            if self.stop_in == 0:
                signal.raise_signal(signal.SIGTERM)
        return super().model_forward(model, batch, device)


class ForeignLoader(jobs.Trainer):
    """Has a loader that knows nothing of resuming and shuffles by the global generator."""

    def get_train_dataloader(self, dataset, **kwargs):
        return torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True)


class StopsItselfForeign(StopsItself, ForeignLoader):
    pass


def train_alone(trainer, cfg):
    made = jobs.alone(trainer, cfg)
    made.train(jobs.Ids(), jobs.Ids(10))
    return jobs.run_of(made._folder.path.parent)


@pytest.mark.parametrize(
    "trainers",
    [(jobs.Trainer, StopsItself), (ForeignLoader, StopsItselfForeign)],
    ids=["own", "foreign loader"],
)
@pytest.mark.parametrize("stop_in", [1, 6, 12, 13, 24, 33])
def test_a_run_stopped_in_any_batch_ends_the_same(tmp_path, stop_in, trainers):
    whole_trainer, stopping = trainers
    whole = train_alone(whole_trainer, jobs.config(tmp_path / "whole", **EVERYTHING))
    stopping.stop_in = stop_in
    with pytest.raises(
        TrainingInterrupted, match=f"Stopped by SIGTERM after batch {stop_in - 1}"
    ) as stop:
        train_alone(stopping, jobs.config(tmp_path / "cut", **EVERYTHING))
    assert stop.value.code == EXIT_INTERRUPTED

    torch.manual_seed(stop_in)  # whatever the generators are
    run = jobs.run_of(tmp_path / "cut")
    state = find_latest_state(run)
    resumed = train_alone(whole_trainer, jobs.config(tmp_path / "cut", **EVERYTHING, resume=state))
    assert resumed == run
    assert jobs.losses(run) == jobs.losses(whole)
    assert jobs.same(jobs.final_state(run), jobs.final_state(whole))
    for name in ("tiny_top1.pth", "tiny_top2.pth"):
        assert jobs.same(torch.load(run / name), torch.load(whole / name))


def test_the_own_loader_skips_without_loading(tmp_path):
    StopsItself.stop_in = 9
    with pytest.raises(TrainingInterrupted):
        train_alone(StopsItself, jobs.config(tmp_path))
    state = find_latest_state(jobs.run_of(tmp_path))
    dataset = jobs.Ids()
    jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=state)).train(dataset, jobs.Ids(10))
    assert "has changed" not in (jobs.run_of(tmp_path) / "train.log").read_text()
    assert dataset.seen == [8 * sample for sample in range(36, 48)]


def test_a_finished_run_is_resumed_to_no_effect(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    before = jobs.losses(run)
    resume = find_latest_state(run)
    best = jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=resume)).train(
        jobs.Ids(), jobs.Ids(10)
    )
    assert jobs.losses(run) == before
    assert jobs.same(dict(best.state_dict()), torch.load(run / "tiny_top1.pth")["MODEL"])


def test_the_last_two_states_are_kept_and_an_older_one_drops_what_came_after(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    whole = jobs.losses(run)
    jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=list_states(run)[1], learning_rate=1.0))
    assert "train.learning_rate: 0.02 -> 1.0" in (run / "train.log").read_text()
    assert [state.name for state in list_states(run)] == ["step_00000008", "step_00000012"]
    jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=list_states(run)[0]))
    assert [state.name for state in list_states(run)] == ["step_00000008"]
    cum_batch = [int(row[5]) for row in jobs.losses(run)[1:]]
    assert max(cum_batch) == 7
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=list_states(run)[0]))
    assert jobs.losses(run) == whole


def test_a_state_of_other_workers_or_a_damaged_one_is_refused(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    state = find_latest_state(run)
    manifest = state / "COMPLETE"
    text = manifest.read_text()
    manifest.write_text(text.replace('"workers": 1', '"workers": 4'))
    with pytest.raises(ValueError, match="workers 4, this run has 1"):
        jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=state))
    manifest.write_text(text)
    (state / "common.pt").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"common\.pt cannot be read"):
        jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=state))
    manifest.unlink()
    with pytest.raises(ValueError, match="neither a checkpoint nor"):
        jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=state))


def test_a_full_disk_leaves_the_last_state_and_says_so(tmp_path, monkeypatch):
    write, written = training_state._write, []

    def disk_of_four_files(path, content):
        if len(written) == 4:
            path = "/dev/full"
            with open(path, "wb") as full:
                torch.save(content, full)
        written.append(path)
        write(path, content)

    monkeypatch.setattr(training_state, "_write", disk_of_four_files)
    with pytest.raises(OSError, match=r"No space left on device; the last good .*step_00000004"):
        train_alone(jobs.Trainer, jobs.config(tmp_path, validate_amount=4))
    monkeypatch.undo()
    run = jobs.run_of(tmp_path)
    state = find_latest_state(run)
    assert [f.name for f in (run / "state").iterdir() if f.name.startswith(".")] == []
    whole = train_alone(jobs.Trainer, jobs.config(tmp_path / "whole"))
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=state))
    assert jobs.losses(run) == jobs.losses(whole)


def test_a_full_disk_leaves_the_best_models_and_says_so(tmp_path, monkeypatch):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path, validate_amount=1))
    best = (run / "tiny_top1.pth").read_bytes()
    models = output.BestModels(run, "tiny", 2, writes=True)
    weights = {"w": torch.zeros(4)}
    models.add(output.Ranked(0.5, "a.pth"), weights)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output, "save_model_state", full)
    before = (run / "tiny_top1.pth").read_bytes()
    with pytest.raises(OSError, match=r"cannot save the model: No space left on device"):
        models.add(output.Ranked(0.1, "b.pth"), weights)
    assert (run / "tiny_top1.pth").read_bytes() == before != best
    assert models.entries == [(0.5, "a.pth", 0)]


def test_restarts_go_on_from_the_last_state(tmp_path):
    class FailsOnce(jobs.Trainer):
        failed = False

        def model_forward(self, model, batch, device):
            if model.training and self._folder.best.entries and not self.failed:
                type(self).failed = True
                raise RuntimeError("a passing trouble")
            return super().model_forward(model, batch, device)

    trainer = jobs.alone(FailsOnce, jobs.config(tmp_path), max_train_restarts=1)
    trainer.train(jobs.Ids(), jobs.Ids(10))
    whole = train_alone(jobs.Trainer, jobs.config(tmp_path / "whole"))
    assert jobs.losses(trainer._folder.path) == jobs.losses(whole)


def test_a_checkpoint_of_the_reference_gives_the_weights_and_says_so(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    checkpoint = run / "tiny_top1.pth"
    trainer = jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=checkpoint, learning_rate=5.0))
    assert jobs.same(dict(trainer._parallel.base.state_dict()), torch.load(checkpoint)["MODEL"])
    best = trainer.train(jobs.Ids(), jobs.Ids(10))
    other = trainer._folder.path
    assert other != run
    assert "weights" in (other / "train.log").read_text()
    # That learning rate made all worse, so that the model it started from is the best.
    assert jobs.same(dict(best.state_dict()), torch.load(checkpoint)["MODEL"])


def rows_written(folder):
    """How many rows of losses the runs in a folder have."""
    return sum(len(file.read_bytes().splitlines()) for file in folder.glob("*/loss.csv"))


def kill_until_done(folder, kills, workers, seed):
    """Kill all workers at random moments, resume, and compare with a run that went through."""
    everything = {**EVERYTHING, "workers": workers, "validate_amount": 17}
    processes = jobs.start(jobs.train, workers, jobs.config(folder / "whole", **everything))
    assert jobs.join(processes) == [0] * workers
    whole, cut = jobs.run_of(folder / "whole"), folder / "cut"
    generator = random.Random(seed)
    moments = sorted(generator.sample(range(3, rows_written(folder / "whole") - 3), kills))
    state = None
    for moment in [*moments, None]:
        cfg = jobs.config(cut, **everything, resume=state)
        processes = jobs.start(jobs.train, workers, cfg)
        if moment is not None:
            deadline = time.monotonic() + 60
            while rows_written(cut) < moment and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.03))  # within a batch, a validation or a save
            for process in processes:
                process.kill()
        codes = jobs.join(processes)
        run = jobs.run_of(cut)
        state = find_latest_state(run)
    assert codes == [0] * workers
    assert len(list(cut.glob("tiny_*"))) == 1
    assert jobs.losses(run) == jobs.losses(whole)
    assert jobs.same(jobs.final_state(run), jobs.final_state(whole))


def test_killed_at_random_moments(tmp_path):
    kill_until_done(tmp_path, kills=2, workers=2, seed=1)


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
            if function == "_write":
                args[0].write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return replaced(*args, **kwargs)

    setattr(module, function, dies)
    jobs.train(cfg)


def dies_writing(call, cfg):
    train_and_die_in(training_state, "_write", call, cfg)


def dies_publishing(call, cfg):
    train_and_die_in(output, "_link", call, cfg)


def dies_pruning(call, cfg):
    train_and_die_in(training_state.shutil, "rmtree", call, cfg)


@pytest.mark.parametrize(
    ("die", "call"),
    [(dies_writing, 5), (dies_writing, 6), (dies_publishing, 4), (dies_pruning, 1)],
)
def test_killed_while_saving(tmp_path, die, call):
    whole = train_alone(jobs.Trainer, jobs.config(tmp_path / "whole"))
    cut = tmp_path / "cut"
    assert jobs.join(jobs.start(die, 1, call, jobs.config(cut))) == [-signal.SIGKILL]
    run = jobs.run_of(cut)
    train_alone(jobs.Trainer, jobs.config(cut, resume=find_latest_state(run)))
    assert jobs.losses(run) == jobs.losses(whole)
    assert jobs.same(jobs.final_state(run), jobs.final_state(whole))
    assert sorted(file.name for file in run.iterdir()) == sorted(f.name for f in whole.iterdir())
    assert sorted(f.name for f in (run / "state").iterdir()) == sorted(
        f.name for f in (whole / "state").iterdir()
    )

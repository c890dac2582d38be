"""A run that is stopped goes on as if nothing had been, whatever it is made of."""

import multiprocessing
import shutil
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml

from mblm.train.core import run_folder
from mblm.train.core.interrupt import EXIT_INTERRUPTED, TrainingInterrupted
from mblm.train.core.training_state import find_latest_state, is_training_state, list_states

from . import jobs
from .jobs import EVERYTHING, StopsItself, train_alone


class ForeignLoader(jobs.Trainer):
    """Has a loader that knows nothing of resuming and shuffles by the global generator."""

    def get_train_dataloader(self, dataset, **kwargs):
        return torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True)


class Random(jobs.Ids):
    """Hides ids at random."""

    def get_sample(self, from_idx):
        ids = super().get_sample(from_idx)
        return ids.masked_fill(torch.rand(ids.shape) < 0.5, 0)


class LoaderWorkers(jobs.Trainer):
    """Samples are drawn in processes of their own, anew in each epoch."""

    stay = False

    def get_train_dataloader(self, dataset, **kwargs):
        return super().get_train_dataloader(dataset, num_workers=2, persistent_workers=self.stay)

    def get_valid_dataloader(self, dataset, **kwargs):
        return super().get_valid_dataloader(dataset, num_workers=1)


class LoaderWorkersThatStay(LoaderWorkers):
    stay = True


class ForeignLoaderWorkers(jobs.Trainer):
    def get_train_dataloader(self, dataset, **kwargs):
        return super().get_train_dataloader(dataset, shuffle=True, num_workers=2)


class ForeignValidation(jobs.Trainer):
    """Validates on a few batches that a generator of its own draws."""

    def get_valid_dataloader(self, dataset, **kwargs):
        generator = torch.Generator().manual_seed(3)
        return torch.utils.data.DataLoader(dataset, 4, shuffle=True, generator=generator)


class HasExtraState(jobs.Trainer):
    """Its model has a state that is no tensor."""

    def init_model(self):
        class Model(jobs.Model):
            calls = 0

            def forward(self, ids):
                self.calls += self.training
                return super().forward(ids)

            def get_extra_state(self):
                return {"calls": self.calls}

            def set_extra_state(self, state):
                self.calls = state["calls"]

        return Model(self.config.params.dropout)


class Numpy(jobs.Trainer):
    """Its schedule and its optimizer count with numpy."""

    def configure_scheduler(self, optimizer, local_gradient_steps):
        factor = np.float64(0.5)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)


def two_samples(samples=2):
    """A dataset whose epochs have no batch of two samples but at the offset 0."""
    return jobs.Ids(2)


ANYWHERE = (1, 6, 12, 13, 24, 33)
OF_LOADER_WORKERS = {"batches": 16, "shuffle_train": True}


@pytest.mark.parametrize(
    ("trainer", "dataset", "fields", "stops"),
    [
        (jobs.Trainer, jobs.Ids, EVERYTHING, ANYWHERE),
        (jobs.Trainer, jobs.mixed, EVERYTHING, (22,)),
        (ForeignLoader, jobs.Ids, EVERYTHING, ANYWHERE),
        (ForeignValidation, jobs.Ids, EVERYTHING, ANYWHERE),
        (HasExtraState, jobs.Ids, EVERYTHING, ANYWHERE),
        (jobs.ByRecipe, jobs.Ids, EVERYTHING | jobs.MUON | {"loss_average": "entries"}, ANYWHERE),
        (
            jobs.ByRecipe,
            jobs.Ids,
            EVERYTHING | {"optimizer": "adamw", "lr_schedule": "linear", "weight_decay": 0.1},
            ANYWHERE,
        ),
        (Numpy, jobs.Ids, {}, (8,)),
        (LoaderWorkers, Random, OF_LOADER_WORKERS, (6,)),
        (LoaderWorkersThatStay, Random, OF_LOADER_WORKERS, (6,)),
        (ForeignLoaderWorkers, Random, OF_LOADER_WORKERS, (6,)),
        (jobs.Trainer, two_samples, {"batches": 3, "batch_size": 2}, (1,)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "",
)
def test_a_run_stopped_in_any_batch_ends_the_same(tmp_path, trainer, dataset, fields, stops):
    class Stops(StopsItself, trainer):
        pass

    fields = {"max_eval_steps": 2, **fields}
    whole = train_alone(trainer, jobs.config(tmp_path / "whole", **fields), dataset)
    done, state = 0, None
    for stop in stops:
        Stops.stop_in = stop - done
        with pytest.raises(
            TrainingInterrupted, match=f"Stopped by SIGTERM .*after batch {stop - 1}"
        ) as stopped:
            train_alone(Stops, jobs.config(tmp_path / "cut", **fields, resume=state), dataset)
        assert stopped.value.code == EXIT_INTERRUPTED
        assert not multiprocessing.active_children()  # of loaders, though the frames are kept
        torch.manual_seed(stop)  # whatever the generators are
        done, state = stop, find_latest_state(jobs.run_of(tmp_path / "cut"))
    run = train_alone(trainer, jobs.config(tmp_path / "cut", **fields, resume=state), dataset)
    assert list((tmp_path / "cut").iterdir()) == [run]
    jobs.assert_same_runs(run, whole)


class StopsInValidation(jobs.Trainer):
    """Asks itself to stop in the first batch of a validation, and draws random numbers in all."""

    stop_in = 0
    batches = 0

    def model_forward(self, model, batch, device):
        if not model.training:
            type(self).batches += 1
            type(self).stop_in -= 1
            torch.rand(1)
            if self.stop_in == 0:
                signal.raise_signal(signal.SIGTERM)
        return super().model_forward(model, batch, device)


def test_a_validation_stops_after_a_batch_and_is_made_whole(tmp_path):
    """A validation has three batches."""
    StopsInValidation.stop_in = -1
    whole = train_alone(StopsInValidation, jobs.config(tmp_path / "whole", **EVERYTHING))
    for validation in (0, 1, 3):  # the first, the second, the last
        cut = tmp_path / str(validation)
        StopsInValidation.stop_in, StopsInValidation.batches = 3 * validation + 1, 0
        with pytest.raises(TrainingInterrupted, match="Stopped by SIGTERM in the validation after"):
            train_alone(StopsInValidation, jobs.config(cut, **EVERYTHING))
        assert StopsInValidation.batches == 3 * validation + 1

        run = jobs.run_of(cut)
        cfg = jobs.config(cut, **EVERYTHING, resume=find_latest_state(run))
        train_alone(StopsInValidation, cfg)
        if validation != 3:
            jobs.assert_same_runs(run, whole)
        else:  # the state is that before it
            assert jobs.losses(run) == jobs.losses(whole)


def test_a_validation_that_is_made_twice_is_told_once(tmp_path):
    """Stopped in a validation; resumed, and killed when that is done; and resumed again."""

    class Dies(jobs.Trainer):
        def _save(self, run):
            raise RuntimeError("killed")

    StopsInValidation.stop_in, StopsInValidation.batches = 4, 0
    with pytest.raises(TrainingInterrupted):
        train_alone(StopsInValidation, jobs.config(tmp_path))
    run = jobs.run_of(tmp_path)
    for trainer, ending in ((Dies, pytest.raises(RuntimeError)), (jobs.Trainer, nullcontext())):
        with ending:
            train_alone(trainer, jobs.config(tmp_path, resume=find_latest_state(run)))
    whole = train_alone(jobs.Trainer, jobs.config(tmp_path / "whole"))
    assert jobs.losses(run) == jobs.losses(whole)


def test_a_test_stops_after_a_batch_and_is_made_whole(tmp_path):
    """It has three batches, as each of the validations before it."""

    def job(**fields):
        trainer = jobs.alone(StopsInValidation, jobs.config(tmp_path, validate_amount=1, **fields))
        trainer.test(jobs.Ids(10), trainer.train(jobs.Ids(), jobs.Ids(10)))

    StopsInValidation.stop_in, StopsInValidation.batches = 4, 0
    with pytest.raises(TrainingInterrupted, match="Stopped by SIGTERM in the test") as stopped:
        job()
    assert stopped.value.code == EXIT_INTERRUPTED and StopsInValidation.batches == 4
    run = jobs.run_of(tmp_path)
    job(resume=find_latest_state(run))
    assert [row[2] for row in jobs.losses(run)[-2:]] == ["valid", "test"]


def test_the_own_loader_skips_without_loading(tmp_path):
    StopsItself.stop_in = 9
    with pytest.raises(TrainingInterrupted):
        train_alone(StopsItself, jobs.config(tmp_path))
    state = find_latest_state(jobs.run_of(tmp_path))
    dataset = jobs.Ids()
    jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=state)).train(dataset, jobs.Ids(10))
    assert "has changed" not in (jobs.run_of(tmp_path) / "train.log").read_text()
    assert dataset.seen == [8 * sample for sample in range(36, 48)]


def test_a_finished_run_is_resumed_to_no_effect(tmp_path, ended):
    before = jobs.losses(ended)
    cfg = jobs.config(tmp_path, resume=find_latest_state(ended))
    best = jobs.alone(jobs.Trainer, cfg).train(jobs.Ids(), jobs.Ids(10))
    assert jobs.losses(ended) == before
    assert jobs.same(dict(best.state_dict()), torch.load(ended / "tiny_top1.pth")["MODEL"])


def how_to_go_on(run):
    return yaml.safe_load((run / "config.yaml").read_text())["resume"]


def test_the_last_two_states_are_kept_and_an_older_one_drops_what_came_after(tmp_path, ended):
    whole, resume = jobs.losses(ended), how_to_go_on(ended)
    assert [state.name for state in list_states(ended)] == ["step_00000008", "step_00000012"]
    StopsItself.stop_in = 2
    with pytest.raises(TrainingInterrupted):
        train_alone(StopsItself, jobs.config(tmp_path, resume=list_states(ended)[0]))
    assert [state.name for state in list_states(ended)] == ["step_00000008", "step_00000010"]
    assert max(int(row[5]) for row in jobs.losses(ended)[1:]) == 9
    at = how_to_go_on(ended)
    assert (at["next_epoch_index"], at["next_batch_index"]) == (0, 8)  # after a validation
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=list_states(ended)[0]))
    assert jobs.losses(ended) == whole
    names = ("next_epoch_index", "next_batch_index", "resumed_from")
    assert [how_to_go_on(ended)[name] for name in names] == [resume[name] for name in names]


@pytest.mark.parametrize("end", [0, 57, -3], ids=["none", "in a row", "a little less"])
def test_rows_that_are_gone_cut_none_of_those_that_follow(tmp_path, ended, end):
    rows = (ended / "loss.csv").read_bytes()
    if end:
        (ended / "loss.csv").write_bytes(rows[: rows.index(b"\n") + end] if end > 0 else rows[:end])
    else:
        (ended / "loss.csv").unlink()
    train_alone(jobs.Trainer, jobs.config(tmp_path, batches=14, resume=list_states(ended)[-1]))
    after = jobs.losses(ended)
    assert after[0][0] == "gpu_rank" and len({len(row) for row in after}) == 1
    assert [row[5] for row in after if row[2] == "train"][-2:] == ["12", "13"]


def test_a_crash_while_it_goes_back_loses_no_row(tmp_path, ended, finished, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "prune_states", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_alone(jobs.Trainer, jobs.config(tmp_path, resume=list_states(ended)[0]))
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=find_latest_state(ended)))
    jobs.assert_same_runs(ended, finished)


def test_the_folder_of_states_may_be_a_link(tmp_path, ended, finished):
    shutil.move(ended / "state", tmp_path / "elsewhere")
    (ended / "state").symlink_to(tmp_path / "elsewhere")
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=list_states(ended)[0]))
    jobs.assert_same_runs(ended, finished)


def test_a_state_that_lies_elsewhere_is_refused(tmp_path, ended):
    (tmp_path / "last").symlink_to(list_states(ended)[0])
    with pytest.raises(ValueError, match=r"last is neither .*, <run>/state/step_<n>"):
        jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=tmp_path / "last"))


def test_what_else_lies_beside_the_states_stays(tmp_path, ended):
    """A link to the last state, an archive, and a picture that another process is writing."""
    last, beside, picture = list_states(ended)[1], ended / "state", ended / ".loss.png.0123abcd.tmp"
    picture.touch()
    (beside / "step_last").symlink_to(last)
    (beside / "step_00000008.tar").touch()
    train_alone(jobs.Trainer, jobs.config(tmp_path, batches=16, resume=last))
    assert [state.name for state in list_states(ended)] == [last.name, "step_00000016"]
    assert is_training_state(beside / "step_last") and (beside / "step_00000008.tar").exists()
    assert picture.exists()


def test_restarts_go_on_from_the_last_state(tmp_path, finished):
    class FailsOnce(jobs.Trainer):
        failed = False

        def model_forward(self, model, batch, device):
            if model.training and self._folder.best.entries and not self.failed:
                type(self).failed = True
                raise RuntimeError("a passing trouble")
            return super().model_forward(model, batch, device)

    # A profile of ten steps and two that warm up is longer than what is left then.
    options = {"max_train_restarts": 1, "profile_steps": 10}
    trainer = jobs.alone(FailsOnce, jobs.config(tmp_path), **options)
    trainer.train(jobs.Ids(), jobs.Ids(10))
    jobs.assert_same_runs(trainer._folder.path, finished)

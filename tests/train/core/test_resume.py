"""A run that is stopped, killed or starved goes on as if nothing had been."""

import errno
import os
import random
import re
import signal
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from mblm import __version__
from mblm.train.core import output, training_state
from mblm.train.core.interrupt import EXIT_INTERRUPTED, TrainingInterrupted
from mblm.train.core.run import Position
from mblm.train.core.run_folder import hold_run
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


def train_alone(trainer, cfg, dataset=jobs.Ids):
    made = jobs.alone(trainer, cfg)
    made.train(dataset(), dataset(10))
    return jobs.run_of(made._folder.path.parent)


@pytest.mark.parametrize(
    ("trainer", "recipe"),
    [
        (jobs.Trainer, {}),
        (ForeignLoader, {}),
        (ForeignValidation, {}),
        (HasExtraState, {}),
        (jobs.ByRecipe, {**jobs.MUON, "loss_average": "entries"}),
        (jobs.ByRecipe, {"optimizer": "adamw", "lr_schedule": "linear", "weight_decay": 0.1}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value.get("optimizer", ""),
)
def test_a_run_stopped_in_any_batch_ends_the_same(tmp_path, trainer, recipe):
    class Stops(StopsItself, trainer):
        pass

    everything = {**EVERYTHING, **recipe, "max_eval_steps": 2}
    whole = train_alone(trainer, jobs.config(tmp_path / "whole", **everything))
    done, state = 0, None
    for stop in (1, 6, 12, 13, 24, 33):
        Stops.stop_in = stop - done
        with pytest.raises(
            TrainingInterrupted, match=f"Stopped by SIGTERM .*after batch {stop - 1}"
        ) as stopped:
            train_alone(Stops, jobs.config(tmp_path / "cut", **everything, resume=state))
        assert stopped.value.code == EXIT_INTERRUPTED
        torch.manual_seed(stop)  # whatever the generators are
        done, state = stop, find_latest_state(jobs.run_of(tmp_path / "cut"))
    run = train_alone(trainer, jobs.config(tmp_path / "cut", **everything, resume=state))
    assert list((tmp_path / "cut").iterdir()) == [run]
    assert jobs.losses(run) == jobs.losses(whole)
    assert jobs.same(jobs.final_state(run), jobs.final_state(whole))
    for name in ("tiny_top1.pth", "tiny_top2.pth"):
        assert jobs.same(torch.load(run / name), torch.load(whole / name))


def test_a_mixture_goes_on_with_the_samples_that_come_next(tmp_path):
    whole = train_alone(jobs.Trainer, jobs.config(tmp_path / "whole", **EVERYTHING), jobs.mixed)
    StopsItself.stop_in = 22
    with pytest.raises(TrainingInterrupted):
        train_alone(StopsItself, jobs.config(tmp_path / "cut", **EVERYTHING), jobs.mixed)
    state = find_latest_state(jobs.run_of(tmp_path / "cut"))
    cfg = jobs.config(tmp_path / "cut", **EVERYTHING, resume=state)
    run = train_alone(jobs.Trainer, cfg, jobs.mixed)
    kinds = {row[2] for row in jobs.losses(run)}
    assert kinds == {"kind", "train", "valid", "valid/all", "valid/few"}
    assert jobs.losses(run) == jobs.losses(whole)
    assert jobs.same(jobs.final_state(run), jobs.final_state(whole))


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


@pytest.mark.parametrize("validation", [0, 1, 3], ids=["first", "second", "last"])
def test_a_validation_stops_after_a_batch_and_is_made_whole(tmp_path, validation):
    """A validation has three batches."""
    StopsInValidation.stop_in = -1
    whole = train_alone(StopsInValidation, jobs.config(tmp_path / "whole", **EVERYTHING))
    StopsInValidation.stop_in, StopsInValidation.batches = 3 * validation + 1, 0
    with pytest.raises(TrainingInterrupted, match="Stopped by SIGTERM in the validation after"):
        train_alone(StopsInValidation, jobs.config(tmp_path / "cut", **EVERYTHING))
    assert StopsInValidation.batches == 3 * validation + 1

    run = jobs.run_of(tmp_path / "cut")
    state = find_latest_state(run)
    train_alone(StopsInValidation, jobs.config(tmp_path / "cut", **EVERYTHING, resume=state))
    assert jobs.losses(run) == jobs.losses(whole)
    if validation != 3:  # after the last, the state is that before it
        assert jobs.same(jobs.final_state(run), jobs.final_state(whole))
    for name in ("tiny_top1.pth", "tiny_top2.pth"):
        assert jobs.same(torch.load(run / name), torch.load(whole / name))


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


@pytest.mark.parametrize("trainer", [LoaderWorkers, LoaderWorkersThatStay, ForeignLoaderWorkers])
def test_what_loader_workers_draw_is_the_same_after_a_stop(tmp_path, trainer):
    class Stops(StopsItself, trainer):
        stop_in = 6

    cfg: dict[str, Any] = {"batches": 16, "shuffle_train": True}
    whole = train_alone(trainer, jobs.config(tmp_path / "whole", **cfg), Random)
    with pytest.raises(TrainingInterrupted):
        train_alone(Stops, jobs.config(tmp_path / "cut", **cfg), Random)
    state = find_latest_state(jobs.run_of(tmp_path / "cut"))
    run = train_alone(trainer, jobs.config(tmp_path / "cut", **cfg, resume=state), Random)
    assert jobs.losses(run) == jobs.losses(whole)
    assert jobs.same(jobs.final_state(run), jobs.final_state(whole))


def test_a_run_stopped_before_an_epoch_without_batches_goes_on(tmp_path):
    cfg: dict[str, Any] = {"batches": 3, "batch_size": 2}

    def two_samples(samples=2):
        return jobs.Ids(2)

    whole = train_alone(jobs.Trainer, jobs.config(tmp_path / "whole", **cfg), two_samples)
    StopsItself.stop_in = 1
    with pytest.raises(TrainingInterrupted):
        train_alone(StopsItself, jobs.config(tmp_path / "cut", **cfg), two_samples)
    state = find_latest_state(jobs.run_of(tmp_path / "cut"))
    cfg["resume"] = state
    run = train_alone(jobs.Trainer, jobs.config(tmp_path / "cut", **cfg), two_samples)
    assert jobs.losses(run) == jobs.losses(whole)


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
    assert [state.name for state in list_states(run)] == ["step_00000008", "step_00000012"]
    StopsItself.stop_in = 2
    with pytest.raises(TrainingInterrupted):
        train_alone(StopsItself, jobs.config(tmp_path, resume=list_states(run)[0]))
    assert [state.name for state in list_states(run)] == ["step_00000008", "step_00000010"]
    assert max(int(row[5]) for row in jobs.losses(run)[1:]) == 9
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=list_states(run)[0]))
    assert jobs.losses(run) == whole


# -- What has changed ------------------------------------------------------------------------------


class Wider(jobs.Trainer):
    def init_model(self):
        model = jobs.Model(0.0)
        model.logits[2] = torch.nn.Linear(8, jobs.NUM_TOKENS + 1)
        return model


class Momentum(jobs.Trainer):
    def configure_optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Freezes(jobs.Trainer):
    def configure_optimizer(self, parameters):
        return super().configure_optimizer(list(parameters)[:2])


class OtherStages(jobs.Trainer):
    def configure_stage_types(self, model):
        return ["mamba1"]


def everything_in(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"trainer": Wider},
            "gone on from: the saved weights do not fit the model: logits.2",
        ),
        ({"trainer": Momentum}, "the optimizer's state is of another one, which had amsgrad"),
        ({"trainer": Freezes}, r"with groups of \[5\] parameters; this one has \[2\]"),
        ({"trainer": OtherStages}, "stages.0: Model -> mamba1"),
        ({"batch_size": 2}, "train.batch_size: 4 -> 2"),
        ({"gradient_accumulate_every": 2}, "train.gradient_accumulate_every: 1 -> 2"),
        ({"shuffle_train": True}, "train.shuffle_train: False -> True"),
        ({"seed": 6}, "train.seed: 5 -> 6"),
        ({"optimizer": "muon"}, "train.optimizer: adam -> muon"),
        ({"name_model": "other"}, "io.name_model: tiny -> other"),
        ({"batches": 7}, "train.target_elements: .* after 7 batches, .* has 8 behind it"),
        (
            {"samples": 20},
            "training_data.size: 384 -> 160",
        ),
        ({"valid_samples": 11}, "validation_data.size: 80 -> 88"),
    ],
    ids=str,
)
def test_a_refused_resume_names_why_and_leaves_the_run_as_it_was(tmp_path, change, message):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    before, resume = everything_in(tmp_path), list_states(run)[0]
    change = dict(change)
    trainer = change.pop("trainer", jobs.Trainer)
    samples = change.pop("samples", jobs.SAMPLES), change.pop("valid_samples", 10)
    with pytest.raises(ValueError, match=message):
        jobs.alone(trainer, jobs.config(tmp_path, resume=resume, **change)).train(
            *map(jobs.Ids, samples)
        )
    assert everything_in(tmp_path) == before


def is_held(run):
    """Whether another process is refused the run."""
    return jobs.join(jobs.start(enter, 1, run)) == [1]


def enter(run):
    hold_run(run).__enter__()


def test_a_run_that_another_trains_is_left_to_it(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    before, cfg = everything_in(tmp_path), jobs.config(tmp_path, resume=list_states(run)[0])
    with hold_run(run):
        assert is_held(run)
        with pytest.raises(ValueError, match="another process is training this run"):
            train_alone(jobs.Trainer, cfg)
        assert everything_in(tmp_path) == before
    train_alone(jobs.Trainer, cfg)


def test_a_job_holds_its_run_until_its_test_is_done(tmp_path):
    trainer = jobs.alone(jobs.Trainer, jobs.config(tmp_path))
    with trainer.holding():
        model = trainer.train(jobs.Ids(), jobs.Ids(10))
        assert is_held(run := jobs.run_of(tmp_path))
        trainer.test(jobs.Ids(10), model)
    assert not is_held(run)
    trainer.test(jobs.Ids(10), model)
    assert not is_held(run)
    assert [row[2] for row in jobs.losses(run)[-2:]] == ["test", "test"]


@pytest.mark.parametrize("raised", [OSError, TrainingInterrupted, KeyboardInterrupt])
def test_a_run_is_let_go_of_in_whatever_way_its_training_fails(tmp_path, raised):
    class Fails(jobs.Trainer):
        def model_forward(self, model, batch, device):
            raise raised("stopped")

    with pytest.raises(raised):
        train_alone(Fails, jobs.config(tmp_path))
    with hold_run(jobs.run_of(tmp_path)):
        pass


def final_optimizer(run):
    return jobs.final_state(run)[0]["optimizer"]


def rates(run, first=0):
    return [row[7] for row in jobs.losses(run)[1:] if row[2] == "train" and int(row[5]) >= first]


@pytest.mark.parametrize("schedule", ["trainer's", "cosine", "linear", "wsd"])
def test_the_learning_rate_is_that_of_the_step_in_the_plan_there_is(tmp_path, schedule):
    trainer, long = jobs.Trainer, {"batches": 30, "log_train_loss_amount": 30}
    short = {}
    if schedule != "trainer's":
        trainer, short = jobs.ByRecipe, {"lr_schedule": schedule}
    long |= short
    whole = train_alone(trainer, jobs.config(tmp_path / "long", **long))
    assert max(map(float, rates(whole))) == pytest.approx(0.02, rel=0.1)
    run = train_alone(trainer, jobs.config(tmp_path, **short))
    train_alone(trainer, jobs.config(tmp_path, **long, resume=find_latest_state(run)))
    assert rates(run, 12) == rates(whole, 12)
    assert len(rates(run, 12)) == 18


def test_a_run_is_made_longer_exactly_before_its_learning_rate_falls(tmp_path):
    wsd = {"lr_schedule": "wsd", "decay_ratio": 0.5, "warmup_steps_perc": 0.0}
    whole = train_alone(jobs.ByRecipe, jobs.config(tmp_path / "long", batches=24, **wsd))
    run = train_alone(jobs.ByRecipe, jobs.config(tmp_path, batches=12, **wsd, validate_amount=3))
    states = list_states(run)
    assert [state.name for state in states] == ["step_00000006", "step_00000012"]
    train_alone(jobs.ByRecipe, jobs.config(tmp_path, batches=24, **wsd, resume=states[0]))
    (common, *_), (expected, *_) = jobs.final_state(run), jobs.final_state(whole)
    assert jobs.same(common["model"], expected["model"])
    assert "train.target_elements: 48 -> 96" in (run / "train.log").read_text()


class OneCycle(jobs.Trainer):
    """Has a schedule that keeps what it needs in the optimizer, and moves its betas, too."""

    def configure_scheduler(self, optimizer, local_gradient_steps):
        rate = self.config.train.learning_rate
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, local_gradient_steps)


@pytest.mark.parametrize("trainer", [jobs.Trainer, jobs.ByRecipe, OneCycle])
def test_a_changed_learning_rate_takes_effect_and_is_told(tmp_path, trainer):
    run = train_alone(trainer, jobs.config(tmp_path))
    before = rates(run, 8)
    state = final_optimizer(run)
    train_alone(trainer, jobs.config(tmp_path, resume=list_states(run)[0]))
    assert jobs.same(final_optimizer(run), state)
    cfg = jobs.config(tmp_path, resume=list_states(run)[0], learning_rate=0.04)
    train_alone(trainer, cfg)
    assert rates(run, 8) == [str(2 * float(rate)) for rate in before]
    assert "train.learning_rate: 0.02 -> 0.04" in (run / "train.log").read_text()


def test_another_version_of_the_package_is_told(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    manifest = find_latest_state(run) / "COMPLETE"
    manifest.write_text(manifest.read_text().replace('"package": "', '"package": "0.'))
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=find_latest_state(run)))
    assert f"package: 0.{__version__} -> {__version__}" in (run / "train.log").read_text()


def test_a_state_of_a_version_without_a_field_meant_its_default(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    manifest = find_latest_state(run) / "COMPLETE"
    text = manifest.read_text()
    older = re.sub(r'"train.(optimizer|betas.\d|lr_schedule|decay_ratio)": [^,]+, ', "", text)
    assert len(older) < len(text) - 80
    manifest.write_text(older)
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=find_latest_state(run)))
    assert "has changed" not in (run / "train.log").read_text()


class Decays(jobs.Trainer):
    decay = 0.0

    def configure_optimizer(self, parameters):
        return torch.optim.Adam(parameters, lr=0.02, weight_decay=self.decay)


class DecaysMore(Decays):
    decay = 0.5


def test_a_changed_option_of_the_optimizer_takes_effect(tmp_path):
    run = train_alone(Decays, jobs.config(tmp_path))
    before = final_optimizer(run)
    train_alone(DecaysMore, jobs.config(tmp_path, resume=list_states(run)[0]))
    assert final_optimizer(run)["param_groups"][0]["weight_decay"] == 0.5
    assert not jobs.same(final_optimizer(run)["state"], before["state"])


def test_a_smaller_number_of_models_to_keep_takes_effect(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    cfg = jobs.config(tmp_path, resume=find_latest_state(run), num_models_to_save=1)
    train_alone(jobs.Trainer, cfg)
    assert [file.name for file in run.glob("*.pth")] == ["tiny_top1.pth"]


def test_a_place_that_the_data_do_not_have_is_refused(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path / "first"))
    cfg = jobs.config(tmp_path / "next", resume=run / "tiny_top1.pth")
    for index in (90, -3):
        cfg.resume.next_batch_index = index
        with pytest.raises(ValueError, match=f"batch of an epoch of 12, got {index}"):
            train_alone(jobs.Trainer, cfg)
    cfg.resume.next_batch_index, cfg.resume.next_epoch_index = 0, -2
    with pytest.raises(ValueError, match="next_epoch_index: expected at least 0, got -2"):
        train_alone(jobs.Trainer, cfg)
    assert not (tmp_path / "next").exists()


class Numpy(jobs.Trainer):
    """Its schedule and its optimizer count with numpy."""

    def configure_scheduler(self, optimizer, local_gradient_steps):
        factor = np.float64(0.5)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path):
    whole = train_alone(Numpy, jobs.config(tmp_path / "whole"))
    run = train_alone(Numpy, jobs.config(tmp_path))
    train_alone(Numpy, jobs.config(tmp_path, resume=list_states(run)[0]))
    assert jobs.losses(run) == jobs.losses(whole)


def test_a_place_is_shared_out_in_whole_steps():
    """Nine batches of 8 sequences, in steps of two, one of which was left out."""
    place = Position(step=109, done=9, batch=5, applied=3)
    place.share_out((8, 2), (4, 3))
    assert (place.step, place.done, place.batch, place.applied) == (109, 15, 8, 4)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    class Array(jobs.Trainer):
        def configure_optimizer(self, parameters):
            optimizer = super().configure_optimizer(parameters)
            optimizer.param_groups[0]["mask"] = np.zeros(2)
            return optimizer

    with pytest.raises(TypeError, match=r"common.optimizer.param_groups.0.mask: .* got ndarray"):
        train_alone(Array, jobs.config(tmp_path))


def test_a_state_of_another_strategy_or_a_damaged_one_is_refused(tmp_path):
    run = train_alone(jobs.Trainer, jobs.config(tmp_path))
    state = find_latest_state(run)
    manifest = state / "COMPLETE"
    text = manifest.read_text()
    manifest.write_text(text.replace('"strategy": "ddp"', '"strategy": "fsdp"'))
    with pytest.raises(ValueError, match="strategy fsdp, this run has ddp"):
        jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=state))
    manifest.write_text(text)
    (state / "common.pt").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"common\.pt cannot be read"):
        jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=state))
    manifest.unlink()
    with pytest.raises(ValueError, match="neither a checkpoint nor"):
        jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=state))


def test_a_full_disk_leaves_the_last_state_and_says_so(tmp_path, monkeypatch):
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
    with pytest.raises(OSError, match="No space left on device"):
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


class OtherData(jobs.Ids):
    """Ids that are nothing like those of `jobs.Ids`."""

    def __init__(self, samples=jobs.SAMPLES):
        super().__init__(samples)
        self.ids = (self.ids + 5) % jobs.NUM_TOKENS


def test_a_checkpoint_ranks_by_its_loss_on_the_data_it_is_trained_on(tmp_path):
    before = train_alone(jobs.Trainer, jobs.config(tmp_path / "before", batches=100))
    old = torch.load(before / "tiny_top1.pth")
    cfg = jobs.config(tmp_path / "after", resume=before / "tiny_top1.pth")
    trainer = jobs.alone(jobs.Trainer, cfg)
    best = trainer.train(OtherData(), OtherData(10))
    new = torch.load(trainer._folder.path / "tiny_top1.pth")
    assert new["LOSS"] > old["LOSS"]
    assert not jobs.same(new["MODEL"], old["MODEL"])
    assert jobs.same(dict(best.state_dict()), new["MODEL"])


def test_a_checkpoint_that_nothing_improves_stays_the_best_with_its_new_loss(tmp_path):
    before = train_alone(jobs.Trainer, jobs.config(tmp_path / "before"))
    old = torch.load(before / "tiny_top1.pth")
    torch.save({**old, "LOSS": 1e9}, tmp_path / "model.pth")
    cfg = jobs.config(tmp_path, resume=tmp_path / "model.pth", learning_rate=5.0)
    new = torch.load(train_alone(jobs.Trainer, cfg) / "tiny_top1.pth")
    assert jobs.same(new, old)


def rows_written(folder):
    """How many rows of losses the runs in a folder have."""
    return sum(len(file.read_bytes().splitlines()) for file in folder.glob("*/loss.csv"))


def kill_until_done(folder, kills, workers, seed, dataset=jobs.Ids):
    """Kill all workers at random moments, resume, and compare with a run that went through."""
    everything = {**EVERYTHING, "workers": workers, "validate_amount": 17}
    what = jobs.Trainer, jobs.SAMPLES, dataset
    cfg = jobs.config(folder / "whole", **everything)
    processes = jobs.start(jobs.train, workers, cfg, *what)
    assert jobs.join(processes) == [0] * workers
    whole, cut = jobs.run_of(folder / "whole"), folder / "cut"
    generator = random.Random(seed)
    moments = sorted(generator.sample(range(3, rows_written(folder / "whole") - 3), kills))
    state = None
    for moment in [*moments, None]:
        cfg = jobs.config(cut, **everything, resume=state)
        processes = jobs.start(jobs.train, workers, cfg, *what)
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

"""A run that goes on with something else: what takes effect, what is refused, who else has it."""

import re

import numpy as np
import pytest
import torch
import yaml

from mblm import __version__
from mblm.train.core.run import Position
from mblm.train.core.run_folder import hold_run
from mblm.train.core.training_state import find_latest_state, list_states

from . import jobs
from .jobs import train_alone


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
        ({"trainer": Wider}, r"gone on from: (.|\n)*size mismatch for logits.2"),
        ({"trainer": Momentum}, "optimizer: Adam -> SGD"),
        ({"trainer": Freezes}, "gone on from: .* doesn't match the size of optimizer's group"),
        ({"trainer": OtherStages}, "stages.0: Model -> mamba1"),
        ({"batch_size": 2}, "train.batch_size: 4 -> 2"),
        ({"gradient_accumulate_every": 2}, "train.gradient_accumulate_every: 1 -> 2"),
        ({"shuffle_train": True}, "train.shuffle_train: False -> True"),
        ({"seed": 6}, "train.seed: 5 -> 6"),
        ({"optimizer": "muon"}, "train.optimizer: adam -> muon"),
        ({"name_model": "other"}, "io.name_model: tiny -> other"),
        ({"batches": 7}, "train.target_elements: .* after 7 batches, .* has 8 behind it"),
        ({"samples": 20}, "training_data.size: 384 -> 160"),
        ({"valid_samples": 11}, "validation_data.size: 80 -> 88"),
    ],
    ids=str,
)
def test_a_refused_resume_names_why_and_leaves_the_run_as_it_was(tmp_path, ended, change, message):
    before, resume = everything_in(tmp_path), list_states(ended)[0]
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


def test_a_run_that_another_trains_is_left_to_it(tmp_path, ended):
    before, cfg = everything_in(tmp_path), jobs.config(tmp_path, resume=list_states(ended)[0])
    with hold_run(ended):
        assert is_held(ended)
        with pytest.raises(ValueError, match="this run is being trained already"):
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


@pytest.mark.parametrize(
    ("change", "stays"),
    [({"learning_rate": 1e-9}, False), ({}, True), ({"batches": 16}, False)],
    ids=["rate", "nothing", "target"],
)
def test_no_model_of_a_way_that_was_left_stays_among_the_best(tmp_path, ended, change, stays):
    before = {torch.load(file)["LOSS"] for file in ended.glob("*.pth")}
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=list_states(ended)[0], **change))
    after = {torch.load(file)["LOSS"] for file in ended.glob("*_top?.pth")}
    assert after <= {float(row[6]) for row in jobs.losses(ended)[1:] if row[2] == "valid"}
    assert (after == before) == stays
    aside = {torch.load(file)["LOSS"] for file in ended.glob("*_left_*.pth")}
    assert before <= after | aside
    resume = yaml.safe_load((ended / "config.yaml").read_text())["resume"]
    assert resume["checkpoint_file"] == str(ended / "tiny_top1.pth")


def test_another_version_of_the_package_is_told(tmp_path, ended):
    manifest = find_latest_state(ended) / "COMPLETE"
    manifest.write_text(manifest.read_text().replace('"package": "', '"package": "0.'))
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=find_latest_state(ended)))
    assert f"package: 0.{__version__} -> {__version__}" in (ended / "train.log").read_text()


def test_a_state_of_a_version_without_a_field_meant_its_default(tmp_path, ended):
    manifest = find_latest_state(ended) / "COMPLETE"
    text = manifest.read_text()
    older = re.sub(r'"train.(optimizer|betas.\d|lr_schedule|decay_ratio)": [^,]+, ', "", text)
    assert len(older) < len(text) - 80
    manifest.write_text(older)
    train_alone(jobs.Trainer, jobs.config(tmp_path, resume=find_latest_state(ended)))
    assert "has changed: train." not in (ended / "train.log").read_text()


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


def test_a_smaller_number_of_models_to_keep_takes_effect(tmp_path, ended):
    cfg = jobs.config(tmp_path, resume=find_latest_state(ended), num_models_to_save=1)
    train_alone(jobs.Trainer, cfg)
    assert [file.name for file in ended.glob("*.pth")] == ["tiny_top1.pth"]


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


def test_a_place_is_shared_out_in_whole_steps():
    """Nine batches of 8 sequences, in steps of two, one of which was left out."""
    place = Position(step=109, done=9, batch=5, applied=3)
    place.share_out(8, 2, 4, 3)
    assert (place.step, place.done, place.batch, place.applied) == (109, 15, 8, 4)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    class Array(jobs.Trainer):
        def configure_optimizer(self, parameters):
            optimizer = super().configure_optimizer(parameters)
            optimizer.param_groups[0]["mask"] = np.zeros(2)
            return optimizer

    with pytest.raises(TypeError, match=r"common.optimizer.param_groups.0.mask: .* got ndarray"):
        train_alone(Array, jobs.config(tmp_path))


def test_a_state_of_another_strategy_or_a_damaged_one_is_refused(tmp_path, ended):
    state = find_latest_state(ended)
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


def test_a_damaged_best_model_is_refused_before_anything_is_dropped(tmp_path, ended):
    states, rows = list_states(ended), jobs.losses(ended)
    (ended / "tiny_top2.pth").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"tiny_top2\.pth cannot be read"):
        train_alone(jobs.Trainer, jobs.config(tmp_path, resume=states[0]))
    assert (list_states(ended), jobs.losses(ended)) == (states, rows)


def test_a_checkpoint_of_the_reference_gives_the_weights_and_says_so(tmp_path, ended):
    checkpoint = ended / "tiny_top1.pth"
    trainer = jobs.alone(jobs.Trainer, jobs.config(tmp_path, resume=checkpoint, learning_rate=5.0))
    assert jobs.same(dict(trainer._parallel.base.state_dict()), torch.load(checkpoint)["MODEL"])
    best = trainer.train(jobs.Ids(), jobs.Ids(10))
    other = trainer._folder.path
    assert other != ended
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

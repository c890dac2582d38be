"""Steps and validations whose losses are not finite, and runs that learn nothing."""

import math

import pytest
import torch

from mblm.train.core.run import NonFiniteLossError

from . import jobs


def train(cfg, trainer):
    made = jobs.alone(trainer, cfg)
    return made, made.train(jobs.Ids(), jobs.Ids(10))


class Bad(jobs.Trainer):
    """Loses its loss in some batches."""

    bad = range(3, 100)
    value = math.nan

    def model_forward(self, model, batch, device):
        loss = super().model_forward(model, batch, device)
        if not model.training:
            return loss
        self.calls = getattr(self, "calls", -1) + 1
        return loss * 0 + self.value if self.calls in self.bad else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_of_bad_losses_stops(tmp_path, value, capsys):
    Bad.value = value
    with pytest.raises(
        NonFiniteLossError,
        match=rf"batch 5 of epoch 0: loss {value} on rank 0, batch 5 \(3 in a row\)",
    ):
        train(jobs.config(tmp_path, max_non_finite_steps=3), Bad)
    assert "Step left out" in capsys.readouterr().err
    assert "NonFiniteLossError" in (jobs.run_of(tmp_path) / "config.yaml").read_text()


def test_bad_losses_may_be_skipped(tmp_path):
    cfg = jobs.config(tmp_path, non_finite_loss="skip", max_non_finite_steps=1)
    trainer, model = train(cfg, Bad)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert (trainer._folder.path / "train.log").read_text().count("Step left out") == 12 - 3


def test_only_bad_losses_in_a_row_count(tmp_path):
    class Now(Bad):
        bad = (1, 2, 4, 5, 7)

    train(jobs.config(tmp_path, max_non_finite_steps=3), Now)


def test_a_bad_batch_spoils_only_its_step(tmp_path):
    class Once(Bad):
        bad = (1,)

    cfg = {"gradient_accumulate_every": 3, "max_non_finite_steps": 2}
    trainer, _ = train(jobs.config(tmp_path, **cfg), Once)
    log = (trainer._folder.path / "train.log").read_text()
    assert "loss nan on rank 0, batch 1 (1 in a row)" in log or "loss inf on rank 0" in log
    assert log.count("Step left out") == 1


class Masked(jobs.Trainer):
    """Has no loss in some batches."""

    masked = range(100)

    def model_forward(self, model, batch, device):
        loss = super().model_forward(model, batch, device)
        self.calls = getattr(self, "calls", -1) + model.training
        return loss * 0 if model.training and self.calls in self.masked else loss


@pytest.mark.parametrize(("batches", "steps"), [(12, 3), (4, 2)])
def test_a_run_that_learns_nothing_fails(tmp_path, batches, steps):
    cfg = {"batches": batches, "gradient_accumulate_every": 2, "max_non_finite_steps": 3}
    with pytest.raises(ValueError, match=rf"gradient was zero in {steps} of {steps} steps"):
        train(jobs.config(tmp_path, **cfg), Masked)


def test_steps_that_learn_nothing_are_said_once(tmp_path, capsys):
    class Some(Masked):
        masked = (*range(2, 12),)

    train(jobs.config(tmp_path, max_non_finite_steps=3), Some)
    assert capsys.readouterr().err.count("The gradient was zero in 1 of 3 steps") == 1


class BadValidation(jobs.Trainer):
    """Loses a batch of its validations: of all, or of the first."""

    always = False

    def model_forward(self, model, batch, device):
        loss = super().model_forward(model, batch, device)
        self.validated = getattr(self, "validated", 0) + (not model.training)
        is_bad = not model.training and (self.always or self.validated == 2)
        return loss * math.nan if is_bad else loss


def test_a_bad_batch_of_a_validation_is_left_out_said_and_not_ranked(tmp_path, capsys):
    trainer, _ = train(jobs.config(tmp_path, validate_amount=2), BadValidation)
    assert "after batch 0: 1 of 3 batches are left out" in capsys.readouterr().err
    valid = [float(row[6]) for row in jobs.losses(trainer._folder.path) if row[2] == "valid"]
    assert all(math.isfinite(loss) for loss in valid)
    # Two are kept, but these cannot be compared.
    assert [entry.loss for entry in trainer._folder.best.entries] == [valid[-1]]


def test_a_run_of_which_no_model_can_be_ranked_fails(tmp_path):
    class Always(BadValidation):
        always = True

    with pytest.raises(NonFiniteLossError, match=r"No model can be ranked.* 3 of 3 batches"):
        train(jobs.config(tmp_path), Always)

"""What a run sends to loggers: every point once, whatever stops it, and no logger ends it."""

import csv
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mblm.train.core.training_state import find_latest_state, list_states
from mblm.train.mblm import MegabyteTrainer, TrainEntryConfig
from tests.train.experiments import experiment_fields

from . import jobs


class Writes(jobs.Trainer):
    """Writes the prompts backwards, with random numbers."""

    def generate_samples(self, model, prompts, seed):
        torch.rand(3)
        assert not model.training
        return [prompt[::-1].encode() for prompt in prompts]

    def losses_by_position(self, model, samples):
        torch.rand(3)
        return [1.0, 0.5]


SAMPLES = {"sample_amount": 2, "sample_prompts": ["abc", "xy"]}


def train(cfg, trainer=Writes):
    made = jobs.alone(trainer, cfg)
    made.train(jobs.Ids(), jobs.Ids(10))
    made.tell_result()
    return made._folder.path


def fake(calls, name="trackio", fails=(), error=ConnectionError):
    """A library that notes what is called; calls of the names given fail."""

    def note(call):
        def noted(*args, **kwargs):
            calls.append((call, args, kwargs))
            if call in fails:
                raise error(f"{call}: no network")

        return noted

    def init(**kwargs):
        note("init")(**kwargs)
        return SimpleNamespace(log=note("log"), finish=note("finish"))

    module = ModuleType(name)
    module.init, module.Html = init, lambda text: text
    module.Settings = lambda **kwargs: kwargs
    module.login = lambda prompt: False
    return module


def logged(calls):
    """Names, values and steps, in their order."""
    points = [(args[0], kwargs["step"]) for call, args, kwargs in calls if call == "log"]
    return [(name, step) for values, step in points for name in values]


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setitem(sys.modules, "trackio", fake(made))
    return made


def test_numbers_and_samples_are_logged_and_the_run_is_the_same(tmp_path, calls):
    plain = train(jobs.config(tmp_path / "plain"), jobs.Trainer)
    run = train(jobs.config(tmp_path / "logged", loggers=["trackio"], **SAMPLES))
    assert jobs.losses(run) == jobs.losses(plain)
    assert jobs.same(jobs.final_state(run)[1:], jobs.final_state(plain)[1:])

    (_, _, begin), *_, (end, _, _) = calls
    assert begin["project"] == "tiny" and begin["name"] == run.name and end == "finish"
    assert begin["config"]["train"]["batch_size"] == 4
    points = logged(calls)
    assert points.count(("loss/train", 3)) == 1
    names = {name for name, _ in points}
    assert {"loss/valid", "learning rate", "mean loss/train", "gradient norm"} <= names
    assert {"elements per second", "share of time waiting for data", "elements seen"} <= names
    assert {"peak memory in GiB", "loss by position/000", "loss by position/001"} <= names
    assert [step for name, step in points if name == "sample 2"] == [0, 11]
    text = (run / "samples" / "step_00000012.txt").read_text()
    assert text == "abccba\n\n---\n\nxyyx\n\n---\n\n"
    assert "sample: 'abc' + b'cba'" in (run / "train.log").read_text()


def test_a_model_that_cannot_write_does_not_end_the_run_and_it_is_said(tmp_path, capsys):
    class Fails(Writes):
        def generate_samples(self, model, prompts, seed):
            torch.rand(3)
            raise torch.OutOfMemoryError("no memory left")

    plain = train(jobs.config(tmp_path / "plain"), jobs.Trainer)
    run = train(jobs.config(tmp_path / "fails", **SAMPLES), Fails)
    assert jobs.losses(run) == jobs.losses(plain)
    assert jobs.same(jobs.final_state(run)[1:], jobs.final_state(plain)[1:])
    said = "after batch 11 is not shown: OutOfMemoryError: no memory left"
    assert said in capsys.readouterr().err and said in (run / "train.log").read_text()


def test_a_run_that_goes_on_sends_no_point_twice(tmp_path, calls):
    """Not even when it is stopped again before it has come as far as the first time."""

    class Fails(Writes):
        def model_forward(self, model, batch, device):
            if model.training and self._folder.best.entries and len(jobs.losses(run)) > 14:
                raise RuntimeError("out of luck")
            return super().model_forward(model, batch, device)

    def job(trainer=Writes, **fields):
        made = jobs.alone(trainer, jobs.config(tmp_path, loggers=["trackio"], **SAMPLES, **fields))
        with made.holding():
            made.test(jobs.Ids(10), made.train(jobs.Ids(), jobs.Ids(10)))
            made.tell_result()
        return made._folder.path

    run = job()
    sent, state = logged(calls), list_states(run)[0]
    assert ("loss/test", 11) in sent
    with pytest.raises(RuntimeError, match="out of luck"):
        job(Fails, resume=state)
    job(resume=state)
    assert logged(calls) == sent
    resumes = [kwargs["resume"] for call, _, kwargs in calls if call == "init"]
    assert resumes == ["never", "allow", "allow"]
    job(batches=14, resume=find_latest_state(run))
    assert {("loss/train", 13), ("loss/test", 13)} <= {*logged(calls)}


def test_a_logger_gets_the_points_of_the_times_that_it_is_used_and_none_twice(tmp_path, calls):
    used = {"loggers": ["trackio"]}
    state = list_states(train(jobs.config(tmp_path)))[0]  # after 8 of 12 batches
    batches = []
    for fields in (used, used, {}, {**used, "batches": 16}):
        train(jobs.config(tmp_path, **fields, resume=state))
        batches.append([step for name, step in logged(calls) if name == "loss/train"])
    assert batches == [[8, 9, 10, 11]] * 3 + [[8, 9, 10, 11, 12, 13, 14, 15]]


def test_tensorboard_shows_the_points_after_a_resume_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = {"loggers": ["tensorboard"], **SAMPLES}
    run = train(jobs.config(tmp_path, **cfg))
    train(jobs.config(tmp_path, **cfg, resume=list_states(run)[0]))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("learning rate", "mean loss/train", "gradient norm"):
        assert [event.step for event in events.Scalars(name)] == list(range(12))
    for kind in ("train", "valid"):
        written = [(int(row[5]), float(row[6])) for row in jobs.losses(run)[1:] if row[2] == kind]
        shown = [(event.step, event.value) for event in events.Scalars(f"loss/{kind}")]
        assert shown == [(step, pytest.approx(loss)) for step, loss in written]
    assert [event.step for event in events.Tensors("sample 1/text_summary")] == [0, 11]


@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_logger_that_fails_is_left_out_and_said_once(tmp_path, monkeypatch, capsys, call, error):
    monkeypatch.setitem(sys.modules, "trackio", fake([], fails=[call], error=error))
    run = train(jobs.config(tmp_path, loggers=["trackio"]))
    failed = f"{error.__name__}: {call}"
    said = f"trackio has failed and gets nothing more of this run, which goes on: {failed}"
    assert capsys.readouterr().err.count(said) == 1
    assert (run / "train.log").read_text().count(said) == 1
    assert len(jobs.losses(run)) == 1 + 12 + 4


def test_without_a_login_wandb_writes_offline_and_says_so(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake(calls))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = train(jobs.config(tmp_path, loggers=["wandb"]))
    assert calls[0][2]["mode"] == "offline"
    assert f"wandb: no login; to send it later: wandb sync {run}/wandb" in capsys.readouterr().err
    train(jobs.config(tmp_path, loggers=["wandb"], resume=find_latest_state(run)))
    first, second = (kwargs["id"] for call, _, kwargs in calls if call == "init")
    assert first == second


@pytest.mark.parametrize(
    "raises, reason",
    [("raise ImportError", "ImportError"), ("1 / 0", "division by zero"), ("exit(3)", "3")],
)
def test_a_missing_library_is_named_before_anything_is_written(
    tmp_path, monkeypatch, raises, reason
):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb.py").write_text(raises)
    with pytest.raises(ValueError, match=rf"wandb needs pip install 'mblm\[wandb\]' \({reason}"):
        train(jobs.config(tmp_path / "out", loggers=["wandb"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_the_libraries_themselves_take_a_run_and_its_rest_offline(tmp_path, monkeypatch, library):
    pytest.importorskip(library)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = {"loggers": [library], **SAMPLES}
    run = train(jobs.config(tmp_path, **cfg))
    train(jobs.config(tmp_path, **cfg, resume=list_states(run)[0]))
    assert "has failed" not in (run / "train.log").read_text()
    if library == "wandb":
        ids = {folder.name.rpartition("-")[2] for folder in run.glob("wandb/offline-run-*")}
        assert len(ids) == 1


def test_metrics_are_of_all_that_a_step_took(tmp_path):
    run = train(jobs.config(tmp_path, batches=8, gradient_accumulate_every=4))
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["cum_batch"] for row in steps] == ["3", "7"]
    assert [row["elements_seen"] for row in steps] == ["128", "256"]
    assert all("nan" not in row.values() for row in rows)
    losses = [float(row[6]) for row in jobs.losses(run)[1:] if row[2] == "train"]
    assert float(steps[1]["loss"]) == pytest.approx(sum(losses[4:]) / 4)
    assert 0 <= float(steps[1]["waiting"]) < 1 and float(steps[1]["memory_max"]) > 0
    assert float(steps[1]["gradient_norm"]) > 0 and float(steps[1]["elements_per_second"]) > 0
    valid = [row for row in rows if row["kind"] == "valid"]
    assert len(valid) == 4 and valid[0]["lr"] == ""


def test_losses_of_a_step_are_those_of_all_workers(tmp_path):
    fields = {"batches": 4, "workers": 2, "batch_size": 2, "enabled_loss_log_for_gpus": [0, 1]}
    run = jobs.train_by(2, jobs.config(tmp_path, **fields, **SAMPLES), Writes)
    rows = [row for row in jobs.losses(run)[1:] if row[2] == "train" and row[5] == "3"]
    with (run / "metrics.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["kind"] == "train"][-1]
    (first, loss), (second, other) = sorted((row[0], row[6]) for row in rows)
    assert (first, second) == ("0", "1") and loss != other
    assert float(last["loss"]) == pytest.approx(sum(float(row[6]) for row in rows) / 2)
    assert last["elements_seen"] == str(4 * 2 * 2 * jobs.SEQ_LEN)
    assert len(list((run / "samples").iterdir())) == 2


class WritesItsWeights(Writes):
    """Writes the sum of the weights that it has."""

    def generate_samples(self, model, prompts, seed):
        super().generate_samples(model, prompts, seed)
        return [str(sum(map(float, map(torch.sum, model.state_dict().values())))).encode()]


def test_a_sharded_model_writes_with_the_weights_that_are_saved_and_trains_the_same(tmp_path):
    fields = {"workers": 2, "batch_size": 2, "strategy": "fsdp", "dropout": 0.3}
    plain = jobs.config(tmp_path / "plain", **fields, num_models_to_save=4)
    writes = jobs.config(tmp_path / "writes", **fields, num_models_to_save=4, sample_amount=2)
    run, whole = (jobs.train_by(2, cfg, WritesItsWeights) for cfg in (writes, plain))
    assert jobs.losses(run) == jobs.losses(whole)
    assert jobs.same(jobs.final_state(run)[1:], jobs.final_state(whole)[1:])
    saved = [torch.load(file)["MODEL"] for file in run.glob("*.pth")]
    sums = {sum(map(float, map(torch.sum, weights.values()))) for weights in saved}
    written = {float(text.read_text().partition("\n")[0]) for text in (run / "samples").iterdir()}
    assert len(written) == 2 and written <= sums


def test_a_hierarchy_writes_text_and_tells_its_losses_by_position(tmp_path):
    fields = experiment_fields(tmp_path)
    cfg = TrainEntryConfig.model_validate(fields)
    trainer = jobs.alone(MegabyteTrainer, cfg)
    model = trainer.init_model().eval()
    first, second = trainer.generate_samples(model, ["The cat", ""], seed=3)
    assert 0 < len(second) <= 16 and len(first) <= 9
    assert trainer.generate_samples(model, ["The cat", ""], seed=3) == [first, second]

    ids = torch.randint(0, 256, (3, 16))
    samples = [(row, torch.ones_like(row)) for row in ids]
    padded = (torch.cat((ids[0, :5], torch.full((3,), 256))), torch.ones(8))
    losses = trainer.losses_by_position(model, [*samples, padded])
    scores = model.score([*ids, ids[0, :5]])
    zeroth = torch.cat([score.log_probs[::4] for score in scores])
    assert len(losses) == 4 and losses[0] == pytest.approx(-float(zeroth.mean()))

    fields["io"]["sample_prompts"] = ["a" * 16]
    with pytest.raises(ValueError, match="sample_prompts: expected less than the context of 16"):
        TrainEntryConfig.model_validate(fields)

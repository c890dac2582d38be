"""Several workers: what each sees, what they agree on, and how they fail."""

import contextlib
import csv
import errno
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from mblm.train.core import training_state
from mblm.train.core.hooks import CoreTrainerOptions
from mblm.train.core.interrupt import EXIT_INTERRUPTED
from mblm.train.core.training_state import find_latest_state, list_states
from mblm.utils.checkpoint import load_model_state
from mblm.utils.distributed import process_group

from . import jobs


class GlobalBatches(jobs.Ids):
    """Gives every number of workers the same batches, taken together."""

    def __init__(self, batch_size, worker, workers):
        super().__init__()
        self.batch_size, self.worker, self.workers = batch_size, worker, workers

    def __len__(self):
        return jobs.SAMPLES // self.workers

    def __getitem__(self, idx):
        batch, within = divmod(idx, self.batch_size)
        sample = (batch * self.workers + self.worker) * self.batch_size + within
        return self.get_sample((sample * jobs.SEQ_LEN + self.sample_offset) % len(self.ids))

    def get_sample(self, from_idx):
        self.seen.append(from_idx)
        return self.ids.roll(-from_idx)[: jobs.SEQ_LEN]


def train_global(cfg, seen_dir=None):
    with process_group(backend="gloo") as run_vars:
        dataset = GlobalBatches(cfg.train.batch_size, run_vars.rank, run_vars.world_size)
        options = CoreTrainerOptions(display_progress=False)
        trainer = jobs.ByRecipe(cfg, run_vars, options)
        model = trainer.train(dataset, jobs.Ids(12))
        trainer.test(jobs.Ids(8), model)


def global_run(folder, workers, strategy="ddp", every=2, resume=None, **fields):
    """Losses of the validations and the test, and the last best model."""
    cfg = jobs.config(
        folder,
        workers=workers,
        batch_size=8 // workers // every,
        batches=12 * every,
        strategy=strategy,
        gradient_accumulate_every=every,
        gradient_clipping=0.2,
        resume=resume,
        **fields,
    )
    assert jobs.join(jobs.start(train_global, workers, cfg)) == [0] * workers
    run = jobs.run_of(folder)
    model, _ = load_model_state(run / "tiny_top1.pth", jobs.Model(0.0))
    return [float(row[6]) for row in jobs.losses(run)[1:] if row[2] != "train"], model


RECIPES = {"adam": {}, "muon": jobs.MUON}


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    make = tmp_path_factory.mktemp
    return {name: global_run(make(name), 1, **fields) for name, fields in RECIPES.items()}


@pytest.mark.parametrize(
    ("workers", "strategy", "recipe"),
    [(2, "ddp", "adam"), (4, "ddp", "muon"), (2, "fsdp", "adam"), (2, "fsdp", "muon")],
)
def test_any_number_of_workers_reaches_the_same_loss(
    tmp_path, one_worker, workers, strategy, recipe
):
    losses, model = global_run(tmp_path, workers, strategy, **RECIPES[recipe])
    expected_losses, expected = one_worker[recipe]
    assert len(losses) == 5
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
    assert expected_losses[-2] < expected_losses[0] - 0.05


class Masked(jobs.ByRecipe):
    """Learns few of the ids, of some batches none."""

    def model_forward(self, model, batch, device):
        logits = model.forward(batch, return_logits=True)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        mask = self.mask(batch).flatten()
        return (losses * mask).sum() / mask.sum().clamp(min=1)

    def mask(self, batch):
        return batch[:, :-1] % 5 == 0

    def count_entries(self, batch):
        return int(self.mask(batch).sum())


class Unmasked(Masked):
    """Learns all but the first id of a sequence."""

    def mask(self, batch):
        return torch.ones_like(batch[:, 1:])


def train_same_steps(cfg, trainer):
    with process_group(backend="gloo") as run_vars:
        dataset = GlobalBatches(cfg.train.batch_size, run_vars.rank, run_vars.world_size)
        trainer(cfg, run_vars, CoreTrainerOptions(display_progress=False)).train(dataset, dataset)


def weights_after_steps_of_8(folder, trainer, batch_size, every, workers=1, **fields):
    cfg = jobs.config(
        folder,
        batches=6 * every,
        workers=workers,
        batch_size=batch_size,
        gradient_accumulate_every=every,
        gradient_clipping=0.5,
        **fields,
    )
    if workers == 1:
        dataset = GlobalBatches(batch_size, 0, 1)
        jobs.alone(trainer, cfg).train(dataset, dataset)
    else:
        assert jobs.join(jobs.start(train_same_steps, workers, cfg, trainer)) == [0] * workers
    return jobs.final_state(jobs.run_of(folder))[0]["model"]


@pytest.mark.parametrize("trainer", [Masked, Unmasked])
def test_a_step_of_many_small_batches_is_one_of_a_large(tmp_path, trainer):
    """1 batch of 8 sequences, 8 of 1, and with 2 workers 4 of 1 each, also where few count."""
    entries = {"loss_average": "entries"}
    large = weights_after_steps_of_8(tmp_path / "large", trainer, 8, 1, **entries)
    small = weights_after_steps_of_8(tmp_path / "small", trainer, 1, 8, **entries)
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)
    two = weights_after_steps_of_8(tmp_path / "two", trainer, 1, 4, workers=2, **entries)
    torch.testing.assert_close(two, large, rtol=1e-4, atol=1e-5)
    published = weights_after_steps_of_8(tmp_path / "published", trainer, 8, 1)
    torch.testing.assert_close(published, large, rtol=1e-4, atol=1e-5)
    of_means = weights_after_steps_of_8(tmp_path / "of_means", trainer, 1, 8)
    moved = max(float((of_means[name] - large[name]).abs().max()) for name in large)
    assert (moved > 1e-2) == (trainer is Masked)


@pytest.mark.parametrize(("workers", "every"), [(1, 4), (4, 1)])
def test_a_run_goes_on_with_another_number_of_workers(tmp_path, one_worker, workers, every):
    """With the same sequences a step it ends where it would have, to rounding."""
    global_run(tmp_path, 2)
    run = jobs.run_of(tmp_path)
    state = list_states(run)[0]
    assert state.name == "step_00000016"
    losses, model = global_run(tmp_path, workers, every=every, resume=state)
    assert jobs.run_of(tmp_path) == run
    log = (run / "train.log").read_text()
    assert f"Not an exact resume: the state is of 2 workers, this run has {workers}" in log
    steps = [int(row[5]) for row in jobs.losses(run)[1:] if row[2] == "train"]
    assert steps == list(range(16 + 4 * every))
    expected_losses, expected = one_worker["adam"]
    torch.testing.assert_close(losses[-2:], expected_losses[-2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_shards_are_of_the_workers_that_saved_them(tmp_path):
    global_run(tmp_path, 2, "fsdp")
    state = find_latest_state(jobs.run_of(tmp_path))
    cfg = jobs.config(tmp_path, strategy="fsdp", resume=state)
    with pytest.raises(ValueError, match="saved with workers 2, this run has 1"):
        jobs.alone(jobs.Trainer, cfg)


def train_and_note(cfg, folder):
    with process_group(backend="gloo") as run_vars:
        dataset = jobs.Ids(jobs.SAMPLES, run_vars.rank, run_vars.world_size)
        options = CoreTrainerOptions(display_progress=False)
        jobs.Trainer(cfg, run_vars, options).train(dataset, jobs.Ids(10))
        (folder / f"{run_vars.rank}.json").write_text(json.dumps(dataset.seen))


def train_as_two_nodes(cfg, folder):
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    train_and_note(cfg, folder)


def test_what_two_nodes_of_two_workers_see_is_disjoint_and_complete(tmp_path):
    cfg = jobs.config(tmp_path, batches=3, workers=4, shuffle_train=True)
    assert jobs.join(jobs.start(train_as_two_nodes, 4, cfg, tmp_path)) == [0] * 4
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    together = sorted(start for of_worker in seen for start in of_worker)
    assert together == list(range(0, jobs.SAMPLES * jobs.SEQ_LEN, jobs.SEQ_LEN))
    assert all(len(of_worker) == jobs.SAMPLES // 4 for of_worker in seen)


@pytest.mark.parametrize(
    ("strategy", "recipe"), [("ddp", "adam"), ("fsdp", "adam"), ("fsdp", "muon")]
)
def test_stopped_by_a_signal_to_one_and_resumed_to_the_bit(tmp_path, strategy, recipe):
    workers = 2
    fields = {
        **RECIPES[recipe],
        "batches": 40,
        "workers": workers,
        "strategy": strategy,
        "dropout": 0.2,
        "shuffle_train": True,
        "gradient_accumulate_every": 7,
        "gradient_clipping": 0.2,
        "batch_size": 2,
    }
    whole_cfg = jobs.config(tmp_path / "whole", **fields)
    assert jobs.join(jobs.start(jobs.train, workers, whole_cfg, jobs.ByRecipe)) == [0] * workers
    processes = jobs.start(
        jobs.train, workers, jobs.config(tmp_path / "cut", **fields), jobs.ByRecipe
    )
    while not list(tmp_path.glob("cut/*/state/step_*/COMPLETE")):
        time.sleep(0.005)
    os.kill(processes[-1].pid, signal.SIGTERM)
    assert jobs.join(processes) == [EXIT_INTERRUPTED] * workers
    run = jobs.run_of(tmp_path / "cut")
    cfg = jobs.config(tmp_path / "cut", **fields, resume=find_latest_state(run))
    assert jobs.join(jobs.start(jobs.train, workers, cfg, jobs.ByRecipe)) == [0] * workers
    whole = jobs.run_of(tmp_path / "whole")
    assert jobs.losses(run) == jobs.losses(whole)
    assert jobs.same(jobs.final_state(run), jobs.final_state(whole))


class StopsRankOneInValidation(jobs.Trainer):
    def model_forward(self, model, batch, device):
        self.evaluated = getattr(self, "evaluated", 0) + (not model.training)
        if self.evaluated == 1 and self._workers.rank == 1 and not self.config.resume:
            signal.raise_signal(signal.SIGTERM)
        return super().model_forward(model, batch, device)


def train_and_validate_long(cfg, trainer):
    with process_group(backend="gloo") as run_vars:
        made = trainer(cfg, run_vars, CoreTrainerOptions(display_progress=False))
        made.train(jobs.Ids(worker_id=run_vars.rank, num_workers=2), jobs.Ids(36))


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_validation_is_stopped_on_all_workers(tmp_path, strategy):
    fields = {"workers": 2, "strategy": strategy, "validate_amount": 2}  # of 9 batches
    whole, cut = (jobs.config(tmp_path / name, **fields) for name in ("whole", "cut"))
    assert jobs.join(jobs.start(train_and_validate_long, 2, whole, jobs.Trainer)) == [0, 0]
    codes = jobs.join(jobs.start(train_and_validate_long, 2, cut, StopsRankOneInValidation))
    assert codes == [EXIT_INTERRUPTED] * 2
    run = jobs.run_of(tmp_path / "cut")
    assert "valid" not in (run / "loss.csv").read_text()
    cut = jobs.config(tmp_path / "cut", **fields, resume=find_latest_state(run))
    assert jobs.join(jobs.start(train_and_validate_long, 2, cut, StopsRankOneInValidation)) == [
        0,
        0,
    ]
    whole_run = jobs.run_of(tmp_path / "whole")
    assert jobs.losses(run) == jobs.losses(whole_run)
    assert jobs.same(jobs.final_state(run), jobs.final_state(whole_run))


class NanOnRankOne(jobs.Trainer):
    def model_forward(self, model, batch, device):
        loss = super().model_forward(model, batch, device)
        is_bad = model.training and self._workers.rank == 1 and len(self.config.io.name_model)
        self.calls = getattr(self, "calls", 0) + model.training
        return loss * math.inf if is_bad and self.calls in (2, 4, 5) else loss


def train_with_nans(cfg):
    jobs.train(cfg, NanOnRankOne)


def test_a_bad_loss_of_one_worker_is_left_out_by_all(tmp_path):
    cfg = jobs.config(tmp_path, workers=2, batches=10, max_non_finite_steps=3, batch_size=2)
    assert jobs.join(jobs.start(train_with_nans, 2, cfg)) == [0, 0]
    log = (jobs.run_of(tmp_path) / "train.log").read_text()
    assert "loss inf on rank 1, batch 1 (1 in a row)" in log
    assert "loss inf on rank 1, batch 4 (2 in a row)" in log
    states = jobs.final_state(jobs.run_of(tmp_path))
    assert all(torch.isfinite(w).all() for w in states[0]["model"].values())
    assert states[1]["position"]["applied"] == 10 - 3


def test_too_many_bad_losses_end_the_run_on_all(tmp_path):
    cfg = jobs.config(tmp_path, workers=2, batches=10, max_non_finite_steps=2, batch_size=2)
    assert jobs.join(jobs.start(train_with_nans, 2, cfg)) == [1, 1]
    text = (jobs.run_of(tmp_path) / "config.yaml").read_text()
    assert "NonFiniteLossError" in text


def start_and_note(function, folder):
    """Start a run of two, note the random numbers that each would draw next, or its error."""
    with contextlib.suppress(Exception):
        note = folder / os.environ["RANK"]
        try:
            with process_group(backend="gloo") as run_vars:
                function(run_vars)
                note.write_text(str(torch.rand(())))
        except Exception as error:
            note.write_text(f"{type(error).__name__}: {error}")
            raise


def construct(run_vars, cfg):
    jobs.Trainer(cfg, run_vars, CoreTrainerOptions(display_progress=False))


def construct_others(run_vars):
    construct(run_vars, jobs.config(Path("out"), workers=2, batch_size=4 + run_vars.rank))


class OtherStages(jobs.Trainer):
    """Builds what this machine has, as Mamba-1 where `mamba_ssm` is missing."""

    def init_model(self):
        model = super().init_model()
        model.logits[1] = torch.nn.Linear(8, 8) if self._workers.rank else torch.nn.GELU()
        return model

    def configure_stage_types(self, model):
        return [type(model.logits[1]).__name__]


def construct_other_stages(run_vars):
    OtherStages(jobs.config(Path("out"), workers=2), run_vars)


class Writes(jobs.Trainer):
    def generate_samples(self, model, prompts, seed):
        raise AssertionError


def construct_what_writes_of_shards(run_vars):
    Writes(jobs.config(Path("out"), workers=2, strategy="fsdp", sample_amount=1), run_vars)


def construct_without_a_seed(run_vars):
    construct(run_vars, jobs.config(Path("out"), workers=2, seed=None))


def construct_without_data(run_vars):
    if run_vars.rank == 1:
        raise FileNotFoundError("no folder 'data' on this machine")
    construct_without_a_seed(run_vars)


def notes_of(tmp_path, function):
    jobs.join(jobs.start(start_and_note, 2, function, tmp_path))
    return [(tmp_path / str(rank)).read_text() for rank in range(2)]


def test_without_a_seed_workers_draw_different_numbers(tmp_path):
    first, second = notes_of(tmp_path, construct_without_a_seed)
    assert first.startswith("tensor") and second.startswith("tensor") and first != second


def test_workers_whose_settings_differ_are_refused_by_name(tmp_path):
    for note in notes_of(tmp_path, construct_others):
        assert "rank 0 and rank 1 do not train the same" in note
        assert "train.batch_size: 4 -> 5" in note


def test_workers_whose_models_differ_are_refused_by_name(tmp_path):
    for note in notes_of(tmp_path, construct_other_stages):
        assert "do not train the same: stages: ['GELU'] -> ['Linear']; parameters: 344" in note


def test_shards_do_not_write(tmp_path):
    for note in notes_of(tmp_path, construct_what_writes_of_shards):
        assert "io.sample_amount: with train.strategy fsdp no worker holds the model" in note


def test_a_worker_that_fails_while_starting_ends_all_with_its_message(tmp_path):
    main, other = notes_of(tmp_path, construct_without_data)
    assert other == "FileNotFoundError: no folder 'data' on this machine"
    assert main == f"RuntimeError: another process failed: rank 1: {other}"


class FailsOnRankOne(jobs.Trainer):
    def model_forward(self, model, batch, device):
        if self._workers.rank == 1:
            raise RuntimeError("rank one is out of luck")
        return super().model_forward(model, batch, device)


def train_with_a_failure(cfg):
    jobs.train(cfg, FailsOnRankOne)


def test_a_failed_worker_ends_the_others(tmp_path):
    begin = time.monotonic()
    cfg = jobs.config(tmp_path, workers=2)
    assert jobs.join(jobs.start(train_with_a_failure, 2, cfg)) == [1, 1]
    assert time.monotonic() - begin < 60  # not a collective's timeout, which is half an hour


def test_every_enabled_rank_logs_its_own_losses(tmp_path):
    cfg = jobs.config(tmp_path, workers=2, batches=4, enabled_loss_log_for_gpus=[0, 1])
    assert jobs.join(jobs.start(jobs.train, 2, cfg)) == [0, 0]
    with (jobs.run_of(tmp_path) / "loss.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "train"]
    by_rank = {rank: [r["loss"] for r in rows if r["gpu_rank"] == rank] for rank in "01"}
    assert len(by_rank["0"]) == len(by_rank["1"]) == 4
    assert by_rank["0"] != by_rank["1"]


def train_with_a_full_disk_on_rank_one(cfg):
    write = training_state.save_tensors

    def write_or_fail(path, content):
        if path.name == "rank_1.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    training_state.save_tensors = write_or_fail
    try:
        jobs.train(cfg)
    except OSError as error:
        assert "No space left on device; there is no earlier state" in str(error)
        os._exit(3)


def test_a_full_disk_of_one_worker_ends_all_and_leaves_nothing_half_done(tmp_path):
    cfg = jobs.config(tmp_path, workers=2, batches=2, batch_size=2)
    processes = jobs.start(train_with_a_full_disk_on_rank_one, 2, cfg)
    assert jobs.join(processes) == [3, 3]
    assert [file.name for file in (jobs.run_of(tmp_path) / "state").glob("*step*")] == []


def train_on_other_data(cfg):
    with process_group(backend="gloo") as run_vars:
        worker, workers = run_vars.rank, run_vars.world_size
        trainer = jobs.Trainer(cfg, run_vars, CoreTrainerOptions(display_progress=False))
        try:
            trainer.train(jobs.Ids(jobs.SAMPLES + worker, worker, workers), jobs.Ids(10))
        except ValueError as error:
            assert "rank 0 and rank 1 do not train the same: training_data" in str(error)
            os._exit(3)


def test_workers_that_do_not_train_on_the_same_are_refused(tmp_path):
    cfg = jobs.config(tmp_path, workers=2, batches=2)
    assert jobs.join(jobs.start(train_on_other_data, 2, cfg)) == [3, 3]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_state_of_one_worker_leaves_the_run_as_it_was(tmp_path):
    fields = {"workers": 2, "batches": 2, "batch_size": 2}
    assert jobs.join(jobs.start(jobs.train, 2, jobs.config(tmp_path, **fields))) == [0, 0]
    run = jobs.run_of(tmp_path)
    first, last = list_states(run)
    (first / "rank_1.pt").write_bytes(b"rubbish")
    before = jobs.losses(run)
    cfg = jobs.config(tmp_path, **fields, resume=first)
    assert jobs.join(jobs.start(jobs.train, 2, cfg)) == [1, 1]
    assert jobs.losses(run) == before
    assert list_states(run) == [first, last]

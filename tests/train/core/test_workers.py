"""Several workers stop, save and fail together, with one message."""

import contextlib
import errno
import json
import math
import os
import signal
import time

import pytest
import torch

from mblm.train.core import training_state
from mblm.train.core.hooks import CoreTrainerOptions
from mblm.train.core.interrupt import EXIT_INTERRUPTED
from mblm.train.core.run import NonFiniteLossError
from mblm.train.core.training_state import find_latest_state
from mblm.utils.distributed import process_group

from . import jobs


@pytest.mark.parametrize(
    ("strategy", "recipe"), [("ddp", "adam"), ("fsdp", "adam"), ("fsdp", "muon")]
)
def test_stopped_by_a_signal_to_one_and_resumed_to_the_bit(tmp_path, strategy, recipe):
    workers = 2
    fields = {
        **jobs.RECIPES[recipe],
        "batches": 40,
        "workers": workers,
        "strategy": strategy,
        "dropout": 0.2,
        "shuffle_train": True,
        "gradient_accumulate_every": 7,
        "gradient_clipping": 0.2,
        "batch_size": 2,
    }
    whole = jobs.train_by(workers, jobs.config(tmp_path / "whole", **fields), jobs.ByRecipe)
    processes = jobs.start(
        jobs.train, workers, jobs.config(tmp_path / "cut", **fields), jobs.ByRecipe
    )
    while not list(tmp_path.glob("cut/*/state/step_*/COMPLETE")):
        time.sleep(0.005)
    os.kill(processes[-1].pid, signal.SIGTERM)
    assert jobs.join(processes) == [EXIT_INTERRUPTED] * workers
    run = jobs.run_of(tmp_path / "cut")
    cfg = jobs.config(tmp_path / "cut", **fields, resume=find_latest_state(run))
    assert jobs.train_by(workers, cfg, jobs.ByRecipe) == run
    jobs.assert_same_runs(run, whole)


class StopsRankOneInValidation(jobs.Trainer):
    def model_forward(self, model, batch, device):
        self.evaluated = getattr(self, "evaluated", 0) + (not model.training)
        if self.evaluated == 1 and self._workers.rank == 1 and not self.config.resume:
            signal.raise_signal(signal.SIGTERM)
        return super().model_forward(model, batch, device)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_validation_is_stopped_on_all_workers(tmp_path, strategy):
    fields = {"workers": 2, "strategy": strategy, "validate_amount": 2}  # of 9 batches
    whole, cut = (jobs.config(tmp_path / name, **fields) for name in ("whole", "cut"))
    what = jobs.Ids, 36
    whole_run = jobs.train_by(2, whole, jobs.Trainer, *what)
    processes = jobs.start(jobs.train, 2, cut, StopsRankOneInValidation, *what)
    assert jobs.join(processes) == [EXIT_INTERRUPTED] * 2
    run = jobs.run_of(tmp_path / "cut")
    assert "valid" not in (run / "loss.csv").read_text()
    cut = jobs.config(tmp_path / "cut", **fields, resume=find_latest_state(run))
    assert jobs.train_by(2, cut, StopsRankOneInValidation, *what) == run
    jobs.assert_same_runs(run, whole_run)


class NanOnRankOne(jobs.Trainer):
    def model_forward(self, model, batch, device):
        loss = super().model_forward(model, batch, device)
        is_bad = model.training and self._workers.rank == 1
        self.calls = getattr(self, "calls", 0) + model.training
        return loss * math.inf if is_bad and self.calls in (2, 4, 5) else loss


def train_with_nans(folder):
    """Twice: three bad losses in a row would be too many, and two are."""
    with process_group(backend="gloo") as run_vars:
        for most in (3, 2):
            fields = {"batches": 10, "max_non_finite_steps": most, "batch_size": 2}
            cfg = jobs.config(folder / str(most), workers=2, **fields)
            trainer = NanOnRankOne(cfg, run_vars, CoreTrainerOptions(display_progress=False))
            with contextlib.nullcontext() if most == 3 else pytest.raises(NonFiniteLossError):
                trainer.train(jobs.Ids(worker_id=run_vars.rank, num_workers=2), jobs.Ids(10))


def test_a_bad_loss_of_one_worker_is_left_out_by_all_and_too_many_end_all(tmp_path):
    assert jobs.join(jobs.start(train_with_nans, 2, tmp_path)) == [0, 0]
    run = jobs.run_of(tmp_path / "3")
    log = (run / "train.log").read_text()
    assert "loss inf on rank 1, batch 1 (1 in a row)" in log
    assert "loss inf on rank 1, batch 4 (2 in a row)" in log
    states = jobs.final_state(run)
    assert all(torch.isfinite(w).all() for w in states[0]["model"].values())
    assert states[1]["position"]["applied"] == 10 - 3
    assert "NonFiniteLossError" in (jobs.run_of(tmp_path / "2") / "config.yaml").read_text()


# -- Starting ------------------------------------------------------------------------------------


class OtherStages(jobs.Trainer):
    """Builds what this machine has, as Mamba-1 where `mamba_ssm` is missing."""

    def init_model(self):
        model = super().init_model()
        model.logits[1] = torch.nn.Linear(8, 8) if self._workers.rank else torch.nn.GELU()
        return model

    def configure_stage_types(self, model):
        return [type(model.logits[1]).__name__]


class WithData(jobs.Trainer):
    """Has another worker's data one sample longer."""

    def __init__(self, cfg, run_vars, options):
        super().__init__(cfg, run_vars, options)
        training = jobs.Ids(jobs.SAMPLES + run_vars.rank, run_vars.rank, 2)
        self.train(training, jobs.Ids(10))


REFUSED = {
    "settings": "train.batch_size: 4 -> 5",
    "models": "do not train the same: stages: ['GELU'] -> ['Linear']; parameters: 344",
    "data": "rank 0 and rank 1 do not train the same: training_data",
    "no seed": "not refused",
}


def start_in_many_ways(folder):
    """Note the errors of what cannot be trained, and a number that is drawn without a seed."""
    with process_group(backend="gloo") as run_vars:
        sizes = {"batch_size": 4 + run_vars.rank}
        ways = {
            "settings": (jobs.Trainer, sizes),
            "models": (OtherStages, {}),
            "data": (WithData, {}),
            "no seed": (jobs.Trainer, {"seed": None}),
        }
        notes = {}
        for name, (trainer, fields) in ways.items():
            notes[name] = "not refused"
            cfg = jobs.config(folder / "out", workers=2, **fields)
            try:
                trainer(cfg, run_vars, CoreTrainerOptions(display_progress=False))
            except ValueError as error:
                notes[name] = str(error)
        notes["drawn"] = float(torch.rand(()))
        (folder / str(run_vars.rank)).write_text(json.dumps(notes))


def test_what_workers_do_not_have_in_common_is_refused_by_name_on_all(tmp_path):
    assert jobs.join(jobs.start(start_in_many_ways, 2, tmp_path)) == [0, 0]
    notes = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for name, message in REFUSED.items():
        assert all(message in of_rank[name] for of_rank in notes), name
    assert not (tmp_path / "out").exists()
    assert notes[0]["drawn"] != notes[1]["drawn"], "without a seed"


def start_without_data(folder):
    """The error that a worker ends with."""
    with contextlib.suppress(Exception):
        try:
            with process_group(backend="gloo") as run_vars:
                if run_vars.rank == 1:
                    raise FileNotFoundError("no folder 'data' on this machine")
                jobs.Trainer(jobs.config(folder, workers=2), run_vars)
        except Exception as error:
            (folder / os.environ["RANK"]).write_text(f"{type(error).__name__}: {error}")
            raise


def test_a_worker_that_fails_while_starting_ends_all_with_its_message(tmp_path):
    jobs.join(jobs.start(start_without_data, 2, tmp_path))
    main, other = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert other == "FileNotFoundError: no folder 'data' on this machine"
    assert main == f"RuntimeError: another process failed: rank 1: {other}"


# -- Failing -------------------------------------------------------------------------------------


def train_on_an_own_disk(cfg):
    with process_group(backend="gloo") as run_vars:
        folder = os.path.join(cfg.io.output_dir, str(run_vars.rank))
        os.mkdir(folder)
        os.chdir(folder)
        cfg.io.output_dir = "runs"
        made = jobs.Trainer(cfg, run_vars, CoreTrainerOptions(display_progress=False))
        best = made.train(jobs.Ids(), jobs.Ids(10)).state_dict()
        written = torch.load(os.path.join("..", "0", made._folder.path, "tiny_top1.pth"))
        assert jobs.same(dict(best), written["MODEL"])


def test_workers_of_another_machine_get_the_best_model_without_a_common_disk(tmp_path):
    cfg = jobs.config(tmp_path, workers=2, batches=4, batch_size=2)
    assert jobs.join(jobs.start(train_on_an_own_disk, 2, cfg)) == [0, 0]


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

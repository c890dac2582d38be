"""A run that is asked to stop, by whatever signal and whoever else it reaches, saves first."""

import os
import signal
import time

import pytest

from mblm.train.core.interrupt import (
    EXIT_INTERRUPTED,
    Requests,
)
from mblm.train.core.training_state import find_latest_state, list_states

from . import jobs


class SlowLoading(jobs.Ids):
    """Is waited for by the trainer, so that a signal comes while it does."""

    def get_sample(self, from_idx):
        time.sleep(0.01)
        return super().get_sample(from_idx)


class LoadsInProcesses(jobs.Trainer):
    method = "fork"

    def get_train_dataloader(self, dataset, **kwargs):
        return super().get_train_dataloader(
            dataset, num_workers=2, prefetch_factor=1, multiprocessing_context=self.method
        )


class LoadsByAServer(LoadsInProcesses):
    method = "forkserver"


def train_as_a_group(cfg, trainer):
    os.setsid()
    jobs.alone(trainer, cfg).train(SlowLoading(400), jobs.Ids(10))


@pytest.mark.parametrize(
    ("number", "trainer"),
    [
        (signal.SIGTERM, LoadsInProcesses),
        (signal.SIGUSR1, LoadsInProcesses),
        pytest.param(signal.SIGTERM, LoadsByAServer, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_processes_of_the_loader_too_loses_nothing(tmp_path, number, trainer):
    cfg = jobs.config(tmp_path, batches=100, validate_amount=1, log_train_loss_amount=100)
    (process,) = jobs.start(train_as_a_group, 1, cfg, trainer)
    while not any("train" in file.read_text() for file in tmp_path.glob("*/loss.csv")):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert jobs.join([process]) == [EXIT_INTERRUPTED]
    run = jobs.run_of(tmp_path)
    state = find_latest_state(run)
    assert int(state.name.removeprefix("step_")) == len(jobs.losses(run)) - 1


class Fails(LoadsInProcesses):
    def model_forward(self, model, batch, device):
        raise RuntimeError("out of luck")


def test_a_run_that_fails_does_not_wait_for_the_processes_of_its_loader(tmp_path):
    (process,) = jobs.start(train_as_a_group, 1, jobs.config(tmp_path), Fails)
    assert jobs.join([process]) == [1]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_stops_unless_it_is_ignored(number):
    before = signal.getsignal(number)
    try:
        for handler, seen in ((signal.SIG_DFL, number), (signal.SIG_IGN, None)):
            signal.signal(number, handler)
            with Requests(None, 0) as requests:
                signal.raise_signal(number)
                assert requests.after_batch(is_last=False) == (seen, False)
            assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


def test_states_are_saved_by_time_and_change_nothing(tmp_path):
    class Fails(jobs.Trainer):
        def model_forward(self, model, batch, device):
            if self._folder.path.joinpath("loss.csv").read_bytes().count(b"train") == 7:
                raise RuntimeError("power is off")
            return super().model_forward(model, batch, device)

    fields = {"batches": 12, "validate_amount": 1, "save_every_minutes": 1e-9}
    trainer = jobs.alone(Fails, jobs.config(tmp_path, **fields))
    with pytest.raises(RuntimeError, match="power"):
        trainer.train(jobs.Ids(), jobs.Ids(10))
    run = jobs.run_of(tmp_path)
    assert [state.name for state in list_states(run)] == ["step_00000006", "step_00000007"]
    cfg = jobs.config(tmp_path, **fields, resume=find_latest_state(run))
    jobs.alone(jobs.Trainer, cfg).train(jobs.Ids(), jobs.Ids(10))

    fields["save_every_minutes"] = 0
    whole = jobs.alone(jobs.Trainer, jobs.config(tmp_path / "whole", **fields))
    whole.train(jobs.Ids(), jobs.Ids(10))
    assert [state.name for state in list_states(whole._folder.path)] == ["step_00000012"]
    assert jobs.losses(run) == jobs.losses(whole._folder.path)


class HastyOnRankOne(jobs.Trainer):
    """Has workers whose clocks differ."""

    def __init__(self, cfg, run_vars, options):
        super().__init__(cfg, run_vars, options)
        cfg.io.save_every_minutes = 1e-9 if run_vars.rank else 0

    def _save(self, run):
        with (self._folder.path / f"{self._workers.rank}.txt").open("a") as file:
            file.write(f"{run.position.step} ")
        super()._save(run)


def test_workers_save_together_whose_clock_ever_it_is(tmp_path):
    cfg = jobs.config(tmp_path, workers=2, batches=5, validate_amount=1, batch_size=2)
    run = jobs.train_by(2, cfg, HastyOnRankOne)
    saved = (run / "0.txt").read_text()
    assert saved == (run / "1.txt").read_text()
    assert {"2", "5"} <= set(saved.split())

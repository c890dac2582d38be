"""What a run tells of itself besides its losses: speed, memory, gradients, what it writes."""

import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

from mblm.data.types import ModelMode
from mblm.train.core.config import CSVMetricsEntry
from mblm.train.core.hooks import TrainerHooks
from mblm.train.core.parallel import Workers
from mblm.train.core.rng import get_rng, set_rng
from mblm.train.core.run import Run
from mblm.train.core.run_folder import RunFolder
from mblm.train.core.telling import tell

T = TypeVar("T")
Hooks: TypeAlias = TrainerHooks[Any, Any, Any, Any, Any]

SAMPLES, ELEMENTS = 16, 1 << 18
"""At most so many of the validation data tell the losses by position."""


class Observer:
    """Measures the batches between two points that are logged, and writes what they came to.

    The workers call its methods together; the main one writes.

    Args:
        workers, folder, log: The run's.
        unit: What an element is; of bytes, losses are logged in bits.
        elements: Elements of a batch, all workers together.
    """

    def __init__(
        self,
        workers: Workers,
        folder: RunFolder,
        log: logging.Logger,
        unit: str,
        elements: int,
    ) -> None:
        self._workers = workers
        self._folder = folder
        self._log = log
        self._unit = unit
        self._elements = elements
        self._begin = self._batch_began = time.perf_counter()
        self._forget()

    def _forget(self) -> None:
        self._batches, self._seconds, self._waited = 0, 0.0, 0.0

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The items; notes how long each was waited for."""
        self._batch_began = time.perf_counter()
        for item in items:
            self._waited += time.perf_counter() - self._batch_began
            yield item
            self._batch_began = time.perf_counter()

    def batch_done(self) -> None:
        """Note that a batch is trained on; what follows until the next one does not count."""
        self._seconds += time.perf_counter() - self._batch_began
        self._batches += 1

    def step(
        self,
        done: int,
        step: int,
        losses: Sequence[torch.Tensor],
        rates: Sequence[float],
        norm: float,
    ) -> None:
        """Log a step, over all since the last one that was logged.

        Args:
            done: Batches of this run.
            step: The cumulative index of the last of them.
            losses: This worker's losses of the step's batches; their mean counts, over all workers.
            rates: The learning rates of the optimizer's groups.
            norm: The norm of the gradient.
        """
        finite = [value for value in map(float, losses) if math.isfinite(value)]
        total, count = self._workers.sum(sum(finite), len(finite))
        took = self._seconds  # nothing before the first step is done
        self._write(
            ModelMode.TRAIN,
            done,
            step,
            total / count if count else math.nan,
            {f"learning rate/{n}": rate for n, rate in enumerate(rates) if rate != rates[0]},
            lr=rates[0],
            gradient_norm=norm,
            elements_per_second=self._batches * self._elements / took if took else None,
            waiting=self._waited / took if took else None,
            memory_max=_peak_memory(self._workers),
        )
        self._forget()

    def validation(self, hooks: Hooks, run: Run, loss: float) -> None:
        """Log a validation: its loss, also by position where loggers are, and what is written.

        The main worker's model does both; training goes on as if it had not, also where it cannot.
        """
        done, step, positions = run.position.done, run.position.step, list[float]()
        writes = step - 1 in run.plan.sample_points
        logs = self._workers.from_main(bool(self._folder.loggers))
        rng = get_rng()
        shows = writes or logs
        state = run.model.full_state() if shows and run.model.is_sharded else None
        if shows and self._workers.is_main:
            try:
                model = run.model.base if state is None else _filled(hooks.init_model(), state)
                model.eval()
                if logs:
                    positions = self._losses_by_position(hooks, run, model)
                if writes:
                    self._let_write(hooks, run, model)
            except Exception as error:  # such as a GPU that has no memory left: the run goes on
                what = f"What the model does after batch {step - 1} is not shown"
                tell(self._log, f"{what}: {type(error).__name__}: {error}")
        set_rng(rng)
        by_position = {
            f"{self._name('loss')} by position/{place:03d}": self._value(at)
            for place, at in enumerate(positions)
        }
        self._write(ModelMode.VALID, done, step - 1, loss, by_position)
        run.model.call.train()

    def _losses_by_position(self, hooks: Hooks, run: Run, model: nn.Module) -> list[float]:
        data = run.validation.dataset
        count = max(1, min(SAMPLES, ELEMENTS // hooks.config.params.input_seq_len))
        if run.model.is_sharded:  # it is on a CPU, and the others wait
            count = 1
        some = [data[number] for number in range(min(count, len(data)))]
        return hooks.losses_by_position(model, some)

    def _let_write(self, hooks: Hooks, run: Run, model: nn.Module) -> None:
        step, prompts = run.position.step, hooks.config.io.sample_prompts
        texts = hooks.generate_samples(model, prompts, run.lineage.seed)
        self._folder.write_samples(step, prompts, texts)
        for prompt, text in zip(prompts, texts, strict=True):
            self._log.info(f"[{step - 1}] sample: {prompt!r} + {text!r}")

    def _write(
        self,
        kind: ModelMode,
        done: int,
        step: int,
        loss: float,
        more: dict[str, float],
        **columns: float | None,
    ) -> None:
        if not self._workers.is_main:
            return
        row = CSVMetricsEntry(
            cum_batch=step,
            kind=kind.value,
            elements_seen=done * self._elements,
            seconds=round(time.perf_counter() - self._begin, 3),
            loss=loss,
            **columns,
        )
        values = {
            f"{self._name('mean loss')}/{kind.value}": self._value(loss),
            f"{self._unit}s seen": row.elements_seen,
            "gradient norm": row.gradient_norm,
            f"{self._unit}s per second": row.elements_per_second,
            "share of time waiting for data": row.waiting,
            "peak memory in GiB": row.memory_max,
            **more,
        }
        told = {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
        self._folder.write_metrics(row, told)

    def _name(self, loss: str) -> str:
        return "bits per byte" if self._unit == "byte" else loss

    def _value(self, loss: float) -> float:
        return loss / math.log(2) if self._unit == "byte" else loss


def _filled(model: nn.Module, state: dict[str, Any]) -> nn.Module:
    model.load_state_dict(state)
    return model


def _peak_memory(workers: Workers) -> float | None:
    """The most that this process has had, of the device or on a CPU in all, in GiB, if known."""
    if workers.device_type == "cuda":
        return torch.cuda.max_memory_allocated(workers.device) / 2**30
    try:
        import resource
    except ImportError:  # on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

"""What a run tells of itself besides its losses: speed, memory, gradients, what it writes."""

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
from mblm.train.core.run import Run
from mblm.train.core.run_folder import RunFolder
from mblm.train.core.telling import tell
from mblm.utils.atomic import atomic_write
from mblm.utils.seed import get_rng, set_rng

T = TypeVar("T")
Hooks: TypeAlias = TrainerHooks[Any, Any, Any, Any, Any]

SAMPLES, ELEMENTS = 16, 1 << 18
"""At most so many of the validation data tell the losses by position."""


class Observer:
    """Measures the batches between two points that are logged, and writes what they came to.

    The workers call its methods together; the main one writes. Losses of bytes are logged in bits.
    """

    def __init__(self, folder: RunFolder, unit: str, elements: int) -> None:
        self._folder = folder
        self._workers = folder.workers
        self._unit = unit
        self._elements = elements  # of a batch, all workers together
        self._nats, self._name = (math.log(2), "bits per byte") if unit == "byte" else (1.0, "loss")
        self._begin = self._batch_began = time.perf_counter()
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
        self, run: Run, losses: Sequence[torch.Tensor], rates: Sequence[float], norm: float
    ) -> None:
        """Log a step: this worker's losses of its batches, the groups' rates, the gradient's norm.

        The loss is the mean over all workers, the speed that since the last step that was logged.
        """
        finite = [value for value in map(float, losses) if math.isfinite(value)]
        total, count = self._workers.sum(sum(finite), len(finite))
        took = self._seconds  # nothing before the first step is done
        self._write(
            ModelMode.TRAIN,
            run,
            total / count if count else math.nan,
            {f"learning rate/{n}": rate for n, rate in enumerate(rates) if rate != rates[0]},
            lr=rates[0],
            gradient_norm=norm,
            elements_per_second=self._batches * self._elements / took if took else None,
            waiting=self._waited / took if took else None,
            memory_max=_peak_memory(self._workers),
        )
        self._batches, self._seconds, self._waited = 0, 0.0, 0.0

    def validation(self, hooks: Hooks, run: Run, loss: float) -> None:
        """Log a validation: its loss, also by position where loggers are, and what is written.

        The main worker's model does both; training goes on as if it had not, also where it cannot.
        """
        last, positions = run.position.step - 1, list[float]()
        writes = last in run.plan.sample_points
        logs = self._workers.from_main(bool(self._folder.loggers))
        rng = get_rng()
        state = run.model.full_state() if (writes or logs) and run.model.is_sharded else None
        if (writes or logs) and self._workers.is_main:
            try:
                model = run.model.base
                if state is not None:
                    model = hooks.init_model()
                    model.load_state_dict(state)
                model.eval()
                if logs:
                    data, length = run.validation.dataset, hooks.config.params.input_seq_len
                    # A model that is sharded is on a CPU now, and the others wait.
                    count = 1 if state is not None else max(1, min(SAMPLES, ELEMENTS // length))
                    some = [data[number] for number in range(min(count, len(data)))]
                    positions = hooks.losses_by_position(model, some)
                if writes:
                    self._let_write(hooks, run, model)
            except Exception as error:  # such as a GPU that has no memory left: the run goes on
                what = f"What the model does after batch {last} is not shown"
                tell(self._folder.log, f"{what}: {type(error).__name__}: {error}")
        set_rng(rng)
        by_position = {
            f"{self._name} by position/{place:03d}": at / self._nats
            for place, at in enumerate(positions)
        }
        self._write(ModelMode.VALID, run, loss, by_position)
        run.model.call.train()

    def _let_write(self, hooks: Hooks, run: Run, model: nn.Module) -> None:
        """Write what the model writes after prompts to ``samples/step_<n>.txt``, and log it."""
        step, prompts = run.position.step, hooks.config.io.sample_prompts
        texts = hooks.generate_samples(model, prompts, run.lineage.seed)
        told = []
        for prompt, text in zip(prompts, texts, strict=True):
            told.append(f"{prompt}{text.decode(errors='replace')}")
            self._folder.log.info(f"[{step - 1}] sample: {prompt!r} + {text!r}")
            self._folder.loggers.log_text(f"sample {len(told)}", told[-1], step - 1)
        (self._folder.path / "samples").mkdir(exist_ok=True)
        with atomic_write(self._folder.path / "samples" / f"step_{step:08d}.txt") as file:
            file.write("\n\n---\n\n".join([*told, ""]).encode())

    def _write(
        self,
        kind: ModelMode,
        run: Run,
        loss: float,
        more: dict[str, float],
        **columns: float | None,
    ) -> None:
        if not self._workers.is_main:
            return
        row = CSVMetricsEntry(
            cum_batch=run.position.step - 1,
            kind=kind.value,
            elements_seen=run.position.done * self._elements,
            seconds=round(time.perf_counter() - self._begin, 3),
            loss=loss,
            **columns,
        )
        values = {
            f"{'mean ' * (self._unit != 'byte')}{self._name}/{kind.value}": loss / self._nats,
            f"{self._unit}s seen": row.elements_seen,
            "gradient norm": row.gradient_norm,
            f"{self._unit}s per second": row.elements_per_second,
            "share of time waiting for data": row.waiting,
            "peak memory in GiB": row.memory_max,
            **more,
        }
        told = {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
        self._folder.loggers.log(row.kind, told, row.cum_batch)
        self._folder.metrics.write_row(row)


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

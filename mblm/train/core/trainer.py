"""The trainer: what a subclass gives, trained in a loop that loses nothing."""

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from datetime import datetime
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from mblm.data.datasets import DistributedDataset
from mblm.data.types import ModelMode
from mblm.train.core.config import TIoConfig, TModelParams, TTrainConfig
from mblm.train.core.evaluation import Check, Evaluation, Sources
from mblm.train.core.hooks import CoreTrainerOptions, TBatch, TModel
from mblm.train.core.interrupt import Requests, TrainingInterrupted
from mblm.train.core.iter import EpochCyclerYield, epoch_cycler
from mblm.train.core.observer import Observer
from mblm.train.core.profiling import check_profile, profiled
from mblm.train.core.run import NonFiniteLossError, Position, Run
from mblm.train.core.starting import TrainerStart
from mblm.train.core.telling import Progress
from mblm.train.core.training_state import find_latest_state, load_training_state
from mblm.utils.seed import get_rng, set_rng

__all__ = ["CoreTrainer", "CoreTrainerOptions"]


class CoreTrainer(TrainerStart[TModel, TBatch, TModelParams, TTrainConfig, TIoConfig]):
    """Trains, validates and tests; a subclass says what, by the methods of `TrainerHooks`.

    All workers construct it with one configuration and call the same methods. What a run writes is
    told in `RunFolder`; it writes nothing before all that it was given, and the state that it goes
    on from, was found to fit. It can be stopped at any moment and goes on from its training state.

    Args:
        config: The run's configuration.
        run_vars: This worker, as ``process_group`` gives it.
        options: The program's wishes.

    Raises:
        ValueError: Several workers without a process group, or nothing to resume from.
    """

    # -- Faces -----------------------------------------------------------------------------------

    def train(
        self,
        train_dataset: DistributedDataset[TBatch],
        valid_dataset: DistributedDataset[TBatch],
    ) -> TModel | None:
        """Train for as long as configured.

        Args:
            train_dataset: This worker's part of the training data.
            valid_dataset: All validation data, the same on every worker.

        Returns:
            The model with the weights of the lowest validation loss, on every worker; with the
            last weights if no model is saved.

        Raises:
            ValueError: It cannot be trained so, or not go on; nothing has been written.
            TrainingInterrupted: A signal came; the state is saved. Exits with 75.
            NonFiniteLossError: The loss was NaN or infinite too often, or in a whole validation
                before any model was ranked.
            ValueError: There is nothing to learn: no batch, or no step with a gradient.
            OSError: Nothing more can be saved; the last training state is whole.
        """
        run = self._start(train_dataset, valid_dataset)
        done = run.position.done // self.config.train.gradient_accumulate_every
        check_profile(self.options.profile_steps, run.plan.gradient_steps - done)
        with self.holding():
            self._begin_writing()
            try:
                self._train_to_end(run, train_dataset, valid_dataset)
            except BaseException as error:
                self._folder.summary.error = f"{type(error).__name__}: {error}"
                with suppress(OSError):  # such as the disk being full, which is the error, then
                    self._folder.dump_config()
                self._folder.loggers.close()
                if isinstance(error, TrainingInterrupted):
                    self._say(str(error))
                else:
                    self._log.critical(f"Training failed: {error}", exc_info=error)
                raise
            return self._load_best()

    def test(self, test_dataset: DistributedDataset[TBatch], model: nn.Module) -> None:
        """Log a model's loss on test data; called by all workers, each with all the data.

        Raises:
            TrainingInterrupted: A signal came between two batches. Exits with 75.
        """
        with self.holding(), Requests(self._workers.group, save_every=0) as requests:
            self._begin_writing()
            sources = Sources(test_dataset, self.get_test_dataloader)
            is_ours = model is self._parallel.base
            callee = self._parallel.to_evaluate if is_ours else model
            place, check = Position(elements_seen=-1), partial(requests.check, "in the test")
            try:
                result = self._evaluate(callee, sources, place, "Test", check)
            except TrainingInterrupted as stopped:
                self._say(str(stopped))
                self._folder.loggers.close()
                raise
            self._test_loss = result.loss
            self._folder.write_evaluation(ModelMode.TEST, result, place)

    def avg_gradient_value(self) -> float:
        """Mean over the parameters of the mean entry of their gradients."""
        return self._parallel.mean_gradient()

    # -- The loop --------------------------------------------------------------------------------

    def _train_to_end(
        self,
        run: Run,
        train_dataset: DistributedDataset[TBatch],
        valid_dataset: DistributedDataset[TBatch],
    ) -> None:
        """Train, again after a failure where that is configured; the folder tells how it ended."""
        self._announce(run)
        self._folder.lineage = run.lineage
        self._folder.summary.training_start = datetime.now().isoformat()
        self._folder.dump_config()
        if self._restores and not self.options.skip_validation:
            rng = get_rng(*run.validation.generators)
            result = self._rank(run, place := "Validation of the weights that it starts from")
            self._log.info(f"{place}: loss {result.loss}")
            set_rng(rng, *run.validation.generators)
        restarts = self.options.max_train_restarts if self._workers.world_size == 1 else 0
        while True:
            if self._resumed is not None:
                self._log.info(f"Resuming exactly from {self._resumed.path}")
                self._folder.rewind(self._resumed, goes_same_way=self._goes_same_way)
                self._resumed = None
            for note in self._notes:
                self._log.info(note)
            self._notes = []
            try:
                self._train(run, train_dataset)
                break
            except Exception as error:
                state_dir = find_latest_state(self._folder.path)
                if restarts == 0 or state_dir is None:
                    raise
                self._log.critical(f"Training failed: {error}", exc_info=True)
            restarts -= 1
            self._log.info(f"{restarts} restarts are left")
            self._resumed = load_training_state(
                state_dir, self._workers, self.config.train.strategy
            )
            run = self._start(train_dataset, valid_dataset)
        self._folder.summary.error = None
        self._folder.summary.training_end = datetime.now().isoformat()
        self._folder.dump_config()

    def _train(self, run: Run, train_dataset: DistributedDataset[TBatch]) -> None:
        config, plan, position = self.config.train, run.plan, run.position

        def before_new_epoch(epoch: int) -> None:
            train_dataset.offset_to(epoch)
            run.batches.epoch = epoch
            if len(run.batches):
                self._log.info(f"Epoch {epoch}")

        items = epoch_cycler(
            run.batches,
            before_new_epoch=before_new_epoch,
            start_epoch=position.epoch,
            start_batch=position.batch,
            max_iters=plan.batches - position.done,
        )
        run.model.call.train()
        elements = self._elements_per_batch()
        self._observer = Observer(self._folder, self.progress_unit, elements)
        requests = Requests(self._workers.group, 60 * self.config.io.save_every_minutes)
        progress = Progress(
            plan.batches,
            elements,
            done=position.done,
            unit=self.progress_unit,
            bar=self.options.display_progress and self._workers.is_main,
            say=self._say,
            interval=self.options.train_prog_min_interval_seconds,
        )
        profile = profiled(
            self.options.profile_steps if self._workers.is_main else 0,
            self._folder.path / "profile",
            is_cuda=self._workers.device_type == "cuda",
            say=self._say,
        )
        with requests, progress, profile as step_done, closing(run.batches), closing(items):
            if position.validates_after is not None:  # where the run was stopped
                self._validate(run, requests)
            for item in self._observer.waiting(items):
                index = position.step
                is_last = position.done + 1 == plan.batches
                completes = (position.done + 1) % config.gradient_accumulate_every == 0
                loss = self._forward_backward(run, item.item, completes=completes)
                position.advance(item.next_epoch, item.next_batch, plan.elements_per_batch)
                if index in plan.log_points:
                    place = position, item.epoch, item.batch
                    rate = float(run.optimizer.param_groups[0]["lr"])
                    self._folder.write_loss(ModelMode.TRAIN.value, float(loss), *place, rate)
                if completes:
                    self._step(run, item)
                    step_done()
                self._observer.batch_done()
                validates = index in plan.validation_points and not self.options.skip_validation
                if validates:
                    position.validates_after = item.epoch, item.batch
                    self._validate(run, requests)
                signal, is_due = requests.after_batch(is_last=is_last)
                if validates or is_last or signal or is_due:
                    self._save(run)
                    requests.saved()
                progress.update(loss)
                if signal and not is_last:
                    raise TrainingInterrupted(
                        f"Stopped by {signal.name} after batch {index}; the state is saved"
                    )
        self._log.info(f"Finished training: {position.elements_seen} elements on this worker")

    # -- Training and validating -----------------------------------------------------------------

    def _forward(self, model: nn.Module, batch: TBatch) -> torch.Tensor:
        # Not around a loader: autocast has no type for the float16 that datasets collate.
        autocast = partial(torch.autocast, self._workers.device_type, self._dtype)
        with nullcontext() if self._dtype == torch.float32 else autocast():
            return self.model_forward(cast(TModel, model), batch, self._device)

    def _forward_backward(self, run: Run, batch: TBatch, *, completes: bool) -> torch.Tensor:
        """Add a batch's gradients to those there are; returns the loss, a scalar on the device."""
        measures = run.position.done < (self.options.track_first_fw_bw_exec_times or 0)
        clock = self._workers.clock if measures else time.perf_counter
        with run.model.accumulate(is_last=completes):
            start = clock()
            loss = self._forward(run.model.call, batch)
            forward = clock()
            run.backward(loss, self._divisor(run, batch))
            backward = clock()
        if measures:
            self._folder.write_timemem(
                ModelMode.TRAIN,
                cum_batch=run.position.step,
                num_items=self.config.train.batch_size,
                fw_time=forward - start,
                bw_time=backward - forward,
            )
        return loss.detach()

    def _divisor(self, run: Run, batch: TBatch) -> float:
        """What to divide a batch's loss by for its share in a step, but for `_factor`."""
        if self.config.train.loss_average == "batches":
            return float(self.config.train.gradient_accumulate_every)
        entries = self.count_entries(batch)
        run.position.entries += entries
        return 1 / entries if entries else math.inf

    def _factor(self, run: Run) -> float:
        """What to multiply a step's gradients by: how many entries it has is not known before."""
        if self.config.train.loss_average == "batches":
            return 1.0
        (entries,) = self._workers.sum(run.position.entries)
        run.position.entries = 0
        return self._workers.world_size / max(entries, 1)

    def _step(self, run: Run, item: EpochCyclerYield[TBatch]) -> None:
        """Apply the gradients, or leave them out and judge whether to go on."""
        every, now = self.config.train.gradient_accumulate_every, run.position.step
        past, upcoming = range(now - every, now), range(now, now + every)
        is_told_next = not run.plan.log_points.isdisjoint(upcoming)  # with the next one's losses
        measure = self.avg_gradient_value if is_told_next else None
        losses, run.losses = run.losses, []
        rates = [float(group["lr"]) for group in run.optimizer.param_groups]
        norm = run.step(measure, self._factor(run))
        if not run.plan.log_points.isdisjoint(past):
            self._observer.step(run, losses, rates, norm)
        run.judge(norm, losses, f"batch {item.batch} of epoch {item.epoch}", self._tell)

    def _validate(self, run: Run, requests: Requests) -> None:
        """Validate, log the loss, and keep the model if it is among the best.

        Stopped on the way, the run goes on with the whole validation, as it was before it.
        """
        position, generators = run.position, run.validation.generators
        rng, after = get_rng(*generators), f"after batch {position.step - 1}"
        check = partial(requests.check, f"in the validation {after}")
        try:
            result = self._rank(run, f"Validation {after}", check)
        except TrainingInterrupted:
            set_rng(rng, *generators)
            self._save(run)
            raise
        assert position.validates_after is not None
        (epoch, batch), position.validates_after = position.validates_after, None
        self._folder.write_evaluation(ModelMode.VALID, result, position, epoch, batch)
        self._observer.validation(self, run, result.loss)
        if self.config.io.num_models_to_save and not self._folder.best.entries:
            raise NonFiniteLossError(f"No model can be ranked. Validation: {result.trouble()}")

    def _rank(self, run: Run, place: str, check: Check = lambda: None) -> Evaluation:
        """Keep the model if its validation loss is among the best."""
        position = run.position
        result = self._evaluate(run.model.to_evaluate, run.validation, position, place, check)
        if math.isfinite(result.loss):
            left_out, state = len(result.left_out), run.model.full_state()
            self._folder.add_model(result.loss, left_out, state, position)
        return result

    def _evaluate(
        self, model: nn.Module, sources: Sources, position: Position, place: str, check: Check
    ) -> Evaluation:
        """The mean loss over the sources' batches, unless a check between them raises."""
        options = self.options
        show: Callable[[range], Any] = partial(
            tqdm,
            desc="Evaluating",
            leave=False,
            disable=not (options.display_progress and self._workers.is_main),
            mininterval=options.valid_prog_min_interval_seconds,
        )
        model.eval()
        with torch.no_grad():  # inference mode would reach what FSDP gathers
            result = sources.evaluate(
                partial(self._forward, model),
                self.count_entries,
                self._workers,
                max_batches=self.config.train.max_eval_steps,
                in_step=self._parallel.is_sharded,
                epoch=position.step,
                show=show,
                check=check,
            )
        if trouble := result.trouble():
            self._tell(f"{place}: {trouble}")
        if options.track_first_fw_bw_exec_times:
            self._folder.write_timemem(
                ModelMode.VALID,
                cum_batch=position.step - 1,
                num_items=position.elements_seen,
                fw_time=result.seconds,
                bw_time=None,
            )
        return result

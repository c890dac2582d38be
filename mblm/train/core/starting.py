"""A trainer around its training: what it starts from, saves and says.

Everything is read, made and checked first, and only then written.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch

from mblm import __version__
from mblm.data.datasets import DistributedDataset
from mblm.train.core.config import (
    GenericEntryConfig,
    Lineage,
    TIoConfig,
    TModelParams,
    TTrainConfig,
)
from mblm.train.core.evaluation import Sources
from mblm.train.core.hooks import CoreTrainerOptions, TBatch, TModel, TrainerHooks
from mblm.train.core.lineage import (
    check_same_as_before,
    check_same_on_all,
    facts_of,
    lineage_of,
)
from mblm.train.core.loggers import logger_names
from mblm.train.core.parallel import ParallelModel, Workers
from mblm.train.core.run import Position, Run
from mblm.train.core.run_folder import RunFolder, hold_run, new_run_dir
from mblm.train.core.sampling import TrainBatches
from mblm.train.core.schedule import check_start, plan_run
from mblm.train.core.telling import format_loss, tell
from mblm.train.core.training_state import (
    SavedState,
    load_training_state,
    prune_states,
    run_dir_of,
    save_training_state,
    state_to_resume,
)
from mblm.utils import cuda
from mblm.utils.checkpoint import load_model_state, read_checkpoint
from mblm.utils.distributed import ElasticRunVars
from mblm.utils.say import say
from mblm.utils.seed import seed_everything


class TrainerStart(TrainerHooks[TModel, TBatch, TModelParams, TTrainConfig, TIoConfig]):
    """Makes what a trainer trains with; `CoreTrainer` says how it is called."""

    def __init__(
        self,
        config: GenericEntryConfig[TModelParams, TTrainConfig, TIoConfig],
        run_vars: ElasticRunVars,
        options: CoreTrainerOptions | None = None,
    ) -> None:
        self.config = config
        self.options = options or CoreTrainerOptions()
        self._workers = Workers(run_vars)
        self._device = self._workers.device
        # Without instructions for bfloat16, which few CPUs have, autocast is slower there.
        given = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
        is_auto = config.train.precision == "auto" and self._workers.device_type == "cuda"
        self._dtype = self.options.amp_dtype if is_auto else given
        plan_run(config, self._workers.world_size)  # refuses what cannot be planned
        if self._workers.is_main:
            logger_names(config.io)
        amount, trainer = config.io.sample_amount, type(self)
        if amount and trainer.generate_samples is TrainerHooks.generate_samples:
            raise ValueError(
                f"io.sample_amount: {trainer.__name__} does not generate; expected 0, got {amount}"
            )
        self._held: ExitStack | None = None
        self._path: Path | None = None
        self._is_held = False
        self._test_loss: float | None = None
        self._resumed: SavedState | None = None
        self._goes_same_way = True
        if (state_dir := state_to_resume(config.resume)) is not None:
            self._resumed = load_training_state(state_dir, self._workers, config.train.strategy)

        seed = config.train.seed
        if seed is not None:
            seed_everything(seed)
        model = self.init_model()
        self._notes: list[str] = []  # for the log, which is in the folder
        self._restores = config.resume is not None and self._resumed is None
        if self._restores:
            self._load_checkpoint(model)
        self._parameters = self.configure_count_parameters(model)
        self._stages = self.configure_stage_types(model)
        # Here: a worker that has failed, or has another model, is noticed before nccl waits for it.
        check_same_on_all(
            {
                **facts_of(config),
                "package": __version__,
                "precision": self._dtype,
                "skip_validation": self.options.skip_validation,
                "stages": self._stages,
                "parameters": self._parameters[0],
            },
            self._workers,
        )
        drawn = int(torch.randint(2**31, ())) if seed is None else seed
        self._seed = self._workers.from_main(drawn)
        if self._resumed is not None:
            self._seed = self._resumed.common["seed"]
        is_new = self._resumed is None or not self._resumed.is_exact
        if is_new and (seed is not None or self._workers.rank):  # workers draw different numbers
            seed_everything((self._seed + 1 + self._workers.rank) % 2**32)

        units = self.configure_fsdp_units(model)
        self._parallel = ParallelModel(model, self._workers, config.train, units)

    def _start(
        self, train_dataset: DistributedDataset[TBatch], valid_dataset: DistributedDataset[TBatch]
    ) -> Run:
        """Set up what trains the model, from the beginning or as a training state has it.

        Everything is checked here, on all workers, and nothing is written.
        """
        config, resume, resumed = self.config.train, self.config.resume, self._resumed
        lineage = Lineage(
            package=__version__,
            stages=self._stages,
            seed=self._seed,
            training_data=lineage_of(train_dataset),
            validation_data=lineage_of(valid_dataset),
        )
        optimizer = self.configure_optimizer(self._parallel.base.parameters())
        facts = {**facts_of(self.config, lineage), "optimizer": type(optimizer).__name__}
        if resumed is not None:
            then = resumed.manifest["facts"]
            changes = check_same_as_before(then, facts, resumed.path, exact=resumed.is_exact)
            self._notes += [f"The configuration has changed: {change}" for change in changes]
            is_of_io = all(change.startswith("io.") for change in changes)
            self._goes_same_way = resumed.is_exact and is_of_io
        train_dataset.offset_to(0)  # the epoch that has most batches
        batches = TrainBatches(self.get_train_dataloader(train_dataset))
        if len(batches) == 0:
            raise ValueError(
                f"train_dataset: not one batch of {config.batch_size} samples for each worker"
            )
        position = Position()
        if resumed is not None:
            position = Position(**resumed.own["position"])
            if not resumed.is_exact:
                then, world = resumed.manifest["facts"], self._workers.world_size
                position.share_out(
                    resumed.manifest["workers"] * then["train.batch_size"],
                    then["train.gradient_accumulate_every"],
                    world * config.batch_size,
                    config.gradient_accumulate_every,
                )
                elements = plan_run(self.config, world).elements_per_batch
                position.elements_seen = position.done * elements
        elif resume is not None:
            position.epoch, position.batch = resume.next_epoch_index, resume.next_batch_index
            position.step = len(batches) * position.epoch + position.batch
        plan = plan_run(self.config, self._workers.world_size, position.step - position.done)
        train_dataset.offset_to(position.epoch)
        if resumed is not None and not resumed.is_exact and position.batch >= len(batches):
            position.epoch, position.batch = position.epoch + 1, 0
        check_start(plan, position.done, position.epoch, position.batch, len(batches))
        run = Run(
            config,
            self._workers,
            plan,
            lineage,
            facts,
            batches,
            Sources(valid_dataset, self.get_valid_dataloader),
            self._parallel,
            optimizer,
            self.configure_scheduler(optimizer, plan.gradient_steps),
            # Of the loss; it does nothing unless the precision is half.
            torch.amp.GradScaler(self._workers.device_type, enabled=self._dtype == torch.half),
            position,
        )
        if resumed is not None:
            run.load(resumed)
        check_same_on_all(facts_of(lineage), self._workers)
        self._notes.append(
            f"Batches {position.done} to {plan.batches} of this run on each of "
            f"{self._workers.world_size} workers, {plan.gradient_steps} gradient steps in all, "
            f"from epoch {position.epoch}, batch {position.batch}"
        )
        if plan.added:
            self._notes.append(
                f"{plan.added} of {plan.batches} batches are more than train.target_elements, so "
                f"that the last step has all of its {config.gradient_accumulate_every} batches"
            )
        return run

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep the run from others from the moment that it is written to until the block ends.

        `train` and `test` do so, each for itself; around both, nobody goes on with it in between.
        """
        if self._held is not None:  # in a block around this one
            yield
            return
        try:
            with ExitStack() as self._held:
                yield
        finally:
            self._held, self._is_held = None, False

    def _begin_writing(self) -> None:
        """Make the run's folder, or go on in that of the state; called while it is to be held."""
        is_main, io = self._workers.is_main, self.config.io
        if self._path is None:
            if self._resumed is not None:
                self._path = run_dir_of(self._resumed.path)
            elif is_main:
                name = f"{io.name_model}_{self.configure_run_id()}"
                self._path = new_run_dir(Path(io.output_dir, name))
            self._path = Path(self._workers.from_main(str(self._path)))
            self._path.mkdir(parents=True, exist_ok=True)  # a node may have a disk of its own
        if is_main and self._held is not None and not self._is_held:
            self._held.enter_context(hold_run(self._path))
            self._is_held = True
        if not hasattr(self, "_folder"):  # as after one that could not be opened
            self._log = self.configure_logger(self._path, is_main)
            self._folder = RunFolder(
                self.config, self.options, self._workers, self._path, self._log, self._resumed
            )
            self._folder.summary.parameter_count, parts = self._parameters
            self._folder.dump_config()
            self._log.info(f"Model parameters: {self._parameters[0]}, ({parts})")
            self._log.info(f"Configuration: {self.config}")
            self._log.info(f"CUDA: {cuda.cuda_properties()}")

    # -- States ----------------------------------------------------------------------------------

    def _save(self, run: Run) -> None:
        """Save the training state."""
        manifest = {
            "strategy": self.config.train.strategy,
            "facts": run.facts,
            **self._folder.manifest(),
        }
        save_training_state(
            self._folder.path,
            run.position.step,
            manifest,
            {**run.common_state(), "seed": self._seed},
            run.own_state(),
            self._workers,
        )
        if self._workers.is_main:
            prune_states(self._folder.path)
        self._log.debug(f"Saved the training state after {run.position.step} batches")

    def _load_best(self) -> TModel:
        """The best model on every worker."""
        if file := self._workers.from_main(self._folder.best.best_file()):
            there = self._workers.is_main or file.exists()
            content = read_checkpoint(file, mmap=True) if there else None
            if None in self._workers.gather(content and content[1]):  # a disk of its own
                content = self._workers.from_main(content)
            assert content is not None
            self._log.info(f"The best model's validation loss: {content[1]}")
            self._parallel.load_state(content[0], is_whole=True)
        return cast(TModel, self._parallel.base)

    def _load_checkpoint(self, model: TModel) -> None:
        """Load weights only."""
        resume = self.config.resume
        assert resume is not None
        _, loss = load_model_state(
            resume.checkpoint_file,
            model,
            map_location="cpu",
            map_extend_embeddings=(
                self.migrate_embeddings_if_enabled() if resume.migrate_embeddings else None
            ),
            map_rename_modules=self.rename_modules_if_enabled() if resume.rename_modules else None,
            on_success=self._notes.append,
        )
        self._notes.append(
            f"Resuming from the weights of {resume.checkpoint_file} (loss {loss:.4f}) only: "
            "optimizer, learning rate and random numbers start anew"
        )

    # -- What is said ----------------------------------------------------------------------------

    def _announce(self, run: Run) -> None:
        """Say what is trained, on what, for how long and where it writes."""
        every, workers = self.config.train.gradient_accumulate_every, self._workers.world_size
        (count, parts), unit = self._parameters, self.progress_unit
        around = {"around them": count - sum(parts.values())} if parts else {}
        told = ", ".join(f"{name} {number:,}" for name, number in {**parts, **around}.items())
        self._say(f"Model: {count:,} parameters" + f" ({told})" * bool(told))

        training, valid = run.lineage.training_data, run.lineage.validation_data
        source = training.dataset
        if training.files:
            first, files = next(iter(training.first)), training.files
            source = f"{first if files == 1 else f'{files:,} files'}, {training.total:,} bytes"
        sizes = f"{training.size:,} {'sample' if training.in_samples else unit}s to train on"
        self._say(f"Data: {source}; {sizes}, {valid.size:,} to validate")

        done, validations = run.position.done // every, len(run.plan.validation_points)
        elements = self._elements_per_batch() * every
        steps = [
            f"{run.plan.gradient_steps:,} steps of {elements:,} {unit}s",
            f"of which {done:,} are done" * bool(done),
            f"{validations} validation{'s' * (validations != 1)}",
            f"{workers} processes" * (workers > 1),
            f"seed {self.config.train.seed}" * (self.config.train.seed is not None),
        ]
        self._say(f"Plan: {', '.join(filter(None, steps))}; writes to {self._folder.path}")
        if self._resumed is not None and not self._resumed.is_exact:
            self._say(
                "Not an exact resume: the state is of "
                f"{self._resumed.manifest['workers']} workers, this run has {workers}. Weights, "
                "optimizer and schedule go on; the data are shared out anew, so that some of this "
                "epoch's come twice or not at all"
            )

    def tell_result(self) -> None:
        """Say what came out, where it is, and what to type next; called when all is done."""
        best, folder = self._folder.best.entries, self._folder.path
        measured = {"Best validation": best[0].loss if best else None, "test": self._test_loss}
        losses = [
            f"{name}: {format_loss(loss, self.progress_unit)}"
            for name, loss in measured.items()
            if loss is not None
        ]
        self._say("; ".join([*losses, f"the run is in {folder}"]))
        if best and (command := self.configure_next_command(folder)):
            self._say(f"Next: {command}")
        self._folder.loggers.close()

    def _elements_per_batch(self) -> int:
        """Elements of a batch, all workers together."""
        train, length = self.config.train, self.config.params.input_seq_len
        return train.batch_size * length * self._workers.world_size

    def _say(self, message: str) -> None:
        """Say something that who watches wants to know."""
        self._log.info(message)
        if self._workers.is_main and self.options.announce:
            say(message)

    def _tell(self, message: str) -> None:
        """Say something once that must not be missed."""
        if self._workers.is_main:
            tell(self._log, message)

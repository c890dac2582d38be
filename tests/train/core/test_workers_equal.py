"""Any number of workers computes what one does: the same steps, losses and samples."""

import json
import os
import shutil

import pytest
import torch

from mblm.train.core.hooks import CoreTrainerOptions
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
    """Losses of the validations and the test, the last best model, and the run's folder."""
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
    run = jobs.train_by(workers, cfg, function=train_global)
    model, _ = load_model_state(run / "tiny_top1.pth", jobs.Model(0.0))
    return [float(row[6]) for row in jobs.losses(run)[1:] if row[2] != "train"], model, run


@pytest.fixture(scope="module")
def global_runs(tmp_path_factory):
    """Runs of one worker by each recipe, and of two."""
    make = tmp_path_factory.mktemp
    runs = {name: global_run(make(name), 1, **fields) for name, fields in jobs.RECIPES.items()}
    return {**runs, "of two": global_run(make("two"), 2)}


def assert_same_end(reached, expected, count):
    """The last losses and the model are the same, to rounding."""
    torch.testing.assert_close(reached[0][-count:], expected[0][-count:], rtol=1e-5, atol=1e-5)
    models = (run[1].state_dict() for run in (reached, expected))
    torch.testing.assert_close(*models, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("workers", "strategy", "recipe"),
    [(2, "ddp", "adam"), (4, "ddp", "muon"), (2, "fsdp", "adam"), (2, "fsdp", "muon")],
)
def test_any_number_of_workers_reaches_the_same_loss(
    tmp_path, global_runs, workers, strategy, recipe
):
    expected = global_runs[recipe]
    if (workers, strategy, recipe) == (2, "ddp", "adam"):
        reached = global_runs["of two"]
    else:
        reached = global_run(tmp_path, workers, strategy, **jobs.RECIPES[recipe])
    assert len(expected[0]) == 5 and expected[0][-2] < expected[0][0] - 0.05
    assert_same_end(reached, expected, 5)
    if strategy == "fsdp":
        cfg = jobs.config(tmp_path, strategy="fsdp", resume=find_latest_state(reached[2]))
        with pytest.raises(ValueError, match="saved with workers 2, this run has 1"):
            jobs.alone(jobs.Trainer, cfg)


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
        jobs.train_by(workers, cfg, trainer, function=train_same_steps)
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
def test_a_run_goes_on_with_another_number_of_workers(tmp_path, global_runs, workers, every):
    """With the same sequences a step it ends where it would have, to rounding."""
    of_two = global_runs["of two"][2]
    run = shutil.copytree(of_two, tmp_path / of_two.name)
    state = list_states(run)[0]
    assert state.name == "step_00000016"
    reached = global_run(tmp_path, workers, every=every, resume=state)
    assert reached[2] == run
    log = (run / "train.log").read_text()
    assert f"Not an exact resume: the state is of 2 workers, this run has {workers}" in log
    steps = [int(row[5]) for row in jobs.losses(run)[1:] if row[2] == "train"]
    assert steps == list(range(16 + 4 * every))
    assert_same_end(reached, global_runs["adam"], 2)


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
    jobs.train_by(4, cfg, tmp_path, function=train_as_two_nodes)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    together = sorted(start for of_worker in seen for start in of_worker)
    assert together == list(range(0, jobs.SAMPLES * jobs.SEQ_LEN, jobs.SEQ_LEN))
    assert all(len(of_worker) == jobs.SAMPLES // 4 for of_worker in seen)

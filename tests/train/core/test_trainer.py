"""The trainer as a single worker: what it writes, its hooks, what it cannot train."""

import csv
import re
import sys

import pytest
import torch

import mblm
from mblm.train.core.config import CSVLossEntry, CSVTimeAndMemSnapshotEntry, GenericOutputConfig
from mblm.train.core.training_state import find_latest_state
from mblm.train.mblm import TrainEntryConfig, train_mblm
from mblm.utils.checkpoint import load_model_state
from mblm.utils.distributed import ElasticRunVars
from mblm.utils.io import load_yml
from tests.train.experiments import experiment_fields

from . import jobs


def train(cfg, trainer=jobs.Trainer, **options):
    made = jobs.alone(trainer, cfg, **options)
    return made, made.train(jobs.Ids(), jobs.Ids(10))


def rows(run, name="loss.csv"):
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_run_folder(tmp_path):
    trainer, model = train(jobs.config(tmp_path, batches=20))
    trainer.test(jobs.Ids(5), model)
    run = jobs.run_of(tmp_path)
    assert re.fullmatch(r"tiny_\d+", run.name)
    assert {file.name for file in run.iterdir()} == {
        "config.yaml", "loss.csv", "timemem.csv", "metrics.csv", "train.log", "state",
        "tiny_top1.pth", "tiny_top2.pth",
    }  # fmt: skip

    loss = rows(run)
    assert tuple(loss[0]) == CSVLossEntry._fields
    assert [row["kind"] for row in loss].count("train") == 20
    valid = [row for row in loss if row["kind"] == "valid"]
    assert [int(row["cum_batch"]) for row in valid] == [0, 6, 12, 19]
    assert (valid[-1]["epoch"], valid[-1]["batch"]) == ("1", "7")  # epoch 0 has 12 batches
    assert loss[-1]["kind"] == "test"
    assert loss[1]["elements_seen"] == "4"
    assert tuple(rows(run, "timemem.csv")[0]) == CSVTimeAndMemSnapshotEntry._fields

    losses = sorted(float(row["loss"]) for row in valid)
    for index, expected in enumerate(losses[:2], start=1):
        _, saved = load_model_state(run / f"tiny_top{index}.pth", jobs.Model(0.0))
        assert saved == expected
    assert jobs.same(dict(model.state_dict()), torch.load(run / "tiny_top1.pth")["MODEL"])

    config = load_yml(
        run / "config.yaml",
        GenericOutputConfig[jobs.Params, jobs.CoreTrainConfig, jobs.CoreIoConfig],
    )
    assert config.resume.checkpoint_file == str(run / "tiny_top1.pth")
    assert (config.resume.next_epoch_index, config.resume.next_batch_index) == (1, 8)
    assert config.summary.error is None
    assert config.summary.parameter_count == sum(p.numel() for p in model.parameters())
    assert load_yml(run / "config.yaml", jobs.Config).train == config.train
    assert config.lineage.package == mblm.__version__
    assert (config.lineage.stages, config.lineage.seed) == (["Model"], 5)
    assert config.lineage.training_data.dataset == "Ids"
    assert config.lineage.validation_data.size == 80


def test_a_mixture_is_validated_on_each_source_and_ranked_by_their_weights(tmp_path):
    made = jobs.alone(jobs.Trainer, jobs.config(tmp_path, batches=6, max_eval_steps=6))
    model = made.train(jobs.mixed(), jobs.mixed(16))
    made.test(jobs.mixed(16), model)
    loss = {row["kind"]: row for row in rows(jobs.run_of(tmp_path))}
    for kind in ("valid", "test"):
        of_all, of_few = (float(loss[f"{kind}/{name}"]["loss"]) for name in ("all", "few"))
        assert of_all != of_few
        assert float(loss[kind]["loss"]) == pytest.approx(0.25 * of_all + 0.75 * of_few)
    assert loss["valid/few"]["cum_batch"] == loss["valid"]["cum_batch"] == "5"
    alone = jobs.alone(jobs.Trainer, jobs.config(tmp_path / "alone", batches=6, max_eval_steps=3))
    alone.test(jobs.Ids(16), model)
    assert rows(jobs.run_of(tmp_path / "alone"))[-1]["loss"] == loss["test/all"]["loss"]


def test_a_seed_decides_everything(tmp_path):
    torch.manual_seed(1)
    _, first = train(jobs.config(tmp_path, dropout=0.2, shuffle_train=True))
    torch.manual_seed(2)
    _, second = train(jobs.config(tmp_path, dropout=0.2, shuffle_train=True))
    assert jobs.same(dict(first.state_dict()), dict(second.state_dict()))
    _, other = train(jobs.config(tmp_path, dropout=0.2, shuffle_train=True, seed=6))
    assert not jobs.same(dict(first.state_dict()), dict(other.state_dict()))


def test_without_a_seed_the_programs_generator_decides_the_weights(tmp_path):
    torch.manual_seed(7)
    trainer = jobs.alone(jobs.Trainer, jobs.config(tmp_path, seed=None))
    torch.manual_seed(7)
    assert jobs.same(dict(trainer._parallel.base.state_dict()), dict(jobs.Model(0.0).state_dict()))


def test_gradients_are_clipped_to_the_norm(tmp_path):
    class Sgd(jobs.Trainer):
        def configure_optimizer(self, parameters):
            return torch.optim.SGD(parameters, lr=1.0)

        def configure_scheduler(self, optimizer, local_gradient_steps):
            return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    cfg = jobs.config(tmp_path, batches=1, gradient_clipping=0.01, num_models_to_save=0)
    trainer = jobs.alone(Sgd, cfg)
    before = torch.nn.utils.parameters_to_vector(trainer._parallel.base.parameters()).clone()
    model = trainer.train(jobs.Ids(), jobs.Ids(10))
    after = torch.nn.utils.parameters_to_vector(model.parameters())
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_epochs_are_offset_and_the_last_short_batch_is_dropped(tmp_path):
    dataset = jobs.Ids(5)
    jobs.alone(jobs.Trainer, jobs.config(tmp_path, batches=5, batch_size=2)).train(
        dataset, jobs.Ids(2)
    )
    assert dataset.seen[:4] == [0, 8, 16, 24]
    assert dataset.seen[4:8] == [1, 9, 17, 25]


def test_accumulated_batches_make_whole_steps_and_it_is_said(tmp_path):
    trainer, _ = train(jobs.config(tmp_path, batches=10, gradient_accumulate_every=4))
    log = (trainer._folder.path / "train.log").read_text()
    assert "2 of 12 batches are more than train.target_elements" in log
    assert not any(jobs.final_state(trainer._folder.path)[1]["gradients"])


def test_a_step_has_all_of_its_batches_wherever_an_epoch_ends(tmp_path):
    class Steps(jobs.Trainer):
        def _step(self, run, item):
            taken.append((item.epoch, item.batch, len(run.losses)))
            super()._step(run, item)

    taken = []
    train(jobs.config(tmp_path, batches=20, gradient_accumulate_every=5), Steps)
    assert taken == [(0, 4, 5), (0, 9, 5), (1, 2, 5), (1, 7, 5)]  # an epoch has 12 and 11 batches


def test_what_is_trained_last_is_validated_however_seldom(tmp_path):
    trainer, _ = train(jobs.config(tmp_path, validate_amount=1))
    valid = [row for row in rows(trainer._folder.path) if row["kind"] == "valid"]
    assert [row["cum_batch"] for row in valid] == ["11"]


def test_every_rank_draws_other_samples_in_its_loaders_workers(tmp_path):
    class Random(jobs.Ids):
        def get_sample(self, from_idx):
            return torch.rand(1)

    trainer = jobs.alone(jobs.Trainer, jobs.config(tmp_path))
    drawn = []
    for trainer._workers.rank in range(2):
        loader = trainer.get_train_dataloader(Random(4), num_workers=1)
        drawn.append(next(iter(loader)).tolist())
    assert drawn[0] != drawn[1]


def test_hooks_of_a_subclass(tmp_path):
    class Custom(jobs.Trainer):
        def configure_run_id(self):
            return "mine"

        def get_valid_dataloader(self, dataset, **kwargs):
            return torch.utils.data.DataLoader(dataset, batch_size=1)

        def get_train_dataloader(self, dataset, **kwargs):
            return super().get_train_dataloader(dataset, batch_size=2, shuffle=True)

        def configure_count_parameters(self, model):
            return 42, {}

    train(jobs.config(tmp_path), Custom)
    train(jobs.config(tmp_path), Custom)
    assert {run.name for run in tmp_path.iterdir()} == {"tiny_mine", "tiny_mine_2"}
    assert "parameter_count: 42" in (tmp_path / "tiny_mine" / "config.yaml").read_text()


def test_without_validation_the_last_model_is_returned(tmp_path):
    trainer, model = train(jobs.config(tmp_path), skip_validation=True)
    assert not list(trainer._folder.path.glob("*.pth"))
    assert model is trainer._parallel.base


def test_bfloat16_on_a_cpu(tmp_path):
    seen = set()

    class Precise(jobs.Trainer):
        def model_forward(self, model, batch, device):
            loss = super().model_forward(model, batch, device)
            seen.add(torch.is_autocast_enabled("cpu"))
            return loss

    train(jobs.config(tmp_path, batches=2), Precise)
    assert seen == {False}
    train(jobs.config(tmp_path, batches=2, precision="bfloat16"), Precise)
    assert seen == {False, True}


def test_a_compiled_model_trains_the_same_and_keeps_its_names(tmp_path, monkeypatch):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    compile_by = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_by(self, backend=backend))
    _, plain = train(jobs.config(tmp_path / "plain"))
    assert not compiled
    trainer, model = train(jobs.config(tmp_path / "compiled", compile=True))
    assert compiled
    saved = torch.load(trainer._folder.path / "tiny_top1.pth")["MODEL"]
    assert saved.keys() == jobs.Model(0.0).state_dict().keys()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


@pytest.mark.slow
def test_a_hierarchy_is_compiled_by_inductor_validated_and_lets_write(tmp_path):
    losses, models = [], []
    for compiles in (False, True):
        fields = experiment_fields(tmp_path)
        fields["train"] |= {"compile": compiles, "target_elements": 2 * 32, "seed": 0}
        fields["io"] |= {"output_dir": str(tmp_path / str(compiles)), "sample_amount": 1}
        train_mblm(TrainEntryConfig.model_validate(fields))
        run = jobs.run_of(tmp_path / str(compiles))
        losses.append([float(row["loss"]) for row in rows(run)])
        models.append(torch.load(run / "tiny_top1.pth")["MODEL"])
        assert (run / "samples").exists()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(models[1], models[0], rtol=1e-3, atol=1e-4)


class Fails(jobs.Trainer):
    def init_model(self):
        raise RuntimeError("no model")


class FailsLate(jobs.Trainer):
    def configure_optimizer(self, parameters):
        raise RuntimeError("no optimizer")


@pytest.mark.parametrize(
    ("trainer", "fields", "message"),
    [
        (Fails, {}, "no model"),
        (FailsLate, {}, "no optimizer"),
        (jobs.Trainer, {"batch_size": 64}, "not one batch of 64 samples"),
        (jobs.Trainer, {"gradient_accumulate_every": 13}, "takes 13 batches, .* no more than 12"),
        (jobs.Trainer, {"resume": "none.pth"}, "none.pth is neither a checkpoint nor the folder"),
        (jobs.Trainer, {"tensorboard": True}, r"tensorboard needs pip install 'mblm.tensorboard.'"),
        (jobs.Trainer, {"sample_amount": 1}, "sample_amount: Trainer does not generate"),
        (jobs.Trainer, {"resume": __file__}, "cannot be read as a checkpoint"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing_behind(
    tmp_path, monkeypatch, trainer, fields, message
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(jobs.config(tmp_path / "out", **fields), trainer)
    assert not (tmp_path / "out").exists()


def test_several_workers_need_a_process_group(tmp_path):
    two = ElasticRunVars(local_rank=0, world_size=2, is_cuda=False)
    with pytest.raises(ValueError, match="2 workers need a process group"):
        jobs.Trainer(jobs.config(tmp_path), two)


class Files(jobs.Ids):
    """Data of files, or of documents."""

    def __init__(self, *files, is_sequential=True):
        super().__init__()
        self.files, self.is_sequential = list(files), is_sequential

    def lineage(self):
        return self.files


def test_what_is_trained_is_said(tmp_path, capsys):
    def said(data, parts=None, **fields):
        class Counts(jobs.Trainer):
            def configure_count_parameters(self, model):
                return 1234, parts or {}

        jobs.alone(Counts, jobs.config(tmp_path, batches=4, **fields)).train(data, jobs.Ids(9))
        return capsys.readouterr().err.splitlines()[:3]

    book, files = Files(("book", 1234)), Files(("a", 1234), ("b", 1))
    model, data, plan = said(book, {"stage 1": 1000, "stage 2": 200}, gradient_accumulate_every=2)
    assert model == "Model: 1,234 parameters (stage 1 1,000, stage 2 200, around them 34)"
    assert data == "Data: book, 1,234 bytes; 384 elements to train on, 72 to validate"
    run = jobs.run_of(tmp_path)
    assert plan == f"Plan: 2 steps of 64 elements, 4 validations, seed 5; writes to {run}"
    assert said(files, validate_amount=1) == [
        "Model: 1,234 parameters",
        "Data: 2 files, 1,235 bytes; 384 elements to train on, 72 to validate",
        f"Plan: 4 steps of 32 elements, 1 validation, seed 5; writes to {jobs.run_of(tmp_path)}",
    ]
    assert "Data: Files; 384 samples to train on" in said(Files(is_sequential=False))[1]
    state = find_latest_state(jobs.run_of(tmp_path))
    assert (
        "4 steps of 32 elements, of which 4 are done"
        in said(Files(is_sequential=False), resume=state)[2]
    )

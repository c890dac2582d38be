"""train_mblm and train_encoder_mblm: from a configuration to models, tests and errors."""

import os
import shutil

import pytest
import torch
from pydantic import ValidationError

from mblm import MBLM, MBLMModelConfig
from mblm.data.dataset.byte_files import ByteFiles
from mblm.train.core.run_folder import hold_run
from mblm.train.mblm import (
    DatasetRegistry,
    MegabyteTrainer,
    TrainEntryConfig,
    TrainMaskedEntryConfig,
    dataset_registry,
    masked_dataset_registry,
    train_mblm,
)
from mblm.utils.distributed import ElasticRunVars
from mblm.utils.errors import describe
from mblm.utils.io import load_model_state
from tests import fresh

from .core import jobs
from .experiments import as_encoder, experiment_fields, run_of


@pytest.fixture
def fields(tmp_path):
    """12 batches in 6 steps."""
    fields = experiment_fields(tmp_path)
    steps = {"target_elements": 12 * 2 * 16, "gradient_accumulate_every": 2}
    fields["train"] |= {**steps, "warmup_steps_perc": 0.5, "seed": 0}
    return fields


def test_a_model_of_bytes(tmp_path, fields):
    config = TrainEntryConfig.model_validate(fields)
    train_mblm(config)
    run = run_of(tmp_path)
    rows = jobs.losses(run)[1:]
    by_kind = {
        kind: [float(row[6]) for row in rows if row[2] == kind] for kind in ("valid", "test")
    }
    assert by_kind["valid"][0] > 5
    assert by_kind["valid"][1] < by_kind["valid"][0] - 0.5
    assert len(by_kind["test"]) == 1
    # Half of the six steps warm up from a tenth of the learning rate, then comes a cosine.
    rates = [float(row[7]) for row in rows if row[2] == "train"][::2]
    assert rates == pytest.approx([0.001, 0.004, 0.007, 0.01, 0.0075, 0.0025])
    plain = MBLMModelConfig(**{k: v for k, v in fields["params"].items() if k != "input_seq_len"})
    _, loss = load_model_state(run / "tiny_top1.pth", MBLM(plain))
    assert loss == by_kind["valid"][1]
    assert "bits per byte" in (run / "train.log").read_text()


def test_a_batch_weighs_its_entries_that_have_loss(fields):
    trainer = MegabyteTrainer(
        TrainEntryConfig.model_validate(fields),
        ElasticRunVars(local_rank=0, world_size=1, is_cuda=False),
    )
    ids = torch.tensor([[1, 2, 256], [3, 256, 256]])
    assert trainer.count_entries((ids, torch.tensor([[1.0, 0.5, 1.0], [0.0, 1.0, 1.0]]))) == 2


def test_a_run_whose_data_are_gone_at_its_end_is_finished(tmp_path, fields, monkeypatch):
    """All but the test, which needs what a file has lost."""
    test = MegabyteTrainer.test

    def shorten_and_test(*arguments):
        with pytest.raises(ValueError, match="being trained already"), hold_run(run_of(tmp_path)):
            pass  # nobody trains on before it is tested
        os.truncate(tmp_path / "text", 100)
        return test(*arguments)

    monkeypatch.setattr(MegabyteTrainer, "test", shorten_and_test)
    train_mblm(TrainEntryConfig.model_validate(fields))
    assert {row[2] for row in jobs.losses(run_of(tmp_path))[1:]} == {"train", "valid"}
    log = (tmp_path / "out" / "mblm.train.mblm.log").read_text()
    assert "not tested" in log and "text' had 2400 bytes and now has 100" in log
    assert list(run_of(tmp_path).glob("*.pth"))


@pytest.mark.parametrize("masked", [False, True])
def test_sequences_beyond_fixed_positions_are_refused_before_anything_is_written(fields, masked):
    fields["params"]["input_seq_len"] = 17
    fields = as_encoder(fields) if masked else fields
    entry = TrainMaskedEntryConfig if masked else TrainEntryConfig
    with pytest.raises(ValidationError, match=r"input_seq_len: expected .* 16 bytes, .* 17"):
        entry.model_validate(fields)
    params = fields["params"].get("mblm_config", fields["params"])
    params["block"]["pos_emb_type"] = "rope"
    assert entry.model_validate(fields).params.input_seq_len == 17


def test_an_error_is_raised_and_in_the_log_of_this_run_alone(tmp_path, fields):
    fields["io"]["dataset_id"] = "nothing"
    for folder in (tmp_path / "first", tmp_path / "second"):
        fields["io"]["output_dir"] = str(folder)
        with pytest.raises(KeyError, match="registered as 'nothing'; there are bytes, clevr, "):
            train_mblm(TrainEntryConfig.model_validate(fields))
        assert not torch.distributed.is_initialized()
        assert "'nothing'" in (folder / "mblm.train.mblm.log").read_text()
        if folder.name == "first":
            shutil.rmtree(folder)
    assert not (tmp_path / "first").exists()


def test_a_part_of_the_data_that_is_too_small_is_named(fields):
    fields["params"]["input_seq_len"] = 14
    fields["io"]["dataset_args"] = {"valid_fraction": 0.005}
    with pytest.raises(ValueError, match=r"the valid part of .*'bytes': .*: data_size: 12 is too"):
        train_mblm(TrainEntryConfig.model_validate(fields))


def test_mistakes_in_the_arguments_of_a_dataset_are_a_line_each(fields):
    fields["io"]["dataset_args"] = {"valid_fraction": False, "files": 3}
    with pytest.raises(ValidationError) as refused:
        train_mblm(TrainEntryConfig.model_validate(fields))
    title, *lines = describe(refused.value).splitlines()
    assert title == "io.dataset_args: 2 mistakes"
    assert lines[0].startswith("  files: Input should be a valid list, got 3")
    assert lines[1].startswith("  valid_fraction: expected a number, no truth value")


def test_a_damaged_summary_of_packed_data_is_named_as_such(fields, tmp_path):
    fields["io"]["dataset_dir"] = str(tmp_path)
    (tmp_path / "pack.json").write_text("{")
    with pytest.raises(ValueError, match=r"the train part of .*pack\.json: Invalid JSON"):
        train_mblm(TrainEntryConfig.model_validate(fields))


def test_the_registries():
    # Other tests of this process may have registered theirs.
    assert dataset_registry.keys() >= {"bytes", "clevr", "pg19"}
    assert sorted(masked_dataset_registry) == ["pg19masked"]
    registry = DatasetRegistry()
    assert registry.register("mine")(ByteFiles) is ByteFiles
    assert registry.retrieve("mine") is ByteFiles


def test_importing_needs_no_pillow_and_touches_no_device():
    told = "print('PIL' in sys.modules, torch.cuda.is_initialized())"
    assert fresh.output_of(f"import sys, mblm.train.mblm, torch; {told}") == "False False\n"

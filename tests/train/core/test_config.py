"""Configurations: the reference's fields suffice, the rest is refused, outputs are inputs."""

import pytest
from pydantic import ValidationError

from mblm.train.mblm import TrainEntryConfig, TrainMaskedEntryConfig, TrainOutputConfig
from tests.train.experiments import as_encoder, experiment_fields


@pytest.fixture
def fields(tmp_path):
    return experiment_fields(tmp_path)


def test_the_references_fields_suffice(fields):
    config = TrainEntryConfig.model_validate(fields)
    assert config.train.warmup_steps_perc == 0.1
    assert config.train.strategy == "ddp"
    assert config.io.enabled_loss_log_for_gpus == [0]
    assert config.resume is None


def test_a_run_may_be_written_below_the_home_folder(fields, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    fields["io"]["output_dir"] = "~/runs"
    assert TrainEntryConfig.model_validate(fields).io.output_dir == "/home/me/runs"


def test_all_errors_are_told_at_once(fields):
    fields["train"] |= {"batch_size": 0, "learning_rat": 1}
    fields["io"]["validate_amount"] = -1
    fields["surprise"] = 1
    with pytest.raises(ValidationError) as error:
        TrainEntryConfig.model_validate(fields)
    places = {".".join(map(str, item["loc"])) for item in error.value.errors()}
    assert places == {"train.batch_size", "train.learning_rat", "io.validate_amount", "surprise"}


def test_an_output_is_an_entry_that_goes_on(fields):
    fields["resume"] = {
        "checkpoint_file": "m_top1.pth",
        "next_epoch_index": 1,
        "next_batch_index": 7,
    }
    fields["summary"] = {
        "training_start": "",
        "training_end": "",
        "num_workers": 1,
        "cuda_devices": [],
        "parameter_count": 3,
        "error": None,
    }
    assert TrainOutputConfig.model_validate(fields).resume.next_batch_index == 7
    entry = TrainEntryConfig.model_validate(fields)
    assert entry.resume.checkpoint_file == "m_top1.pth"
    fields["resume"]["checkpoint_file"] = ""  # a run that has validated nothing
    assert TrainEntryConfig.model_validate(fields).resume is None


def test_a_masked_configuration_round_trips(fields):
    config = TrainMaskedEntryConfig.model_validate(as_encoder(fields))
    assert TrainMaskedEntryConfig.model_validate(config.model_dump()) == config

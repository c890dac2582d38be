"""Configurations: the reference's fields suffice, the rest is refused, outputs are inputs."""

import pytest
import yaml
from pydantic import ValidationError

from mblm.train.mblm import TrainEntryConfig, TrainMaskedEntryConfig, TrainOutputConfig

REFERENCE = """
params:
  input_seq_len: 32
  num_tokens: 257
  pad_token_id: 256
  hidden_dims: [16, 16]
  seq_lens: [8, 4]
  num_layers: [1, 1]
  train_checkpoint_chunks: null
  block:
    block_type: transformer
    attn_head_dims: 8
    attn_num_heads: 2
    attn_use_rot_embs: true
    pos_emb_type: fixed
train:
  target_elements: 1000
  target_elements_strategy: sequence
  batch_size: 2
  learning_rate: 0.001
  gradient_accumulate_every: 2
io:
  name_model: m
  output_dir: out
  num_models_to_save: 1
  validate_amount: 2
  log_train_loss_amount: 3
  dataset_dir: data
  dataset_id: bytes
"""


def fields():
    return yaml.safe_load(REFERENCE)


def test_the_references_fields_suffice():
    config = TrainEntryConfig.model_validate(fields())
    assert config.train.warmup_steps_perc == 0.1
    assert config.train.strategy == "ddp"
    assert config.io.enabled_loss_log_for_gpus == [0]
    assert config.resume is None


def test_a_run_may_be_written_below_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    entry = fields()
    entry["io"]["output_dir"] = "~/runs"
    assert TrainEntryConfig.model_validate(entry).io.output_dir == "/home/me/runs"


def test_all_errors_are_told_at_once():
    data = fields()
    data["train"] |= {"batch_size": 0, "learning_rat": 1}
    data["io"]["validate_amount"] = -1
    data["surprise"] = 1
    with pytest.raises(ValidationError) as error:
        TrainEntryConfig.model_validate(data)
    places = {".".join(map(str, item["loc"])) for item in error.value.errors()}
    assert places == {"train.batch_size", "train.learning_rat", "io.validate_amount", "surprise"}


def test_an_output_is_an_entry_that_goes_on():
    data = fields()
    data["resume"] = {"checkpoint_file": "m_top1.pth", "next_epoch_index": 1, "next_batch_index": 7}
    data["summary"] = {
        "training_start": "",
        "training_end": "",
        "num_workers": 1,
        "cuda_devices": [],
        "parameter_count": 3,
        "error": None,
    }
    assert TrainOutputConfig.model_validate(data).resume.next_batch_index == 7
    entry = TrainEntryConfig.model_validate(data)
    assert entry.resume.checkpoint_file == "m_top1.pth"
    data["resume"]["checkpoint_file"] = ""  # a run that has validated nothing
    assert TrainEntryConfig.model_validate(data).resume is None


def test_a_masked_configuration_round_trips():
    data = fields()
    model = data["params"]
    data["params"] = {"input_seq_len": model.pop("input_seq_len"), "mask_token_id": 256}
    data["params"]["mblm_config"] = model
    model["block"]["block_type"] = "transformerEncoder"
    data["train"]["masking_proba"] = 0.15
    config = TrainMaskedEntryConfig.model_validate(data)
    assert TrainMaskedEntryConfig.model_validate(config.model_dump()) == config

"""What a configuration makes: parameters stage by stage, and what a training step keeps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mblm import MBLM, MBLMEncoder, MBLMEncoderModelConfig, MBLMModelConfig
from mblm.train.overview import format_overview, load_overview, overview
from tests.models import mamba, transformer


def config(*blocks: Any, **fields: Any) -> MBLMModelConfig:
    defaults: dict[str, Any] = {
        "num_tokens": 11,
        "pad_token_id": 10,
        "hidden_dims": [16, 8],
        "num_layers": [2, 1],
        "seq_lens": [6, 4],
        "train_checkpoint_chunks": None,
        "block": list(blocks),
    }
    return MBLMModelConfig(**{**defaults, **fields})


@pytest.mark.parametrize("kind", ["transformer", "mamba1", "mamba2"])
def test_parameters_are_those_of_the_model(kind: str) -> None:
    blocks = [transformer() if kind == "transformer" else mamba(kind), transformer()]
    facts = overview(config(*blocks))
    of_stages = sum(s.model_parameters + s.other_parameters for s in facts.stages)
    built = sum(p.numel() for p in MBLM(config(*blocks)).parameters())
    assert facts.parameters == of_stages + facts.logits_parameters == built
    assert facts.weight_bytes == 4 * built
    assert [(s.layers, s.width, s.positions, s.patch) for s in facts.stages] == [
        (2, 16, 6, 4),
        (1, 8, 4, 1),
    ]
    assert facts.context == facts.seq_len == 24


def test_an_encoder_too() -> None:
    block = {**transformer().model_dump(), "block_type": "transformerEncoder"}
    encoder = MBLMEncoderModelConfig(mask_token_id=9, mblm_config=config(block, block))
    facts = overview(encoder, batch_size=2)
    assert facts.parameters == sum(p.numel() for p in MBLMEncoder(encoder).parameters())
    assert facts.activation_bytes > 0


def kept_on_the_cpu(model: MBLM, batch_size: int, seq_len: int) -> int:
    """Bytes that autograd keeps in a real forward pass, weights aside."""
    kept: dict[int, int] = {}
    tensors = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        tensors.append(tensor)
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.randint(0, 10, (batch_size, seq_len)))
    assert loss.requires_grad
    return sum(count for pointer, count in kept.items() if pointer not in weights)


@pytest.mark.parametrize("seq_len", [1, 15, 24])
def test_activations_are_what_autograd_keeps(seq_len: int) -> None:
    cfg = config(mamba("mamba2"), transformer(), hidden_dims=[64, 64], seq_lens=[64, 8])
    seq_len = 512 * seq_len // 24
    estimated = overview(cfg, batch_size=2, seq_len=seq_len).activation_bytes
    assert estimated == pytest.approx(kept_on_the_cpu(MBLM(cfg), 2, seq_len), rel=0.25)


def test_chunks_keep_less() -> None:
    long = {"seq_lens": [64, 8], "num_layers": [1, 8]}
    plain = overview(config(transformer(), transformer(), **long))
    chunked = overview(config(transformer(), transformer(), train_checkpoint_chunks=[8], **long))
    assert chunked.activation_bytes < plain.activation_bytes / 3


def test_tiles_keep_the_most_global_stage_and_a_tile() -> None:
    long = {"seq_lens": [64, 8], "num_layers": [1, 8]}
    plain, tiled, less = (
        overview(config(transformer(), transformer(), **fields, **long)).activation_bytes
        for fields in ({}, {"tile": 64}, {"tile": 64, "checkpoint_global": True})
    )
    assert less < tiled < plain / 3
    assert (
        overview(config(transformer(), transformer(), tile=512, **long)).activation_bytes == plain
    )


def test_long_attention_keeps_no_matrix_of_weights() -> None:
    one = {"hidden_dims": [8], "num_layers": [1], "seq_lens": [16384]}
    facts = overview(config(transformer(), **one))
    assert facts.activation_bytes < 16384**2 / 4


def test_reads_experiments_and_models(tmp_path: Path) -> None:
    fields = config(transformer(), transformer()).model_dump_json()
    model, experiment = tmp_path / "model.yaml", tmp_path / "experiment.yaml"
    model.write_text(fields)
    params = fields[:-1] + ', "input_seq_len": 20}'
    experiment.write_text(f'{{"params": {params}, "train": {{"batch_size": 3}}}}')
    alone, of_experiment = load_overview(model), load_overview(experiment)
    assert (alone.batch_size, alone.seq_len) == (1, 24)
    assert (of_experiment.batch_size, of_experiment.seq_len) == (3, 20)
    assert alone.stages == of_experiment.stages
    text = format_overview("name", of_experiment)
    assert f"name: {alone.parameters:,} parameters, a context of 24 bytes" in text
    assert "3 x 20 bytes" in text and "1 transformer" in text


@pytest.mark.parametrize(
    "text, message",
    [
        ("params: {num_tokens: 3, colour: 1}", "colour"),
        ("params: [1]", "must be mappings"),
        ("[1]", "expected a mapping|Input should be"),
        ("params: {mblm_config: {}}", "mask_token_id"),
        ("{params: {}, train: {batch_size: many}}", "train.batch_size must be an integer"),
        ("params: {input_seq_len: 0}", "params.input_seq_len must be an integer"),
    ],
)
def test_refuses_what_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        load_overview(tmp_path / "c.yaml")
    assert "c.yaml" in str(refused.value)


def test_patches_of_three_stages() -> None:
    deep = config(*[transformer()] * 3, hidden_dims=[8] * 3, num_layers=[1] * 3, seq_lens=[4, 3, 2])
    facts = overview(deep)
    assert [s.patch for s in facts.stages] == [6, 2, 1]
    assert facts.context == math.prod([4, 3, 2])

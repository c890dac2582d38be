"""What a configuration makes: parameters stage by stage."""

from pathlib import Path
from typing import Any

import pytest

from mblm import MBLM, MBLMEncoder, MBLMEncoderModelConfig, MBLMModelConfig
from mblm.train.overview import format_overview, load_model
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


@pytest.fixture
def overview(tmp_path: Path) -> Any:
    """The lines that are said of a configuration, the words of each."""

    def call(config: MBLMModelConfig | MBLMEncoderModelConfig) -> list[list[str]]:
        (tmp_path / "c.yaml").write_text(config.model_dump_json())
        text = format_overview("name", load_model(tmp_path / "c.yaml"))
        return [line.replace(",", "").split() for line in text.splitlines()]

    return call


@pytest.mark.parametrize("kind", ["transformer", "mamba1", "mamba2"])
def test_parameters_are_those_of_the_model(overview: Any, kind: str) -> None:
    blocks = [transformer() if kind == "transformer" else mamba(kind), transformer()]
    built = MBLM(config(*blocks))
    first, columns, *stages, memory = overview(config(*blocks))
    total = sum(p.numel() for p in built.parameters())
    assert first == f"name: {total} parameters a context of 24 bytes".split()
    assert columns[:5] == ["stage", "layers", "width", "positions", "patch"]
    assert stages[0][:6] == ["1", kind, "2", "16", "6", "4"]
    assert stages[1][:6] == ["2", "transformer", "1", "8", "4", "1"]
    of_stages = sum(int(n) for stage in stages for n in stage[6:])
    assert of_stages + sum(p.numel() for p in built.to_logits.parameters()) == total
    assert memory[:4] == ["float32:", "weights", f"{4 * total / 2**20:.1f}", "MiB"]


def test_an_encoder_too(overview: Any) -> None:
    block = {**transformer().model_dump(), "block_type": "transformerEncoder"}
    encoder = MBLMEncoderModelConfig(mask_token_id=9, mblm_config=config(block, block))
    total = sum(p.numel() for p in MBLMEncoder(encoder).parameters())
    assert overview(encoder)[0][1] == str(total)


def test_reads_experiments_and_models(tmp_path: Path) -> None:
    fields = config(transformer(), transformer()).model_dump_json()
    model, experiment = tmp_path / "model.yaml", tmp_path / "experiment.yaml"
    model.write_text(fields)
    params = fields[:-1] + ', "input_seq_len": 20}'
    experiment.write_text(f'{{"params": {params}, "train": {{"batch_size": 3}}}}')
    assert format_overview("x", load_model(model)) == format_overview("x", load_model(experiment))


@pytest.mark.parametrize(
    "text, message",
    [
        ("params: {num_tokens: 3, colour: 1}", "colour"),
        ("params: [1]", "must be a mapping"),
        ("[1]", "c.yaml: expected a mapping of fields at the top level, got list"),
        ("", "c.yaml: expected a mapping of fields at the top level, got nothing"),
        ("params: {mblm_config: {}}", "mask_token_id"),
    ],
)
def test_refuses_what_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        load_model(tmp_path / "c.yaml")
    assert "c.yaml" in str(refused.value)

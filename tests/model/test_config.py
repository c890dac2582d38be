"""Model configurations: what they accept and refuse, and that they survive every format."""

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import ValidationError

from mblm import (
    MBLM,
    MambaBlock,
    MBLMEncoder,
    MBLMEncoderModelConfig,
    MBLMModelConfig,
    MBLMReturnType,
    TransformerBlock,
    TransformerEncoderBlock,
)
from mblm.model.block import StageBlock
from mblm.model.config import MaskReduceStrat, block_registry
from mblm.utils.io import dump_yml, load_yml
from tests.models import LSTM, LSTMBlock, mamba, transformer

FIELDS: dict[str, Any] = {
    "num_tokens": 257,
    "pad_token_id": 256,
    "hidden_dims": [16, 8],
    "num_layers": [2, 1],
    "seq_lens": [5, 4],
    "train_checkpoint_chunks": None,
    "block": {"attn_head_dims": 4, "attn_num_heads": 2, "attn_use_rot_embs": True},
}


def config(**fields: Any) -> MBLMModelConfig:
    return MBLMModelConfig.model_validate({**FIELDS, **fields})


@pytest.fixture
def registered_lstm() -> Any:
    """`LSTMBlock` as a block that configuration files know, for one test."""
    block_registry.register()(LSTMBlock)
    yield LSTMBlock
    block_registry.discard(LSTMBlock)


BLOCKS = {
    "one transformer": transformer(),
    "an encoder": TransformerEncoderBlock(**transformer().model_dump(exclude={"block_type"})),
    "a list": [mamba("mamba1"), transformer(pos_emb_type="rope", ff_dropout=0.1)],
    "mamba2, whatever is installed": mamba("mamba2", dropout=0.2),
    "a tuple": (mamba("mamba2"), mamba("mamba1")),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
class TestRoundTrip:
    def test_python(self, block: Any) -> None:
        before = config(block=block, train_checkpoint_chunks=[3])
        assert MBLMModelConfig.model_validate(before.model_dump()) == before
        assert MBLMModelConfig(**before.model_dump()) == before

    def test_json(self, block: Any) -> None:
        before = config(block=block)
        assert MBLMModelConfig.model_validate_json(before.model_dump_json()) == before
        assert MBLMModelConfig.model_validate(json.loads(before.model_dump_json())) == before

    def test_yaml(self, block: Any, tmp_path: Any) -> None:
        before = config(block=block)
        assert load_yml(dump_yml(tmp_path / "c", before), MBLMModelConfig) == before
        text = yaml.safe_dump(before.model_dump(mode="json"))
        assert MBLMModelConfig.model_validate(yaml.safe_load(text)) == before

    def test_every_field_of_the_block_is_dumped(self, block: Any) -> None:
        blocks = block if isinstance(block, (list, tuple)) else [block]
        dumped = config(block=block).model_dump()["block"]
        dumped = dumped if isinstance(dumped, list) else [dumped]
        for given, fields in zip(blocks, dumped, strict=True):
            assert fields == given.model_dump() and "block_type" in fields


class TestSettingsOfLongSequences:
    """Beyond the published package's, which reads a configuration that sets none of them."""

    SET: ClassVar[dict[str, Any]] = {"tile": 512, "checkpoint_global": True, "offload": True}

    def test_are_dumped_where_they_are_set(self) -> None:
        assert config().model_dump().keys() == FIELDS.keys()
        assert json.loads(config().model_dump_json()).keys() == FIELDS.keys()
        dumped = config(**self.SET).model_dump()
        assert dumped == {**config().model_dump(), **self.SET}
        assert "tile" not in config(**self.SET).model_dump(exclude={"tile"})

    @pytest.mark.parametrize("name", SET)
    def test_round_trip(self, name: str, tmp_path: Path) -> None:
        before = config(**{name: self.SET[name]})
        assert MBLMModelConfig.model_validate(before.model_dump()) == before
        assert MBLMModelConfig.model_validate_json(before.model_dump_json()) == before
        assert load_yml(dump_yml(tmp_path / "c", before), MBLMModelConfig) == before
        encoder = MBLMEncoderModelConfig(mask_token_id=1, mblm_config=before)
        assert MBLMEncoderModelConfig.model_validate(encoder.model_dump()) == encoder

    @pytest.mark.parametrize("fields", [{"tile": 0}, {"tile": 1.5}, {"offload": "cpu"}], ids=str)
    def test_bad_ones_are_named(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match=next(iter(fields))):
            config(**fields)


def test_a_registered_custom_block_round_trips(registered_lstm: type[StageBlock]) -> None:
    before = config(block=[registered_lstm(with_hook=True), transformer()])  # type: ignore[call-arg]
    after = MBLMModelConfig.model_validate_json(before.model_dump_json())
    assert after == before
    assert isinstance(after.stage_blocks()[0], LSTMBlock)
    assert isinstance(after.stage_blocks()[0].to_model(4, 1), LSTM)


def test_a_block_that_is_not_registered_is_taken_as_an_object_only() -> None:
    built = config(block=LSTMBlock())
    assert built.model_dump()["block"] == {
        "block_type": "lstm",
        "pos_emb_type": None,
        "with_hook": False,
    }
    with pytest.raises(ValidationError, match="matches no registered stage block"):
        MBLMModelConfig.model_validate(built.model_dump())


def test_encoder_config_round_trips() -> None:
    before = MBLMEncoderModelConfig(
        mask_token_id=255, mblm_config=config(), mask_reduce_strat=MaskReduceStrat.ALL
    )
    assert MBLMEncoderModelConfig.model_validate(before.model_dump()) == before
    assert MBLMEncoderModelConfig.model_validate_json(before.model_dump_json()) == before
    text = yaml.safe_dump(before.model_dump(mode="json"))
    assert MBLMEncoderModelConfig.model_validate(yaml.safe_load(text)) == before
    assert MBLMEncoderModelConfig(mask_token_id=1, mblm_config=config()).mask_reduce_strat == "any"


def test_libraries_read_a_configuration_as_those_of_hugging_face() -> None:
    of_model = config()
    assert of_model.to_dict() == of_model.model_dump()
    assert of_model.get("num_tokens") == 257 and of_model.get("tile", 1) is None
    assert of_model.get("tie_word_embeddings") is None and of_model.get("copy", "no") == "no"
    of_encoder = MBLMEncoderModelConfig(mask_token_id=255, mblm_config=of_model)
    assert of_encoder.get("mask_token_id") == of_encoder.to_dict()["mask_token_id"] == 255


class TestBlockType:
    """Which block a mapping becomes."""

    def test_without_one_the_decoder_comes_before_the_encoder(self) -> None:
        assert list(block_registry) == [TransformerBlock, MambaBlock, TransformerEncoderBlock]
        assert type(config().block) is TransformerBlock

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("transformer", TransformerBlock), ("transformerEncoder", TransformerEncoderBlock)],
    )
    def test_decides_where_given(self, name: str, kind: type) -> None:
        assert type(config(block={**FIELDS["block"], "block_type": name}).block) is kind

    @pytest.mark.parametrize("name", ["mamba1", "mamba2"])
    def test_of_mamba_is_kept(self, name: str) -> None:
        fields = {"d_state": 4, "d_conv": 3, "expand": 2, "headdim": 4, "block_type": name}
        assert config(block=fields).stage_blocks()[1].block_type == name

    def test_mamba_without_one_is_what_is_installed(self, monkeypatch: Any) -> None:
        fields = {"d_state": 4, "d_conv": 3, "expand": 2, "headdim": 4}
        for found, name in ((None, "mamba1"), (object(), "mamba2")):
            monkeypatch.setattr("mblm.model.mamba.find_spec", lambda _, found=found: found)
            assert config(block=fields).block.block_type == name  # type: ignore[union-attr]

    def test_mamba_without_one_says_what_it_becomes_and_what_decides_it(
        self, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr("mblm.model.mamba.find_spec", lambda _: None)
        fields = {"d_state": 4, "d_conv": 3, "expand": 2, "headdim": 4}
        without = config(block=fields)
        with pytest.warns(UserWarning, match="becomes a Mamba-1.*`block_type: mamba2`") as said:
            MBLM(without)
        assert len({(line.filename, line.lineno) for line in said}) == 1  # which is shown once
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            MBLM(config(block={**fields, "block_type": "mamba1"}))
            MBLM(config(block=fields | {"block_type": "mamba2"}))


def test_stage_blocks_are_one_per_stage() -> None:
    assert config().stage_blocks() == [config().block] * 2
    blocks = [mamba("mamba1"), transformer()]
    assert list(config(block=blocks).stage_blocks()) == blocks


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_tokens": "many"}, "num_tokens"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"pad_token_id": 257}, "pad_token_id is 257, expected an id below num_tokens = 257"),
        ({"hidden_dims": []}, "hidden_dims"),
        ({"hidden_dims": [16, 0]}, r"hidden_dims\.1"),
        ({"hidden_dims": 16}, "hidden_dims"),
        ({"hidden_dims": [16, 8, 4]}, "num_layers has 2 entries, hidden_dims has 3"),
        ({"seq_lens": [5]}, "seq_lens has 1 entries, hidden_dims has 2"),
        ({"seq_lens": [5, 1.5]}, r"seq_lens\.1"),
        ({"num_layers": [2]}, "num_layers has 1 entries"),
        ({"train_checkpoint_chunks": [0]}, r"train_checkpoint_chunks\.0"),
        ({"block": None}, "block: expected a stage block or a mapping, got None"),
        ({"block": []}, "block has 0 entries"),
        ({"block": [FIELDS["block"]] * 3}, "block has 3 entries"),
        ({"block": [FIELDS["block"], "transformer"]}, "got 'transformer'"),
        ({"hidden_dims": [16, 7], "block": {**FIELDS["block"], "pos_emb_type": "rope"}}, "even"),
        ({"block": {**FIELDS["block"], "pos_emb_type": "learned"}}, "pos_emb_type"),
        ({"colour": "red"}, "colour"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:60],
)
def test_a_bad_field_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**fields)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"{name}\n  Field required"):
        MBLMModelConfig.model_validate({k: v for k, v in FIELDS.items() if k != name})


def test_several_bad_fields_are_reported_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        config(seq_lens=[1], num_layers=[1], pad_token_id=300)
    for words in ("seq_lens has 1", "num_layers has 1", "pad_token_id is 300"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (TransformerBlock, {"attn_head_dims": 0}, "attn_head_dims"),
        (TransformerBlock, {"attn_dropout": 1.5}, "attn_dropout"),
        (TransformerBlock, {"ff_dropout": -0.1}, "ff_dropout"),
        (TransformerBlock, {"heads": 2}, "heads"),
        (TransformerBlock, {"block_type": "mamba1"}, "block_type"),
        (TransformerEncoderBlock, {"block_type": "transformer"}, "block_type"),
        (MambaBlock, {"d_state": 0}, "d_state"),
        (MambaBlock, {"dropout": 2}, "dropout"),
        (MambaBlock, {"block_type": "mamba3"}, "block_type"),
    ],
)
def test_a_bad_field_of_a_block_is_named(
    kind: type[StageBlock], fields: dict[str, Any], words: str
) -> None:
    good = mamba("mamba1") if kind is MambaBlock else transformer()
    with pytest.raises(ValidationError, match=words):
        kind(**{**good.model_dump(exclude={"block_type"}), **fields})


def test_rotary_positions_of_an_odd_head_are_refused() -> None:
    with pytest.raises(ValueError, match="attn_head_dim: got 3"):
        transformer(attn_head_dims=3).to_model(model_dim=6, num_layers=1)
    transformer(attn_head_dims=3, attn_use_rot_embs=False).to_model(model_dim=6, num_layers=1)


def test_return_types() -> None:
    assert [kind.name for kind in MBLMReturnType] == [
        "LOGITS",
        "LOSS",
        "LOSS_LOGITS",
        "HIDDEN_STATE",
    ]


def test_a_model_refuses_the_chunks_that_its_configuration_takes() -> None:
    """As the published package does; configurations with an entry for stage 1 exist."""
    chunks = config(train_checkpoint_chunks=[5, 10])
    assert MBLMModelConfig.model_validate(chunks.model_dump()) == chunks
    encoder = MBLMEncoderModelConfig(mask_token_id=1, mblm_config=chunks)
    with pytest.raises(ValueError, match=r"train_checkpoint_chunks has 2 entries, .* the 1 stages"):
        MBLM(chunks)
    with pytest.raises(ValueError, match="train_checkpoint_chunks has 2 entries"):
        MBLMEncoder(encoder)

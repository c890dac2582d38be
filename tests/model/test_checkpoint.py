"""Loading a ``.pth`` file beside the configuration of the run that wrote it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mblm import MBLM
from mblm.model.pretrained import CONFIG_FILE, load_checkpoint
from mblm.utils.io import save_model_state
from tests.models import mamba, model, transformer


def build() -> MBLM:
    return model(mamba("mamba1"), transformer(pos_emb_type="rope"), seq_lens=[3, 4])


class TestCheckpoint:
    """A ``.pth`` file beside the configuration of the run that wrote it."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> tuple[MBLM, Path]:
        m = build()
        _, file = save_model_state(tmp_path, "best", m, 1.5)
        self.write_config(tmp_path / "config.yaml", m)
        return m, file

    def write_config(self, file: Path, m: MBLM, **params: Any) -> None:
        params = {**m.config.model_dump(mode="json"), "input_seq_len": 12, **params}
        file.write_text(yaml.safe_dump({"params": params, "train": {"batch_size": 1}, "io": {}}))

    def test_is_loaded(self, run: tuple[MBLM, Path]) -> None:
        m, file = run
        for name in (file, str(file)):
            loaded = load_checkpoint(MBLM, name)
            assert loaded.config == m.config and not loaded.training
            assert torch.equal(loaded.to_logits.weight, m.to_logits.weight)

    def test_with_a_config_from_elsewhere(self, run: tuple[MBLM, Path], tmp_path: Path) -> None:
        _, file = run
        other = (file.parent / "config.yaml").rename(tmp_path / "other.yaml")
        with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
            load_checkpoint(MBLM, file)
        assert load_checkpoint(MBLM, file, config_file=other).num_tokens == 19

    def test_folders_are_what_from_pretrained_takes(self, tmp_path: Path) -> None:
        build().save_pretrained(folder := tmp_path / "model")
        assert load_checkpoint(MBLM, folder).num_tokens == 19
        with pytest.raises(ValueError, match=r"config_file: .* is no \.pth file"):
            load_checkpoint(MBLM, folder, config_file=folder / CONFIG_FILE)
        with pytest.raises(FileNotFoundError, match="neither a folder nor a model id"):
            load_checkpoint(MBLM, "no/such/thing")

    def test_that_is_missing_or_damaged(self, run: tuple[MBLM, Path]) -> None:
        _, file = run
        with pytest.raises(FileNotFoundError, match=r"worst\.pth: no such file"):
            load_checkpoint(MBLM, file.with_name("worst.pth"))
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"best\.pth cannot be read"):
            load_checkpoint(MBLM, file)

    @pytest.mark.parametrize(
        ("params", "words"),
        [
            ({"num_tokens": 20}, r"best\.pth does not fit MBLM: .*to_logits.weight"),
            ({"seq_lens": [3]}, r"config\.yaml, params.*seq_lens has 1 entries"),
            ({"colour": "red"}, r"config\.yaml, params(.|\n)*colour"),
            ({"block": {"size": 1}}, "matches no registered stage block"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
    )
    def test_with_a_config_that_does_not_fit(
        self, run: tuple[MBLM, Path], params: dict[str, Any], words: str
    ) -> None:
        m, file = run
        self.write_config(file.with_name("config.yaml"), m, **params)
        with pytest.raises(ValueError, match=f"(?s){words}"):
            load_checkpoint(MBLM, file)

    @pytest.mark.parametrize("text", ["", "params", "params: 3", "train: {}", "params: ["])
    def test_with_a_config_that_is_none(self, run: tuple[MBLM, Path], text: str) -> None:
        file = run[1]
        file.with_name("config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml"):
            load_checkpoint(MBLM, file)

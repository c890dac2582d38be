"""Every configuration in configs/: it is valid, its model can be built, its header tells how."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from mblm import MBLM, MBLMEncoder, MBLMEncoderModelConfig, MBLMModelConfig
from mblm.train.experiment import load_experiment
from mblm.train.mblm import TrainMaskedEntryConfig, dataset_registry, masked_dataset_registry

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PUBLISHED = {
    "pg19_1d_t": ([42], [8192], 361_451_776),
    "pg19_2d_st": ([25, 21], [1024, 8], 358_898_528),
    "pg19_2d_ss": ([28, 24], [1024, 8], 360_850_560),
    "pg19_3d_stt": ([9, 8, 8], [8192, 16, 8], 362_870_112),
    "clevr_1d_s": ([54], [8192], 356_983_616),
}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_its_model_can_be_built_and_its_dataset_is_known(file: Path) -> None:
    config = load_experiment(file)
    fields = {k: v for k, v in config.params.model_dump().items() if k != "input_seq_len"}
    with torch.device("meta"):
        if isinstance(config, TrainMaskedEntryConfig):
            encoder = MBLMEncoder(MBLMEncoderModelConfig.model_validate(fields))
            model: MBLM | MBLMEncoder = encoder
            assert config.io.dataset_id in masked_dataset_registry
        else:
            model = MBLM(MBLMModelConfig.model_validate(fields))
            assert config.io.dataset_id in dataset_registry
    assert config.params.input_seq_len <= model.context_size
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_experiments_have_360_million_parameters(name: str) -> None:
    layers, seq_lens, count = PUBLISHED[name]
    params = load_experiment(ROOT / "configs" / f"{name}.yaml").params
    assert isinstance(params, MBLMModelConfig)
    assert (list(params.num_layers), list(params.seq_lens)) == (layers, seq_lens)
    assert set(params.hidden_dims) == {1024}
    with torch.device("meta"):
        model = MBLM(params)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_its_header_holds_its_command(file: Path) -> None:
    title, empty, command, *_ = file.read_text().splitlines()
    assert re.fullmatch(r"# .+\.", title) and empty == "#"
    program, action, config, *options = shlex.split(command.removeprefix("#"))
    assert (program, action, config) == ("mblm", "train", f"configs/{file.name}")
    settings = [word for word in options if "=" in word]
    dataset_dir = load_experiment(file, settings).io.dataset_dir
    if settings:
        assert dataset_dir == settings[0].partition("=")[2]
    else:  # its data are here
        assert (ROOT / dataset_dir).is_dir()

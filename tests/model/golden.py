"""Golden cases: numbers that the reference computed, and the model they belong to."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, safe_open

from mblm import MBLM, MBLMEncoder, MBLMEncoderModelConfig, MBLMModelConfig
from tests.conftest import ROOT, shared_dir

# Agreement expected in float32.
FORWARD = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT = 1e-4  # of the tensor's largest entry


@dataclass(frozen=True)
class GoldenCase:
    name: str
    config: dict
    settings: dict
    tensors: dict[str, torch.Tensor]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.group("w")

    @property
    def lengths(self) -> list[int]:
        return sorted(
            int(key[3:].split("/")[0])
            for key in self.tensors
            if key.endswith("/ids") and key.startswith("len")
        )

    def group(self, name: str) -> dict[str, torch.Tensor]:
        prefix = f"{name}/"
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def model(self) -> MBLM | MBLMEncoder:
        if self.settings["model"] == "MBLMEncoder":
            model = MBLMEncoder(MBLMEncoderModelConfig.model_validate(self.config))
        else:
            model = MBLM(MBLMModelConfig.model_validate(self.config))
        model.load_state_dict(self.weights, strict=True)
        return model.eval()


def case_files() -> dict[str, Path]:
    """Files by case name; the larger set, where it is found, replaces the repository's."""
    folders = [ROOT / "tests" / "golden"]
    if (shared := shared_dir()) is not None:
        folders.append(shared / "golden")
    return {f.stem: f for folder in folders for f in sorted(folder.glob("*.safetensors"))}


DECODERS = [name for name in case_files() if not name.startswith("enc")]
ENCODERS = [name for name in case_files() if name.startswith("enc")]
WITH_GRADIENTS = ["mamba1_st_2d", "mamba2_st_2d", "tt_2d", "tt_2d_rope", "ttt_3d", "ttt_3d_chunks"]


@lru_cache(maxsize=4)
def golden_case(name: str) -> GoldenCase:
    file = case_files()[name]
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    return GoldenCase(
        name, json.loads(header["config"]), json.loads(header["settings"]), load_file(file)
    )

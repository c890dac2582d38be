"""What a configuration makes: parameters and patches of each stage, context, memory of weights.

Nothing is computed: the model is built on the meta device, which knows shapes alone.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import ValidationError

from mblm.model.config import MBLMEncoderModelConfig, MBLMModelConfig
from mblm.model.mblm import MBLM, MBLMEncoder
from mblm.model.utils import ParamType, count_params
from mblm.utils.errors import with_title
from mblm.utils.io import load_fields

FLOAT = 4  # bytes of a float32


def load_model(file: Path) -> MBLM | MBLMEncoder:
    """The model of an experiment's YAML file, or of a model's alone, on the meta device.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no configuration; the message names the file and the fields.
    """
    fields = load_fields(file)
    params = fields.get("params", fields)
    if not isinstance(params, dict):
        raise ValueError(f"{file}: params must be a mapping of fields")
    params.pop("input_seq_len", None)
    try:
        with torch.device("meta"):
            if "mblm_config" in params:
                return MBLMEncoder(MBLMEncoderModelConfig.model_validate(params))
            return MBLM(MBLMModelConfig.model_validate(params))
    except ValidationError as error:
        raise with_title(error, f"{file}, params") from None


def format_overview(name: object, model: MBLM | MBLMEncoder) -> str:
    """A table of a model's stages, the most global first, and a line about its memory."""
    columns = ("stage", "layers", "width", "positions", "patch", "parameters", "around it")
    rows = [columns, *_stages(model)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    parameters, _ = count_params(model)
    weights = FLOAT * parameters
    return "\n".join(
        [
            f"{name}: {parameters:,} parameters, a context of {model.context_size:,} bytes",
            *("  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows),
            f"float32: weights {_size(weights)}, gradients {_size(weights)}, "
            f"Adam {_size(2 * weights)}; {_size(4 * weights)} in all, besides activations",
        ]
    )


def _stages(model: MBLM | MBLMEncoder) -> Iterator[tuple[str, ...]]:
    config = model.config
    for n, block in enumerate(config.stage_blocks()):
        around: list[ParamType] = [
            model.pos_embs[n],
            model.token_embs_rev[model.num_stages - 1 - n],
            model.to_next_stage_proj[n],
        ]
        if isinstance(model, MBLM):
            around.append(model.start_tokens[n])
        shape = (config.num_layers[n], config.hidden_dims[n], config.seq_lens[n])
        _, counts = count_params(model, ("stage", [model.stage_models[n]]), ("around", around))
        numbers = (*shape, model.patch_sizes[n], *counts.values())
        yield f"{n + 1} {block.block_type}", *(f"{number:,}" for number in numbers)


def _size(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.1f} {name}"

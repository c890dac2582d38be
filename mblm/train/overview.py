"""What a configuration makes: parameters and patches of each stage, context, memory in training.

Nothing is computed: the model is built on the meta device, which knows shapes alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import RootModel, ValidationError
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from mblm.model.config import MBLMEncoderModelConfig, MBLMModelConfig, MBLMReturnType
from mblm.model.hierarchy import Hierarchy
from mblm.model.mblm import MBLM, MBLMEncoder
from mblm.model.utils import count_params
from mblm.utils.errors import with_title
from mblm.utils.io import load_yml

FLOAT = 4  # bytes of a float32


@dataclass
class StageOverview:
    """One stage of a model.

    Attributes:
        block: The block's type.
        layers: Number of layers.
        width: Width of the stage.
        positions: Positions of a sequence of the stage.
        patch: Bytes that a position covers.
        model_parameters: Parameters of the stage model.
        other_parameters: Those of its embeddings, start token and of its context projection.
    """

    block: str
    layers: int
    width: int
    positions: int
    patch: int
    model_parameters: int
    other_parameters: int


@dataclass
class Overview:
    """What a configuration makes.

    Attributes:
        stages: The stages, the most global first.
        logits_parameters: Parameters of the logits' projection.
        parameters: All parameters.
        context: Bytes of the context.
        batch_size: Sequences of a training step that `activation_bytes` is for.
        seq_len: Their length.
        weight_bytes: Weights in float32; gradients take as much, Adam's moments twice as much.
        activation_bytes: An estimate: what autograd keeps for the backward pass of one step in
            float32, and for stages in recomputed chunks their inputs and one chunk's.
    """

    stages: list[StageOverview]
    logits_parameters: int
    parameters: int
    context: int
    batch_size: int
    seq_len: int
    weight_bytes: int
    activation_bytes: int


def overview(
    config: MBLMModelConfig | MBLMEncoderModelConfig,
    *,
    batch_size: int = 1,
    seq_len: int | None = None,
) -> Overview:
    """Describe the model of a configuration.

    Args:
        config: The model's configuration.
        batch_size: Sequences in a training step. Default 1.
        seq_len: Bytes of a sequence. Default: the context.
    """
    with torch.device("meta"):
        model = MBLM(config) if isinstance(config, MBLMModelConfig) else MBLMEncoder(config)
    blocks = model.config.stage_blocks()
    stages = [
        StageOverview(
            block=blocks[n].block_type,
            layers=model.config.num_layers[n],
            width=model.hidden_dims[n],
            positions=model.seq_lens[n],
            patch=model.patch_sizes[n],
            model_parameters=_count(model.stage_models[n]),
            other_parameters=_count(*_around_stage(model, n)),
        )
        for n in range(model.num_stages)
    ]
    parameters = _count(model)
    seq_len = seq_len or model.context_size
    return Overview(
        stages=stages,
        logits_parameters=_count(model.to_logits),
        parameters=parameters,
        context=model.context_size,
        batch_size=batch_size,
        seq_len=seq_len,
        weight_bytes=FLOAT * parameters,
        activation_bytes=_activation_bytes(model, batch_size, seq_len),
    )


def load_overview(file: Path) -> Overview:
    """Describe the model of an experiment's YAML file, or of a model's alone.

    Activations are those of the experiment's batches, or of one sequence.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no configuration; the message names the file and the fields.
    """
    fields = load_yml(file, RootModel[dict[str, Any]]).root
    params = fields.get("params", fields)
    train = fields.get("train") or {}
    if not isinstance(params, dict) or not isinstance(train, dict):
        raise ValueError(f"{file}: params and train must be mappings of fields")
    seq_len, batch_size = params.pop("input_seq_len", None), train.get("batch_size", 1)
    for name, value in (("params.input_seq_len", seq_len), ("train.batch_size", batch_size)):
        if value is not None and not (isinstance(value, int) and value > 0):
            raise ValueError(f"{file}: {name} must be an integer of at least 1, got {value!r}")
    config_class = MBLMEncoderModelConfig if "mblm_config" in params else MBLMModelConfig
    try:
        config = config_class.model_validate(params)
    except ValidationError as error:
        raise with_title(error, f"{file}, params") from None
    return overview(config, batch_size=batch_size or 1, seq_len=seq_len)


def format_overview(name: object, facts: Overview) -> str:
    """A table of a model's stages and lines about its memory."""
    rows: list[tuple[str, ...]] = [
        ("stage", "layers", "width", "positions", "patch", "parameters", "around it")
    ]
    for number, stage in enumerate(facts.stages, start=1):
        numbers = (stage.layers, stage.width, stage.positions, stage.patch)
        counts = (stage.model_parameters, stage.other_parameters)
        rows.append((f"{number} {stage.block}", *(f"{n:,}" for n in (*numbers, *counts))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    weights, activations = facts.weight_bytes, facts.activation_bytes
    sequences = f"{facts.batch_size} x {facts.seq_len:,} bytes"
    return "\n".join(
        [
            f"{name}: {facts.parameters:,} parameters, a context of {facts.context:,} bytes",
            *table,
            f"float32: weights {_size(weights)}, gradients {_size(weights)}, "
            f"Adam {_size(2 * weights)}, about {_size(activations)} kept for the backward pass of "
            f"{sequences}; {_size(4 * weights + activations)} in all",
        ]
    )


def _size(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.1f} {name}"


def _count(*modules: nn.Module | nn.Parameter) -> int:
    return sum(count_params(module)[0] for module in modules)


def _around_stage(model: Hierarchy, stage: int) -> list[nn.Module | nn.Parameter]:
    """What belongs to a stage besides its model."""
    reverse = model.num_stages - 1 - stage
    modules: list[nn.Module | nn.Parameter] = [
        model.pos_embs[stage],
        model.token_embs_rev[reverse],
        model.to_next_stage_proj[stage],
    ]
    return [*modules, model.start_tokens[stage]] if isinstance(model, MBLM) else modules


# -- Activations -------------------------------------------------------------------------------


def _activation_bytes(model: MBLM | MBLMEncoder, batch_size: int, seq_len: int) -> int:
    """Bytes of what a forward pass keeps, counted storage by storage."""
    config, chunks = model.config, model.checkpoint_chunks
    plain = {"tile": None, "checkpoint_global": False, "offload": False}
    model.config = config.model_copy(update=plain)
    model.checkpoint_chunks = [None] * model.num_stages
    kept = _Kept(model)
    ids = torch.zeros(batch_size, seq_len, dtype=torch.long, device="meta")
    labels = {} if isinstance(model, MBLM) else {"labels": ids}
    with kept.counted(), _FlashAttention():
        loss = model.train()(ids, return_type=MBLMReturnType.LOSS, **labels)
    model.config, model.checkpoint_chunks = config, chunks
    del loss  # which kept what was counted alive

    of_global = (kept.inputs_outputs if config.checkpoint_global else kept.inside)[0]
    if config.tile is not None and config.tile < ids.numel():
        # Of what lies below the most global stage, a tile at a time.
        below = kept.outside + sum(kept.inside[1:])
        return of_global + below * config.tile // ids.numel()
    total, one_chunk = kept.outside + of_global, 0
    for stage, count in enumerate(chunks[1:], start=1):
        if count is None:
            total += kept.inside[stage]
        else:
            total += kept.inputs_outputs[stage]
            one_chunk = max(one_chunk, kept.inside[stage] // count)
    return total + one_chunk


class _Kept:
    """Counts the bytes that autograd keeps, inside each stage model and outside of them."""

    def __init__(self, model: Hierarchy) -> None:
        self.inside = [0] * model.num_stages
        self.inputs_outputs = [0] * model.num_stages
        self.outside = 0
        self._model = model
        self._stage: int | None = None
        weights = [*model.parameters(), *model.buffers()]
        self._seen = {_storage_of(weight) for weight in weights}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is kept in the block."""
        hooks = []
        for number, stage in enumerate(self._model.stage_models):
            hooks.append(stage.register_forward_pre_hook(self._entering(number)))
            hooks.append(stage.register_forward_hook(self._leaving(number)))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, number: int) -> Callable[..., tuple[torch.Tensor | None, ...]]:
        def enter(
            _: nn.Module, inputs: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor | None, ...]:
            self._stage = number
            self.inputs_outputs[number] += inputs[0].nbytes
            return (inputs[0], *(None for _ in inputs[1:]))  # an encoder's mask counts for nothing

        return enter

    def _leaving(self, number: int) -> Callable[..., None]:
        def leave(_: nn.Module, __: object, output: torch.Tensor) -> None:
            self._stage = None
            self.inputs_outputs[number] += output.nbytes

        return leave

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if (storage := _storage_of(tensor)) not in self._seen:
            self._seen.add(storage)
            if self._stage is None:
                self.outside += tensor.untyped_storage().nbytes()
            else:
                self.inside[self._stage] += tensor.untyped_storage().nbytes()
        return tensor


class _FlashAttention(TorchFunctionMode):
    """Attention keeps what fused kernels keep; on the meta device it would keep all weights."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _KeepOperands.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _KeepOperands(torch.autograd.Function):
    """Queries, keys, values ``(B, H, S, d)`` and the output are kept, no ``S x S`` weights."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def _storage_of(tensor: torch.Tensor) -> int:
    """What tells storages apart as long as they live; meta tensors have no addresses."""
    return StorageWeakRef(tensor.untyped_storage()).cdata

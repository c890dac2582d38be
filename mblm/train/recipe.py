"""What a configuration optimizes a model by: groups of parameters, optimizer and schedule."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from mblm.train.core.config import CoreTrainConfig
from mblm.train.core.muon import Muon
from mblm.train.core.schedule import learning_rate_factor


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The matrices of a model, and all its other parameters, as groups for an optimizer.

    A matrix is the weight of a ``torch.nn.Linear``, wherever in the model: in the stages (those of
    a user's own, too), in what embeds patches and in what projects contexts; but not that of
    ``to_logits``, and none that another module uses, too. The others are embeddings, positions,
    start tokens, norms, biases, the logits' layer, and what convolutions and state spaces have,
    Mamba-1's ``A_log`` included: some of them have two dimensions, and are no matrices.

    Returns:
        Two groups: the matrices with ``orthogonalize`` True, which `Muon` looks at, and the others
        with a ``weight_decay`` of 0, whatever the optimizer's is.
    """
    is_matrix: dict[nn.Parameter, bool] = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) and "to_logits" not in name.split(".")
        for own_name, parameter in module.named_parameters(recurse=False):
            so_far = is_matrix.get(parameter, True)
            is_matrix[parameter] = so_far and is_linear and own_name == "weight"
    matrices = [parameter for parameter, is_one in is_matrix.items() if is_one]
    others = [parameter for parameter, is_one in is_matrix.items() if not is_one]
    return [
        {"params": matrices, "orthogonalize": True},
        {"params": others, "orthogonalize": False, "weight_decay": 0.0},
    ]


def make_optimizer(
    train: CoreTrainConfig, model: nn.Module, parameters: Iterable[nn.Parameter]
) -> Optimizer:
    """The configured optimizer of these parameters of a model."""
    rate, betas, decay = train.learning_rate, train.betas, train.weight_decay
    if train.optimizer == "adam":
        return Adam(parameters, lr=rate, betas=betas, fused=True)
    given, groups = set(parameters), param_groups(model)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter in given]
    if train.optimizer == "adamw":
        return AdamW(groups, lr=rate, betas=betas, weight_decay=decay, fused=True)
    groups[0]["lr"] = train.learning_rate_matrix or rate
    return Muon(groups, lr=rate, betas=betas, weight_decay=decay)


def make_schedule(train: CoreTrainConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The configured schedule of a run of so many steps."""
    if train.lr_schedule == "cosine" and train.min_lr_factor == 0:
        return _published_cosine(train, optimizer, steps)
    return LambdaLR(optimizer, partial(learning_rate_factor, train, steps))


def _published_cosine(train: CoreTrainConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The factors of `learning_rate_factor`, rounded as in the published package."""
    warmup = math.floor(steps * train.warmup_steps_perc)
    cosine = CosineAnnealingLR(optimizer, T_max=max(steps - warmup, 1))
    if warmup == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=0.1, end_factor=1, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])

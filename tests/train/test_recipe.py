"""The configured recipe: which parameters are matrices, the optimizers, the learning rates."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mblm import MBLM, MambaBlock, MBLMEncoder, MBLMEncoderModelConfig, MBLMModelConfig
from mblm.model.block import StageBlock
from mblm.train import Muon, param_groups
from mblm.train.core.config import CoreTrainConfig
from mblm.train.recipe import make_optimizer, make_schedule

TRANSFORMER = {"attn_head_dims": 4, "attn_num_heads": 2, "attn_use_rot_embs": True}
TRANSFORMER_MATRICES = ["0.0.to_q", "0.0.to_kv", "0.0.to_out", "0.1.1", "0.1.4"]
BETWEEN = ["token_embs_rev.1._post.2.weight", "to_next_stage_proj.0.1.weight"]


def model_config(*blocks):
    return MBLMModelConfig(
        num_tokens=257,
        pad_token_id=256,
        hidden_dims=[8] * len(blocks),
        num_layers=[1] * len(blocks),
        seq_lens=[4] * len(blocks),
        train_checkpoint_chunks=None,
        block=list(blocks),
    )


def names(model):
    """The names of the matrices, after a look at whether all parameters are in a group once."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    matrices, others = (group["params"] for group in param_groups(model))
    assert len(matrices) + len(others) == len(name_of)
    assert {*matrices, *others} == name_of.keys()
    return {name_of[parameter] for parameter in matrices}


def mamba(kind):
    sizes = {"d_state": 4, "d_conv": 4, "expand": 2, "headdim": 4}
    return MambaBlock.model_validate({"block_type": kind, **sizes})


@pytest.mark.parametrize(
    ("block", "stage_matrices"),
    [
        (mamba("mamba1"), [f"0.mixer.{n}_proj" for n in ("in", "x", "dt", "out")]),
        (mamba("mamba2"), ["0.mixer.in_proj", "0.mixer.out_proj"]),
        ({**TRANSFORMER, "pos_emb_type": "fixed"}, TRANSFORMER_MATRICES),
    ],
    ids=["mamba1", "mamba2", "transformer"],
)
def test_the_matrices_of_stages_patch_embeddings_and_contexts(block, stage_matrices):
    model = MBLM(model_config(block, {**TRANSFORMER, "pos_emb_type": "fixed"}))
    first = {f"stage_models.0.layers.{name}.weight" for name in stage_matrices}
    last = {f"stage_models.1.layers.{name}.weight" for name in TRANSFORMER_MATRICES}
    assert names(model) == {*first, *last, *BETWEEN}


def test_an_encoder_has_the_same():
    block = {**TRANSFORMER, "block_type": "transformerEncoder"}
    config = MBLMEncoderModelConfig(mask_token_id=255, mblm_config=model_config(block, block))
    stages = [f"stage_models.{n}.layers.{m}.weight" for n in (0, 1) for m in TRANSFORMER_MATRICES]
    assert names(MBLMEncoder(config)) == {*stages, *BETWEEN}


class Custom(nn.Module):
    """Has a linear layer, one that is tied to an embedding, and a table of numbers."""

    def __init__(self, dim):
        super().__init__()
        self.mix, self.tied = nn.Linear(dim, dim), nn.Linear(dim, 3)
        self.table = nn.Embedding(3, dim)
        self.table.weight = self.tied.weight
        self.decays = nn.Parameter(torch.zeros(dim, 4))

    def forward(self, x):
        return self.mix(x)


class CustomBlock(StageBlock):
    block_type: str = "custom"

    def to_model(self, model_dim, num_layers):
        return Custom(model_dim)


def test_of_a_stage_of_ones_own_the_weights_of_linear_layers():
    assert names(MBLM(model_config(CustomBlock()))) == {"stage_models.0.mix.weight"}


def test_only_the_matrices_decay():
    matrices, others = param_groups(MBLM(model_config(TRANSFORMER)))
    assert "weight_decay" not in matrices and matrices["orthogonalize"] is True
    assert others["weight_decay"] == 0 and others["orthogonalize"] is False


def train_config(**fields):
    required = {
        "target_elements": 1,
        "target_elements_strategy": "batch",
        "batch_size": 1,
        "learning_rate": 0.01,
        "gradient_accumulate_every": 1,
    }
    return CoreTrainConfig(**{**required, **fields})


def optimizer_of(model, parameters=None, **fields):
    given = model.parameters() if parameters is None else parameters
    return make_optimizer(train_config(**fields), model, given)


def test_the_default_is_the_published_adam():
    model = MBLM(model_config(TRANSFORMER))
    optimizer = optimizer_of(model)
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert group["params"] == list(model.parameters())
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.9, 0.95), 0)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("muon", Muon)])
def test_the_other_optimizers_take_the_configured_numbers(name, kind):
    model = MBLM(model_config(TRANSFORMER, TRANSFORMER))
    fields = {"optimizer": name, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    if name == "muon":
        fields["learning_rate_matrix"] = 0.02
    optimizer = optimizer_of(model, **fields)
    assert type(optimizer) is kind
    matrices, others = optimizer.param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert matrices["betas"] == others["betas"] == (0.8, 0.9)
    assert (matrices["lr"], others["lr"]) == (0.02 if name == "muon" else 0.01, 0.01)


def test_parameters_that_are_not_given_are_not_optimized():
    model = MBLM(model_config(TRANSFORMER, TRANSFORMER))
    given = list(model.stage_models[0].parameters())
    optimizer = optimizer_of(model, given, optimizer="muon")
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(optimized) == len(given) and set(optimized) == set(given)


def rates(steps=20, groups=1, **fields):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    rate_of = [{"params": [p], "lr": 0.01 * (n + 1)} for n, p in enumerate(parameters)]
    optimizer = torch.optim.SGD(rate_of)
    schedule = make_schedule(train_config(**fields), optimizer, steps)
    taken = []
    for _ in range(steps):
        taken.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return taken


def test_wsd_rises_stays_and_falls():
    taken = [r for (r,) in rates(lr_schedule="wsd", warmup_steps_perc=0.1, decay_ratio=0.25)]
    falling = [0.01, 0.008, 0.006, 0.004, 0.002]
    assert taken == pytest.approx([0.001, 0.0055, *[0.01] * 13, *falling])


def test_linear_rises_and_falls():
    taken = [r for (r,) in rates(4, lr_schedule="linear", warmup_steps_perc=0)]
    assert taken == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_a_cosine_may_begin_at_its_top():
    assert [r for (r,) in rates(2, warmup_steps_perc=0)] == pytest.approx([0.01, 0.005])


def test_a_cosine_to_a_share_is_the_published_one_moved_up():
    published = [rate for (rate,) in rates()]
    raised = [rate for (rate,) in rates(min_lr_factor=0.2)]
    assert raised[:2] == pytest.approx(published[:2])
    assert raised[2:] == pytest.approx([0.002 + 0.8 * rate for rate in published[2:]])


def test_every_group_keeps_its_rate_relative_to_the_others():
    for schedule in ("cosine", "wsd", "linear"):
        for first, second in rates(groups=2, lr_schedule=schedule):
            assert second == pytest.approx(2 * first)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "sgd"}, "Input should be 'adam', 'adamw' or 'muon'"),
        ({"lr_schedule": "step"}, "Input should be 'cosine', 'wsd' or 'linear'"),
        ({"betas": [0.9, 1.0]}, "betas.1\n.*less than 1"),
        ({"betas": [0.9]}, "betas"),
        ({"optimizer": "adamw", "weight_decay": float("inf")}, "weight_decay\n.*a finite number"),
        ({"learning_rate": float("inf")}, "learning_rate\n.*a finite number"),
        ({"weight_decay": -0.1}, "weight_decay\n.*greater than or equal to 0"),
        ({"weight_decay": 0.1}, "weight_decay: expected 0 with optimizer adam, got 0.1"),
        (
            {"optimizer": "adamw", "learning_rate_matrix": 0.1},
            "learning_rate_matrix: expected none with optimizer adamw, got 0.1",
        ),
        (
            {"lr_schedule": "wsd", "warmup_steps_perc": 0.75},
            "decay_ratio: expected at most what warmup_steps_perc leaves, 0.25, got 0.4",
        ),
        ({"decay_ratio": 0}, "decay_ratio\n.*greater than 0"),
        ({"min_lr_factor": 2}, "min_lr_factor\n.*less than or equal to 1"),
        ({"optimiser": "muon"}, "optimiser\n.*Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_a_recipe_that_is_none_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        train_config(**fields)

"""Token embeddings: their formula, and checkpoints whose keys are those of release 0.4.0."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mblm import MBLM
from mblm.model.embeddings import MBLM_TOKEN_EMB_MIGRATION, migrate_embedding_keys
from mblm.utils.io import load_model_state, save_model_state
from tests.models import model, transformer


def build() -> MBLM:
    return model(transformer(), seq_lens=[3, 2, 4])


def old_keys(state_dict: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The layout of release 0.4.0, where an embedding was a Sequential of five modules."""
    upper = {"embedding": "0", "_post.1": "2", "_post.2": "3", "_post.3": "4"}
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith(f"{prefix}token_embs_rev.0."):
            key = f"{prefix}token_embs_rev.0.weight"
        elif key.startswith(f"{prefix}token_embs_rev."):
            stage, name = key.removeprefix(f"{prefix}token_embs_rev.").split(".", 1)
            module, parameter = name.rsplit(".", 1)
            key = f"{prefix}token_embs_rev.{stage}.{upper[module]}.{parameter}"
        renamed[key] = value
    return renamed


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (key, expected), actual in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, actual), key


class TestOldKeys:
    def test_are_those_of_the_contract(self) -> None:
        keys = old_keys(build().state_dict())
        assert "token_embs_rev.0.weight" in keys
        for name in ("0.weight", "2.weight", "2.bias", "3.weight", "3.bias", "4.weight", "4.bias"):
            assert f"token_embs_rev.1.{name}" in keys and f"token_embs_rev.2.{name}" in keys
        assert not any("embedding" in key or "_post" in key for key in keys)

    def test_become_the_current_ones(self) -> None:
        state = build().state_dict()
        migrated = migrate_embedding_keys(old_keys(state))
        assert list(migrated) == list(state)
        assert list(migrate_embedding_keys(state)) == list(state)

    def test_load_strictly(self) -> None:
        saved, fresh = build(), build()
        state = old_keys(saved.state_dict())
        before = list(state)
        fresh.load_state_dict(state, strict=True)
        assert_same_weights(saved, fresh)
        assert list(state) == before, "the caller's state dict is never written"

    @pytest.mark.parametrize("depth", [1, 2])
    def test_load_inside_other_modules(self, depth: int) -> None:
        saved, fresh = build(), build()
        prefix = "0." * depth
        wrapper: nn.Module = fresh
        for _ in range(depth):
            wrapper = nn.Sequential(wrapper)
        state = {f"{prefix}{key}": value for key, value in old_keys(saved.state_dict()).items()}
        wrapper.load_state_dict(state, strict=True)
        assert_same_weights(saved, fresh)

    def test_that_are_missing_are_still_named(self) -> None:
        state = old_keys(build().state_dict())
        del state["token_embs_rev.1.3.bias"]
        with pytest.raises(RuntimeError, match=r"token_embs_rev\.1\._post\.2\.bias"):
            build().load_state_dict(state)

    def test_of_other_modules_stay(self) -> None:
        state = {"other.token_embs_rev.0.weight": torch.zeros(1), "0.weight": torch.zeros(1)}
        assert migrate_embedding_keys(state).keys() == state.keys()
        assert migrate_embedding_keys(state, "other.").keys() == {
            "other.token_embs_rev.0.embedding.weight",
            "0.weight",
        }


@pytest.mark.parametrize("seq_lens", [[4], [3, 4], [2, 3, 4], [2, 2, 2, 2]], ids=len)
def test_a_smaller_vocabulary_fills_the_first_rows_of_a_larger_one(
    tmp_path: Path, seq_lens: list[int]
) -> None:
    small = model(transformer(), seq_lens=seq_lens, num_tokens=19, pad_token_id=0)
    large = model(transformer(), seq_lens=seq_lens, num_tokens=23, pad_token_id=0)
    before = {key: value.clone() for key, value in large.state_dict().items()}
    _, file = save_model_state(tmp_path, "small", small, loss=1.0)
    load_model_state(file, large, map_extend_embeddings=MBLM_TOKEN_EMB_MIGRATION)
    grown = 0
    for key, rows in small.state_dict().items():
        now = large.state_dict()[key]
        assert torch.equal(now[: len(rows)], rows), key
        assert torch.equal(now[len(rows) :], before[key][len(rows) :]), key
        grown += len(now) > len(rows)
    assert grown == len(seq_lens) + 2, "a table per stage, and weight and bias of the logits"


def test_the_published_names_are_among_those_that_grow() -> None:
    assert {
        "token_embs_rev.0.embedding.weight",
        "token_embs_rev.1.embedding.weight",
        "to_logits.weight",
        "to_logits.bias",
    } <= MBLM_TOKEN_EMB_MIGRATION


def test_every_stage_tells_the_sizes_of_its_table() -> None:
    m = build()
    sizes = {(table.num_embeddings, table.embedding_dim) for table in m.token_embs_rev}
    assert sizes == {(m.num_tokens, m.hidden_dims[-1])}


def test_a_patch_is_its_bytes_normalized_and_projected() -> None:
    """The formula written out, on a patch that is cut short by the end of the ids."""
    m = build()
    embedding = m.token_embs_rev[2]  # of stage 1, whose patches are 8 bytes
    _, norm_flat, project, norm = embedding._post
    ids = torch.randint(0, 18, (2, 13))
    padded = torch.cat((ids, torch.full((2, 3), m.pad_token_id)), dim=1)
    flat = embedding.embedding.weight[padded].view(2, 2, 8 * 8)
    expected = norm(project(norm_flat(flat)))
    torch.testing.assert_close(m.embed_patches(0, ids, 2), expected)
    torch.testing.assert_close(
        embedding.from_embeddings(flat.view(2, 2, 8, 8)), expected, msg="from embeddings of bytes"
    )


def test_the_padding_id_gets_no_gradient() -> None:
    m = build().train()
    ids = torch.randint(0, 18, (2, 23))  # padded to 24 bytes by the model
    ids[0, 5:] = m.pad_token_id
    m(ids).backward()
    for embedding in m.token_embs_rev:
        grad = embedding.embedding.weight.grad
        assert grad[m.pad_token_id].eq(0).all()
        assert grad.abs().sum() > 0

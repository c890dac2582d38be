"""The bidirectional hierarchy: masks of patches, padding, labels, and what it never writes to."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mblm import MBLMEncoder, MBLMEncoderModelConfig, MBLMReturnType
from mblm.model.block import StageBlock
from tests.models import encoder, mamba, transformer
from tests.models import model as decoder

LOSS, LOGITS = MBLMReturnType.LOSS, MBLMReturnType.LOGITS
LOSS_LOGITS, HIDDEN = MBLMReturnType.LOSS_LOGITS, MBLMReturnType.HIDDEN_STATE
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
PAD = 18  # of the models below, whose vocabulary is 19


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, PAD - 1, shape)


@pytest.fixture
def model() -> MBLMEncoder:
    return encoder(seq_lens=[3, 4])


def masks_of_stages(model: MBLMEncoder, mask: torch.Tensor) -> list[torch.Tensor]:
    """The masks that the stage models are given, from the most global one on."""
    seen: list[torch.Tensor] = []
    for stage in model.stage_models:
        stage.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(draw_ids(*mask.shape), attention_mask=mask, return_type=HIDDEN)
    return seen


# A whole patch, a part of one, and nothing of the last, which is short.
MASK = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]


class TestMask:
    @pytest.mark.parametrize(
        ("strategy", "of_patches"),
        [("any", [[True, True, False]]), ("all", [[True, False, False]])],
    )
    def test_is_reduced_per_patch(self, strategy: str, of_patches: list[list[bool]]) -> None:
        model = encoder(seq_lens=[3, 4], mask_reduce_strat=strategy)
        upper, local = masks_of_stages(model, torch.tensor([MASK]).bool())
        assert upper.tolist() == of_patches
        padded = torch.tensor([[*MASK, 0, 0]]).bool()
        assert local.tolist() == padded.view(3, 4).tolist()

    def test_a_patch_that_is_padded_is_not_wholly_attended(self) -> None:
        full = torch.ones(1, 10, dtype=torch.bool)
        anys = masks_of_stages(encoder(seq_lens=[3, 4]), full)[0]
        alls = masks_of_stages(encoder(seq_lens=[3, 4], mask_reduce_strat="all"), full)[0]
        assert anys.tolist() == [[True, True, True]]
        assert alls.tolist() == [[True, True, False]]

    def test_of_three_stages(self) -> None:
        mask = torch.zeros(2, 16, dtype=torch.bool)
        mask[0, 9] = True
        top, middle, local = masks_of_stages(encoder(seq_lens=[2, 2, 4]), mask)
        assert top.tolist() == [[False, True], [False, False]]
        assert middle.tolist() == [[False, False], [True, False], [False, False], [False, False]]
        assert local.sum() == 1 and local.shape == (8, 4)

    def test_none_is_all(self, model: MBLMEncoder) -> None:
        ids = draw_ids(2, 10)
        mask = torch.ones(2, 10, dtype=torch.bool)
        assert torch.equal(
            model(ids, return_type=LOGITS), model(ids, attention_mask=mask, return_type=LOGITS)
        )

    @pytest.mark.parametrize("strategy", ["any", "all"])
    @pytest.mark.parametrize("more", [2, 4])
    def test_padding_that_is_masked_changes_nothing(self, strategy: str, more: int) -> None:
        model = encoder(seq_lens=[3, 4], mask_reduce_strat=strategy)
        ids, mask = draw_ids(2, 6), torch.ones(2, 6, dtype=torch.bool)
        expected = model(ids, attention_mask=mask, return_type=LOGITS)
        padded = model(
            F.pad(ids, (0, more), value=PAD),
            attention_mask=F.pad(mask, (0, more), value=False),
            return_type=LOGITS,
        )
        torch.testing.assert_close(padded[:, :6], expected, **CLOSE)

    def test_bytes_that_are_masked_are_not_seen_within_their_patch(self) -> None:
        """With "all", a partly masked patch is not seen by the others of its stage."""
        model = encoder(seq_lens=[3, 4], mask_reduce_strat="all")
        ids, mask = draw_ids(1, 12), torch.ones(1, 12, dtype=torch.bool)
        mask[0, 5] = False
        changed = ids.clone()
        changed[0, 5] = (ids[0, 5] + 1) % PAD
        before, after = (
            model(x, attention_mask=mask, return_type=LOGITS)[0] for x in (ids, changed)
        )
        elsewhere = [*range(4), *range(8, 12)]  # its own patch still gets context from itself
        torch.testing.assert_close(before[elsewhere], after[elsewhere], **CLOSE)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
    def test_rows_with_nothing_to_attend_to_are_finite(
        self, model: MBLMEncoder, dtype: torch.dtype | None
    ) -> None:
        ids, mask = draw_ids(2, 10), torch.zeros(2, 10, dtype=torch.bool)
        mask[1] = True
        if dtype is not None:
            model = copy.deepcopy(model).to(dtype)
        model.train()
        loss, logits = model(ids, attention_mask=mask, labels=ids, return_type=LOSS_LOGITS)
        loss.backward()
        assert logits.isfinite().all() and loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class TestShapes:
    def test_flat_and_nested_ids_give_the_same(self, model: MBLMEncoder) -> None:
        ids, mask = draw_ids(2, 12), torch.rand(2, 12) < 0.7
        labels, weights = draw_ids(2, 12), torch.rand(2, 12)
        flat = {"attention_mask": mask, "labels": labels, "loss_mask": weights}
        nested = {key: value.view(2, 3, 4) for key, value in flat.items()}
        loss, logits = model(ids, **flat, return_type=LOSS_LOGITS)
        nested_loss, nested_logits = model(ids.view(2, 3, 4), **nested, return_type=LOSS_LOGITS)
        assert nested_logits.shape == (2, 3, 4, 19)
        assert torch.equal(nested_logits.flatten(1, 2), logits)
        assert torch.equal(nested_loss, loss)

    @pytest.mark.parametrize("length", [1, 4, 7, 12])
    def test_of_flat_ids(self, model: MBLMEncoder, length: int) -> None:
        ids = draw_ids(2, length)
        assert model(ids, return_type=HIDDEN).shape == (2, length, 8)
        assert model(ids, return_type=LOGITS).shape == (2, length, 19)
        assert model(ids, labels=ids, return_type=LOSS).shape == ()

    def test_without_a_return_type_both_are_returned(self, model: MBLMEncoder) -> None:
        ids = draw_ids(2, 5)
        loss, logits = model(ids, labels=ids)
        assert loss.shape == () and logits.shape == (2, 5, 19)

    def test_there_are_no_start_tokens(self, model: MBLMEncoder) -> None:
        assert not any("start_tokens" in key for key in model.state_dict())

    def test_every_byte_sees_every_other(self, model: MBLMEncoder) -> None:
        ids = draw_ids(1, 12)
        changed = ids.clone()
        changed[0, 11] = (ids[0, 11] + 1) % PAD
        difference = model(ids, return_type=LOGITS) - model(changed, return_type=LOGITS)
        assert (difference.abs().amax(-1) > 1e-6).all()


class TestLoss:
    def by_hand(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        losses = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
        losses = losses * weights
        return losses[losses != 0].mean()

    def test_counts_bytes_that_are_attended_and_labelled(self, model: MBLMEncoder) -> None:
        ids, labels = draw_ids(2, 10), draw_ids(2, 10)
        mask = torch.rand(2, 10) < 0.7
        labels[0, :4] = -100
        weights = torch.rand(2, 10)
        loss, logits = model(
            ids, attention_mask=mask, labels=labels, loss_mask=weights, return_type=LOSS_LOGITS
        )
        counted = weights * mask * (labels != -100)
        torch.testing.assert_close(loss, self.by_hand(logits, labels, counted))

    def test_pad_labels_count_as_any_other(self, model: MBLMEncoder) -> None:
        ids = draw_ids(1, 5)
        labels = torch.full((1, 5), PAD)
        loss, logits = model(ids, labels=labels)
        torch.testing.assert_close(loss, self.by_hand(logits, labels, torch.ones(1, 5)))
        assert loss > 0

    def test_of_nothing_is_zero_and_has_a_gradient(self, model: MBLMEncoder) -> None:
        ids = draw_ids(2, 5)
        loss = model.train()(ids, labels=torch.full_like(ids, -100), return_type=LOSS)
        assert loss.item() == 0
        loss.backward()

    def test_writes_to_no_argument(self, model: MBLMEncoder) -> None:
        ids, labels = draw_ids(2, 10), draw_ids(2, 10)
        arguments = {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": torch.rand(2, 10) < 0.5,
            "loss_mask": torch.rand(2, 10),
        }
        copies = {key: value.clone() for key, value in arguments.items()}
        model.train()(**arguments, return_type=LOSS).backward()
        for key, value in arguments.items():
            assert torch.equal(value, copies[key]), key

    def test_checkpoint_chunks_give_the_same(self, model: MBLMEncoder) -> None:
        chunked = encoder(seq_lens=[3, 4], train_checkpoint_chunks=[2]).train()
        chunked.load_state_dict(model.state_dict())
        ids, mask = draw_ids(3, 10), torch.rand(3, 10) < 0.8
        losses = [
            x(ids, attention_mask=mask, labels=ids, return_type=LOSS)
            for x in (model.train(), chunked)
        ]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(model.local_table.grad, chunked.local_table.grad)


def test_inputs_embeds_repeat_what_ids_give(model: MBLMEncoder) -> None:
    ids, mask = draw_ids(2, 3, 4), torch.rand(2, 3, 4) < 0.7
    upper = model.token_embs_rev[1]
    embedded = [
        model.local_table[ids],
        upper.from_embeddings(upper.embedding.weight[ids]),
    ]
    for given in (None, mask):
        expected = model(ids, attention_mask=given, return_type=HIDDEN)
        actual = model(inputs_embeds=embedded, attention_mask=given, return_type=HIDDEN)
        torch.testing.assert_close(actual, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 3, 4\)"):
        model(inputs_embeds=embedded, attention_mask=mask.flatten(1), return_type=HIDDEN)
    with pytest.raises(ValueError, match="HIDDEN_STATE only"):
        model(inputs_embeds=embedded, return_type=LOGITS)


@pytest.mark.parametrize("block", [transformer(), mamba("mamba1")], ids=["transformer", "mamba1"])
def test_blocks_of_a_decoder_are_refused(block: StageBlock) -> None:
    config = decoder(block, transformer(), seq_lens=[3, 4]).config
    with pytest.raises(ValueError, match=r"block: stage 1 is a \w+, which takes no attention mask"):
        MBLMEncoder(MBLMEncoderModelConfig(mask_token_id=17, mblm_config=config))


def test_the_configuration_of_a_decoder_is_refused(model: MBLMEncoder) -> None:
    with pytest.raises(TypeError, match=r"expected an mblm.MBLMEncoderModelConfig, got MBLMModel"):
        MBLMEncoder(model.config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"labels": None}, ValueError, "labels: a loss needs labels"),
        ({"labels": torch.zeros(2, 4).long()}, ValueError, r"labels: expected the shape"),
        ({"labels": torch.full((2, 5), 19)}, ValueError, r"labels: token id 19 at position"),
        ({"labels": torch.full((2, 5), -1)}, ValueError, r"labels: token id -1 at position"),
        ({"labels": torch.zeros(2, 5)}, TypeError, "labels: expected integer"),
        ({"labels": [1]}, TypeError, "labels: expected a tensor, got list"),
        ({"attention_mask": torch.ones(2, 5)}, TypeError, "torch.bool, got torch.float32"),
        ({"attention_mask": [True]}, TypeError, "attention_mask: .* torch.bool, got list"),
        ({"attention_mask": torch.ones(2, 4).bool()}, ValueError, "attention_mask: expected the"),
        ({"loss_mask": torch.ones(1, 5)}, ValueError, "loss_mask: expected the shape"),
        ({"input_ids": torch.zeros(2, 0).long()}, ValueError, "at least one byte"),
        ({"input_ids": torch.full((2, 5), 19)}, ValueError, "input_ids: token id 19"),
        ({"input_ids": torch.zeros(2, 13).long()}, ValueError, "13 bytes exceed the context"),
        ({"input_ids": None}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"return_type": "loss"}, TypeError, "return_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_named(
    model: MBLMEncoder, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    good = {"input_ids": torch.zeros(2, 5).long(), "labels": torch.zeros(2, 5).long()}
    with pytest.raises(error, match=words):
        model(**{**good, "return_type": LOSS_LOGITS, **arguments})

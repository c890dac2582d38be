"""The hierarchy's forward pass: nesting, losses, embeddings as input, dtypes, bad input."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mblm import MBLM, MBLMReturnType
from tests.hierarchies import hierarchies
from tests.models import LSTMBlock, mamba, model, transformer

LOSS, LOGITS = MBLMReturnType.LOSS, MBLMReturnType.LOGITS
LOSS_LOGITS, HIDDEN = MBLMReturnType.LOSS_LOGITS, MBLMReturnType.HIDDEN_STATE
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
PAD = 18  # of the models below, whose vocabulary is 19


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, PAD, shape)


@pytest.fixture
def three() -> MBLM:
    return model(transformer(), seq_lens=[3, 2, 4], hidden_dims=[6, 4, 8])


def loss_by_hand(
    m: MBLM, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of flat ids and of each byte, from nested logits: the first row predicts byte 0."""
    padded = F.pad(ids, (0, -ids.shape[1] % m.patch_sizes[0]), value=m.pad_token_id)
    nested = m(padded.view(len(ids), -1, *m.seq_lens[1:]), return_type=LOGITS)
    first = nested.flatten(1, -3)[:, 0, :1]  # (B, 1, V)
    later = nested[..., 1:, :].flatten(1, -2)[:, : ids.shape[1] - 1]
    losses = F.cross_entropy(
        torch.cat((first, later), dim=1).transpose(1, 2), ids, reduction="none"
    )
    losses = losses * (ids != m.pad_token_id)
    if mask is not None:
        losses = losses * mask
    return losses[losses != 0].mean(), losses


class TestNesting:
    @pytest.mark.parametrize("length", [8, 16, 24])
    def test_flat_and_nested_ids_give_the_same(self, three: MBLM, length: int) -> None:
        ids = draw_ids(2, length)
        nested = ids.view(2, -1, 2, 4)
        loss, logits = three(ids, return_type=LOSS_LOGITS)
        nested_loss, nested_logits = three(nested, return_type=LOSS_LOGITS)
        assert nested_logits.shape == (2, length // 8, 2, 1 + 4, 19)
        assert torch.equal(nested_logits[..., 1:, :].flatten(1, -2), logits)
        assert torch.equal(nested_loss, loss), "over all of the nested input"
        hidden = three(nested, return_type=HIDDEN)
        assert hidden.shape == (*nested.shape, 8)
        assert torch.equal(hidden.flatten(1, -2), three(ids, return_type=HIDDEN))

    @pytest.mark.parametrize("length", [1, 3, 8, 9, 23, 24])
    def test_shapes_of_flat_ids(self, three: MBLM, length: int) -> None:
        ids = draw_ids(2, length)
        assert three(ids).shape == ()
        assert three(ids, return_type=LOGITS).shape == (2, length, 19)
        assert three(ids, return_type=HIDDEN).shape == (2, length, 8)
        logits = three(ids, return_type=HIDDEN) @ three.to_logits.weight.T + three.to_logits.bias
        torch.testing.assert_close(logits, three(ids, return_type=LOGITS))

    def test_what_is_padded_makes_no_difference(self, three: MBLM) -> None:
        ids = draw_ids(2, 13)
        padded = F.pad(ids, (0, 3), value=PAD)
        assert torch.equal(
            three(padded, return_type=LOGITS)[:, :13], three(ids, return_type=LOGITS)
        )
        torch.testing.assert_close(three(padded), three(ids))

    def test_a_single_stage(self) -> None:
        m = model(transformer(), seq_lens=[9])
        ids = draw_ids(2, 7)
        loss, logits = m(ids, return_type=LOSS_LOGITS)
        assert logits.shape == (2, 7, 19)
        first = m(ids[:, :0], return_type=LOGITS)
        rows = torch.cat((first, logits[:, :-1]), dim=1).transpose(1, 2)
        torch.testing.assert_close(loss, F.cross_entropy(rows, ids))

    @pytest.mark.parametrize("kind", [LOSS, LOGITS, HIDDEN])
    @pytest.mark.parametrize("shape", [(3, 0), (3, 0, 2, 4)])
    def test_empty_input(self, three: MBLM, kind: MBLMReturnType, shape: tuple[int, ...]) -> None:
        empty = torch.empty(shape, dtype=torch.long)
        logits = three(empty, return_type=kind)
        assert logits.shape == (3, 1, 19)
        assert torch.equal(logits[0], logits[2])

    def test_empty_input_by_its_formula(self, three: MBLM) -> None:
        """Every stage on its start token and row 0 of the context from the stage above."""
        context = torch.zeros(6)
        for stage, dim in enumerate(three.hidden_dims):
            x = (three.start_tokens[stage] + context)[None, None]
            attended = three.stage_models[stage](x)
            if stage < 2:
                context = three.to_next_stage_proj[stage](attended).flatten(0, 2)[0]
            assert attended.shape == (1, 1, dim)
        torch.testing.assert_close(three(torch.empty(1, 0).long()), three.to_logits(attended))

    def test_more_bytes_than_the_context_without_fixed_positions(self) -> None:
        m = model(mamba("mamba1"), transformer(), seq_lens=[2, 3])
        assert m(draw_ids(1, 20), return_type=LOGITS).shape == (1, 20, 19)


@given(m=hierarchies(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_no_byte_changes_what_comes_before_it(m: MBLM, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, m.context_size), label="length")
    position = data.draw(st.integers(0, length - 1), label="position")
    ids = draw_ids(1, length)
    changed = ids.clone()
    changed[0, position:] = (changed[0, position:] + 1 + position % 3) % PAD
    with torch.no_grad():
        before, after = (m(x, return_type=LOGITS)[:, :position] for x in (ids, changed))
    torch.testing.assert_close(before, after, **CLOSE)


class TestLoss:
    @pytest.mark.parametrize("length", [1, 8, 13, 24])
    def test_equals_the_mean_over_bytes(self, three: MBLM, length: int) -> None:
        ids = draw_ids(3, length)
        torch.testing.assert_close(three(ids), loss_by_hand(three, ids)[0])

    def test_leaves_out_pad_tokens(self, three: MBLM) -> None:
        ids = draw_ids(2, 13)
        ids[0, 4:] = PAD
        ids[1, 3] = PAD
        expected, losses = loss_by_hand(three, ids)
        assert losses.count_nonzero() == 4 + 12
        torch.testing.assert_close(three(ids), expected)

    def test_mask_of_nested_ids(self, three: MBLM) -> None:
        ids, mask = draw_ids(2, 16), torch.rand(2, 16)
        nested = three(ids.view(2, 2, 2, 4), loss_mask=mask.view(2, 2, 2, 4))
        assert torch.equal(nested, three(ids, loss_mask=mask))

    @pytest.mark.parametrize("why", ["pad tokens only", "a mask of zeros"])
    def test_of_nothing_is_zero_and_has_a_gradient(self, three: MBLM, why: str) -> None:
        ids = torch.full((2, 5), PAD) if why == "pad tokens only" else draw_ids(2, 5)
        mask = torch.zeros(2, 5) if why != "pad tokens only" else None
        loss = three.train()(ids, loss_mask=mask)
        assert loss.item() == 0 and loss.requires_grad
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in three.parameters())

    def test_writes_to_no_argument(self, three: MBLM) -> None:
        ids, mask = draw_ids(2, 13), torch.rand(2, 13)
        copies = ids.clone(), mask.clone()
        three.train()(ids, loss_mask=mask).backward()
        assert torch.equal(ids, copies[0]) and torch.equal(mask, copies[1])


@pytest.mark.parametrize("chunks", [[1, 1], [2, 3], [100, 100]])
def test_checkpoint_chunks_give_the_same_loss_and_gradients(chunks: list[int]) -> None:
    m = model(mamba("mamba1"), transformer(), transformer(), seq_lens=[3, 2, 4]).train()
    chunked = MBLM(m.config.model_copy(update={"train_checkpoint_chunks": chunks})).train()
    chunked.load_state_dict(m.state_dict())
    ids = draw_ids(2, 13)
    losses = [x(ids) for x in (m, chunked)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, expected), actual in zip(m.named_parameters(), chunked.parameters(), strict=True):
        assert (expected.grad is None) == (actual.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(
                actual.grad, expected.grad, msg=lambda x, n=name: f"{n}: {x}"
            )


class TestInputsEmbeds:
    def embeddings(self, m: MBLM, ids: torch.Tensor) -> list[torch.Tensor]:
        """What the model's own tables give for nested ids, the local stage's first."""
        tables = [module.embedding.weight for module in m.token_embs_rev]
        embedded = [tables[0][ids]]
        for reverse in range(1, m.num_stages):
            of_bytes = tables[reverse][ids].flatten(ids.ndim - reverse, -2)
            embedded.append(m.token_embs_rev[reverse].from_embeddings(of_bytes))
        return embedded

    def test_one_per_stage_repeats_what_ids_give(self, three: MBLM) -> None:
        ids = draw_ids(2, 3, 2, 4)
        embedded = self.embeddings(three, ids)
        assert [tuple(x.shape) for x in embedded] == [(2, 3, 2, 4, 8), (2, 3, 2, 4), (2, 3, 6)]
        for sequence in (embedded, tuple(embedded)):
            hidden = three(inputs_embeds=sequence, return_type=HIDDEN)
            torch.testing.assert_close(hidden, three(ids, return_type=HIDDEN), **CLOSE)

    def test_one_tensor_serves_all_stages(self, three: MBLM) -> None:
        """As if every stage's table were the one that the embeddings come from."""
        ids = draw_ids(2, 3, 2, 4)
        with torch.no_grad():
            for module in three.token_embs_rev[1:]:
                module.embedding.weight.copy_(three.token_embs_rev[0].embedding.weight)
        of_bytes = three.token_embs_rev[0].embedding.weight[ids]
        with pytest.warns(UserWarning, match="one tensor per stage") as caught:
            hidden = three(inputs_embeds=of_bytes, return_type=HIDDEN)
        assert caught[0].filename == __file__
        torch.testing.assert_close(hidden, three(ids, return_type=HIDDEN), **CLOSE)

    def test_one_stage_needs_no_warning(self) -> None:
        m = model(transformer(), seq_lens=[9])
        ids = draw_ids(2, 7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hidden = m(inputs_embeds=m.local_table[ids], return_type=HIDDEN)
        torch.testing.assert_close(hidden, m(ids, return_type=HIDDEN), **CLOSE)

    def test_have_gradients(self, three: MBLM) -> None:
        embedded = [
            x.detach().requires_grad_() for x in self.embeddings(three, draw_ids(1, 3, 2, 4))
        ]
        three(inputs_embeds=embedded, return_type=HIDDEN).sum().backward()
        assert all(x.grad is not None for x in embedded)

    @pytest.mark.parametrize(
        ("shape", "words"),
        [
            ((2, 3, 2, 4, 7), r"inputs_embeds: expected shape \(B, P_1', 2, 4, 8\), got"),
            ((2, 3, 3, 4, 8), "inputs_embeds: expected shape"),
            ((2, 24, 8), "inputs_embeds: expected shape"),
            ((0, 3, 2, 4, 8), "inputs_embeds: expected shape"),
            ((2, 0, 2, 4, 8), "inputs_embeds: expected shape"),
            ((2, 4, 2, 4, 8), "4 patches exceed the 3 fixed positions"),
        ],
    )
    def test_of_another_shape_are_refused(
        self, three: MBLM, shape: tuple[int, ...], words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            three(inputs_embeds=torch.zeros(shape), return_type=HIDDEN)

    def test_lists_are_checked_one_by_one(self, three: MBLM) -> None:
        good = self.embeddings(three, draw_ids(2, 3, 2, 4))
        for bad, error, words in (
            (good[:2], ValueError, "expected 3 tensors, one per stage, got 2"),
            (good[::-1], ValueError, r"inputs_embeds\[0\]: expected shape"),
            ([good[0], good[1], good[2][:1]], ValueError, r"inputs_embeds\[2\]: .* = \(2, 3\)"),
            ([good[0], good[1], None], TypeError, r"inputs_embeds\[2\]: .* got NoneType"),
            ([good[0].long(), *good[1:]], TypeError, r"inputs_embeds\[0\]: .* got torch.int64"),
        ):
            with pytest.raises(error, match=words):
                three(inputs_embeds=bad, return_type=HIDDEN)

    @pytest.mark.parametrize("kind", [LOSS, LOGITS, LOSS_LOGITS])
    def test_give_hidden_states_only(self, three: MBLM, kind: MBLMReturnType) -> None:
        with pytest.raises(ValueError, match="inputs_embeds gives HIDDEN_STATE only"):
            three(inputs_embeds=torch.zeros(1, 3, 2, 4, 8), return_type=kind)


class TestDtypes:
    @pytest.mark.parametrize(
        "blocks",
        [(transformer(),), (mamba("mamba1"), transformer(pos_emb_type="rope"))],
        ids=["transformers", "mamba and rope"],
    )
    @pytest.mark.parametrize("how", ["autocast", "bfloat16"])
    def test_half_precision_is_close(self, blocks: Any, how: str) -> None:
        m = model(*blocks, seq_lens=[6, 4])
        ids = draw_ids(2, 21)
        loss, logits = m(ids, return_type=LOSS_LOGITS)
        if how == "bfloat16":
            half = copy.deepcopy(m).bfloat16()
            half_loss, half_logits = half(ids, return_type=LOSS_LOGITS)
            half_loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in half.parameters())
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half_loss, half_logits = m(ids, return_type=LOSS_LOGITS)
            half_loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
        torch.testing.assert_close(half_loss.float(), loss, atol=0.02, rtol=0.02)
        torch.testing.assert_close(half_logits.float(), logits, atol=0.05, rtol=0.05)


class TestBadInput:
    @pytest.mark.parametrize(
        ("ids", "error", "words"),
        [
            (torch.tensor([[0, 1], [2, 19]]), ValueError, r"id 19 at position \(1, 1\) .* 19"),
            (torch.tensor([[0, -1]]), ValueError, r"input_ids: token id -1 at position \(0, 1\)"),
            (torch.zeros(2, 3), TypeError, "input_ids: expected integer .* got torch.float32"),
            (torch.zeros(2, 3).bool(), TypeError, "got torch.bool"),
            (torch.zeros(2, 3).numpy(), TypeError, "got ndarray"),
            ([[1, 2]], TypeError, "got list"),
            (torch.zeros(2, 3).long().to_sparse(), TypeError, "a dense tensor, got .*sparse"),
            (torch.zeros(3).long(), ValueError, r"expected shape \(B, L\) or \(B, P_1', 2, 4\)"),
            (torch.tensor(1), ValueError, "expected shape"),
            (torch.zeros(1, 2, 3).long(), ValueError, "expected shape"),
            (torch.zeros(1, 2, 4, 2).long(), ValueError, r"nested shape \(B, P_1', 2, 4\), got"),
            (torch.zeros(0, 3).long(), ValueError, "the batch is empty"),
            (torch.zeros(1, 25).long(), ValueError, "25 bytes exceed the context of 24 bytes"),
            (torch.zeros(1, 4, 2, 4).long(), ValueError, "4 patches exceed the context"),
        ],
        ids=lambda value: str(value)[:30] if isinstance(value, str) else None,
    )
    def test_ids(self, three: MBLM, ids: Any, error: type[Exception], words: str) -> None:
        for kind in MBLMReturnType:
            with pytest.raises(error, match=words):
                three(ids, return_type=kind)

    def test_neither_or_both_inputs(self, three: MBLM) -> None:
        for arguments in ({}, {"input_ids": draw_ids(1, 3), "inputs_embeds": torch.zeros(1)}):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
                three(**arguments)

    def test_loss_mask(self, three: MBLM) -> None:
        with pytest.raises(ValueError, match=r"loss_mask: expected the shape .* \(2, 5\), got"):
            three(draw_ids(2, 5), loss_mask=torch.ones(2, 4))
        with pytest.raises(TypeError, match="loss_mask: expected a tensor, got list"):
            three(draw_ids(2, 5), loss_mask=[[1] * 5] * 2)
        with pytest.raises(ValueError, match=r"loss_mask: expected the device .* cpu, got meta"):
            three(draw_ids(2, 5), loss_mask=torch.ones(2, 5, device="meta"))

    @pytest.mark.parametrize("config", [None, {"num_tokens": 257}])
    def test_what_is_no_configuration(self, config: Any) -> None:
        with pytest.raises(TypeError, match=r"cfg: expected an mblm.MBLMModelConfig, got"):
            MBLM(config)

    @pytest.mark.parametrize("kind", ["loss", "LOSS", None, 2])
    def test_return_type(self, three: MBLM, kind: Any) -> None:
        with pytest.raises(TypeError, match="return_type: expected a MBLMReturnType, got"):
            three(draw_ids(2, 5), return_type=kind)


def test_a_custom_block_works_as_it_is() -> None:
    m = model(LSTMBlock(pos_emb_type="fixed"), transformer(), seq_lens=[3, 4]).train()
    m(draw_ids(2, 9)).backward()
    assert m.stage_models[0].lstm.weight_hh_l0.grad.abs().sum() > 0


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_made_on_meta_and_filled_later_is_the_same(assign: bool) -> None:
    m = model(transformer(pos_emb_type="rope"), mamba("mamba1"), seq_lens=[3, 4])
    ids = draw_ids(2, 9)
    with torch.device("meta"):
        meta = MBLM(m.config).eval()
    assert all(p.is_meta for p in meta.parameters())
    assert meta(ids.to("meta"), return_type=LOGITS).shape == (2, 9, 19)
    if not assign:
        meta.to_empty(device="cpu")
    meta.load_state_dict(m.state_dict(), assign=assign)
    assert torch.equal(meta(ids, return_type=LOGITS), m(ids, return_type=LOGITS))


@pytest.mark.parametrize("how", [{}, {"tile": 4}, {"checkpoint_global": True}, {"offload": True}])
@pytest.mark.parametrize("upper", [mamba("mamba1"), transformer()], ids=["mamba1", "transformer"])
def test_a_training_step_is_tried_without_values(upper: Any, how: dict[str, Any]) -> None:
    """As tools do that estimate memory, and those that count operations."""
    blocks, how = (upper, transformer()), {"num_layers": [2, 1], **how}
    with FakeTensorMode():
        m = model(*blocks, seq_lens=[5, 4], **how).train()
        m(torch.randint(0, 18, (2, 20))).backward()
        assert all(p.grad is not None for p in m.parameters())
    with FlopCounterMode(display=False) as counted:
        m = model(*blocks, seq_lens=[5, 4], **how).train()
        m(torch.randint(0, 18, (2, 20))).backward()
    assert counted.get_total_flops()


def test_a_copy_is_the_same() -> None:
    m = model(transformer(), mamba("mamba1"), seq_lens=[3, 4])
    ids = draw_ids(2, 9)
    assert torch.equal(copy.deepcopy(m)(ids), m(ids))


@pytest.mark.slow
@pytest.mark.parametrize("block", ["transformer", "mamba1"])
def test_a_training_step_compiles_without_a_break(block: str) -> None:
    upper = transformer() if block == "transformer" else mamba("mamba1")
    m = model(upper, transformer(pos_emb_type="rope"), seq_lens=[3, 4]).train()
    ids = draw_ids(2, 9)
    expected = m(ids)
    expected.backward()
    gradients = {name: p.grad for name, p in m.named_parameters()}
    m.zero_grad(set_to_none=True)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    loss = compiled(ids)
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for name, p in m.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(
                p.grad, gradients[name], **CLOSE, msg=lambda x, n=name: n + x
            )


@pytest.mark.parametrize(
    "seq_lens", [[24], pytest.param([6, 4], marks=pytest.mark.slow)], ids=["one stage", "two"]
)
@torch.no_grad()
def test_a_compiled_model_takes_any_length_by_one_graph(seq_lens: list[int]) -> None:
    m = model(transformer(attn_use_rot_embs=False), seq_lens=seq_lens)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(m, fullgraph=True, backend=keep, dynamic=True)
    for length in (22, 24, 17, 9):
        ids = draw_ids(2, length)
        torch.testing.assert_close(compiled(ids), m(ids), **CLOSE)
    assert len(graphs) == 1

"""Layers that are not what they seem (adapted, quantized, hooked, replaced) are called as they are.

A model computes with them in training, and its session decodes what its forward pass computes.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from mblm import MBLM, MBLMReturnType
from mblm.inference.session import Session
from mblm.model.transformer import TransformerDecoder
from mblm.model.transformer_layers import RotaryEmbedding
from mblm.model.utils import RoPE
from mblm.train.mblm import MaskedTrainer, MegabyteTrainer
from tests.models import LSTMBlock, encoder, mamba, model, transformer

BLOCKS: dict[str, Callable[[], Any]] = {
    "transformer": transformer,
    "mamba1": mamba,
    "mamba2": lambda: mamba("mamba2", pos_emb_type="rope"),
}
IDS = torch.randint(0, 18, (2, 11), generator=torch.Generator().manual_seed(1))


def build(kind: str, layers: int = 1, **fields: Any) -> MBLM:
    """A model of two stages of one kind, so many layers in the upper one."""
    torch.manual_seed(0)
    plain = model(BLOCKS[kind](), seq_lens=[3, 4], hidden_dims=[16, 8], num_layers=[layers, 1])
    if not fields:
        return plain
    other = MBLM(plain.config.model_copy(update=fields)).eval()
    other.load_state_dict(plain.state_dict())
    return other


@pytest.fixture(params=sorted(BLOCKS))
def m(request: pytest.FixtureRequest) -> MBLM:
    return build(request.param)


def linears(m: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in m.named_modules() if isinstance(part, nn.Linear)}


def replace(m: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(m.get_submodule(parent), own, part)


@torch.no_grad()
def forward_logits(m: Any, ids: Tensor = IDS) -> Tensor:
    """Logits of the byte after ``ids (B, L)``, of a pass over all of it."""
    return m(ids, return_type=MBLMReturnType.LOGITS)[:, -1]


def decoded_logits(m: Any, ids: Tensor = IDS) -> Tensor:
    """The same, by a session that takes in some bytes at once and the others one by one."""
    session = Session(m, len(ids))
    session.feed(ids[:, :6])
    for byte in ids[:, 6:].unbind(1):
        session.feed(byte[:, None])
    return session.logits()


def check_decodes(m: Any) -> None:
    """A session computes what the forward pass does, and generates accordingly."""
    torch.testing.assert_close(decoded_logits(m), forward_logits(m), rtol=1e-4, atol=1e-5)
    ragged = Session(m, 2).feed([IDS[0, :5], IDS[1, :7]]).generate(1)
    for row, count, byte in zip(IDS, (5, 7), ragged, strict=True):
        assert byte == forward_logits(m, row[None, :count]).argmax()
    generated = m.generate(IDS[0, :5], num_tokens_to_generate=6, enable_progress=False)[None]
    for end in range(5, 11):
        assert generated[0, end] == forward_logits(m, generated[:, :end]).argmax()


class TestPeft:
    @pytest.fixture(autouse=True)
    def peft(self) -> Any:
        return pytest.importorskip("peft", reason="peft is not installed: LoRA is NOT tested")

    def adapted(self, m: MBLM, peft: Any, **fields: Any) -> Any:
        """A model with an adapter on every linear layer, which does something at once."""
        config = peft.LoraConfig(
            r=2, target_modules=[*linears(m)], init_lora_weights=False, **fields
        )
        return peft.get_peft_model(m, config)

    @pytest.mark.parametrize("fields", [{}, {"tile": 4}, {"checkpoint_global": True}], ids=str)
    @pytest.mark.parametrize("kind", sorted(BLOCKS))
    def test_each_adapter_gets_a_gradient(
        self, peft: Any, kind: str, fields: dict[str, Any]
    ) -> None:
        adapted = self.adapted(build(kind, **fields).train(), peft)
        adapted(IDS).backward()
        adapters = [(n, p) for n, p in adapted.named_parameters() if "lora_" in n]
        assert len(adapters) == 2 * len(linears(build(kind)))
        assert [n for n, p in adapters if p.grad is None or not p.grad.any()] == []

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", sorted(BLOCKS))
    def test_they_are_compiled_in_one_graph(self, peft: Any, kind: str) -> None:
        adapted = self.adapted(build(kind).train(), peft)
        compiled = torch.compile(adapted, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS), adapted(IDS))

    def test_logits_and_decoding_change_with_it(self, peft: Any, m: MBLM) -> None:
        before = forward_logits(m)
        adapted = self.adapted(m, peft)
        assert (forward_logits(adapted) - before).abs().max() > 0.01
        check_decodes(m)
        with adapted.disable_adapter():
            torch.testing.assert_close(decoded_logits(m), before)

    def test_merged_equals_unmerged(self, peft: Any, m: MBLM) -> None:
        adapted = self.adapted(m, peft)
        unmerged = forward_logits(adapted)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(forward_logits(merged), unmerged, rtol=1e-4, atol=1e-5)
        check_decodes(merged)

    def test_dropout_of_an_adapter_is_drawn_for_every_row(self, peft: Any) -> None:
        m = build("transformer").train()
        adapted = self.adapted(m, peft, lora_dropout=0.5)
        stage, x = m.stage_models[1], torch.randn(1, 5, 8).expand(6, -1, -1)
        starts = stage(x, shared_start=True)[:, 0]
        assert not torch.equal(starts[0], starts[1])
        assert adapted is not m

    @pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
    @pytest.mark.parametrize("kind", sorted(BLOCKS))
    def test_embeddings_and_convolutions(self, peft: Any, kind: str) -> None:
        m = build(kind)
        targets = [n for n, p in m.named_modules() if isinstance(p, (nn.Embedding, nn.Conv1d))]
        before = forward_logits(m)
        ranks = {n: m.get_submodule(n).groups for n in targets if n.endswith("conv1d")}
        config = peft.LoraConfig(
            r=2, target_modules=targets, init_lora_weights=False, rank_pattern=ranks
        )
        adapted = peft.get_peft_model(m, config)
        assert (forward_logits(m) - before).abs().max() > 0.001
        check_decodes(m)
        adapted(IDS).backward()
        adapters = [p for n, p in adapted.named_parameters() if "lora_" in n]
        assert len(adapters) == 2 * len(targets) and all(p.grad is not None for p in adapters)


class TestQuantization:
    @pytest.mark.filterwarnings("ignore")
    def test_torchs_own_of_activations_and_weights(self, m: MBLM) -> None:
        before = forward_logits(m)
        quantized = torch.ao.quantization.quantize_dynamic(m, {nn.Linear})
        assert not linears(quantized)
        after = forward_logits(quantized)
        assert 0 < (after - before).abs().max() < 0.1
        # What is quantized at once shares a scale, so that rounding is another.
        torch.testing.assert_close(decoded_logits(quantized), after, rtol=0, atol=0.05)

    @pytest.mark.filterwarnings("ignore")
    def test_torchao_of_weights(self, m: MBLM) -> None:
        try:
            torchao = importlib.import_module("torchao.quantization")
        except (ImportError, AttributeError) as error:  # it asks torch for names of later releases
            pytest.skip(f"torchao cannot be imported, int8 is NOT tested: {error}")
        before = forward_logits(m)
        # A weight of one column is more than it can take.
        torchao.quantize_(
            m,
            torchao.Int8WeightOnlyConfig(),
            lambda part, _: isinstance(part, nn.Linear) and part.in_features > 1,
        )
        assert type(m.to_logits.weight) is not nn.Parameter
        assert 0 < (forward_logits(m) - before).abs().max() < 0.1
        check_decodes(m)


def scaled(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", _Scaled())


class _Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


class TestParametrizations:
    @pytest.mark.parametrize(
        "register",
        [scaled, parametrizations.weight_norm, parametrizations.spectral_norm],
        ids=["scaled", "weight norm", "spectral norm"],
    )
    def test_they_are_as_the_weights_that_they_give(
        self, m: MBLM, register: Callable[[nn.Module], Any]
    ) -> None:
        layers = {n: p for n, p in m.named_modules() if isinstance(p, (nn.Linear, nn.Conv1d))}
        for layer in layers.values():
            register(layer)
        logits = forward_logits(m)
        check_decodes(m)
        m(IDS).backward()
        originals = [p for n, p in m.named_parameters() if "parametrizations.weight" in n]
        assert len(originals) >= len(layers)
        assert all(p.grad is not None and p.grad.any() for p in originals)
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight")
        torch.testing.assert_close(forward_logits(m), logits)


def called_modules(m: Any) -> dict[str, nn.Module]:
    """All modules but lists, what stands for no positions, and what projects no context."""
    lists = (nn.ModuleList, nn.ParameterList)
    last = f"to_next_stage_proj.{m.num_stages - 1}"
    parts = {n: p for n, p in m.named_modules() if n and not isinstance(p, lists)}
    for name in [last, *(n for n in parts if n.startswith("pos_embs"))]:
        if isinstance(parts[name], nn.Identity):
            del parts[name]
    return parts


def one_and_a_half(part: nn.Module, inputs: Any, output: Any) -> Any:
    return 1.5 * output if isinstance(output, Tensor) else None


def silent_hooks(m: Any, register: str, **inputs: Any) -> list[str]:
    """Modules on which a hook, added alone, is not called by a training step."""
    inputs = inputs or {"input_ids": IDS[:1]}
    silent = []
    for name, part in called_modules(m).items():
        if "backward" in register and name.endswith("rotary_emb"):
            continue  # which has no gradients
        calls: list[str] = []
        handle = getattr(part, f"register_{register}")(lambda *_, calls=calls: calls.append(""))
        loss = m(**inputs, return_type=MBLMReturnType.LOSS)
        if "backward" in register:
            loss.backward()
        handle.remove()
        silent += [] if calls else [name]
    return silent


class TestHooks:
    @pytest.mark.filterwarnings("ignore:Full backward hook is firing")
    @pytest.mark.parametrize(
        "register", ["forward_hook", "forward_pre_hook", "full_backward_pre_hook"]
    )
    def test_one_on_any_module_is_called_in_training(self, m: MBLM, register: str) -> None:
        assert silent_hooks(m.train(), register) == []

    @pytest.mark.parametrize(
        "fields",
        [{"tile": 4}, {"checkpoint_global": True}, {"train_checkpoint_chunks": [2]}],
        ids=str,
    )
    @pytest.mark.parametrize("kind", sorted(BLOCKS))
    def test_and_where_memory_is_saved(self, kind: str, fields: dict[str, Any]) -> None:
        assert silent_hooks(build(kind, **fields).train(), "forward_hook") == []

    def test_one_on_any_module_of_an_encoder_is_called(self) -> None:
        ids = IDS[:1] % 17
        m = encoder(seq_lens=[3, 4], pos_emb_type="rope").train()
        assert silent_hooks(m, "forward_hook", input_ids=ids, labels=ids) == []

    def test_one_on_any_module_counts_in_decoding(self, m: MBLM) -> None:
        plain = forward_logits(m)
        for name, part in called_modules(m).items():
            handle = part.register_forward_hook(one_and_a_half)
            logits = forward_logits(m)
            if not name.endswith("rotary_emb"):
                assert not torch.equal(logits, plain), name
            torch.testing.assert_close(
                decoded_logits(m),
                logits,
                rtol=1e-3,
                atol=1e-4,
                msg=lambda text: f"{name}: {text}",  # noqa: B023
            )
            handle.remove()

    @pytest.mark.parametrize("weights", ["float32", "int8"])
    def test_one_that_is_added_to_a_session_is_seen(self, m: MBLM, weights: str) -> None:
        begun = Session(m, weights=weights).feed(IDS[:1, :6])
        for name, part in called_modules(m).items():
            session, calls = begun.fork(), []
            handle = part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            session.generate(5)
            assert calls, name
            handle.remove()
            calls.clear()
            session.generate(1)
            assert not calls

    def test_one_for_all_modules_is_called_in_training_and_decoding(self, m: MBLM) -> None:
        session = Session(m)
        session.feed(IDS[:1, :6])
        seen: set[nn.Module] = set()
        handle = nn.modules.module.register_module_forward_hook(lambda part, *_: seen.add(part))
        try:
            m.train()(IDS).backward()
            trained, seen = seen, set()
            m.eval()
            session.generate(6)
        finally:
            handle.remove()
        assert set(called_modules(m).values()) <= trained
        assert set(called_modules(m).values()) <= seen

    def test_one_on_the_model_is_called_by_its_trainers(self) -> None:
        m, ids, calls = build("transformer"), IDS % 17, []
        m.register_forward_hook(lambda *_: calls.append(1))
        MegabyteTrainer.model_forward(Any, m, (ids, torch.ones_like(ids)), "cpu")
        masked = encoder(seq_lens=[3, 4])
        masked.register_forward_hook(lambda *_: calls.append(2))
        MaskedTrainer.model_forward(Any, masked, (ids, ids > 3, ids), "cpu")
        assert calls == [1, 2]

    def test_one_on_a_stage_with_a_state_of_the_users(self) -> None:
        m = model(LSTMBlock(with_hook=True), seq_lens=[3, 4])
        session = Session(m, len(IDS))
        m.stage_models[0].register_forward_hook(one_and_a_half)
        torch.testing.assert_close(decoded_logits(m), forward_logits(m))
        for begun in (session, session.fork()):
            with pytest.raises(RuntimeError, match="was added to a LSTMWithHook after decoding"):
                begun.feed(IDS)


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return 1.5 * self.inner(x, *others)


class _Doubled(TransformerDecoder):
    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return 2 * super().forward(input_ids)


class TestReplaced:
    def test_any_module_but_rotary_positions_in_a_wrapper(self, m: MBLM) -> None:
        plain = forward_logits(m)
        for name, part in called_modules(m).items():
            if isinstance(part, (RoPE, RotaryEmbedding)):
                continue
            replace(m, name, _Wrapped(part))
            logits = forward_logits(m)
            assert not torch.equal(logits, plain), name
            torch.testing.assert_close(
                decoded_logits(m),
                logits,
                rtol=1e-3,
                atol=1e-4,
                msg=lambda text: f"{name}: {text}",  # noqa: B023
            )
            replace(m, name, part)

    @pytest.mark.parametrize("weights", ["float32", "int8"])
    def test_a_layer_with_other_settings(self, weights: str) -> None:
        m = build("mamba2")
        layer: Any = m.stage_models[0].layers[0]  # type: ignore[index,union-attr]
        layer.norm = nn.RMSNorm(16, eps=0.5)
        layer.mixer.in_proj = nn.Linear(16, layer.mixer.in_proj.out_features)  # with a bias
        m.token_embs_rev[0].embedding.max_norm = 0.5  # type: ignore[union-attr]
        check_decodes(m)
        m = build("transformer")
        attention: Any = m.stage_models[0].layers[0][0]  # type: ignore[index]
        attention.to_kv = nn.Linear(16, attention.to_kv.out_features)
        check_decodes(m)
        with torch.no_grad():
            before = forward_logits(m)
            attention.to_kv.bias += 1
        assert not torch.equal(forward_logits(m), before)
        check_decodes(m)

    def test_the_forward_of_a_class_of_pytorchs(
        self, m: MBLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain, session, own = forward_logits(m), Session(m).feed(IDS[0, :6]), nn.Linear.forward
        before, calls = session.fork(), []

        def doubled(layer: nn.Linear, x: Tensor) -> Tensor:
            calls.append(layer)
            return 1.5 * own(layer, x)

        monkeypatch.setattr(nn.Linear, "forward", doubled)
        assert not torch.equal(forward_logits(m), plain)
        check_decodes(m)
        calls.clear()
        before.generate(5)
        assert set(calls) == set(linears(m).values())

    def test_a_layer_more(self, m: MBLM) -> None:
        for parts in (m.to_next_stage_proj[0], m.token_embs_rev[1]._post):  # type: ignore[union-attr]
            parts.append(nn.Tanh())  # type: ignore[operator,union-attr]
        for _, feed_forward in getattr(m.stage_models[0], "layer_pairs", list)():
            feed_forward.append(nn.Tanh())
        check_decodes(m)
        m(IDS).backward()

    def test_a_stage_with_another_forward(self) -> None:
        for change in ("class", "instance"):
            m = build("transformer")
            stage: Any = m.stage_models[1]
            if change == "class":
                stage.__class__ = _Doubled
            else:
                own = stage.forward
                stage.forward = lambda x, **_: 2 * own(x)  # noqa: B023
            check_decodes(m)

    def test_rotary_positions_of_the_users(self) -> None:
        m = build("mamba2")

        class Slower(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor, *, input_pos: Tensor) -> Tensor:
                return self.inner(x, input_pos=input_pos // 2)

        before = forward_logits(m)
        m.pos_embs[0] = Slower(m.pos_embs[0])
        assert not torch.equal(forward_logits(m), before)
        check_decodes(m)


class TestFunctionalCall:
    @pytest.mark.parametrize("are_results", [False, True], ids=["leaves", "results"])
    @pytest.mark.parametrize(
        "fields",
        [
            {"checkpoint_global": True},
            {"checkpoint_global": True, "tile": 4},
            {"tile": 4},
            {"train_checkpoint_chunks": [2]},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("kind", sorted(BLOCKS))
    def test_gradients_are_those_of_the_given_weights(
        self, kind: str, fields: dict[str, Any], are_results: bool
    ) -> None:
        """Also where the backward pass comes after the call, and computes pieces again."""

        def gradients(m: MBLM) -> dict[str, Tensor]:
            given = {n: (1.1 * p.detach()).requires_grad_() for n, p in m.named_parameters()}
            used = {n: 1.0 * p for n, p in given.items()} if are_results else given
            loss = torch.func.functional_call(m, used, (IDS,))
            loss.backward()
            assert all(p.grad is None for p in m.parameters())
            return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in given.items()}

        expected = gradients(build(kind, layers=2).train())
        actual = gradients(build(kind, layers=2, **fields).train())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
        assert all(expected[n].any() for n in expected if n.startswith("stage_models.0"))

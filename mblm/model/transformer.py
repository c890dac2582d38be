"""Transformer stages: their blocks, the causal decoder and the bidirectional encoder."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from mblm.model.block import StageBlock
from mblm.model.linear import apply
from mblm.model.plain import Part, are_plain, keeps_forward
from mblm.model.recomputation import run_layers_recomputed
from mblm.model.stage import Carried, tensor_of
from mblm.model.transformer_layers import (
    SHORT,
    Attention,
    FeedForward,
    RMSNorm,
    Rotary,
    RotaryEmbedding,
)
from mblm.model.transformer_state import Continuation, TransformerState, split, stack
from mblm.ops import _native
from mblm.ops.packing import NONE, is_on_gpu, pack_linear
from mblm.utils.checks import check_sizes
from mblm.utils.huge_pages import HugePages


class _TransformerBlockFields(StageBlock):
    attn_head_dims: PositiveInt
    attn_num_heads: PositiveInt
    attn_use_rot_embs: bool
    attn_dropout: NonNegativeFloat = Field(default=0.0, le=1.0)
    ff_multiplier: PositiveInt = 2
    ff_dropout: NonNegativeFloat = Field(default=0.0, le=1.0)
    use_flash_attn: bool = False

    def to_model(self, model_dim: int, num_layers: int) -> nn.Module:
        """Build a `TransformerDecoder`, or the `TransformerEncoder` of a block of that name."""
        is_encoder = isinstance(self, TransformerEncoderBlock)
        return (TransformerEncoder if is_encoder else TransformerDecoder)(
            model_dim=model_dim,
            num_layers=num_layers,
            attn_head_dim=self.attn_head_dims,
            attn_num_heads=self.attn_num_heads,
            attn_dropout=self.attn_dropout,
            attn_use_rot_embs=self.attn_use_rot_embs,
            ff_dropout=self.ff_dropout,
            ff_mult=self.ff_multiplier,
            use_flash_attn=self.use_flash_attn,
        )


class TransformerBlock(_TransformerBlockFields):
    """A causal Transformer stage.

    Attributes:
        attn_head_dims: Width of a head.
        attn_num_heads: Number of heads.
        attn_use_rot_embs: Whether queries and keys get rotary positions.
        attn_dropout: Dropout of attention probabilities. Default 0.
        ff_multiplier: Inner width of the feed-forward over the stage's. Default 2.
        ff_dropout: Dropout inside the feed-forward. Default 0.
        use_flash_attn: Accepted for compatibility: attention always runs PyTorch's best kernel.
    """

    block_type: Literal["transformer"] = "transformer"


class TransformerEncoderBlock(_TransformerBlockFields):
    """A bidirectional Transformer stage; the fields are those of `TransformerBlock`."""

    block_type: Literal["transformerEncoder"] = "transformerEncoder"


_LAYERS = (Attention, FeedForward)
_WIDEST_HEAD_ON_GPU = 256


class _Transformer(nn.Module):
    """Layers of attention and feed-forward, and a final norm."""

    causal: bool
    takes_recompute_layers = True  # the hierarchy may ask for it

    def __init__(
        self,
        *,
        model_dim: int,
        num_layers: int,
        attn_head_dim: int = 64,
        attn_num_heads: int = 8,
        attn_dropout: float = 0.0,
        attn_use_rot_embs: bool = True,
        ff_dropout: float = 0.0,
        ff_mult: int = 4,
        use_flash_attn: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"attn_head_dim": attn_head_dim, "attn_num_heads": attn_num_heads}
        check_sizes(model_dim=model_dim, **sizes, ff_mult=ff_mult)
        if attn_use_rot_embs and attn_head_dim % 2:
            raise ValueError(
                f"attn_head_dim: got {attn_head_dim}, rotary positions need an even width"
            )
        self.model_dim, self.num_heads, self.head_dim = model_dim, attn_num_heads, attn_head_dim
        self.rotary_emb = RotaryEmbedding(attn_head_dim) if attn_use_rot_embs else None
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            attention = Attention(
                model_dim,
                head_dim=attn_head_dim,
                num_heads=attn_num_heads,
                dropout=attn_dropout,
                causal=self.causal,
            )
            feed_forward = FeedForward(
                model_dim, mult=ff_mult, dropout=ff_dropout, shift=self.causal
            )
            self.layers.append(nn.ModuleList([attention, feed_forward]))
        self.norm = RMSNorm(model_dim)

    def rotary(self, first: int, count: int) -> Rotary | None:
        """Rotary positions ``first .. first + count - 1`` (0 is the start token), if used."""
        return None if self.rotary_emb is None else self.rotary_emb(first, count)

    def layer_pairs(self) -> Iterator[tuple[Attention, FeedForward]]:
        """Attention and feed-forward of each layer."""
        layers: Any = self.layers
        yield from layers

    def parts(self) -> Iterator[Part]:
        """The modules that it computes with, as built; see `mblm.model.plain.are_plain`."""
        yield self, TransformerDecoder if self.causal else TransformerEncoder
        yield self.norm, RMSNorm
        if self.rotary_emb is not None:
            yield self.rotary_emb, RotaryEmbedding
        for attention, feed_forward in self.layer_pairs():
            yield attention, Attention  # first: another module has no parts of its own
            yield from attention.parts()
            yield feed_forward, FeedForward
            yield from feed_forward.parts()

    def _run_layers(
        self, x: Tensor, mask: Tensor | None = None, *, recompute: bool = False
    ) -> Tensor:
        rotary = self.rotary(0, x.shape[-2])

        def run(attention: Attention, feed_forward: FeedForward, x: Tensor) -> Tensor:
            x = x + attention(x, rotary, mask)
            return x + feed_forward(x)

        layers = [functools.partial(run, *layer) for layer in self.layer_pairs()]
        if recompute:
            return self.norm(run_layers_recomputed(self, layers, x))
        for layer in layers:
            x = layer(x)
        return self.norm(x)


class TransformerDecoder(_Transformer):
    """Causal Transformer with token shift before attention and feed-forward, and a final RMSNorm.

    Rotary positions are those of Su et al., RoFormer, https://arxiv.org/abs/2104.09864, by halves.

    Args:
        model_dim: Width D of the stage.
        num_layers: Number of layers.
        attn_head_dim: Width of a head; even, if there are rotary positions. Default 64.
        attn_num_heads: Number of heads. Default 8.
        attn_dropout: Dropout of attention probabilities, in training. Default 0.
        attn_use_rot_embs: Whether queries and keys get rotary positions. Default True.
        ff_dropout: Dropout inside the feed-forward, in training. Default 0.
        ff_mult: Inner width of the feed-forward over D. Default 4.
        use_flash_attn: Accepted for compatibility.

    Raises:
        ValueError: A size is below 1, or the width of a head is odd with rotary positions.
    """

    causal = True
    takes_shared_start = True  # the hierarchy may say so of its rows

    def forward(
        self,
        input_ids: Tensor,
        *,
        shared_start: bool = False,
        recompute_layers: bool = False,
        carried: Carried | None = None,
    ) -> Tensor:
        """Map embeddings ``(B, S, D)`` to ``(B, S, D)``, causally.

        Args:
            input_ids: Embeddings ``(B, S, D)``.
            shared_start: All rows begin with the same vector, as those of a hierarchy do with the
                start token: where that pays, what becomes of it is computed once.
            recompute_layers: Keep the layers' inputs only, and compute each layer again in the
                backward pass.
            carried: The positions come after those of the state before; see `Carried`.
        """
        if carried is not None:
            return self._continue(input_ids, carried)
        rows, count, _ = input_ids.shape
        shared_start = shared_start and not recompute_layers and rows > 1 and 1 < count <= SHORT
        if shared_start and not self._drops() and are_plain(self.parts()):
            return self._run_after_shared_start(input_ids[:1, :1], input_ids[:, 1:])
        return self._run_layers(input_ids, recompute=recompute_layers)

    def _drops(self) -> bool:
        """Whether dropout makes rows differ that begin alike."""
        return self.training and any(
            (isinstance(m, Attention) and m.dropout > 0) or (isinstance(m, nn.Dropout) and m.p > 0)
            for m in self.modules()
        )

    def _run_after_shared_start(self, start: Tensor, x: Tensor) -> Tensor:
        """Run rows ``x (B, P, D)`` that all come after ``start (1, 1, D)``: ``(B, 1 + P, D)``."""
        rows, half = x.shape[0], x.shape[-1] // 2

        def delayed() -> Tensor:  # what the shift takes from the start token, (B, D // 2)
            return start[:, 0, start.shape[-1] - half :].expand(rows, -1)

        rotary = self.rotary(0, 1 + x.shape[1])
        for attention, feed_forward in self.layer_pairs():
            _, k0, v0 = attention.heads(start)
            q, k, v = attention.heads(x, delayed())
            keys = torch.cat((k0.expand(rows, -1, -1, -1), k), dim=1)
            values = torch.cat((v0.expand(rows, -1, -1, -1), v), dim=1)
            x = x + attention.attend_short(q, keys, values, rotary)
            start = start + apply(attention.to_out, v0.flatten(-2))  # it attends to itself alone
            x = x + feed_forward(x, delayed())
            start = start + feed_forward(start)
        return torch.cat((self.norm(start).expand(rows, -1, -1), self.norm(x)), dim=1)

    def pack(self, weights: str, memory: HugePages) -> Any:
        """Its weights as compiled decoding reads them, or None; see `mblm.model.stage.Stage`."""
        fits_gpu = self.head_dim <= _WIDEST_HEAD_ON_GPU and self.num_heads * self.head_dim % 8 == 0
        if is_on_gpu(self.norm.g) and not fits_gpu:
            return None
        frequencies = NONE if self.rotary_emb is None else self.rotary_emb.inv_freq
        tensors: list[Tensor] = [self.norm.g, frequencies]
        for attention, feed_forward in self.layer_pairs():
            tensors.append(attention.norm.g)
            for linear in (attention.to_q, attention.to_kv, attention.to_out):
                tensors += pack_linear(linear, weights, memory)
            parts: Any = feed_forward
            norm, expand, _, _, contract = parts
            tensors.append(norm.g)
            tensors += pack_linear(expand, weights, memory)
            tensors += pack_linear(contract, weights, memory)
        return _native.library().Stage.transformer(tensors, self.num_heads)

    # -- Decoding: see `mblm.model.stage.Stage` ----------------------------------------------------

    @property
    def takes_carried(self) -> bool:
        """Whether it and its layers are called as built, hooked or not."""
        layers = [
            (part, kind)
            for pair in self.layer_pairs()
            for part, kind in zip(pair, _LAYERS, strict=True)
        ]
        return all(keeps_forward(*part) for part in [(self, TransformerDecoder), *layers])

    def forward_with_state(
        self, x: Tensor, state: TransformerState | None
    ) -> tuple[Tensor, TransformerState]:
        """Continue ``x (B, S, D)``, S >= 1, after the positions that ``state`` has seen."""
        carried = Carried(state)
        return self._continue(x, carried), carried.after

    def _continue(self, x: Tensor, carried: Carried) -> Tensor:
        """`forward_with_state` of a state that is carried."""
        new = Continuation(carried.before, x)
        rotary = self.rotary(new.first, new.end - new.first)
        if rotary is not None:
            rotary = new.rotate_by(*rotary)
        kept = self.model_dim - self.model_dim // 2
        for layer, (attention, feed_forward) in enumerate(self.layer_pairs()):
            of_attention = x[:, -1, kept:]
            previous = new.delayed(layer, 0, x.dtype)
            x = x + attention(
                x, rotary, previous=previous, extend=functools.partial(new.extend, layer)
            )
            of_feed_forward = x[:, -1, kept:]
            x = x + feed_forward(x, new.delayed(layer, 1, x.dtype))
            new.delay(of_attention, of_feed_forward)
        carried.after = new.state()
        return self.norm(x)

    stack_states, split_state = staticmethod(stack), staticmethod(split)

    def state_tensors(self, state: TransformerState) -> dict[str, Tensor]:
        """``keys`` and ``values (layers, H, positions, d)``, ``delayed (layers, 2, D // 2)``."""
        ((end,), shapes) = state.positions, self._shapes_of_state(*state.positions)
        parts: dict[str, list[Tensor]] = {
            "keys": [keys[0, :, :end] for keys in state.keys],
            "values": [values[0, :, :end] for values in state.values],
            "delayed": [torch.cat(halves) for halves in state.delayed],
        }
        return {
            name: torch.stack(layers) if layers else torch.empty(shapes[name])
            for name, layers in parts.items()
        }

    def state_of(self, tensors: Mapping[str, Tensor], positions: int) -> TransformerState:
        """The state of one row after so many positions; see `state_tensors`."""
        shapes = self._shapes_of_state(positions)
        keys, values, delayed = (
            tensor_of(tensors, name, shape)[:, None] for name, shape in shapes.items()
        )
        halves = tuple(layer.unbind(1) for layer in delayed)
        return TransformerState((positions,), tuple(keys), tuple(values), halves)

    def _shapes_of_state(self, positions: int) -> dict[str, tuple[int, ...]]:
        layers, half = len(self.layers), self.model_dim // 2
        of_keys = (layers, self.num_heads, positions, self.head_dim)
        return {"keys": of_keys, "values": of_keys, "delayed": (layers, 2, half)}


class TransformerEncoder(_Transformer):
    """Bidirectional Transformer, without token shift; the arguments are `TransformerDecoder`'s."""

    causal = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        recompute_layers: bool = False,
    ) -> Tensor:
        """Map embeddings ``(B, S, D)`` to ``(B, S, D)``.

        Args:
            input_ids: Embeddings ``(B, S, D)``.
            attention_mask: Which positions are attended to, bool ``(B, S)``, True = attend.
            recompute_layers: Keep the layers' inputs only, and compute each layer again in the
                backward pass.
        """
        return self._run_layers(input_ids, attention_mask, recompute=recompute_layers)

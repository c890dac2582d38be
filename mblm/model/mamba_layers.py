"""What both Mamba stage models have in common: the run of their layers, a state, a convolution."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mblm.model.plain import Part, is_plain, keeps_forward
from mblm.model.stage import Carried, tensor_of
from mblm.ops.causal_conv import causal_conv
from mblm.ops.gated_rms_norm import gated_rms_norm
from mblm.utils.checks import check_sizes

# SSM state, (B, D_inner, N) or (B, H, P, N), and conv window (B, K - 1, D_conv).
LayerState = tuple[Tensor, Tensor]
State = tuple[LayerState, ...]

NORM_EPS = 1e-5  # of mambapy and mamba_ssm alike


def convolve(conv: nn.Module, taps: int, x: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
    """SiLU of a causal convolution ``(B, S, D)`` after a window, and the next window.

    ``taps`` is K, and a window the K - 1 inputs before: ``(B, K - 1, D)``, zeros if None.
    """
    window = None if window is None else window.to(x.dtype)  # autocast may have begun since
    if is_plain(conv, nn.Conv1d):
        return causal_conv(x, conv.weight, conv.bias, window)  # type: ignore[arg-type]
    count, before = x.shape[1], taps - 1
    if window is None:
        window = x.new_zeros(x.shape[0], before, x.shape[2])
    extended = torch.cat((window, x), dim=1)
    convolved = conv(extended.transpose(1, 2)).transpose(1, 2)[:, before : before + count]
    return F.silu(convolved), extended[:, count:]


def rms_norm(norm: nn.Module, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """``norm`` of x (.., D), times the SiLU of the gate where there is one."""
    if is_plain(norm, nn.RMSNorm):
        return gated_rms_norm(x, norm.weight, gate, eps=norm.eps)  # type: ignore[arg-type]
    out: Tensor = norm(x if gate is None else x * F.silu(gate))
    return out


class MambaLayer(nn.Module):
    """A residual layer, with dropout of what the mixer gives, which carries a state."""

    def __init__(self, mixer: nn.Module, model_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.mixer = mixer
        self.norm = nn.RMSNorm(model_dim, eps=NORM_EPS)

    def forward(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D), after a state where one is carried."""
        normed = rms_norm(self.norm, x)
        # A mixer of the user's may know nothing of a state.
        out = self.mixer(normed) if carried is None else self.mixer(normed, carried)
        return F.dropout(out, self.dropout, self.training) + x


class MambaStage(nn.Module):
    """A stage of residual layers that carry a state.

    Attributes:
        model_dim: Width D of the stage.
        layers: Each maps ``(x, carried)`` to the same shape as x, as does its ``mixer``.
        mixer_class: The class of a layer's mixer.
        linears: The names of a mixer's linear layers.
    """

    is_recurrent = True
    layers: nn.ModuleList
    mixer_class: type[nn.Module]
    linears: tuple[str, ...]

    def __init__(self, model_dim: int, **sizes: int) -> None:
        super().__init__()
        check_sizes(model_dim=model_dim, **sizes)
        self.model_dim = model_dim

    def forward(self, x: Tensor, *, carried: Carried | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D) causally: from the zero state, or from one that is carried."""
        if carried is not None:
            y, carried.after = self.forward_with_state(x, carried.before)
            return y
        self._check(x)
        for layer in self.layers:
            x = layer(x)
        return self.finish(x)

    def forward_with_state(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Continue after the positions that ``state`` has seen.

        Args:
            x: (B, S, D).
            state: What an earlier call returned, left as it is; None at the beginning.

        Returns:
            (B, S, D) and the state after the last position.

        Raises:
            ValueError: ``x`` or ``state`` does not fit this model.
        """
        self._check(x)
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"state must have {len(self.layers)} layers, got {len(state)}")
        states: list[Any] = []
        for index, layer in enumerate(self.layers):
            carried = Carried(None if state is None else state[index])
            x = layer(x, carried)
            states.append(carried.after)
        return self.finish(x), tuple(states)

    def finish(self, x: Tensor) -> Tensor:
        """What comes after the layers."""
        return x

    def parts_of_layers(self) -> Iterator[Part]:
        """What its layers compute with, as built."""
        layer: Any
        for layer in self.layers:
            yield layer, MambaLayer
            yield layer.norm, nn.RMSNorm
            yield layer.mixer, self.mixer_class
            yield layer.mixer.conv1d, nn.Conv1d
            yield from ((getattr(layer.mixer, name), nn.Linear) for name in self.linears)

    # -- Decoding: see `mblm.model.stage.Stage` ----------------------------------------------------

    @property
    def takes_carried(self) -> bool:
        """Whether it, its layers and their mixers are called as built, hooked or not."""
        return keeps_forward(self, MambaStage) and all(
            keeps_forward(layer, MambaLayer) and keeps_forward(layer.mixer, self.mixer_class)  # type: ignore[arg-type]
            for layer in self.layers
        )

    def stack_states(self, states: Sequence[State]) -> State:
        """The rows of states in one."""
        layers = zip(*states, strict=True)
        return tuple(tuple(map(torch.cat, zip(*layer, strict=True))) for layer in layers)  # type: ignore[misc]

    def split_state(self, state: State) -> list[State]:
        """The rows of a state."""
        rows = range(len(state[0][0]))
        return [tuple((a[r : r + 1], b[r : r + 1]) for a, b in state) for r in rows]

    def state_tensors(self, state: State) -> dict[str, Tensor]:
        """``ssm (layers, ..)`` and ``window (layers, taps - 1, channels)``."""
        ssm, window = (torch.cat(layers) for layers in zip(*state, strict=True))
        return {"ssm": ssm, "window": window}

    def state_of(self, tensors: Mapping[str, Tensor], positions: int) -> State:
        """The state of one row; see `state_tensors`."""
        weight = next(self.parameters())
        _, zero = self.forward_with_state(weight.new_zeros(1, 0, self.model_dim), None)
        ssm, window = (
            tensor_of(tensors, name, like.shape).to(like.dtype)[:, None]
            for name, like in self.state_tensors(zero).items()
        )
        return tuple(zip(ssm, window, strict=True))

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[-1] != self.model_dim:
            raise ValueError(f"x must be (B, S, {self.model_dim}), got shape {tuple(x.shape)}")

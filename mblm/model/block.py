"""Stage blocks: configurations that build a stage model, and the registry that parses them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, MutableSet
from typing import Any, Literal, TypeVar, get_args

import torch
from pydantic import Field, ValidationError

from mblm.utils.fields import Fields


class StageBlock(ABC, Fields):
    """Configuration of one stage's model.

    A subclass adds the fields it needs and builds the stage model in ``to_model``. It works as it
    is when passed to a model configuration as an object; to be parsed from YAML, it is registered
    with ``mblm.model.config.block_registry``.

    Attributes:
        block_type: A name for the block. In a configuration file it selects the block.
        pos_emb_type: Positions added to the stage's token embeddings: ``"fixed"`` (learned),
            ``"rope"`` (a rotation over the full width) or None.
    """

    block_type: str = Field(description="Name of the block, which selects it in a configuration")
    pos_emb_type: Literal["fixed", "rope"] | None = Field(
        default=None, description="Positions added to the stage's token embeddings"
    )

    @abstractmethod
    def to_model(self, model_dim: int, num_layers: int) -> torch.nn.Module:
        """Build the stage model, a causal map ``(B', S, model_dim) -> (B', S, model_dim)``."""


TStageBlock = TypeVar("TStageBlock", bound=StageBlock)


class StageBlockRegistry(MutableSet[type[StageBlock]]):
    """The set of stage blocks that can be parsed from a configuration, in order of registration."""

    def __init__(self, blocks: Iterable[type[StageBlock]] = ()) -> None:
        self._blocks: dict[type[StageBlock], None] = {}
        for block in blocks:
            self.add(block)

    def register(self) -> Callable[[type[TStageBlock]], type[TStageBlock]]:
        """Decorator that makes a block parseable, ``@block_registry.register()``."""

        def decorator(block: type[TStageBlock]) -> type[TStageBlock]:
            self.add(block)
            return block

        return decorator

    def add(self, block: type[StageBlock]) -> None:
        """Make a block parseable; one of the same module and name, defined anew, takes its place.

        Raises:
            ValueError: Another block has its ``block_type``.
        """
        for other in list(self):
            taken = sorted(_own_types(block) & _own_types(other))
            if other is block or not taken:
                continue
            if (other.__module__, other.__qualname__) != (block.__module__, block.__qualname__):
                raise ValueError(
                    f"block_type: {taken[0]!r} of {block.__qualname__} is that of the registered "
                    f"block {other.__qualname__}; choose another, or discard that block first"
                )
            self.discard(other)
        self._blocks[block] = None

    def discard(self, block: type[StageBlock]) -> None:
        """Parse a block no more; one that is not registered is ignored."""
        self._blocks.pop(block, None)

    def __iter__(self) -> Iterator[type[StageBlock]]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def try_parse(
        self, data: Any, parse_func: Callable[[type[StageBlock], Any], StageBlock]
    ) -> StageBlock:
        """Parse ``data`` to the first registered block that accepts it.

        Args:
            data: A mapping with the fields of a block, from a configuration file.
            parse_func: ``parse_func(block class, data)`` returns the block or raises.

        Raises:
            ValueError: No block accepts ``data``; the message says why, per block, or of those
                alone whose ``block_type`` it has.
        """
        reasons = []
        given = data.get("block_type") if isinstance(data, dict) else None
        for block in [block for block in self if given in _own_types(block)] or self:
            try:
                _check_block_type(block, data)
                return parse_func(block, data)
            except Exception as error:  # a block's own validators may raise anything
                reasons.append(f"  {block.__name__}: {_reason(error)}")
        raise ValueError(
            f"block: {data!r} matches no registered stage block:\n" + "\n".join(reasons)
        )


def _check_block_type(block: type[StageBlock], data: Any) -> None:
    """A ``block_type`` that is given must be the block's own, also where any text would do."""
    given = data.get("block_type") if isinstance(data, dict) else None
    own = sorted(_own_types(block))
    if given is not None and own and given not in own:
        raise ValueError(f"block_type: expected {' or '.join(map(repr, own))}, got {given!r}")


def _own_types(block: type[StageBlock]) -> set[str]:
    """What ``block_type`` a block of this class has; empty if that is for each to say."""
    field = block.model_fields["block_type"]
    return {
        value for value in (field.default, *get_args(field.annotation)) if isinstance(value, str)
    }


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error) if isinstance(error, (ValueError, TypeError)) else repr(error)
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'block'}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors()
    )

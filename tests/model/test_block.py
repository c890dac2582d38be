"""The registry of stage blocks: order, parsing, and errors that say why."""

from typing import Any, Literal

import pytest
from pydantic import field_validator
from torch import nn

from mblm.model.block import StageBlock, StageBlockRegistry
from mblm.model.config import block_registry


class _Block(StageBlock):
    def to_model(self, model_dim: int, num_layers: int) -> nn.Module:
        return nn.Linear(model_dim, model_dim)


class Narrow(_Block):
    block_type: str = "narrow"
    width: int


class Wide(_Block):
    block_type: str = "wide"
    width: int


def parse(registry: StageBlockRegistry, data: Any) -> StageBlock:
    return registry.try_parse(data, lambda block, fields: block.model_validate(fields))


@pytest.mark.parametrize("order", [(Narrow, Wide), (Wide, Narrow)])
def test_the_first_registered_block_that_fits_is_taken(order: tuple[type[StageBlock], ...]) -> None:
    registry = StageBlockRegistry()
    for block in order:
        assert registry.register()(block) is block
    assert list(registry) == list(order)
    assert type(parse(registry, {"width": 3})) is order[0]


def test_no_match_says_why_for_every_block() -> None:
    registry = StageBlockRegistry()
    registry.register()(Narrow)
    registry.register()(Wide)
    with pytest.raises(ValueError) as caught:
        parse(registry, {"width": "three", "length": 1})
    message = str(caught.value)
    assert "{'width': 'three', 'length': 1} matches no registered stage block" in message
    for name in ("Narrow", "Wide"):
        line = next(line for line in message.splitlines() if line.startswith(f"  {name}: "))
        assert "width: " in line and "length: " in line


def test_an_empty_registry_matches_nothing() -> None:
    with pytest.raises(ValueError, match="matches no registered stage block"):
        parse(StageBlockRegistry(), {"width": 3})


def test_a_validator_that_raises_anything_leaves_the_turn_to_the_next_block() -> None:
    class Broken(_Block):
        block_type: str = "broken"
        width: int

        @field_validator("width")
        @classmethod
        def _look_up(cls, width: int) -> int:
            return {1: 1}[width]

    registry = StageBlockRegistry([Broken, Wide])
    assert type(parse(registry, {"width": 3})) is Wide
    registry.discard(Wide)
    with pytest.raises(ValueError, match=r"Broken: KeyError\(3\)"):
        parse(registry, {"width": 3})


def test_it_is_a_set() -> None:
    registry = StageBlockRegistry()
    for _ in range(2):
        registry.add(Narrow)
    assert list(registry) == [Narrow] and registry == {Narrow}
    registry |= {Wide}
    registry.discard(Narrow)
    registry.discard(Narrow)
    assert len(registry) == 1 and Wide in registry
    registry.remove(Wide)
    with pytest.raises(KeyError):
        registry.remove(Wide)
    registry.add(Wide)
    registry.clear()
    assert not registry


def test_a_block_type_that_is_taken_is_refused() -> None:
    class Other(_Block):
        block_type: str = "wide"

    class Either(_Block):
        block_type: Literal["narrow", "wide"] = "narrow"

    registry = StageBlockRegistry([Wide])
    for block in (Other, Either):
        with pytest.raises(ValueError, match=r"block_type: 'wide' of .* registered block Wide"):
            registry.register()(block)
    assert list(registry) == [Wide]
    with pytest.raises(ValueError, match=r"'mamba1' of .*Mine is that of .* MambaBlock"):

        @block_registry.register()
        class Mine(_Block):
            block_type: str = "mamba1"


def test_a_block_defined_anew_takes_its_own_place() -> None:
    registry = StageBlockRegistry()
    classes = []
    for _ in range(2):  # as when a notebook's cell is run again

        @registry.register()
        class Again(_Block):
            block_type: str = "again"

        classes.append(Again)
    assert list(registry) == classes[1:]


def test_a_block_without_a_model_cannot_be_made() -> None:
    class Incomplete(StageBlock):
        block_type: str = "incomplete"

    with pytest.raises(TypeError, match="to_model"):
        Incomplete()  # type: ignore[abstract]


def test_a_block_type_that_is_given_decides() -> None:
    registry = StageBlockRegistry()
    for block in (Narrow, Wide):
        registry.register()(block)
    assert type(parse(registry, {"block_type": "wide", "width": 3})) is Wide
    with pytest.raises(ValueError, match="Narrow: block_type: expected 'narrow', got 'other'"):
        parse(registry, {"block_type": "other", "width": 3})

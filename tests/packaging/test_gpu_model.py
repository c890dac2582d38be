"""benchmarks/gpu_model.py: what it counts is in the sources, and docs/gpu.md shows what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_model
import pytest
from decode import MODELS, build, bytes_read

ROOT = Path(__file__).resolve().parents[2]


def of(name: str) -> Any:
    return gpu_model.config_of(*gpu_model.MODELS[name])


def test_a_byte_of_the_published_model_is_109_kernels() -> None:
    config = of(gpu_model.MODELS_SHOWN["published 2D"])
    phases = gpu_model.Phases(config, gpu_model.DESIGNS[0], rows=1)
    assert len(phases.byte()) == 5 * 21 + 4
    assert len(phases.patch()) == 8 * len(phases.byte()) + 3 * 25 + 8


def test_weights_are_those_that_decoding_reads() -> None:
    name = "small, 2 + 2 Transformer, width 128"
    phases = gpu_model.Phases(of(name), gpu_model.DESIGNS[0], rows=1).patch()
    weights = sum(phase.bytes for phase in phases if phase.trips != 6)  # without attention's cache
    # The model counts no biases, norms and gains.
    assert weights / 8 == pytest.approx(bytes_read(build(*MODELS[name]), "bfloat16"), rel=0.05)


@pytest.mark.parametrize("rows", [1, 64])
def test_no_design_beats_the_floor_and_none_loses_by_running_ahead(rows: int) -> None:
    config, device = of("quickstart, Transformer/Transformer"), gpu_model.DEVICES[0]
    for design in gpu_model.DESIGNS:
        figures = gpu_model.predict(config, device, design, rows)
        further = gpu_model.predict(config, device, replace(design, prefetched=24e6), rows)
        assert 0 < figures["fraction"] <= further["fraction"] < 1


def test_memory_alone_is_the_floor() -> None:
    free = replace(gpu_model.DESIGNS[0], link=0, ahead=1e12)
    device = replace(gpu_model.DEVICES[0], trip=0, end=0, l2_bandwidth=1e18)
    phases = [gpu_model.Phase(bytes=1e7)] * 20
    floor = 2e8 / device.bandwidth
    assert gpu_model.simulate(phases, device, free) == pytest.approx(floor, rel=0.01)


def test_the_page_shows_what_is_predicted() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert gpu_model.table(1) in page
    assert gpu_model.table(64) in page

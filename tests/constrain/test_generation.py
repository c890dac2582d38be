"""Generating under constraints: what comes out matches, whatever the model would rather say."""

import json
import re
from typing import Any

import pytest
import torch

from mblm import MBLM
from mblm.constrain import AllowedBytes, Grammar, JsonSchema, Prefix, Regex, Utf8
from mblm.inference.continuation import Continuation, Course
from mblm.inference.request import request
from tests.inference.caches import ENGINES, MakeCache, on_every_engine
from tests.models import model, transformer

SAMPLED = {"temperature": 1.5, "filter_thres": 0.0}


@pytest.fixture(scope="module")
def m() -> MBLM:
    """It knows nothing, and has two ids that are no bytes."""
    torch.manual_seed(0)
    return model(
        transformer(pos_emb_type="rope"),
        transformer(pos_emb_type="rope"),
        seq_lens=[32, 4],
        num_tokens=258,
    ).eval()


def courses(m: MBLM, make: MakeCache, wishes: list[dict[str, Any]]) -> list[Course]:
    """What becomes of requests side by side."""
    cache = make(m)
    rows = cache.add(len(wishes))
    requests = [request(m, b"{", **each) for each in wishes]
    cache.feed(rows, [each.prompt for each in requests])
    continuation = Continuation(cache)
    continuation.add(rows, list(map(Course, requests)))
    with torch.inference_mode():
        while continuation.going:
            continuation.run()
    return [continuation[row] for row in rows]


def data(course: Course) -> bytes:
    return bytes(course.ids().tolist())


PATTERNS: list[str | bytes] = [
    rb"\d{4}-\d{2}-\d{2}",
    rb"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?",
    rb"[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,3}",
    rb"(yes|no|maybe)",
    rb"[\x80-\xff]{3,9}",
    rb"a*(|b)",
    r"[à-ÿ]+\s?€?",
    r"(?s).{3,}",
]
CONSTRAINTS = [*map(Regex, PATTERNS), Utf8(), Prefix(b"\x89PNG\r\n"), AllowedBytes(b"01")]


@on_every_engine
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_what_comes_out_matches(m: MBLM, make: MakeCache, sampling: dict[str, Any]) -> None:
    """Rows of all constraints side by side, of several lengths; each alone gives the same."""
    wishes = [
        {"constraint": constraint, "max_bytes": count, "seed": count, **sampling}
        for constraint in CONSTRAINTS
        for count in (10, 23)
    ]
    for wish, course in zip(wishes, courses(m, make, wishes), strict=True):
        pattern, string = wish["constraint"].pattern, data(course)
        text = string if isinstance(pattern.pattern, bytes) else string.decode()
        assert course.is_matched() and pattern.fullmatch(text), (pattern, string)
        assert course.reason in ("matched", "length")
        assert (course.reason == "length") == (len(string) == wish["max_bytes"]) or string
        (alone,) = courses(m, make, [wish])
        assert data(alone) == string


@on_every_engine
def test_what_cannot_end_in_time_says_so(m: MBLM, make: MakeCache) -> None:
    short = {"constraint": Regex(rb"\d{8}"), "max_bytes": 5}
    fits = {"constraint": Regex(rb"\d{8}"), "max_bytes": 8}
    cut, whole = courses(m, make, [short, fits])
    assert (
        cut.reason == "length" and cut.is_matched() is False and re.fullmatch(rb"\d{5}", data(cut))
    )
    assert whole.reason == "matched" and whole.is_matched() is True


SCHEMAS: dict[str, tuple[Any, type]] = {
    "anything": ({}, object),
    "integer": ({"type": "integer", "minimum": 7, "maximum": 4711}, int),
    "object": (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "größe": {"type": "number"},
                "tags": {"type": "array", "items": {"enum": ["a", "b\n", "€"]}, "maxItems": 3},
            },
            "required": ["name", "größe"],
            "additionalProperties": False,
        },
        dict,
    ),
    "recursive": (
        {
            "type": "object",
            "properties": {"left": {"$ref": "#"}, "right": {"anyOf": [{"$ref": "#"}, {}]}},
            "required": ["right"],
        },
        dict,
    ),
}


@on_every_engine
@pytest.mark.parametrize("schema", SCHEMAS)
def test_json_comes_out_whole(m: MBLM, make: MakeCache, schema: str) -> None:
    pytest.importorskip("llguidance")
    form, kind = SCHEMAS[schema]
    wishes = [
        {"constraint": JsonSchema(form), "max_bytes": count, "seed": count, **sampling}
        for count in (28, 50)
        for sampling in ({}, SAMPLED)
    ]
    for course in courses(m, make, wishes):
        value = json.loads(data(course))
        assert course.is_matched() and isinstance(value, kind)
        if schema == "object":
            assert isinstance(value["name"], str) and isinstance(value["größe"], (int, float))
            assert set(value) <= {"name", "größe", "tags"}
            assert set(value.get("tags", [])) <= {"a", "b\n", "€"}
        if schema == "integer":
            assert 7 <= value <= 4711 and course.reason == "matched"


def test_a_grammar(m: MBLM) -> None:
    pytest.importorskip("llguidance")
    grammar = Grammar('start: sum\nsum: NUMBER | sum "+" sum | "(" sum ")"\nNUMBER: /[1-9][0-9]*/')
    for seed in range(8):
        ids = m.generate(
            b"", num_tokens_to_generate=15, seed=seed, constraint=grammar, enable_progress=False,
            **SAMPLED,
        )  # fmt: skip
        assert isinstance(eval(bytes(ids.tolist()), {}), int)


def test_bytes_of_a_guide_equal_those_of_the_automaton(m: MBLM) -> None:
    """The same set of strings by both ways, of any lengths."""
    pytest.importorskip("llguidance")
    grammar, regex = Grammar("start: /[ab]*c/"), Regex(rb"[ab]*c")
    for seed in range(4):
        wishes = {"num_tokens_to_generate": 9, "seed": seed, "enable_progress": False, **SAMPLED}
        by_guide = m.generate(b"", constraint=grammar, **wishes)
        assert torch.equal(by_guide, m.generate(b"", constraint=regex, **wishes))


@pytest.mark.parametrize("kind", ["automaton", "guide"])
def test_an_end_that_is_no_byte_comes_where_the_constraint_accepts(m: MBLM, kind: str) -> None:
    if kind == "guide":
        pytest.importorskip("llguidance")
    constraint = Grammar("start: /(ab)*/") if kind == "guide" else Regex(rb"(ab)*")
    lengths = set()
    for seed in range(30):
        wishes = {"max_bytes": 8, "end_token_id": 257, "seed": seed, **SAMPLED}
        (course,) = courses(m, ENGINES["torch"], [{"constraint": constraint, **wishes}])
        ids = course.ids().tolist()
        lengths.add(len(ids))
        assert course.is_matched()
        assert (course.reason == "stop") == (257 in ids)
        assert re.fullmatch(b"(ab)*", bytes(ids[:-1] if 257 in ids else ids))
    assert {1, 3, 5} <= lengths, "at the beginning, too"

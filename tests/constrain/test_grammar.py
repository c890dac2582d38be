"""Guides by llguidance: what they allow, that they find an end in time, and what is refused."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

from llguidance import LLMatcher, LLParserLimits

from mblm.constrain import Grammar, JsonSchema
from mblm.constrain.completion import completion, rejoined, tokenizer
from mblm.constrain.endless import grammar_ends, schema_ends
from mblm.constrain.grammar import _RowGuide, _start
from mblm.inference.guide import Guide

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "mail": {"type": "string", "pattern": r"^[a-z]+@x\.org$"},
        "born": {"type": "string", "format": "date"},
        "friends": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["name", "mail"],
}


def guide(constraint: Any, num_tokens: int = 257) -> Guide:
    return constraint.compile(num_tokens)()


def follow(constraint: Any, text: bytes, left: int = 1000) -> Guide:
    """A guide that has taken some bytes, each of which it allowed."""
    state = guide(constraint)
    for taken, byte in enumerate(text):
        assert state.allowed(left - taken)[byte], text[: taken + 1]
        state.take(byte)
    return state


def allowed(state: Guide, left: int = 1000) -> bytes:
    return bytes(state.allowed(left).nonzero()[:, 0].tolist())


def walk(constraint: Any, count: int, seed: int) -> tuple[bytes, Guide]:
    """Any bytes that are allowed, at most ``count``."""
    chosen, state, string = random.Random(seed), guide(constraint), b""
    while len(string) < count and not state.is_complete():
        may_come = allowed(state, count - len(string))
        if not may_come:
            assert state.accepts()
            break
        byte = chosen.choice(may_come)
        state.take(byte)
        string += bytes([byte])
    return string, state


def test_bytes_are_allowed_one_by_one() -> None:
    schema = JsonSchema({"enum": ["ab", "é"]}, max_spaces=0)
    assert allowed(guide(schema)) == b'"'
    assert allowed(follow(schema, b'"')) == b"a\xc3"
    state = follow(schema, '"é"'.encode())
    assert state.accepts() and state.is_complete() and allowed(state) == b""


def test_what_may_go_on_is_accepted_but_not_complete() -> None:
    state = follow(JsonSchema({"type": "integer"}), b"12")
    assert state.accepts() and not state.is_complete()
    assert not follow(JsonSchema({"type": "integer"}), b"-").accepts()


@pytest.mark.parametrize("num_tokens", [257, 300])
def test_ids_that_are_no_bytes_are_never_allowed(num_tokens: int) -> None:
    state = guide(JsonSchema({"type": "integer"}), num_tokens)
    state.take(ord("1"))
    assert state.allowed(10).shape == (num_tokens,)
    assert not state.allowed(10)[256:].any()
    with pytest.raises(ValueError, match="constraint: no byte: 256"):
        state.take(256)


@pytest.mark.parametrize(("max_spaces", "spaces"), [(0, b""), (1, b" "), (3, b" \n\t")])
def test_white_space_is_bounded(max_spaces: int, spaces: bytes) -> None:
    schema = JsonSchema({"type": "array", "items": {"type": "null"}}, max_spaces)
    state = follow(schema, b"[" + spaces)
    assert allowed(state) == b"]n"
    follow(schema, b"[" + spaces + b"null" + spaces + b"," + spaces + b"null" + spaces + b"]")


def test_a_schema_may_be_text() -> None:
    assert allowed(guide(JsonSchema('{"enum": [null]}'))) == b"n"
    assert allowed(guide(JsonSchema("true"), 257)) == allowed(guide(JsonSchema({})))


@pytest.mark.parametrize("count", [30, 45, 200])
@pytest.mark.parametrize("max_spaces", [0, 1])
def test_it_ends_in_time(count: int, max_spaces: int) -> None:
    for seed in range(3):
        string, state = walk(JsonSchema(PERSON, max_spaces), count, seed)
        assert state.accepts(), string
        assert {"name", "mail"} <= set(json.loads(string))


def test_any_json_ends_in_time() -> None:
    for seed in range(20):
        string, state = walk(JsonSchema({"type": ["object", "array"]}), 2 + seed, seed)
        assert state.accepts() and isinstance(json.loads(string), (dict, list))


def test_what_is_nested_ends_in_time() -> None:
    """Each byte may take the end a byte further away."""
    grammar = Grammar('start: "(" start ")" | "x"')
    string, state = b"", guide(grammar)
    for left in range(100, 0, -1):
        may_come = allowed(state, left)
        byte = may_come[:1]  # an opening one wherever it may
        state.take(byte[0])
        string += byte
        if state.is_complete():
            break
    assert string == b"(" * 49 + b"x" + b")" * 49, "no deeper than can be closed"


def test_what_takes_many_bytes_is_begun_only_where_they_are_left() -> None:
    """One byte, the brace that opens an item, takes the end 50 bytes further away."""
    properties = {name: {"type": "string"} for name in ("first", "second", "third", "fourth")}
    item = {"type": "object", "properties": properties, "required": list(properties)}
    schema = JsonSchema({"type": "array", "items": item}, max_spaces=0)
    assert allowed(guide(schema), 60) == b"["
    assert allowed(follow(schema, b"["), 60) == b"]{"
    assert allowed(follow(schema, b"["), 40) == b"]"
    for seed in range(5):
        string, state = walk(schema, 150, seed)
        assert state.accepts(), string


def test_what_was_found_with_more_bytes_left_does_not_do() -> None:
    grammar = Grammar(r'start: (("A" | "B") ": " /[A-Z][a-z ]{3,40}[.!?]/ "\n")+')
    for seed in range(40):
        string, state = walk(grammar, 20 + seed % 60, seed)
        assert state.accepts(), string


def test_what_may_come_does_not_depend_on_other_rows() -> None:
    grammar = r'start: /[ab]{1,9}/ "x" | "c" start "y" | "d" start "zzz"'
    after_others = [walk(Grammar(grammar), 10 + 7 * seed, seed)[0] for seed in range(8)]
    for seed, string in enumerate(after_others):
        _start.cache_clear()
        assert walk(Grammar(grammar), 10 + 7 * seed, seed)[0] == string


def test_with_too_few_bytes_it_goes_on_unfinished() -> None:
    string, state = walk(JsonSchema(PERSON), 20, 0)
    assert len(string) == 20 and not state.accepts()


def test_the_shortest_end_need_not_be_the_first_thought() -> None:
    """A property that comes first and need not be there takes many bytes."""
    large = {"type": "object", "properties": {"word": {"minLength": 9}}, "required": ["word"]}
    schema = {"type": "object", "properties": {"a": large, "b": {}}, "required": ["b"]}
    for seed in range(5):
        _, state = walk(JsonSchema(schema, max_spaces=0), 8, seed)
        assert state.accepts()


def test_a_vocabulary_that_lacks_bytes() -> None:
    schema = JsonSchema({"enum": ["é", "z", "b"]})
    state = guide(schema, ord("f"))
    state.take(ord('"'))
    assert allowed(state) == b"b", "z and what é begins with are not in it"
    with pytest.raises(ValueError, match="nothing satisfies"):
        schema.compile(10)


def test_rows_do_not_share_what_they_took() -> None:
    make = JsonSchema({"enum": ["a", "b"]}).compile(257)
    one, other = make(), make()
    one.take(ord('"'))
    one.take(ord("a"))
    assert allowed(other) == b'"'


def test_a_grammar_is_read_once() -> None:
    _start.cache_clear()
    for _ in range(3):
        JsonSchema({"enum": [1]}).compile(257)
    assert _start.cache_info().misses == 2  # for all bytes, which checks it, and for the model


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("left", [40, 10_000])
@pytest.mark.parametrize("max_spaces", [0, 1, 300])
def test_a_comma_does_not_come_where_no_name_is_left(max_spaces: int, left: int) -> None:
    schema = {
        "properties": {"a": {"type": "integer"}},
        "patternProperties": {"^a$": {"minimum": 3}},
        "additionalProperties": False,
        "type": "object",
    }
    state = follow(JsonSchema(schema, max_spaces), b'{"a":12', left)
    assert set(allowed(state, left)) - set(b" \t\r\n0123456789") == set(b"}")


@pytest.mark.parametrize("left", [40, 10_000])
@pytest.mark.parametrize("of", [{"item_separator": ";"}, {"whitespace_pattern": " *"}])
def test_nothing_comes_after_which_only_white_space_does(of: dict[str, str], left: int) -> None:
    """Whatever separates members, and where white space is forced without an end."""
    schema = {
        "x-guidance": of,
        "properties": {"a": {"type": "integer"}},
        "patternProperties": {"^a$": {}},
        "additionalProperties": False,
        "type": "object",
    }
    state = follow(Grammar(f"start: %json {json.dumps(schema)}"), b'{"a":12', left)
    assert set(allowed(state, left)) - set(b" \t\r\n0123456789") == set(b"}")


def test_an_end_that_is_known_from_elsewhere_is_validated() -> None:
    """After some names a number completes it, after others not, though the same may come."""
    schema = {
        "patternProperties": {"^b$": {"type": "integer"}},
        "additionalProperties": {"type": "boolean"},
        "type": "object",
    }
    for seed in range(8):
        assert walk(JsonSchema(schema), 20, seed)[1].accepts()


def test_a_comma_comes_where_white_space_has_to_follow() -> None:
    schema = {"patternProperties": {"^a$": {"pattern": "^,  b$"}}, "type": "object"}
    assert allowed(follow(JsonSchema(schema), b'{"a":"')) == b","
    state = follow(Grammar(r'start: "patternProperties" ("," /\n+/)+'), b"patternProperties")
    assert allowed(state) == b","


@pytest.mark.parametrize("asked", ["allowed", "is_complete"])
def test_what_llguidance_gives_up_is_no_match(asked: str) -> None:
    """It accepts what there is, and fails at what may follow."""
    limits = LLParserLimits(step_max_items=1)
    lark = LLMatcher.grammar_from_lark("start: /[a-z]*/")
    matcher = LLMatcher(tokenizer(), lark, log_level=0, limits=limits)
    state = _RowGuide(matcher, None, 257, False, 512)
    state.take(ord("a"))
    assert state.accepts()
    with pytest.raises(ValueError, match=r"constraint: .*Too many items"):
        state.allowed(9) if asked == "allowed" else state.is_complete()


def test_keys_and_texts_of_any_characters() -> None:
    """However JSON writes them in the schema."""
    key = 'größe "x" \\ \U0001f600'
    form = {"properties": {key: {"enum": ["\u00e9"]}}, "required": [key]}
    schema = JsonSchema({"type": "object", "additionalProperties": False, **form})
    string, state = walk(schema, 60, 1)
    assert state.accepts() and json.loads(string) == {key: "é"}


IMPOSSIBLE: list[Any] = [
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"enum": []},
    False,
]


@pytest.mark.parametrize("schema", IMPOSSIBLE)
def test_a_schema_that_nothing_satisfies_is_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match=r"^schema: .*(Unsatisfiable|nothing|empty|enum)"):
        JsonSchema(schema if isinstance(schema, dict) else json.dumps(schema))


def _node(**kinds: Any) -> dict[str, Any]:
    """A schema of objects whose ``next``, which they must have, is of one of some kinds."""
    own = {"type": "object", "properties": {"next": kinds}, "required": ["next"]}
    return {"$ref": "#/$defs/node", "$defs": {"node": own}}


NODE, ONE = {"$ref": "#/$defs/node"}, {"type": "array", "minItems": 1}
ENDLESS: list[Any] = [
    _node(**NODE),
    _node(anyOf=[NODE, _node(allOf=[NODE])["$defs"]["node"]]),
    _node(**ONE, items=NODE),
    _node(**ONE, prefixItems=[NODE]),
    {"type": ["array"], "minItems": 2, "prefixItems": [{}], "items": {"$ref": "#"}},
    'start: item+\nitem: "a" start? "b" item | /["]+/ (item "," | "x"* start) // "a" |',
    'start: a\n?a: "x" b "y"\nb: "z" (a | ("y"? b)) "w"\n%ignore / /',
]
ENDING: list[Any] = [
    _node(anyOf=[NODE, {"type": "null"}]),
    _node(type=["object", "null"], required=["next"], properties={"next": NODE}),
    _node(type="array", items=NODE),
    _node(**ONE, prefixItems=[{}], items=NODE),
    {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["last"]},
    'start: "(" start? ")"',
    'start: "(" (start | /x/) ")"',
    'start: "(" [start] ")" | "<" start ">"',
    'start: "(" start~0..2 ")"',
]


@pytest.mark.parametrize("given", [*ENDLESS, *ENDING], ids=str)
def test_what_has_no_end_is_refused(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mblm.constrain.grammar._FIRST_TRIES", 400)
    make, ends = (Grammar, grammar_ends) if isinstance(given, str) else (JsonSchema, schema_ends)
    assert ends(given) == (given in ENDING)
    if given in ENDING:
        make(given)
        return
    with pytest.raises(ValueError, match=r"^(schema|lark): nothing satisfies it: .* has no end"):
        make(given)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: JsonSchema({"not": {}}),
            ValueError,
            'schema: Unimplemented keys: \\["not"\\]',
        ),
        (lambda: JsonSchema({"type": "nothing"}), ValueError, "schema: Invalid type: nothing"),
        (lambda: JsonSchema({"pattern": "a(?=b)"}), ValueError, "schema: .*"),
        (lambda: JsonSchema("{"), ValueError, "schema: no JSON: Expecting property name"),
        (lambda: JsonSchema("[" * 9999), ValueError, "schema: no JSON: maximum recursion"),
        (lambda: JsonSchema({"enum": [{1}]}), ValueError, "schema: no JSON: .* not JSON serial"),
        (lambda: JsonSchema(nested(200)), ValueError, "schema: recursion limit exceeded"),
        (lambda: JsonSchema(nested(5000)), ValueError, "schema: no JSON: maximum recursion"),
        (lambda: JsonSchema("[]"), TypeError, r"schema: expected a dict or a JSON text, got \[\]"),
        (lambda: JsonSchema({}, -1), ValueError, "max_spaces: expected a number >= 0, got -1"),
        (lambda: Grammar(b"start: "), TypeError, "lark: expected str, got b'start: '"),
        (lambda: Grammar("start: foo"), ValueError, 'lark: .*unknown name: "foo"'),
        (lambda: Grammar("start: /(/"), ValueError, "lark: .*unclosed group"),
        (lambda: Grammar('start: ""'), ValueError, "lark: only the empty string satisfies it"),
        (lambda: Grammar('start: "a" start'), ValueError, "lark: .*Too many items"),
    ],
)
def test_refuses_by_name(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"(?s)^{words}"):
        make()


def test_what_is_forced_is_not_looked_at_byte_by_byte() -> None:
    text = "word " * 100
    matcher, _ = _start(Grammar(f'start: ("x" | "y") "{text}" /[0-9]{{2}}/')._grammar, 257)
    found = completion(matcher, 510, 257, max_tries=200)
    assert found is not None and found[1:-2] == text.encode()


@pytest.mark.parametrize(
    ("begun", "bridge"), [(b"\\", b'"'), (b"\xc3", b"\x80"), (b"\xf0\x9f", b"\x80\x80")]
)
def test_few_bytes_lead_back_to_an_end_that_is_known(begun: bytes, bridge: bytes) -> None:
    """So that what is begun within a string costs no search."""
    matcher, _ = _start(JsonSchema({"type": "array", "items": {"type": "string"}})._grammar, 257)
    matcher = matcher.deep_copy()
    assert matcher.consume_tokens([*b'["', *begun])
    end = bridge + b'"]'
    assert rejoined(matcher, b'"]', 9, 257) == rejoined(matcher, b'"]', len(end), 257) == end
    assert rejoined(matcher, b'"]', len(end) - 1, 257) is None
    assert rejoined(matcher, b"x}", 9, 257) is None


def test_a_byte_that_may_not_come_is_refused() -> None:
    state = guide(JsonSchema({"type": "null"}))
    with pytest.raises(ValueError, match=r"constraint: .*doesn't satisfy the grammar") as caught:
        state.take(ord("x"))
    assert "<state>" not in str(caught.value)


def test_nothing_of_pythons_runs_in_llguidance() -> None:
    """Where a Ctrl-C would be lost, and the grammar with it, for all that use it later."""
    called: set[str] = set()
    guide = JsonSchema({"type": "array", "minItems": 20, "items": {"const": 0}}).compile(256)()
    sys.setprofile(lambda frame, *_: called.add(frame.f_code.co_filename))
    try:
        for left in range(41, 0, -1):
            guide.take(int(guide.allowed(left).int().argmax()))
    finally:
        sys.setprofile(None)
    assert guide.accepts() and not any("llguidance" in Path(file).parts for file in called)

"""Whether what a schema or a grammar describes may end, which not every recursion does.

What is referred to is taken to have no end until its definition has one: a least fixed point. Where
the answer is in doubt, it is yes.
"""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

_Ends = Callable[[str], bool]  # of what is referred to

# Of Lark: strings and regular expressions, or comments and directives; names that are defined;
# groups without others in them; what may be left out; what may mean anything.
_LITERAL = re.compile(r'(?m)("(?:\\.|[^"\\])*"|/(?!/)(?:\\.|[^/\\])+/)|(?:#|//|^\s*%(?!json)).*')
_NAME = re.compile(r"(?m)^\s*[!?]*([A-Za-z_][\w-]*)[^:|\n]*:")
_GROUP = re.compile(r"\(([^()]*)\)")
_OPTIONAL = re.compile(r"[\w-]+\s*[?*]|\[[^][]*\]")
_DOUBTFUL = re.compile(r"[][{}~%@<>]|::")


def schema_ends(root: Any) -> bool:
    """Whether a text that a JSON schema describes may end."""

    def holds(schema: Any, ends: _Ends) -> bool:
        if not isinstance(schema, dict):
            return True
        if "$ref" in schema:
            return ends(schema["$ref"])
        needed, kind = [*schema.get("allOf", ())], schema.get("type")
        if kind in ("object", ["object"]):
            own = schema.get("properties", {})
            needed += [own[name] for name in schema.get("required", ()) if name in own]
        if kind in ("array", ["array"]):
            items = [*schema.get("prefixItems", ()), schema.get("items")]
            needed += items[: int(schema.get("minItems", 0))]
        ways = [schema[name] for name in ("anyOf", "oneOf") if name in schema]
        return all(holds(one, ends) for one in needed) and all(
            any(holds(one, ends) for one in of) for of in ways
        )

    def definition(reference: str, ends: _Ends) -> bool:
        schema, (document, *path) = root, unquote(reference).split("/")
        for name in path:
            name = name.replace("~1", "/").replace("~0", "~")
            schema = schema[int(name)] if isinstance(schema, list) else schema[name]
        return document != "#" or holds(schema, ends)

    return _least_fixed_point("#", definition)


def grammar_ends(lark: str) -> bool:
    """Whether a text that a grammar in Lark's syntax describes may end."""
    _, *parts = _NAME.split(_LITERAL.sub(lambda match: "0" if match[1] else "", lark))
    rules = dict(zip(parts[::2], parts[1::2], strict=True))
    for name, body in [*rules.items()]:
        while match := _GROUP.search(body):
            rules[group := f"-{len(rules)}"] = match[1]
            body = f"{body[: match.start()]} {group} {body[match.end() :]}"
        rules[name] = body

    def definition(name: str, ends: _Ends) -> bool:
        body = _OPTIONAL.sub("", rules.get(name, ""))
        return _DOUBTFUL.search(body) is not None or any(
            all(map(ends, re.findall(r"[\w-]+", way))) for way in body.split("|")
        )

    return "%lark" in lark or _least_fixed_point("start", definition)


def _least_fixed_point(start: str, definition: Callable[[str, _Ends], bool]) -> bool:
    asked, ended, size = {start}, set[str](), 0

    def ends(name: str) -> bool:
        asked.add(name)
        return name in ended

    try:
        while size != (size := len(asked) + len(ended)):
            ended |= {name for name in [*asked] if definition(name, ends)}
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return True  # it is another one than it seems
    return start in ended

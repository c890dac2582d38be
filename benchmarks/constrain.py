"""Constraints: bytes per second under each over those without one, in turns in one process.

Automata are followed in compiled code, guides answer each byte from Python. Also how long each
constraint takes to compile, once.

    python benchmarks/constrain.py
"""

import time
from collections.abc import Callable
from typing import Any

from decode import MODELS, build
from side_by_side import new_figures, parser, positive, spread, write_json

from mblm.constrain import Grammar, JsonSchema, Regex, Utf8

# Each goes on for as many bytes as wished.
CONSTRAINTS: dict[str, Callable[[], Any]] = {
    "regex, [a-z ,.]*": lambda: Regex(rb"[a-z ,.]*"),
    "regex, lines of dates": lambda: Regex(rb"(\d{4}-\d{2}-\d{2}\n)*"),
    "regex, any letters of Unicode": lambda: Regex(r"(\w+\s)*"),
    "regex, 5000 states": lambda: Regex(rb"([^\n]{0,5000}\n)*"),
    "UTF-8": Utf8,
    "guide, Grammar [a-z ,.]*": lambda: Grammar("start: /[a-z ,.]*/"),
    "guide, JSON array": lambda: JsonSchema({"type": "array", "minItems": 10**6}),
}
SAMPLINGS = {"greedy": {}, "sampled": {"temperature": 1.0, "top_k": 50}}


def rate(model: Any, count: int, constraint: Any, sampling: dict[str, Any]) -> float:
    """Bytes per second of one call."""
    begin = time.perf_counter()
    ids = model.generate(
        b"",
        num_tokens_to_generate=count,
        seed=0,
        enable_progress=False,
        constraint=constraint,
        **sampling,
    )
    return len(ids) / (time.perf_counter() - begin)


def main() -> None:
    options = parser(__doc__, runs=7)
    options.add_argument("--bytes", type=positive, default=512, help="of a run")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[::3])
    arguments = options.parse_args()
    figures = new_figures(arguments)
    constraints = {}
    for name, make in CONSTRAINTS.items():
        begin = time.perf_counter()
        constraints[name] = make()
        constraints[name].compile(257)
        figures[f"compile, {name}"] = seconds = time.perf_counter() - begin
        print(f"compile {name:32} {1e3 * seconds:8.1f} ms")
    for model_name in arguments.models:
        model = build(*MODELS[model_name])
        for sampling_name, sampling in SAMPLINGS.items():
            print(f"{model_name}, {sampling_name}")
            for name, constraint in constraints.items():
                ratios = []
                for run in range(1 + arguments.runs):
                    free = rate(model, arguments.bytes, None, sampling)
                    bound = rate(model, arguments.bytes, constraint, sampling)
                    if run:
                        ratios.append(bound / free)
                figures[f"{model_name}, {sampling_name}, {name}"] = ratios
                shown = spread(ratios, ".2f")
                print(f"  {name:32} {shown} of {free:6.0f} bytes/s without", flush=True)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

"""Drafted against plain decoding: bytes a second after real texts, in one run, alternating.

Greedily, at temperature 0.8, and for bytes without any order at a temperature that makes the model
write nothing else, where drafts fail. Each ratio is the median over the prompts of the runs'. With
``--small``, also drafts of a smaller model.

    python benchmarks/draft.py MODEL code.py prose.txt
"""

import time
from statistics import median
from typing import Any

import torch
from decode import BYTES
from side_by_side import existing, new_figures, parser, positive, spread, write_json

from mblm import MBLM

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 0.8": {"temperature": 0.8, "filter_thres": 0.0, "seed": 0},
}
HOT: dict[str, Any] = {"temperature": 30.0, "filter_thres": 0.0, "seed": 0}


def clock(model: MBLM, prompt: bytes, count: int, **wishes: Any) -> tuple[float, torch.Tensor]:
    """Seconds that the bytes after a prompt take, without those of the prompt."""
    session = model.session(weights=wishes.pop("type_of_weights"))
    session.feed(prompt)
    # On one thread, what else runs on the machine does not count.
    now = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    begin = now()
    ids = session.generate(count, **wishes)
    return now() - begin, ids


def compare(model: MBLM, prompts: list[bytes], arguments: Any, **wishes: Any) -> dict[str, Any]:
    """Bytes a second without and with drafts, and their ratios, prompt by prompt."""
    figures: dict[str, Any] = {"plain": [], "drafted": [], "ratios": []}
    for prompt in prompts:
        plain, drafted = [], []
        for _ in range(arguments.runs):
            seconds, want = clock(model, prompt, arguments.bytes, **wishes)
            plain.append(seconds)
            seconds, got = clock(model, prompt, arguments.bytes, draft=arguments.draft, **wishes)
            drafted.append(seconds)
            assert torch.equal(want, got), "drafts have changed a byte"
        figures["plain"].append(arguments.bytes / min(plain))
        figures["drafted"].append(arguments.bytes / min(drafted))
        figures["ratios"].append(min(plain) / min(drafted))
    return figures


def prompts_of(data: bytes, arguments: Any) -> list[bytes]:
    """Pieces of a file, evenly spread."""
    step = max((len(data) - arguments.prompt) // arguments.prompts, 1)
    return [data[i * step :][: arguments.prompt] for i in range(arguments.prompts)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("model", help="a folder that save_pretrained has written")
    options.add_argument("files", nargs="+", type=existing, help="texts to go on from")
    options.add_argument("--small", help="draft by this model, too")
    options.add_argument("--prompts", type=positive, default=5, help="of each file")
    options.add_argument("--prompt", type=positive, default=4000, help="bytes of each")
    options.add_argument("--bytes", type=positive, default=2000, help="to generate")
    options.add_argument("--weights", nargs="+", choices=BYTES, default=["float32", "int8"])
    arguments = options.parse_args()
    model = MBLM.from_pretrained(arguments.model).eval()
    drafts: dict[str, Any] = {"ngram": "ngram"}
    if arguments.small:
        drafts["model"] = MBLM.from_pretrained(arguments.small).eval()
    figures = new_figures(arguments)
    texts = {file.name: prompts_of(file.read_bytes(), arguments) for file in arguments.files}
    cases = [(name, texts[name], way) for name in texts for way in WAYS]
    noise = torch.randint(0, 256, (arguments.prompt,), generator=torch.Generator().manual_seed(0))
    texts["noise"] = [bytes(noise.tolist())]
    print(f"{'draft':6} {'weights':9} {'text':24} {'':16} {'plain B/s':>9} {'drafted':>9}  ratio")
    for draft, arguments.draft in drafts.items():
        for weights in arguments.weights:
            for name, prompts, way in [*cases, ("noise", texts["noise"], "")]:
                wishes = WAYS.get(way, HOT)
                result = compare(model, prompts, arguments, type_of_weights=weights, **wishes)
                figures[f"{draft}, {weights}, {name}, {way}"] = result
                print(
                    f"{draft:6} {weights:9} {name:24} {way:16} {median(result['plain']):>9,.0f} "
                    f"{median(result['drafted']):>9,.0f}  {spread(result['ratios'], '.2f')}",
                    flush=True,
                )
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

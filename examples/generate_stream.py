"""Generate from a saved model and show every byte as it comes, with the speed at the end.

python examples/generate_stream.py my-model "Once upon a time" --bytes 500
"""

import argparse
import sys
import time

from mblm import MBLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder that save_pretrained wrote")
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--bytes", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()

    model = MBLM.from_pretrained(arguments.model)
    sys.stdout.write(arguments.prompt)
    begin = time.perf_counter()
    stream = model.stream(
        arguments.prompt,
        text=True,
        max_bytes=arguments.bytes,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for text in stream:
        print(text, end="", flush=True)
    seconds = time.perf_counter() - begin
    count = len(stream.result.ids)
    print(f"\n{count} bytes in {seconds:.1f} s, {count / seconds:.0f} bytes/s", file=sys.stderr)


if __name__ == "__main__":
    main()

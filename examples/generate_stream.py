"""Generate from a saved model and show every byte as it comes, with the speed at the end.

python examples/generate_stream.py python "def " --bytes 500
"""

import argparse
import sys
import time

from mblm import MBLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="what MBLM.from_pretrained takes")
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--bytes", type=int, default=200)
    parser.add_argument("--top-p", type=float, default=0.95)
    options = parser.parse_args()

    model = MBLM.from_pretrained(options.model).float()
    print(options.prompt, end="")
    begin = time.perf_counter()
    stream = model.stream(options.prompt, text=True, max_bytes=options.bytes, top_p=options.top_p)
    for text in stream:
        print(text, end="", flush=True)
    seconds = time.perf_counter() - begin
    count = len(stream.result.ids)
    print(f"\n{count} bytes in {seconds:.1f} s, {count / seconds:.0f} bytes/s", file=sys.stderr)


if __name__ == "__main__":
    main()

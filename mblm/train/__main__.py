"""One worker of a training run: `torchrun … -m mblm.train CONFIG [--set …] [--resume …]`."""

import argparse
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from mblm.train.experiment import load_experiment, train_experiment
from mblm.utils.errors import describe


def main() -> None:
    """Train; expected errors are one line on standard error."""
    parser = argparse.ArgumentParser(prog="mblm.train", description=__doc__)
    parser.add_argument("config", type=Path, help="the experiment's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--resume", metavar="latest|PATH")
    arguments = parser.parse_args()
    try:
        _work(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"mblm: error: {describe(error)}")


@record  # leaves an error where the launcher finds it
def _work(arguments: argparse.Namespace) -> None:
    train_experiment(load_experiment(arguments.config, arguments.set, arguments.resume))


if __name__ == "__main__":
    main()

"""One worker of a training run: `torchrun … -m mblm.train CONFIG [--set …] [--resume …]`."""

import argparse
import sys
from pathlib import Path

from mblm.utils import interrupt


def main() -> None:
    """Train; expected errors are one line on standard error."""
    parser = argparse.ArgumentParser(prog="mblm.train", description=__doc__)
    parser.add_argument("config", type=Path, help="the experiment's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--resume", metavar="auto|latest|PATH")
    parser.add_argument("--import", action="append", default=[], metavar="MODULE", dest="imports")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS")
    arguments = parser.parse_args()
    with interrupt.ends_at_once():  # but while a run goes, which is saved then
        from torch.distributed.elastic.multiprocessing.errors import record

        from mblm.utils.errors import describe

        try:
            record(_work)(arguments)  # leaves an error where the launcher finds it
        except (OSError, ValueError) as error:
            sys.exit(f"mblm: error: {describe(error)}")


def _work(arguments: argparse.Namespace) -> None:
    from mblm.train.experiment import load_experiment, train_experiment
    from mblm.utils.imports import import_modules

    import_modules(arguments.imports)
    config = load_experiment(arguments.config, arguments.set, arguments.resume)
    train_experiment(config, profile=arguments.profile)


if __name__ == "__main__":
    main()

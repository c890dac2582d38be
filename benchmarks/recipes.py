"""Compares recipes of training on any text: bits per byte of held-out bytes after equal bytes.

Two Transformer stages, 1.1 M weights; a step takes 4 windows of 512 bytes. Every recipe begins with
the same weights and trains on the same windows, which a seed decides, and is measured on the same
windows of what is held out: of a folder whole files, of a file its end. The table shows the mean
and the standard deviation over `--runs` seeds, and the CPU time of a step, of all threads.

    python benchmarks/recipes.py FILE
    python benchmarks/recipes.py FOLDER --files "*.py" json
    python benchmarks/recipes.py FILE --recipe optimizer=adam,learning_rate=0.002 --steps 1200
"""

import math
import time
from statistics import mean, median, stdev
from typing import Any

import torch
import yaml
from side_by_side import config_of, existing, new_figures, parser, positive, write_json

from mblm import MBLM
from mblm.data.dataset.byte_files import ByteFiles, ByteFilesArgs
from mblm.data.types import ModelMode
from mblm.train.core.config import CoreTrainConfig
from mblm.train.recipe import make_optimizer, make_schedule

LENGTH = 512
BATCH_SIZE = 4
MODEL = config_of(["t", "t"], 128, [3, 3], [64, 8])
MUON = {"optimizer": "muon", "learning_rate": 0.01, "weight_decay": 0.1}
WSD = {"lr_schedule": "wsd", "warmup_steps_perc": 0.05, "decay_ratio": 0.4}
COSINE = {"lr_schedule": "cosine", "warmup_steps_perc": 0.05}
RECIPES: dict[str, dict[str, Any]] = {
    "adam, cosine": {"optimizer": "adam", "learning_rate": 0.003, **COSINE},
    "adam, wsd": {"optimizer": "adam", "learning_rate": 0.003, **WSD},
    "muon, cosine": {**MUON, **COSINE},
    "muon, wsd": {**MUON, **WSD},
}


def train(recipe: CoreTrainConfig, data: ByteFiles, seed: int, steps: int) -> MBLM:
    """A model after so many steps."""
    torch.manual_seed(seed)
    model = MBLM(MODEL)
    optimizer = make_optimizer(recipe, model, model.parameters())
    schedule = make_schedule(recipe, optimizer, steps)
    for _ in range(steps):
        starts = torch.randint(0, data._data_size - LENGTH + 1, (recipe.batch_size,)).tolist()
        model(torch.stack([data.get_sample(start)[0] for start in starts])).backward()
        if recipe.gradient_clipping is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clipping)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def bits_per_byte(model: MBLM, data: ByteFiles, windows: int) -> float:
    """The mean over windows spread evenly over the data."""
    last = data._data_size - LENGTH
    starts = torch.linspace(0, last, min(windows, last + 1)).long().tolist()
    model.eval()
    samples = torch.stack([data.get_sample(start)[0] for start in starts])
    sums = [float(model(part)) * len(part) for part in samples.split(16)]
    return sum(sums) / len(samples) / math.log(2)


def recipe_of(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the fields of ``field=value,field=value``."""
    fields = [field.partition("=") for field in text.split(",")]
    return text, {name.strip(): yaml.safe_load(value) for name, _, value in fields}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("data", type=existing, help="a file, or a folder")
    options.add_argument("--files", nargs="+", default=["."], help="what to read of a folder")
    options.add_argument(
        "--recipe",
        dest="recipes",
        action="append",
        type=recipe_of,
        metavar="FIELD=VALUE,..",
        help=f"fields of train; may be repeated. Default: {'; '.join(RECIPES)}",
    )
    options.add_argument("--steps", type=positive, default=300)
    options.add_argument("--windows", type=positive, default=128, help="how many are held out")
    arguments = options.parse_args()
    figures = new_figures(arguments)
    args = None
    if arguments.data.is_dir():
        args = ByteFilesArgs(files=arguments.files, split_by="documents")
    training, held_out = (
        ByteFiles(arguments.data, mode, args, seq_len=LENGTH, worker_id=0, num_workers=1)
        for mode in (ModelMode.TRAIN, ModelMode.VALID)
    )
    recipes = {
        name: CoreTrainConfig(
            target_elements=arguments.steps * BATCH_SIZE * LENGTH,
            target_elements_strategy="sequence",
            batch_size=BATCH_SIZE,
            gradient_accumulate_every=1,
            **{"gradient_clipping": 1.0, **fields},
        )
        for name, fields in (arguments.recipes or RECIPES.items())
    }

    print(f"{training._data_size} bytes, {arguments.steps} steps")
    results: dict[str, dict[str, list[float]]] = {
        name: {"bits_per_byte": [], "seconds_per_step": []} for name in recipes
    }
    figures |= {"bytes": training._data_size, "steps": arguments.steps, "recipes": results}
    for seed in range(arguments.runs):
        for name, recipe in recipes.items():
            start = time.process_time()
            model = train(recipe, training, seed, arguments.steps)
            seconds = (time.process_time() - start) / arguments.steps
            bits = bits_per_byte(model, held_out, arguments.windows)
            print(f"seed {seed}, {name}: {bits:.3f} bits per byte", flush=True)
            results[name]["bits_per_byte"].append(bits)
            results[name]["seconds_per_step"].append(seconds)
            write_json(arguments.json, figures)
    for name, result in results.items():
        values, seconds = result["bits_per_byte"], median(result["seconds_per_step"])
        deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        measured = f"{mean(values):.3f}{deviation} bits per byte"
        print(f"{name:>14}: {measured}, {seconds:.3f} s of CPU time a step")


if __name__ == "__main__":
    main()

"""`mblm generate`: what it takes; the work is done in `generate`."""

import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from mblm.cli.generate import (
    LateFile,
    check_out,
    constraint_of,
    generate_all,
    how_many,
    load,
    read_file,
    read_prompts,
    stream,
)
from mblm.cli.options import Device, Imports, Model, RunConfig
from mblm.model.find import find_model
from mblm.utils.naming import naming


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="What comes before the bytes.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="The same from a file; - is standard input.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Many prompts, lines such as {"prompt": "The"}; results are lines of --out, '
            "written as they come."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write to this file. [default: standard output]")
    ] = None,
    num_bytes: Annotated[
        int | None,
        typer.Option(
            "--bytes",
            min=0,
            help="How many bytes to generate. [default: 256, or as many as the context holds]",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            help="Divides the logits: below 1, likely bytes get likelier; 0 takes the likeliest."
        ),
    ] = 1.0,
    filter_thres: Annotated[
        float,
        typer.Option(
            metavar="F", help="Sample from the top 1 - F of the vocabulary; 1 takes the likeliest."
        ),
    ] = 0.9,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from so many likeliest bytes, as the next two.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest bytes that together reach this probability, instead "
            "of what --filter-thres keeps."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample from bytes at least this share as likely as the likeliest."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same bytes. [default: a new one]")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End after this text; may be given several times."),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Write what this regular expression matches."),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="Write JSON that the schema in this file describes.")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(metavar="ngram", help="Propose what came before: the same text, sooner."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            metavar="float32|bfloat16|int8",
            help="Read the weights rounded to this type: faster on a CPU, not quite the model.",
        ),
    ] = "float32",
    device: Device = None,
    config: RunConfig = None,
    imports: Imports = None,
) -> int:
    """Generate bytes with a saved model, written as they come.

    The prompt is not repeated. A last line on standard error tells the speed and the seed.

    \b
    Examples:
      mblm generate python --prompt "def "
      mblm generate mblm-demo --prompt-file story.txt --bytes 1000 --out more.txt
      mblm generate runs/latest --temperature 0.7 --stop END --seed 1
      mblm generate mblm-demo --regex "[a-z_]+ = [0-9]+" --min-p 0.05
      mblm generate run/model_top1.pth --filter-thres 1 | head -c 100
      mblm generate mblm-demo --weights int8 --bytes 10000 --out much.txt
      mblm generate mblm-demo --prompts many.jsonl --out results.jsonl
    """
    if sum(given is not None for given in (prompt, prompt_file, prompts)) > 1:
        raise typer.BadParameter("pass at most one of --prompt, --prompt-file and --prompts")
    if prompts is not None and out is None:
        raise typer.BadParameter("--prompts needs --out")
    if regex is not None and json_schema is not None:
        raise typer.BadParameter("pass at most one of --regex and --json-schema")
    constraint = constraint_of(regex, json_schema)
    checkpoint = find_model(model)
    prime = os.fsencode(prompt or "") if prompt_file is None else read_file(prompt_file)
    primes = [] if prompts is None else read_prompts(prompts)
    if out is not None:
        check_out(out, checkpoint, prompt_file, prompts, config, json_schema)
    loaded = load(checkpoint, config, device)
    file = None if out is None else LateFile(out)
    wishes: dict[str, Any] = {
        "temperature": temperature,
        "filter_thres": filter_thres,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "constraint": constraint,
        "draft": draft,
        "seed": secrets.randbits(32) if seed is None else seed,
        "stop": [os.fsencode(text) for text in stop or ()],
        "weights": weights,
    }
    names = {"constraint": "--json-schema" if regex is None else "--regex"}
    with naming(**names, **({} if prompt_file is None else {"prime": "--prompt-file"})):
        if file is not None and prompts is not None:
            return generate_all(loaded, primes, file, num_bytes, **wishes)
        count = how_many(num_bytes, len(prime), loaded.max_length)
        return stream(loaded, prime, file, num_tokens_to_generate=count, **wishes)

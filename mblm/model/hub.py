"""Publish models on the Hugging Face hub: a folder, and a card that says what is in it."""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mblm.utils.checks import check_number

_CARD = "README.md"


def push_folder(
    repo_id: str,
    write: Callable[[str], object],
    card: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload what ``write`` writes into a folder, and the card if the repository has none.

    The other arguments are those of `huggingface_hub`.

    Returns:
        The address of the commit.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("to push to the hub: pip install 'mblm[hub]'") from error
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(repo_id, _CARD, revision=revision):
            Path(folder, _CARD).write_text(card, encoding="utf-8")
        commit: str = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload a model",
            create_pr=create_pr,
        )
    return commit


def model_card(
    model: Any, *, library: str, usage: Sequence[str], bits_per_byte: float | None = None
) -> str:
    """The card of a model: what the hub reads, and how to load it.

    Args:
        model: An `mblm.MBLM` or an `mblm.MBLMEncoder`.
        library: What loads it, ``"mblm"`` or ``"transformers"``.
        usage: Lines of Python that load and use it.
        bits_per_byte: What it needs on average of a text's byte, if that is known.
    """
    is_decoder = hasattr(model, "generate")
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {'text-generation' if is_decoder else 'fill-mask'}",
        "tags: [mblm, bytes]",
        "---",
        "",
        f"# {type(model).__name__}",
        "",
        "A multiscale byte language model: its tokens are bytes, of text or of any file.",
        "",
        "| stage | block | positions | width | layers |",
        "|---|---|---|---|---|",
    ]
    config = model.config
    stages = zip(
        config.stage_blocks(), config.seq_lens, config.hidden_dims, config.num_layers, strict=True
    )
    lines += [
        f"| {n} | {block.block_type} | {positions} | {width} | {layers} |"
        for n, (block, positions, width, layers) in enumerate(stages, 1)
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines += ["", f"{parameters:,} parameters; a context of {model.context_size:,} bytes."]
    if bits_per_byte is not None:
        bits_per_byte = check_number("bits_per_byte", bits_per_byte)
        if not 0 < bits_per_byte < math.inf:
            raise ValueError(f"bits_per_byte: expected a number above 0, got {bits_per_byte}")
        lines += [
            "",
            f"**{bits_per_byte:.4g} bits per byte** on the texts that it was evaluated on.",
        ]
    return "\n".join([*lines, "", "```python", *usage, "```", ""])

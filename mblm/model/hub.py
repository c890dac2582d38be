"""Models on the Hugging Face hub: download a folder; publish one, and a card of what is in it."""

import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mblm.model.find import CONFIG_FILE, INDEX_FILE, SHARDS, WEIGHTS_FILE
from mblm.utils.checks import check_number

_CARD = "README.md"


def download_folder(name: Path, **options: Any) -> Path:
    """The folder of a model, as far as the hub or an earlier download has it.

    Args:
        name: Its id, ``owner/name``.
        **options: As `huggingface_hub.snapshot_download` has them.

    Raises:
        FileNotFoundError: The name is none, or the hub cannot be asked.
    """
    if name.exists():
        raise FileNotFoundError(f"{name} is no model: expected a folder or a .pth file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name.as_posix(), re.ASCII):
        raise FileNotFoundError(
            f"{name} is neither a folder nor a model id like owner/name; see mblm models"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{name} is no folder; to look for it on the hub: pip install 'mblm[hub]'"
        ) from error
    files = [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, SHARDS]
    try:
        return Path(snapshot_download(name.as_posix(), allow_patterns=files, **options))
    except Exception as error:  # those of its network library are of no class of their own
        raise FileNotFoundError(
            f"{name} is no folder here, and could not be downloaded from the hub: "
            f"{type(error).__name__}: {error}"
        ) from error


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
        if revision is not None and not revision.startswith("refs/"):  # a pull request's is there
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

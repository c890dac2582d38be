"""A tiny experiment on a file of text, as it is configured."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TEXT = b"The cat sat on the mat.\n" * 100


def experiment_fields(folder: Path) -> dict[str, Any]:
    """24 batches of 2 sequences of 16 bytes, with the published fields alone."""
    (folder / "text").write_bytes(TEXT)
    return {
        "params": {
            "input_seq_len": 16,
            "num_tokens": 257,
            "pad_token_id": 256,
            "hidden_dims": [16, 16],
            "num_layers": [1, 1],
            "seq_lens": [4, 4],
            "train_checkpoint_chunks": None,
            "block": {
                "block_type": "transformer",
                "attn_head_dims": 8,
                "attn_num_heads": 2,
                "attn_use_rot_embs": True,
                "pos_emb_type": "fixed",
            },
        },
        "train": {
            "target_elements": 24 * 2 * 16,
            "target_elements_strategy": "sequence",
            "batch_size": 2,
            "learning_rate": 0.01,
            "gradient_accumulate_every": 1,
        },
        "io": {
            "name_model": "tiny",
            "output_dir": str(folder / "out"),
            "dataset_dir": str(folder / "text"),
            "dataset_id": "bytes",
            "num_models_to_save": 1,
            "validate_amount": 2,
            "log_train_loss_amount": 24,
        },
    }


def as_encoder(fields: dict[str, Any]) -> dict[str, Any]:
    """The same experiment with an encoder."""
    params = {"input_seq_len": fields["params"].pop("input_seq_len"), "mask_token_id": 255}
    fields["params"]["block"]["block_type"] = "transformerEncoder"
    masked = {**fields["train"], "masking_proba": 0.3}
    return {**fields, "params": {**params, "mblm_config": fields["params"]}, "train": masked}


def run_of(folder: Path) -> Path:
    """The folder of the only run of an experiment in a folder."""
    (run,) = (folder / "out").glob("tiny_*")
    return run


def summary_of(run: Path) -> dict[str, object]:
    """What a run's ``config.yaml`` says became of it."""
    said: dict[str, object] = yaml.safe_load((run / "config.yaml").read_text())["summary"]
    return said


# -- In processes of their own ---------------------------------------------------------------------


ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.endswith("JOB_ID")},
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
    "PYTHON": sys.executable,
}


def start(
    *command: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [str(word) for word in command],
        env=ENVIRONMENT | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )

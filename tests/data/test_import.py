"""What programs import from ``mblm.data``, and that Pillow waits for the first image."""

import importlib

import pytest

from tests import fresh

NAMES = {
    "mblm.data.datasets": "DistributedDataset DistributedDatasetConfig",
    "mblm.data.types": "ModelMode BatchWithLossMask BatchMaskedForMLM",
    "mblm.data.utils": "Bytes FileStream ImagePipeline ColorSpace BinMode Tokenizer "
    "TokenizerOptions target_loss_mask shift_remap_tensor",
    "mblm.data.utils.bytes": "Bytes FileStream",
    "mblm.data.utils.image": "ImagePipeline ColorSpace BinMode",
    "mblm.data.utils.misc": "target_loss_mask shift_remap_tensor",
    "mblm.data.utils.tokenizer": "Tokenizer TokenizerOptions",
    "mblm.data.dataset.pg19": "PG19",
    "mblm.data.dataset.pg19_masked": "PG19Masked",
    "mblm.data.dataset.clevr": "Clevr ClevrOptionalArgs",
    "mblm.data.dataset.byte_files": "ByteFiles ByteFilesArgs",
    "mblm.data.dataset.mixture": "Mixture",
    "mblm.data.pack": "pack",
    "mblm.data.packed": "PackSummary open_part read_summary",
    "mblm.data.documents": "find_source read_source",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_can_be_imported(module: str) -> None:
    imported = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(imported, name)] == []


def test_no_import_brings_pillow_or_the_trainer() -> None:
    imports = "; ".join(f"import {module}" for module in NAMES)
    done = fresh.run(
        f"import sys; {imports}; "
        "print([name for name in ('PIL', 'mblm.train', 'mblm.model') if name in sys.modules])"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_without_pillow_an_image_says_how_to_get_it() -> None:
    done = fresh.run(
        "import sys; sys.modules['PIL'] = None; from mblm.data.utils import *; "
        "ImagePipeline('image.png', ColorSpace.RGB)"
    )
    assert "ImportError: images need Pillow: pip install 'mblm[image]'" in done.stderr

"""Pillow and the trainer wait until they are needed."""

from tests import fresh

MODULES = [
    *("datasets", "types", "utils", "documents", "pack", "packed"),
    *(f"dataset.{name}" for name in ("byte_files", "clevr", "mixture", "pg19", "pg19_masked")),
]


def test_no_import_brings_pillow_or_the_trainer() -> None:
    imports = "; ".join(f"import mblm.data.{module}" for module in MODULES)
    told = fresh.output_of(
        f"import sys; {imports}; "
        "print([name for name in ('PIL', 'mblm.train', 'mblm.model') if name in sys.modules])"
    )
    assert told.strip() == "[]"


def test_without_pillow_an_image_says_how_to_get_it() -> None:
    told = fresh.output_of(
        "import sys; sys.modules['PIL'] = None\n"
        "from mblm.data.utils import *\n"
        "try: ImagePipeline('image.png', ColorSpace.RGB)\n"
        "except ImportError as error: print(error)"
    )
    assert told.strip() == "images need Pillow: pip install 'mblm[image]'"

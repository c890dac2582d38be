"""The names a program may import, and that importing the package brings nothing it needs later."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import mblm
from tests import fresh

NAMES = {
    "mblm": "MBLM MBLMEncoder MBLMModelConfig MBLMEncoderModelConfig MBLMReturnType "
    "TransformerBlock TransformerEncoderBlock MambaBlock __version__ Score Session build_info "
    "to_bytes to_text Generation constrain",
    "mblm.constrain": "AllowedBytes Grammar JsonSchema Prefix Regex Utf8",
    "mblm.model.block": "StageBlock StageBlockRegistry",
    "mblm.model.config": "MBLMModelConfig MBLMEncoderModelConfig MBLMReturnType MaskReduceStrat "
    "block_registry",
    "mblm.model.mblm": "MBLM MBLMEncoder",
    "mblm.model.transformer": "TransformerBlock TransformerDecoder TransformerEncoderBlock "
    "TransformerEncoder",
    "mblm.model.mamba": "MambaBlock",
    "mblm.model.embeddings": "MBLM_TOKEN_EMB_MIGRATION",
    "mblm.model.utils": "RoPE count_params top_k gumbel_sample",
    "mblm.utils.stream": "ByteStreamer",
    "mblm.utils.io": "load_yml dump_yml CSVWriter NDJSONWriter read_jsonl save_model_state "
    "load_model_state StateDict",
    "mblm.utils.misc": "retry",
    "mblm.utils.top_n": "TopN",
    "mblm.utils.seed": "seed_everything",
    "mblm.utils.logging": "create_logger shutdown_log_handlers",
    "mblm.utils.distributed": "process_group ElasticRunVars",
    "mblm.utils.cuda": "cuda_properties cuda_memory_snapshot IS_CUDA_AVAILABLE IS_BF16_AVAILABLE",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_can_be_imported(module: str) -> None:
    imported = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(imported, name)] == []


def test_the_package_lists_its_names() -> None:
    assert sorted(mblm.__all__) == sorted(NAMES["mblm"].split())


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (mblm.MBLM.__init__, "self cfg"),
        (mblm.MBLM.forward, "self input_ids inputs_embeds return_type loss_mask"),
        (
            mblm.MBLM.generate,
            "self prime stream num_tokens_to_generate end_of_gen_token_id temperature "
            "filter_thres enable_progress",
        ),
        (mblm.MBLMEncoder.__init__, "self config"),
        (
            mblm.MBLMEncoder.forward,
            "self input_ids inputs_embeds attention_mask labels loss_mask return_type",
        ),
    ],
)
def test_parameters_have_their_names_and_places(function: object, parameters: str) -> None:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    placed = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert placed == parameters.split()


ROOT = Path(__file__).parents[1]


def imports_of(module: str, modules: dict[str, ast.Module]) -> set[str]:
    """Modules of the package that one imports where it is imported, or for its types."""
    found: set[str] = set()
    nodes: list[ast.AST] = [modules[module]]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules.keys() or {node.module} & modules.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules.keys()
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))
    return found - {module}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What each module of the package imports."""
    modules = {}
    for file in (ROOT / "mblm").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = ast.parse(file.read_text())
    return {module: imports_of(module, modules) for module in modules}


def test_imports_make_no_circle(imports: dict[str, set[str]]) -> None:
    """Also with those for types."""
    left = imports
    while bottom := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in bottom}
    assert not left


def test_only_what_every_system_has_is_imported_without_a_way_out() -> None:
    """Windows lacks these."""
    some_lack = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}
    found = set[str]()
    for file in (ROOT / "mblm").rglob("*.py"):
        nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.Import):
                found |= {f"{file}: {name.name}" for name in node.names if name.name in some_lack}
            elif isinstance(node, ast.ImportFrom) and node.module in some_lack:
                found.add(f"{file}: {node.module}")
            elif not isinstance(node, ast.Try):
                nodes.extend(ast.iter_child_nodes(node))
    assert not found


def test_the_drawn_floors_are_those_there_are(imports: dict[str, set[str]]) -> None:
    floors: dict[str, set[str]] = {}
    for module, others in imports.items():
        if module == "mblm.model.mblm":  # the types of what its methods return
            others = {other for other in others if not other.startswith("mblm.inference.")}
        _, *parts = module.split(".")
        if parts and parts[0] != "__main__":
            below = {other.split(".")[1] for other in others if "." in other}
            floors[parts[0]] = floors.get(parts[0], set()) | below - {parts[0]}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (drawn,) = re.findall(r"^Imports point one way[^:]+:\n\n((?:    .+\n)+)", text, re.M)
    lines = (line.split(" ← ") for line in drawn.splitlines())
    assert {names[-1].strip(): set(" ".join(names[:-1]).split()) for names in lines} == floors


LATER = [
    "PIL",
    "causal_conv1d",
    "datasets",
    "einops",
    "filelock",
    "huggingface_hub",
    "mamba_ssm",
    "mambapy",
    "matplotlib",
    "tensorboard",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "trackio",
    "transformers",
    "typer",
    "wandb",
    "yaml",
]


def imported_by(code: str) -> set[str]:
    """Modules that a fresh interpreter imports for this code, torch's aside."""
    code = f"import sys; before = set(sys.modules); {code}; print(*set(sys.modules) - before)"
    return set(fresh.output_of(code).split())


def test_importing_the_package_imports_only_itself() -> None:
    assert {name for name in imported_by("import mblm") if name != "mblm"} == set()


def test_using_its_names_brings_nothing_that_is_needed_only_later() -> None:
    assert imported_by("from mblm import *").isdisjoint(LATER)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        mblm.Nothing  # noqa: B018
    assert set(mblm.__all__) <= set(dir(mblm))


def test_what_is_no_python_is_installed_too() -> None:
    package = Path(mblm.__file__).parent
    compiled = re.compile(r"\.(py|pyc|so|pyd)$|^_build\.json$")
    files = {str(file.relative_to(package)) for file in package.rglob("*.*") if file.is_file()}
    project = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^\[tool\.setuptools\.package-data\]\nmblm = \[(.+)\]$", project, re.M)
    patterns = set(re.findall(r'"(.+?)"', listed)) - {"_build.json"}  # of what is compiled
    installed = [set(package.glob(pattern)) for pattern in patterns]
    assert all(installed)
    names = {str(file.relative_to(package)) for file in set.union(*installed)}
    assert names == {file for file in files if not compiled.search(file)}

"""Experiments: settings replace fields, what to resume from is found, mistakes are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mblm.train.core.training_state import state_dir_at
from mblm.train.experiment import apply_setting, find_resume, load_experiment
from mblm.train.mblm import TrainEntryConfig, TrainMaskedEntryConfig

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "configs" / "small_2d_st.yaml"
MASKED = ROOT / "configs" / "pg19_masked_2d_tt.yaml"


def fields_of(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


# -- Settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("a.b=2", {"a": {"b": 2}, "c": [{"d": 1}, 5]}),
        ("a.b=1e-3", {"a": {"b": 0.001}, "c": [{"d": 1}, 5]}),
        ("a.b=1_000", {"a": {"b": 1000}, "c": [{"d": 1}, 5]}),
        ("a.b=1e6", {"a": {"b": 1e6}, "c": [{"d": 1}, 5]}),
        ('a.b="123"', {"a": {"b": "123"}, "c": [{"d": 1}, 5]}),
        ("a.b='1e6'", {"a": {"b": "1e6"}, "c": [{"d": 1}, 5]}),
        ("a.b=null", {"a": {"b": None}, "c": [{"d": 1}, 5]}),
        ("a.b=x=y", {"a": {"b": "x=y"}, "c": [{"d": 1}, 5]}),
        ("a.b=[1, {e: f}]", {"a": {"b": [1, {"e": "f"}]}, "c": [{"d": 1}, 5]}),
        ("a.new.deep=1", {"a": {"b": 1, "new": {"deep": 1}}, "c": [{"d": 1}, 5]}),
        ("c.0.d=7", {"a": {"b": 1}, "c": [{"d": 7}, 5]}),
        ("c.1=7", {"a": {"b": 1}, "c": [{"d": 1}, 7]}),
        ("n.m=1", {"a": {"b": 1}, "c": [{"d": 1}, 5], "n": {"m": 1}}),
    ],
)
def test_a_setting_replaces_one_field(setting: str, expected: dict[str, Any]) -> None:
    fields = fields_of("{a: {b: 1}, c: [{d: 1}, 5]}")
    apply_setting(fields, setting)
    assert fields == expected


@pytest.mark.parametrize(
    "setting, message",
    [
        ("a.b", "expected path=value"),
        ("=1", "expected path=value"),
        ("a..b=1", "expected path=value"),
        ("a.b=[1", "--set a.b, line 1, column 3: invalid YAML"),
        ("a.b={c: 1, c: 2}", "the key 'c' comes twice"),
        ("a.b.c=1", "a.b has no field c"),
        ("c.2=1", "c has no field 2"),
        ("c.x=1", "c has no field x"),
    ],
)
def test_refuses_settings_that_lead_nowhere(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_setting(fields_of("{a: {b: 1}, c: [{d: 1}, 5]}"), setting)


def test_loads_an_experiment_with_settings() -> None:
    config = load_experiment(SMALL, ["train.batch_size=3", "params.block.0.d_state=64"])
    assert type(config) is TrainEntryConfig
    assert config.train.batch_size == 3
    assert config.params.stage_blocks()[0].d_state == 64  # type: ignore[attr-defined]
    assert config.resume is None


def test_numbers_and_truth_values_are_taken_as_they_are_meant() -> None:
    config = load_experiment(
        SMALL, ["train.target_elements=2e6", "train.shuffle_eval=yes", 'io.name_model="123"']
    )
    assert (config.train.target_elements, config.train.shuffle_eval) == (2_000_000, True)
    assert config.io.name_model == "123"


def test_of_a_named_block_its_own_mistakes_are_told() -> None:
    settings = ["params.block.0.d_state=0", "params.block.0.colour=1"]
    with pytest.raises(ValueError, match=r"MambaBlock: d_state: .*; colour: Extra") as refused:
        load_experiment(SMALL, settings)
    assert "TransformerBlock" not in str(refused.value)


def test_a_masked_experiment_is_recognized() -> None:
    config = load_experiment(MASKED, ["train.masking_proba=0.3"])
    assert type(config) is TrainMaskedEntryConfig
    assert config.train.masking_proba == 0.3


@pytest.mark.parametrize(
    "settings, message",
    [
        (["train.colour=1"], "train.colour"),
        (["colour=1"], "colour"),
        (["params.colour=1"], "params.colour"),
        (["train.batch_size=many"], "train.batch_size"),
        (["train.batch_size=0", "io.name_model="], "train.batch_size(.|\n)*io.name_model"),
        (
            ["train.target_elements=99999999999999999999"],
            "train.target_elements(.|\n)*should be less than",
        ),
        (["params=null"], "params"),
        (["params=3"], "params(.|\n)*Input should be a valid"),
        (["train.batch_size=yes"], "train.batch_size(.|\n)*no truth value"),
        (["params.num_layers=[2, on]"], "params.num_layers(.|\n)*no truth value"),
        (["params.block.0.d_state=true"], "d_state: expected a number, no truth value"),
        (["io.name_model=a/b"], "io.name_model(.|\n)*no path"),
        (["io.dataset_id=book"], "io.dataset_id: no dataset is registered as 'book'"),
    ],
)
def test_bad_fields_are_named_with_the_file(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load_experiment(SMALL, settings)
    assert str(SMALL) in str(refused.value)


def test_a_resume_that_is_no_mapping_is_named_though_another_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"resume\n  Input should be a valid"):
        load_experiment(SMALL, ["resume=3"], resume="latest")


# -- What to resume from ---------------------------------------------------------------------------


def state_of(run: Path, step: int, name: str = "model") -> Path:
    """A training state, as far as finding it goes."""
    state = state_dir_at(run, step)
    state.mkdir(parents=True)
    (state / "COMPLETE").write_text(json.dumps({"facts": {"io.name_model": name}}))
    return state


def test_the_latest_state_of_the_runs_of_that_name(tmp_path: Path) -> None:
    for name, step in (("other_3", 9), ("model_1", 7), ("model_2", 3), ("model_2", 4)):
        newest = state_of(tmp_path / name, step)
    (tmp_path / "model_2" / "state" / "step_00000005").mkdir()  # not whole
    state_of(tmp_path / "another_3", 9)
    state_of(tmp_path / "model_large_1", 9, "model_large")
    (state_of(tmp_path / "model_3", 9) / "COMPLETE").write_text("{}")  # of an older format
    assert find_resume("latest", tmp_path, "model") == {"checkpoint_file": str(newest)}


def test_auto_is_the_latest_state_or_a_new_run(tmp_path: Path) -> None:
    settings = [f"io.output_dir={tmp_path}", "io.name_model=model"]
    assert load_experiment(SMALL, settings, "auto").resume is None
    said = [*settings, "resume.checkpoint_file=a.pth"]
    new = load_experiment(SMALL, said, "auto").resume
    assert new is not None and new.checkpoint_file == "a.pth"
    state = state_of(tmp_path / "model_1", 3)
    resume = load_experiment(SMALL, said, "auto").resume
    assert resume is not None and resume.checkpoint_file == str(state)


def test_the_latest_state_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "model_1"
    first, last = state_of(run, 2), state_of(run, 10)
    (run / "config.yaml").write_text("resume: {checkpoint_file: a.pth}")
    for path in (run, run / "config.yaml", last):
        assert find_resume(str(path), tmp_path, "model") == {"checkpoint_file": str(last)}
    assert find_resume(str(first), tmp_path, "model") == {"checkpoint_file": str(first)}


def test_a_run_without_state_goes_on_as_its_configuration_says(tmp_path: Path) -> None:
    said = {"checkpoint_file": "x.pth", "next_epoch_index": 2, "next_batch_index": 7}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"resume": {**said, "resumed_from": "y"}}))
    for path in (tmp_path, tmp_path / "config.yaml"):
        assert find_resume(str(path), tmp_path, "model") == said


@pytest.mark.parametrize(
    "resume, message",
    [
        ("latest", "no run of 'model' in .* with a training state"),
        ("absent", "no file or folder absent"),
        ("EMPTY", "config.yaml"),
        ("NEW", "has neither a training state nor a checkpoint"),
    ],
)
def test_says_that_there_is_nothing_to_resume_from(
    tmp_path: Path, resume: str, message: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "NEW").mkdir()
    (tmp_path / "NEW" / "config.yaml").write_text("resume: {checkpoint_file: ''}")
    given = str(tmp_path / resume) if resume.isupper() else resume
    with pytest.raises((ValueError, OSError), match=message):
        find_resume(given, tmp_path, "model")


def test_fields_of_resume_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "model_top1.pth"
    file.write_bytes(b"")
    config = load_experiment(SMALL, ["resume.rename_modules=true"], str(file))
    assert config.resume is not None
    assert (config.resume.checkpoint_file, config.resume.rename_modules) == (str(file), True)
    assert (config.resume.next_epoch_index, config.resume.next_batch_index) == (0, 0)

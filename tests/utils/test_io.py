"""YAML, CSV and JSON lines: round trips, several writers, and errors that name the place."""

import csv
import json
import multiprocessing
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from mblm.utils.io import CSVWriter, NDJSONWriter, dump_yml, load_yml, read_jsonl


class Stage(BaseModel):
    """A part of a configuration."""

    model_config = ConfigDict(extra="forbid")
    width: int
    rate: float = 1e-5


class Config(BaseModel):
    """A configuration."""

    name: str
    stages: list[Stage]


CONFIG = Config(name="naïve: #1", stages=[Stage(width=8), Stage(width=16, rate=0.5)])


class TestYAML:
    @pytest.mark.parametrize("name", ["config", "config.yaml", "config.yml", "config.txt"])
    def test_a_configuration_comes_back(self, tmp_path, name):
        path = dump_yml(str(tmp_path / name), CONFIG)
        assert path == tmp_path / "config.yaml"
        assert load_yml(path, Config) == CONFIG

    def test_the_other_suffix_is_tried_if_asked_to(self, tmp_path):
        (tmp_path / "a.yml").write_text("{width: 1}")
        assert load_yml(tmp_path / "a.yaml", Stage, try_yaml_suffixes=True).width == 1
        with pytest.raises(FileNotFoundError, match=r"a\.yaml"):
            load_yml(tmp_path / "a.yaml", Stage)
        with pytest.raises(FileNotFoundError, match=r"b\.yaml"):
            load_yml(tmp_path / "b.yaml", Stage, try_yaml_suffixes=True)

    def test_another_suffix_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"a\.json is not a YAML file"):
            load_yml(tmp_path / "a.json", Stage, try_yaml_suffixes=True)

    @pytest.mark.parametrize(
        "text, message",
        [
            (b"width: 1\nrate: [1,", "line 2, column 10: invalid YAML"),
            (b"width: 1\n\trate: 2", "line 2, column 1: invalid YAML"),
            (b"width: !!python/object/apply:os.getcwd []", "line 1, column 8: invalid YAML"),
            (b"width: \xff", "invalid YAML"),
            (b"width: 2026-13-01", "invalid YAML: month"),
            (b"[" * 1500, "invalid YAML"),
            (b"width: 1\nrate: 2\nwidth: 3", "line 3, column 1: .* the key 'width' comes twice"),
            (b"{rate: {a: 1, b: 2, a: 1}}", "line 1, column 21: .* the key 'a' comes twice"),
            (b'width: "\\uD83D"', "line 1, column 8: invalid YAML: half of a character"),
            (b"", "expected a mapping .* got nothing"),
            (b"- width: 1", "expected a mapping .* got list"),
        ],
    )
    def test_bad_yaml_is_named_by_file_and_place(self, tmp_path, text, message):
        path = tmp_path / "a.yaml"
        path.write_bytes(text)
        with pytest.raises(ValueError, match=f"a.yaml.*{message}"):
            load_yml(path, Stage)

    def test_a_character_may_be_escaped_as_in_json(self, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text(r'{"name": "\ud83d\ude00 \u00e4", "stages": []}')
        assert load_yml(path, Config).name == "\N{GRINNING FACE} \u00e4"

    def test_a_number_needs_no_point(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("{width: 1e6, rate: 1E-3}")
        assert load_yml(path, Stage) == Stage(width=1_000_000, rate=0.001)
        for text in ("1e6", "1_0e-3", "yes", "12"):  # comes back as the text it is
            name = Config(name=text, stages=[])
            assert load_yml(dump_yml(path, name), Config) == name

    def test_what_is_merged_in_may_be_said_anew(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("a: &a {width: 1, rate: 2}\nb: &b {<<: *a, width: 3}\nc: {<<: [*b, *a]}\n")
        stages = load_yml(path, RootModel[dict[str, Stage]]).root
        assert stages["b"] == Stage(width=3, rate=2)

    def test_every_bad_field_is_named(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("stages: [{width: wide}, {width: 1, depth: {2}}]")
        with pytest.raises(ValidationError, match=f"3 validation errors for Config in {path}") as e:
            load_yml(path, Config)
        found = {error["loc"]: (error["type"], error["msg"]) for error in e.value.errors()}
        assert found == {
            ("name",): ("missing", "Field required"),
            ("stages", 0, "width"): (
                "int_parsing",
                "Input should be a valid integer, unable to parse string as an integer",
            ),
            ("stages", 1, "depth"): ("extra_forbidden", "Extra inputs are not permitted"),
        }

    def test_a_list_is_fine_for_a_model_of_lists(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("- width: 1")
        assert load_yml(path, RootModel[list[Stage]]).root == [Stage(width=1)]

    def test_what_yaml_has_no_form_for_leaves_the_old_file(self, tmp_path):
        class Free(BaseModel):
            value: Any

        path = dump_yml(tmp_path / "a", CONFIG)
        with pytest.raises(TypeError, match="Free holds a value that YAML has no form for"):
            dump_yml(path, Free(value=[1, object()]))
        with pytest.raises(TypeError, match="data must be a pydantic model, got dict"):
            dump_yml(path, {"width": 1})
        assert load_yml(path, Config) == CONFIG


class Row(NamedTuple):
    """A row."""

    worker: int
    text: str
    loss: float | None = None


def write_rows(writer, worker, num_rows):
    for _ in range(num_rows):
        writer.write_row(Row(worker, 'a "quoted",\n' * 50))


def write_rows_from_a_process(folder, worker, num_rows, all_have_writers):
    writer = CSVWriter[Row](folder, "rows")
    all_have_writers.wait()  # since a new one clears the file
    write_rows(writer, worker, num_rows)


class TestCSV:
    def read(self, path):
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    def test_rows_follow_one_header(self, tmp_path):
        writer = CSVWriter[Row](str(tmp_path / "a" / "b"), "rows.txt")
        writer.write_row(Row(0, "é"))
        writer.write_row(Row(1, 'a,"b"\n', 0.5))
        assert self.read(tmp_path / "a" / "b" / "rows.csv") == [
            ["worker", "text", "loss"],
            ["0", "é", ""],
            ["1", 'a,"b"\n', "0.5"],
        ]

    def test_a_new_writer_begins_an_empty_file(self, tmp_path):
        CSVWriter[Row](tmp_path, "rows").write_row(Row(0, "old"))
        CSVWriter[Row](tmp_path, "rows")
        assert (tmp_path / "rows.csv").read_bytes() == b""

    def test_noop_touches_nothing(self, tmp_path):
        CSVWriter[Row](tmp_path / "a", "rows", noop=True).write_row(Row(0, "x"))
        assert list(tmp_path.iterdir()) == []

    def test_what_is_no_named_tuple_is_refused(self, tmp_path):
        writer = CSVWriter[Row](tmp_path, "rows")
        with pytest.raises(TypeError, match="row must be a named tuple, got tuple"):
            writer.write_row((1, 2))
        assert (tmp_path / "rows.csv").read_bytes() == b""

    def assert_whole(self, path, num_rows):
        header, *rows = self.read(path)
        assert header == list(Row._fields)
        assert sorted(row[0] for row in rows) == sorted(num_rows * ["0", "1"])
        assert {row[1] for row in rows} == {'a "quoted",\n' * 50}

    def test_processes_do_not_mix_their_rows(self, tmp_path):
        context = multiprocessing.get_context("forkserver")
        barrier = context.Barrier(2)
        processes = [
            context.Process(target=write_rows_from_a_process, args=(tmp_path, worker, 20, barrier))
            for worker in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        self.assert_whole(tmp_path / "rows.csv", 20)


class TestJSONLines:
    def test_lines_can_be_appended_and_removed(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"width": 1}\n')
        writer = NDJSONWriter[Stage](str(path))
        writer.write_line(Stage(width=2))
        writer.write_line(Stage(width=300))
        writer.remove_last_line()
        writer.write_line(Stage(width=4))
        assert [stage.width for stage in read_jsonl(path, Stage)] == [1, 2, 4]

    def test_only_its_own_lines_are_removed(self, tmp_path):
        path = tmp_path / "a.jsonl"
        writer = NDJSONWriter[Stage](path)
        writer.remove_last_line()
        assert not path.exists()
        path.write_text('{"width": 1}\n')
        writer.write_line(Stage(width=2))
        for _ in range(3):
            writer.remove_last_line()
        assert path.read_text() == '{"width": 1}\n'

    def test_a_function_may_parse_the_lines(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"a": 1, "b": "é"}\n{"a": 2}', encoding="utf-8")
        assert read_jsonl(str(path), dict) == [{"a": 1, "b": "é"}, {"a": 2}]

    @pytest.mark.parametrize(
        "text, error",
        [
            ('{"a": 1}\n{"a": \n', json.JSONDecodeError),
            ("{}\n[1]\n", ValueError),
            ("{}\n" + "[" * 9999, ValueError),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, text, error):
        path = tmp_path / "a.jsonl"
        path.write_text(text)
        with pytest.raises(error, match=r"a\.jsonl, line 2: "):
            read_jsonl(path, dict)

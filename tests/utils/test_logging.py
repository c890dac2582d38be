"""create_logger: where lines go, and that each goes there once."""

import logging
import os

import pytest

from mblm.utils.logging import create_logger, shutdown_log_handlers
from tests import fresh


@pytest.fixture
def name(request):
    """A logger's name that no other test uses; its handlers are closed in the end."""
    name = f"test {request.node.name}".replace("/", "_")
    yield name
    for handler in list(logging.getLogger(name).handlers):
        logging.getLogger(name).removeHandler(handler)
        handler.close()


def test_writes_to_a_file_in_a_folder_it_creates(tmp_path, name, capsys):
    log = create_logger(name, log_dir=str(tmp_path / "a" / "b"))
    log.debug("détail")
    (line,) = (tmp_path / "a" / "b" / f"{name}.log").read_text("utf-8").splitlines()
    assert line.endswith(f" - {name} - DEBUG - détail")
    assert capsys.readouterr() == ("", "")


def test_writes_what_is_no_text(tmp_path, name, capsys):
    create_logger(name, log_dir=str(tmp_path)).info(os.fsdecode(b"\xff.txt"))
    assert (tmp_path / f"{name}.log").read_text("utf-8").endswith(" - \\udcff.txt\n")
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="is a file on a full disk")
def test_a_full_disk_ends_nothing_and_fills_no_screen(tmp_path, name, capsys):
    (tmp_path / f"{name}.log").symlink_to("/dev/full")
    for _ in range(2):  # the first one is closed then
        create_logger(name, log_dir=tmp_path).info("hello")
    assert capsys.readouterr() == ("", "")


def test_writes_to_stderr_by_default(name, capsys):
    create_logger(name).info("hello")
    assert capsys.readouterr().err.endswith(f" - {name} - INFO - hello\n")


def test_noop_writes_nowhere(tmp_path, name, capsys):
    create_logger(name, log_dir=tmp_path, noop=True).critical("hello")
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_same_logger_created_again_writes_each_line_once(tmp_path, name, capsys):
    for _ in range(3):
        create_logger(name)
        log = create_logger(name, log_dir=tmp_path)
    log.info("hello")
    assert capsys.readouterr().err.count("hello") == 1
    assert (tmp_path / f"{name}.log").read_text().count("hello") == 1


def test_what_the_program_set_up_itself_stays(name):
    log = logging.getLogger(name)
    log.setLevel(logging.WARNING)
    log.addHandler(own := logging.NullHandler())
    create_logger(name)
    assert log.level == logging.WARNING
    assert own in log.handlers


def test_shutdown_closes_files(tmp_path):
    # In a process of its own: it closes the handlers of all loggers.
    code = (
        "import sys; from mblm.utils.logging import *\n"
        "log = create_logger('x', log_dir=sys.argv[1]); log.info('hello')\n"
        "shutdown_log_handlers(); assert log.handlers[0].stream is None"
    )
    fresh.output_of(code, tmp_path)
    assert (tmp_path / "x.log").read_text().endswith("hello\n")
    assert callable(shutdown_log_handlers)

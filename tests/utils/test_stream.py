"""ByteStreamer: binary and text streams, decoding, flushing, odd values, broken pipes."""

import codecs
import contextlib
import io
import os
import socket
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.utils.stream import ByteStreamer

TEXT = "naïve 👉🏽 bytes"


class Recorder:
    """The least a text stream can be: an object with a write method."""

    def __init__(self):
        self.written = []

    def write(self, text):
        if not isinstance(text, str):
            raise TypeError("text only")
        self.written.append(text)


class CountingText(io.StringIO):
    """Counts the flushes it is given."""

    num_flushes = 0

    def flush(self):
        self.num_flushes += 1
        super().flush()


def feed(stream, data, **options):
    with ByteStreamer(stream, **options) as streamer:
        for value in data:
            streamer.write(value)


@given(data=st.binary(max_size=64))
@settings(deadline=None, max_examples=200)
def test_decoded_text_equals_decoding_all_at_once(data):
    stream = io.StringIO(newline="")
    feed(stream, data, decode_utf8=True)
    assert stream.getvalue() == data.decode("utf-8", errors="replace")


@given(data=st.binary(max_size=64), decode=st.booleans())
@settings(deadline=None, max_examples=50)
def test_binary_streams_receive_the_bytes(data, decode):
    stream = io.BytesIO()
    feed(stream, data, decode_utf8=decode)
    assert stream.getvalue() == data


@given(data=st.binary(max_size=32))
@settings(deadline=None, max_examples=50)
def test_text_streams_receive_numbers_separated_by_spaces(data):
    stream = io.StringIO()
    feed(stream, data)
    assert stream.getvalue() == " ".join(map(str, data))


@pytest.mark.parametrize("opened", [tempfile.NamedTemporaryFile, tempfile.SpooledTemporaryFile])
def test_temporary_files(opened):
    with opened() as file:
        feed(file, TEXT.encode(), decode_utf8=True)
        file.seek(0)
        assert file.read() == TEXT.encode()
    with opened(mode="w+", encoding="utf-8") as file:
        feed(file, TEXT.encode(), decode_utf8=True)
        file.seek(0)
        assert file.read() == TEXT


@pytest.mark.parametrize("buffering", [0, None], ids=["raw", "buffered"])
def test_a_socket_s_file_shows_every_byte_at_once(buffering):
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("wb", buffering=buffering) as file:
        streamer = ByteStreamer(file)
        for value in b"\x00A\xff":
            streamer.write(value)
            assert theirs.recv(8) == bytes((value,))


def test_an_object_with_only_a_write_method_receives_text():
    stream = Recorder()
    feed(stream, "aé".encode() + b"\xc3", decode_utf8=True)
    assert stream.written == ["a", "é", "\ufffd"]


def test_a_pipe_and_a_text_stream_show_every_byte_at_once():
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as seen, open(writer, "wb") as binary:
        ByteStreamer(binary).write(0x41)
        assert seen.read(8) == b"A"
        text = io.TextIOWrapper(binary, encoding="utf-8")
        ByteStreamer(text, decode_utf8=True).write(0x42)
        assert seen.read(8) == b"B"
        text.detach()


def test_text_is_flushed_after_every_character():
    stream = CountingText()
    streamer = ByteStreamer(stream, decode_utf8=True)
    for value in "é".encode():
        streamer.write(value)
    assert stream.getvalue() == "é"
    assert stream.num_flushes == 1


def test_flush_replaces_an_incomplete_character_once_and_starts_anew():
    stream = io.StringIO()
    streamer = ByteStreamer(stream, decode_utf8=True)
    streamer.write(0xC3)
    assert stream.getvalue() == ""
    streamer.flush()
    streamer.flush()
    assert stream.getvalue() == "\ufffd"
    streamer.write(0xA9)  # would have completed the character
    streamer.write(0x41)
    assert stream.getvalue() == "\ufffd\ufffdA"


@pytest.mark.parametrize("decode", [False, True], ids=["numbers", "decoded"])
@pytest.mark.parametrize("stream_type", [io.BytesIO, io.StringIO])
def test_values_above_a_byte_are_skipped_or_refused(stream_type, decode):
    stream = stream_type()
    feed(stream, [65, 256, 10_000, 66], decode_utf8=decode)
    expected = stream_type()
    feed(expected, [65, 66], decode_utf8=decode)
    assert stream.getvalue() == expected.getvalue()

    strict = ByteStreamer(stream_type(), decode_utf8=decode, ignore_overflowing=False)
    strict.write(255)
    with pytest.raises(OverflowError, match="got 256"):
        strict.write(256)


@pytest.mark.parametrize("value", [np.int64(65), np.uint8(65), torch.tensor(65)])
def test_integers_of_other_libraries_are_integers(value):
    stream = io.BytesIO()
    feed(stream, [value])
    assert stream.getvalue() == b"A"


@pytest.mark.parametrize(
    "value, error",
    [(-1, ValueError), (65.0, TypeError), ("A", TypeError), (b"A", TypeError), (None, TypeError)],
)
def test_what_is_no_byte_is_refused_and_nothing_written(value, error):
    stream = io.StringIO()
    with pytest.raises(error, match="int_byte"):
        ByteStreamer(stream).write(value)
    assert stream.getvalue() == ""


def test_what_cannot_be_written_to_is_refused():
    with pytest.raises(TypeError, match="write method, got str"):
        ByteStreamer("out.txt")


class TestBrokenPipe:
    @pytest.fixture(params=["raw", "buffered", "text"])
    def pipe(self, request):
        """The writing end of a pipe without a reader."""
        reader, writer = os.pipe()
        os.close(reader)
        mode = "w" if request.param == "text" else "wb"
        buffering = 0 if request.param == "raw" else -1
        # A buffered file tries once more to write when it is closed.
        with contextlib.suppress(BrokenPipeError), open(writer, mode, buffering) as file:
            yield file

    @pytest.mark.parametrize("pipe", ["buffered", "text"], indirect=True)
    def test_does_not_hide_another_error(self, pipe):
        with pytest.raises(KeyError, match="mine"), ByteStreamer(pipe):
            pipe.write("held back" if isinstance(pipe, io.TextIOBase) else b"held back")
            raise KeyError("mine")


class Leaving(io.RawIOBase):
    """A connection that the other side resets."""

    num_writes = 0

    def writable(self):
        return True

    def write(self, data):
        self.num_writes += 1
        raise ConnectionResetError("reset by peer")


@pytest.mark.parametrize("opened", [lambda raw: raw, io.BufferedWriter, io.TextIOWrapper])
def test_a_connection_that_breaks_is_raised_once(opened):
    raw = Leaving()
    file = opened(io.BufferedWriter(raw) if opened is io.TextIOWrapper else raw)
    streamer = ByteStreamer(file)
    with pytest.raises(ConnectionResetError):
        streamer.write(65)
    assert streamer.reader_left
    num_writes = raw.num_writes
    streamer.flush()
    assert raw.num_writes == num_writes
    raw.write = len  # whatever is buffered goes nowhere when the file is closed


@pytest.mark.parametrize(
    ("encoding", "seen"),
    [("ascii", b"a?? b?c"), ("cp1252", b"a\xe9? b?c"), ("latin-1", b"a\xe9? b?c")],
)
def test_what_an_encoding_lacks_becomes_a_question_mark(encoding, seen):
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding=encoding)
    feed(stream, "aé👉 b".encode() + b"\xc3c", decode_utf8=True)
    assert file.getvalue() == seen
    opened = codecs.getwriter(encoding)(codecs_file := io.BytesIO())
    feed(opened, "aé👉 b".encode() + b"\xc3c", decode_utf8=True)
    assert codecs_file.getvalue() == seen


def test_the_blocks_own_error_is_raised_though_flushing_fails_too():
    class Full(io.StringIO):
        def flush(self):
            raise OSError("disk full")

    with pytest.raises(KeyError, match="mine"), ByteStreamer(Full()):
        raise KeyError("mine")
    with pytest.raises(OSError, match="disk full"), ByteStreamer(Full()):
        pass


def test_a_full_non_blocking_pipe_is_an_error_not_a_lost_byte():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(reader, "rb"), open(writer, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
        with pytest.raises(BlockingIOError):
            ByteStreamer(file).write(65)

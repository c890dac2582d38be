"""Decoding on the threads that there are, which can be fewer than torch's."""

import os
import subprocess
import sys

import pytest

from tests import fresh
from tests.native import needs_native

# Worth more than one thread. Of 6 heads, 2 threads take 3 each, and 4 share all.
SETUP = """
import os, signal, torch
from mblm.inference.session import Session
from tests.models import model, transformer

torch.manual_seed(0)
torch.set_num_threads(4)
stage = lambda: transformer(attn_head_dims=16, attn_num_heads=6)
m = model(stage(), stage(), hidden_dims=[96, 96], num_layers=[2, 2], seq_lens=[8, 8])
ids = torch.arange(8 * 20).view(8, 20) % 19

def decode():
    session = Session(m, batch_size=8)
    session.feed(ids)
    return session.generate(24, generator=torch.Generator().manual_seed(1))
"""


def output_of(script: str) -> str:
    return fresh.output_of(SETUP + script, MBLM_NATIVE="require")


def interpret(script: str, **environment: str) -> None:
    """Run in an interpreter of its own: a copy takes no limit of threads, and has no such end."""
    environment = {**os.environ, "MBLM_NATIVE": "require", **environment}
    command = [sys.executable, "-c", SETUP + script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@needs_native
def test_a_team_may_be_smaller_than_asked_for() -> None:
    script = """
of_two = decode()
torch.set_num_threads(1)
assert torch.equal(of_two, decode())
"""
    interpret(script, OMP_THREAD_LIMIT="2")


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_decodes() -> None:
    script = """
before = decode()
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends it if it hangs
    os._exit(0 if torch.equal(decode(), before) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert output_of(script) == "0\n"


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_before_anything_is_decoded_keeps_its_threads() -> None:
    script = """
child = os.fork()
if child == 0:
    os._exit(torch.get_num_threads())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert output_of(script) == "4\n"


@needs_native
def test_a_thread_that_decodes_when_the_interpreter_ends() -> None:
    """It is not ended amid what must not be unwound, which would abort the process."""
    script = """
import threading, time

class LastObject:  # Python's lock is there for other threads while it goes
    def __del__(self, sleep=time.sleep):
        sleep(0.2)

long = model(stage(), stage(), hidden_dims=[96, 96], num_layers=[2, 2], seq_lens=[4096, 8])
session = Session(long, batch_size=8)
session.feed(ids)
session.generate(24)
last_object = LastObject()
threading.Thread(target=session.generate, args=[30_000], daemon=True).start()
time.sleep(0.2)
"""
    interpret(script)

"""A profile is written whole or not at all, and never ends a run."""

import torch

from mblm.train.core.profiling import profiled


def profile_steps(folder, steps, done):
    """What is said of a profile of so many steps, of a run that does some."""
    said = []
    with profiled(steps, folder, is_cuda=False, say=said.append) as step_done:
        for _ in range(done):
            torch.ones(2).add(1)
            step_done()
    return said


def test_writes_when_its_steps_are_done(tmp_path):
    (said,) = profile_steps(tmp_path / "profile", 2, 6)
    assert said.startswith(f"Profiled 2 steps: {tmp_path}/profile/trace.json.gz for")
    assert "aten::add" in (tmp_path / "profile" / "operators.txt").read_text()


def test_a_run_that_is_stopped_before_has_none(tmp_path):
    assert [profile_steps(tmp_path / "profile", 3, done) for done in (0, 1, 2, 4)] == [[]] * 4
    assert not (tmp_path / "profile").exists()

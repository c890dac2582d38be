"""The example for Slurm, run by stand-ins for its commands: it is queued again until it is done."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mblm.train.plot import read_curves
from tests.train.experiments import ENVIRONMENT, ROOT, run_of

SBATCH = f"""#!{sys.executable}
import os, re, subprocess, sys
options = dict(re.findall(r"^#SBATCH --(\\S+?)=(\\S+)", open(sys.argv[1]).read(), re.M))
os.environ.update(SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="node[1-2]",
                  SLURM_JOB_NUM_NODES=options["nodes"], SIGNAL=options["signal"].split("@")[0])
while True:
    status = subprocess.call(["bash", *sys.argv[1:]])
    if not os.path.exists("requeued"):
        sys.exit(status)
    os.remove("requeued")
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) printf 'localhost\\nnode2\\n' ;;
  requeue) echo "$2" | tee -a requeues > requeued ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Submits the example, in a folder with stand-ins; takes those of `srun` and `mblm`."""

    def submit(
        srun: str, mblm: str, *arguments: object, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        commands = {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": srun, "mblm": mblm}
        for name, text in commands.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        return subprocess.run(
            ["sbatch", str(ROOT / "examples" / "slurm.sbatch"), *map(str, arguments)],
            env={**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return submit


def test_is_queued_again_only_while_it_was_stopped_and_saved(slurm, tmp_path: Path) -> None:
    srun = '#!/bin/sh\nshift\nexec "$@"\n'
    mblm = """#!/bin/sh
    echo "$@" >> calls
    case $(wc -l < calls) in 1|2) exit 75 ;; *) exit 3 ;; esac
    """
    done = slurm(srun, mblm, "a b.yaml", "--set", "train.seed=1")
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "requeues").read_text() == "4711\n4711\n"
    call = (
        "train a b.yaml --set train.seed=1 --resume auto --nnodes 1 --rdzv-endpoint localhost:24711"
    )
    assert (tmp_path / "calls").read_text().splitlines() == [call] * 3


def test_of_an_array_the_task_alone_is_queued_again(slurm, tmp_path: Path) -> None:
    mblm = "#!/bin/sh\n[ -e requeues ] || exit 75\n"
    array = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "0"}
    done = slurm('#!/bin/sh\nshift\nexec "$@"\n', mblm, "a.yaml", **array)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "requeues").read_text() == "4711_0\n"


def test_says_how_it_is_used(slurm) -> None:
    done = slurm("", "")
    assert done.returncode == 2 and "usage: sbatch" in done.stderr


@pytest.mark.slow
def test_a_job_whose_time_is_up_goes_on_in_the_next(slurm, experiment: Path) -> None:
    """The first time its step is told so, as soon as it has trained for some steps."""
    srun = """#!/usr/bin/env bash
    shift
    "$@" &
    if [ ! -e requeues ]; then
      until [ "$(cat out/*/loss.csv 2>/dev/null | wc -l)" -gt 5 ]; do sleep 0.05; done
      kill -s "$SIGNAL" $!
    fi
    wait $!
    """
    mblm = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mblm "$@"\n'
    settings = ["--set", "train.target_elements=6400"]
    done = slurm(srun, mblm, experiment, *settings)
    assert done.returncode == 0, done.stderr
    assert (experiment.parent / "requeues").read_text() == "4711\n"
    run = run_of(experiment.parent)
    assert run.name == "tiny_4711"
    assert "Resuming exactly" in (run / "train.log").read_text()
    assert len(read_curves(run).train) == 24

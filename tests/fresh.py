"""Runs code in a Python process of its own that has imported torch and nothing else.

Torch takes seconds to import. A process that has it, kept while the tests run, is copied in
hundredths of one.
"""

import functools
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class Fresh:
    """Code that runs as a program's, in the caller's folder and environment if none are given.

    Attributes:
        returncode: With which it has ended, a negative signal where one has ended it.
        stdout: What it has printed.
        stderr: What it has said beside that.
    """

    def __init__(
        self,
        code: str,
        *arguments: object,
        cwd: Path | str | None = None,
        env: dict[str, str] | None = None,
        imported: str = "torch",
    ) -> None:
        request = tempfile.TemporaryFile()  # noqa: SIM115
        folder, environment = str(cwd or Path.cwd()), dict(env or os.environ)
        pickle.dump((code, list(map(str, arguments)), folder, environment), request)
        request.seek(0)
        self._said = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._ended, ended = os.pipe()
        files = [file.fileno() for file in (request, *self._said)]
        socket.send_fds(_server(imported), [b"!"], [*files, ended])
        request.close()
        os.close(ended)

    def wait(self) -> "Fresh":
        """Wait for its end."""
        with open(self._ended) as ended:
            self.returncode = int(ended.read())
        texts = []
        for said in self._said:
            with said:
                said.seek(0)
                texts.append(said.read().decode())
        self.stdout, self.stderr = texts
        return self


def run(code: str, *arguments: object, **environment: str) -> Fresh:
    """Run code to its end, in this environment with changes."""
    return Fresh(code, *arguments, env={**os.environ, **environment}).wait()


def output_of(code: str, *arguments: object, **environment: str) -> str:
    """What code prints that ends well."""
    done = run(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _server(imported: str) -> socket.socket:
    """The link to a process that has imported a module; it ends with this one."""
    ours, its = socket.socketpair()
    command = [sys.executable, "-W", "ignore", __file__, str(its.fileno()), imported]
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.Popen(command, env=environment, pass_fds=[its.fileno()])
    its.close()
    return ours


def _serve(link: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        message, files, _, _ = socket.recv_fds(link, 1, 4)
        if not message:
            return
        if os.fork() == 0:
            link.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if (child := os.fork()) == 0:
                os._exit(_run(*files[:3]))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.write(files[3], str(status).encode())
            os._exit(0)
        for file in files:
            os.close(file)


def _run(request: int, out: int, err: int) -> int:
    """Run what is requested; returns its exit status."""
    with open(request, "rb") as asked:
        code, arguments, folder, environment = pickle.load(asked)
    for descriptor, target in ((out, 1), (err, 2)):
        os.dup2(descriptor, target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    sys.path[:] = [folder for folder in sys.path if folder != str(Path(__file__).parent)]
    importlib.import_module(sys.argv[2])
    _serve(socket.socket(fileno=int(sys.argv[1])))

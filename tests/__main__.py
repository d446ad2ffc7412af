"""`python -m tests`: the whole suite in two processes. The tests of one compute, those of the other mostly wait for
workers. Arguments go to both."""

from __future__ import annotations

import subprocess
import sys
import tempfile

from tests.helpers import ROOT

COMPUTING = ("unit", "store", "races", "neighbours", "django", "chaos")
WAITING = ("integration", "acceptance")


def command(folders: tuple[str, ...], *more: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", *more, *(f"tests/{folder}" for folder in folders)]


def main(*more: str) -> int:
    # Not by the shell's `&`: what it starts so ignores SIGINT and SIGQUIT, and all that the tests start with it.
    print(f"tests of {', '.join(COMPUTING)}; at the same time, shown after them: {', '.join(WAITING)}", flush=True)
    with tempfile.TemporaryFile("w+") as log:
        waiting = subprocess.Popen(
            command(WAITING, "-p", "no:cacheprovider", *more), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            failed = subprocess.run(command(COMPUTING, *more), cwd=ROOT, check=False).returncode
            failed = waiting.wait() or failed
        finally:
            waiting.terminate()
            waiting.wait()
            log.seek(0)
            sys.stdout.writelines(log)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

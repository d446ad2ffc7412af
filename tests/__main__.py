"""`python -m tests`: the whole suite in three processes, which share it out between them. One begins with the tests
that compute, two with those that mostly wait for workers. Arguments go to all."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import ROOT, guardian, quick_folder

COMPUTING = ("unit", "store", "races", "neighbours", "django", "chaos")
WAITING = ("acceptance", "flower", "integration")
#: In which order each process takes what the others have not taken.
ORDERS = (COMPUTING + WAITING, WAITING + COMPUTING[::-1], WAITING[::-1] + COMPUTING[::-1])


def command(order: tuple[str, ...], share: Path, *more: str) -> list[str]:
    options = ("-q", "-p", "tests.sharing", f"--share={share}")
    return [sys.executable, "-m", "pytest", *options, *more, *(f"tests/{folder}" for folder in order)]


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """For all files of this run."""
    with tempfile.TemporaryDirectory(prefix="batchtrack-tests-", dir=quick_folder()) as name:
        guardian.watch("folder", Path(name))
        Path(name).chmod(0o755)  # PostgreSQL may be another user
        yield Path(name)
    guardian.forget("folder", Path(name))


def main(*more: str) -> int:
    # Not by the shell's `&`: what it starts so ignores SIGINT and SIGQUIT, and all that the tests start with it.
    print(f"{len(ORDERS)} processes share these tests, and are shown one after another", flush=True)
    first, *others = ORDERS
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary())
        share, environment = folder / "share", {**os.environ, "TMPDIR": str(folder)}
        share.mkdir()
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in others]
        running = [
            subprocess.Popen(
                command(order, share, "-p", "no:cacheprovider", *more),
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )
            for order, log in zip(others, logs, strict=True)
        ]  # fmt: skip
        try:
            codes = [subprocess.run(command(first, share, *more), cwd=ROOT, env=environment, check=False).returncode]
            codes += [each.wait() for each in running]
        finally:
            for each, log in zip(running, logs, strict=True):
                each.terminate()
                each.wait()
                log.seek(0)
                sys.stdout.writelines(log)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

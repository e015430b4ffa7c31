"""The front door: runs the command line and turns the failures a user can meet into one line and an exit code."""

import errno
import os
import sys
import traceback

from distill.errors import Unfinished

OK, FAILED, USER, INTERRUPTED = 0, 1, 2, 130


def main() -> None:
    """Exit codes: 0 done, 2 a mistake of the user's, 1 another known failure, 130 interrupted.

    Anything else is a bug of ours and keeps its traceback; DISTILL_DEBUG=1 keeps all of them.
    """
    from distill.cli import app

    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            _say("interrupted; the same command goes on from here")
        raise
    except Exception as error:
        known = explain(error)
        if known is None or os.environ.get("DISTILL_DEBUG"):
            raise
        code, line = known
        _say(line)
        sys.exit(code)


def explain(error: BaseException) -> tuple[int, str] | None:
    """(exit code, one line) for a failure that needs no traceback; None for a bug."""
    if is_disk_full(error):
        return FAILED, f"no space left on device{_place(error)}; free some and start the same command again, it resumes"
    if isinstance(error, Unfinished):
        return FAILED, _one_line(error)
    if isinstance(error, ValueError):
        return USER, _one_line(error) + _where(error)
    if isinstance(error, OSError):
        return FAILED, f"{error.strerror or _one_line(error)}{_place(error)}"
    if isinstance(error, MemoryError):
        return FAILED, f"out of memory ({_one_line(error) or 'no more given'}); lower the recipe's batch sizes"
    return None


def is_disk_full(error: BaseException) -> bool:
    """Python says ENOSPC; safetensors, torch's zip writer and arrow raise their own, with the system's text in it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "os error 28" in str(error)


def _place(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return f": {os.fsdecode(name)}" if isinstance(name, str | bytes) else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _where(error: BaseException) -> str:
    """A ValueError that we did not raise ourselves may be a bug of ours, so it tells where to look."""
    frames = traceback.extract_tb(error.__traceback__)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ours = [os.path.join(root, package, "") for package in ("distill", "teacher", "students", "evals")]
    if not frames or frames[-1].filename.startswith(tuple(ours)):
        return ""
    return f" (from {os.path.basename(frames[-1].filename)}; DISTILL_DEBUG=1 shows the traceback)"


def _say(line: str) -> None:
    print(f"distill: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""The command line: each verb reads its arguments and hands them to its flow. Nothing heavy is imported before that.

Exit codes: 0 fine, 1 it ran and failed, 2 wrong use (faulty data included), 3 a required proof failed, 130 Ctrl-C.
Results go to stdout, progress and errors to stderr; with `--json` stdout holds one JSON value, also for an error.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from luthier.cli import measuring, tuning, using
from luthier.cli.front import INTERRUPTED, app, dump, visible
from luthier.errors import LuthierError, UsageError

__all__ = ["app", "main", "measuring", "tuning", "using"]
STOPPED = "stopped; what was saved is kept"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if os.environ.get("LUTHIER_DEBUG") != "1":
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries to each other, not to a user
    try:
        code = app(given, standalone_mode=False)
        if code == INTERRUPTED:
            print(STOPPED, file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("LUTHIER_DEBUG") == "1":
            traceback.print_exc()
        told = error if isinstance(error, LuthierError) else _foreign(error)
        _tell_error(told, as_json="--json" in given)
        sys.exit(told.exit_code)


def _foreign(error: Exception) -> LuthierError:
    """An error that is not ours in one sentence: wrong use that typer found, the machine's limits, or our own fault."""
    if hasattr(error, "format_message"):
        return UsageError(error.format_message(), remedy="luthier COMMAND --help lists what there is")
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return LuthierError(
            "the memory is used up", remedy="lower train.tokens_per_pack or set train.checkpointing: true"
        )
    if isinstance(error, OSError) and error.filename:
        return LuthierError(str(error.strerror or error), where=str(error.filename))
    remedy = "LUTHIER_DEBUG=1 shows where; please report it"
    return LuthierError(f"unexpected {type(error).__name__}: {error}", remedy=remedy)


def _tell_error(error: LuthierError, *, as_json: bool) -> None:
    """Tell of an error on stderr, and with `--json` on stdout as well."""
    if as_json:
        faults = [{"where": one.where, "what": one.what, "remedy": one.remedy} for one in error.faults]
        told = {"what": error.what, "where": error.where, "remedy": error.remedy, "exit_code": error.exit_code}
        dump({"error": {**told, "faults": faults}})
    print(visible(f"luthier: {error}"), file=sys.stderr)

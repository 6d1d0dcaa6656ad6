"""Execute a chapter of the book, its parameters checked: ``python -m sdecor_book build/training -p preset quick``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message}; a parameter is given as -p NAME VALUE")


def _execute(words: Sequence[str] | None) -> None:
    about = "Execute a chapter of the book; without arguments, list them all."
    parser = _Parser(prog="python -m sdecor_book", description=about, allow_abbrev=False)
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="such as experiments/mnist, or its file")
    pair = ("NAME", "VALUE")
    parser.add_argument("-p", dest="given", nargs=2, action="append", default=[], metavar=pair, help="a parameter")
    parser.add_argument("--out", default="", metavar="FILE.ipynb", help="where to write (default: a temporary file)")
    parser.add_argument("--publish", action="store_true", help="replace the committed notebook")
    parser.add_argument("--stale", action="store_true", help="replace every notebook whose source has changed")
    said = parser.parse_intermixed_args(words)
    from . import execute  # takes a second

    names, known = said.chapters, execute.known()
    if not names and not (said.stale or said.publish or said.given or said.out):
        print(*known, sep="\n")
        return
    if len(names) != (0 if said.stale else 1):
        raise ValueError(f"give {'no' if said.stale else 'one'} chapter; known: {', '.join(known)}")
    if (said.stale or said.publish) and (said.given or said.out):
        raise ValueError("a published chapter has default parameters and its own place: leave -p and --out away")
    if said.stale:
        names = [name for name in known if execute.is_stale(name)]
    for name in names:
        print(f"{name}: {execute.run(name, dict(said.given), out=said.out, publish=said.publish or said.stale)}")
    if not names:
        print("every notebook agrees with its source")


def main(words: Sequence[str] | None = None) -> int:
    """Do what is asked; a foreseen error is one line, and its code 2 if the request was wrong, 1 if the work failed."""
    try:
        _execute(words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ChildProcessError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

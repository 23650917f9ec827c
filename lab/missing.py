"""A package that is not there, in one line. Imports nothing that may be missing, so that commands import it first."""

import os
import sys


def in_one_line(program: str) -> None:
    """From here on a module that is not found ends the program with one line on stderr and exit code 2."""

    def hook(kind, error, trace) -> None:
        if issubclass(kind, ModuleNotFoundError) and sys.stderr:
            where = "pip install -r requirements.txt (see README.md)"
            sys.stderr.write(f"{program}: error: the package {error.name} is not there: {where}\n")
            sys.stderr.flush()
            os._exit(2)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook

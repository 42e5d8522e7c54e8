"""Every exception that gdn raises on purpose.

GdnError
├── ArgumentError        a call's argument is wrong: which one, what came, what is expected   (also a ValueError)
├── ConfigError          a configuration has an unknown, missing or impossible field           (also a ValueError)
├── ImplementationError  an implementation asked for by name cannot serve the call             (also a RuntimeError)
├── DataError            a data source cannot be read or holds nothing usable                  (also a ValueError)
├── CheckpointError      a checkpoint is absent, incomplete or of another model                (also a RuntimeError)
├── NonFiniteError       a loss or gradient stopped being a number                             (also an ArithmeticError)
├── ExperimentError      some runs of an experiment failed: which, and why
└── MissingExtraError    an optional package is needed: which one and how to install it        (also an ImportError)
"""

from __future__ import annotations

import difflib
import errno
import importlib
from collections.abc import Iterable
from types import ModuleType

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when there is no room for a file."""


class GdnError(Exception):
    """Base of all errors raised by gdn."""


class ArgumentError(GdnError, ValueError):
    """A call's argument is wrong."""


class ConfigError(GdnError, ValueError):
    """A configuration cannot be used."""


class ImplementationError(GdnError, RuntimeError):
    """An implementation cannot serve the call it was asked to serve."""


class DataError(GdnError, ValueError):
    """A data source cannot be used."""


class CheckpointError(GdnError, RuntimeError):
    """A checkpoint cannot be written or loaded."""


class NonFiniteError(GdnError, ArithmeticError):
    """Training produced a value that is not finite."""


class ExperimentError(GdnError):
    """Runs of an experiment failed."""


class MissingExtraError(GdnError, ImportError):
    """An optional dependency is not installed."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A sentence that names the closest valid spelling: ' Did you mean "x"?' or the list of all options."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Known: {', '.join(options)}." if options else ""


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or raise `MissingExtraError` that says which extra of gdn brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(f'{purpose} needs the package "{package}": pip install "gated-delta-networks[{extra}]"') from error

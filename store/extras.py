"""Libraries of the optional extras in pyproject.toml."""

import importlib
from typing import Any

from .errors import UsageError

_USES = {
    "adapters": "an adapter",
    "diffusion": "a diffusion model",
    "evaluation": "a comparison of rankings",
    "images": "a classifier of images",
    "hub": "a saved or a hub dataset",
    "object-stores": "an index or corpus in an object store",
    "pandas": "a data frame",
    "server": "serving",
    "training": "device map",
}


def require(library: str, extra: str) -> Any:
    """Import a library of an extra.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UsageError(f"{_USES[extra]} needs the extra {extra}: pip install 'wherefrom[{extra}]'") from error

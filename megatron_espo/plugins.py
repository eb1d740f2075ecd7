"""A user's own class or function, by the name in a setting."""

import importlib
import os
import sys
from typing import Any

from megatron_espo.errors import InputError


def load_object(key: str, name: str, expected: str = "module:Class") -> Any:
    """Import ``module:attribute``; the module is on Python's path or in the current directory.

    Args:
        key: the setting, for the error message.
        name: its value.
        expected: its possible values, for the error message.

    Raises:
        InputError: no such module or attribute.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # a command's first folder is that of the command
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{key}: expected {expected}, got {name!r} ({error})") from None

"""The error type for mistakes that a user can correct."""


class InputError(ValueError):
    """Bad configuration, data, model folder or placement.

    The message gives the key (with file and line, if known), what was expected, what was found, and
    what to do. The command line prints it without a traceback and exits with code 2.
    """

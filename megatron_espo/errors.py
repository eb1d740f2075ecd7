"""The one error type for mistakes a user can mend."""


class InputError(ValueError):
    """Bad configuration, data, model folder or placement.

    The message names the thing (file:line and key where there is one), what was expected, what was got, and the way
    out. The command line prints it without a traceback and exits with code 2.
    """

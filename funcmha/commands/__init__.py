"""What the command line does: one module for each command, which parses nothing and returns the exit status."""

from collections.abc import Iterator
from contextlib import contextmanager


class BadInputError(Exception):
    """Bad input from the user: the message is printed without a traceback."""


@contextmanager
def error_of_picture() -> Iterator[None]:
    """BadInputError where matplotlib is missing, or cannot write such a file."""
    try:
        yield
    except (ModuleNotFoundError, ValueError) as error:
        raise BadInputError(str(error)) from None

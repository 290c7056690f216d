"""What the command line does: one module for each command, which parses nothing and returns the exit status."""


class BadInputError(Exception):
    """Bad input from the user: the message is printed without a traceback."""

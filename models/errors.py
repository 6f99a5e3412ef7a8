"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in input, settings or usage. Its message is one line: what, where, and what to do.

    The `twinloop` command prints the message without a traceback and exits with code 2.
    """

"""The exceptions that a user, not a programmer, reads: one line with the remedy, never a traceback."""


class UserError(ValueError):
    """A mistake of the user: the message names the offending value and says what to do."""

    status = 2  # of the process


class RunFailed(RuntimeError):
    """A run that cannot go on: the message says where it stopped and what is saved."""

    status = 1

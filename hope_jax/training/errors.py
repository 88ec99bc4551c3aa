"""How a command ends early: exceptions that a user reads (one line with the remedy, no traceback), and statuses."""

EXIT_PREEMPTED = 42  # SIGTERM, saved: a launcher starts the same command again
EXIT_INTERRUPTED = 130  # Ctrl-C


class UserError(ValueError):
    """A mistake of the user: the message names the offending value and says what to do."""

    status = 2  # of the process


class RunFailed(RuntimeError):
    """A run that cannot go on: the message says where it stopped and what is saved."""

    status = 1

"""The one error a user is meant to read."""


class UserError(Exception):
    """Bad input or a bad state that the user can mend.

    The message says what was given, what was expected and what to do. The command prints it
    without a traceback and exits with code 2; the Snakefile passes it on as a WorkflowError.
    """

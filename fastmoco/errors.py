"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake the user can mend: the message names the file or option and says what to do.

    The command line prints it without a traceback and exits with status 2.
    """

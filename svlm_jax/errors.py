"""The one exception for mistakes that a user can mend; the command line prints its text alone, without a traceback."""


class UserError(Exception):
    """Bad input or settings. The message is one line: it names the thing that is wrong and the way out."""

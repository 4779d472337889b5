"""Errors that the programs report to the user without a traceback."""


class UserError(ValueError):
    """An error that the user can fix: in a setting, a file, an image or an argument.

    The message says what is wrong, where, and what to do. The programs print it and end with exit
    code 2. Any other ValueError is a bug: it ends with its traceback.
    """


class LockedError(UserError):
    """Another process works in the folder."""


class MissingExtraError(ModuleNotFoundError):
    """A package of an extra that is not installed; the message has the command that installs it."""

"""Errors that speak to a person.

A `UserError` is the user's to mend: the command line prints its message without a traceback and exits with
its code. Anything else that escapes is a bug of ours.
"""


class UserError(Exception):
    """Something the user can put right; the message says what, where, and what would be right."""

    exit_code = 2
    """What the command line ends with."""


class ConfigError(UserError):
    """A refused setting.

    Args:
        where: What was being read (a file, `run config`, `--run-config`).
        key: The key as the user wrote it.
        value: The refused value.
        expected: What would be right, as a noun phrase.
    """

    def __init__(self, where: str, key: str, value: object, expected: str) -> None:
        """Compose the one-line message."""
        self.where, self.key, self.value, self.expected = where, key, value, expected
        super().__init__(f"{where}: {key} = {value!r} is refused: expected {expected}")


USERS_CODE = (Exception, SystemExit)
"""What a user's own code may raise; a script that is taken for a module exits."""


def named(error: BaseException) -> str:
    """Name an error of the user's own code, with what it says."""
    return f"{type(error).__name__}: {error}"

"""Errors that speak to a person.

A `UserError` is the user's to mend: the command line prints its message without a traceback and exits with
code 2. Anything else that escapes is a bug of ours.
"""


class UserError(Exception):
    """Something the user can put right; the message says what, where, and what would be right."""


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


class MissingExtra(UserError):
    """An optional dependency is not installed.

    Args:
        extra: Name of the extra that brings it.
        needed_for: What the user asked for.
    """

    def __init__(self, extra: str, needed_for: str) -> None:
        """Compose the message with the command that installs the extra."""
        super().__init__(f'{needed_for} needs an extra: pip install -c constraints.txt -e ".[{extra}]"')

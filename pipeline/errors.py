"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. Each problem is one line that names the file or flag, what was expected and found.

    The command line prints the problems and exits with code 2.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

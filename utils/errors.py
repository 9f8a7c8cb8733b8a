"""What can go wrong that a person can put right. Libraries raise these; `utils.cli.script` turns them into an exit."""

import re

# Control characters but tab and newline, and those that turn the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text of a file for a terminal: what could move its cursor or hide other lines is shown as \\x1b and the like."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class CvGDiffError(Exception):
    """A sentence, what was found, what was expected, what to do, and the exit status of a script that ends with it."""

    def __init__(self, sentence: str, status: int = 1):
        super().__init__(printable(sentence))
        self.status = status


class InputError(CvGDiffError, ValueError):
    """A file, a folder or an option that cannot be used."""


class RunFolderError(CvGDiffError):
    """The output folder holds something else, or cannot be used."""


class Stopped(CvGDiffError):
    """Work that ended before its end: a signal, a full disk, too little memory. What was done is kept."""

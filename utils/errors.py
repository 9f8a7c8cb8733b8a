"""What can go wrong that a person can put right. Libraries raise these; `utils.cli.script` turns them into an exit."""


class CvGDiffError(Exception):
    """A sentence, what was found, what was expected, what to do, and the exit status of a script that ends with it."""

    def __init__(self, sentence: str, status: int = 1):
        super().__init__(sentence)
        self.status = status


class InputError(CvGDiffError, ValueError):
    """A file, a folder or an option that cannot be used."""


class RunFolderError(CvGDiffError):
    """The output folder holds something else, or cannot be used."""


class Stopped(CvGDiffError):
    """Work that ended before its end: a signal, a full disk, too little memory. What was done is kept."""

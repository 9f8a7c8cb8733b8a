"""What can go wrong that a person can put right. Libraries raise these; `utils.cli.script` turns them into an exit."""


class CvGDiffError(Exception):
    """Base of this project's errors. Its text is a sentence: what was found, what was expected, what to do."""

    status = 1  # exit status of a script that ends with it


class InputError(CvGDiffError, ValueError):
    """A file, a folder or an option that cannot be used."""


class RunFolderError(CvGDiffError):
    """The output folder holds something else, or cannot be used."""


class Stopped(CvGDiffError):
    """Work that ended before its end: a signal, a full disk, too little memory. What was done is kept."""

    def __init__(self, sentence: str, status: int = 1):
        super().__init__(sentence)
        self.status = status

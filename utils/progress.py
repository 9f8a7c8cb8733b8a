"""How far the work is: a bar in a terminal; elsewhere a line every half minute, however long a step takes."""

import io
import sys
import threading
import time

from tqdm import tqdm

FIRST, EVERY = 8, 30  # seconds from the start of a program to its first line, and from line to line
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"


class Progress(tqdm):
    """tqdm's bar, for a terminal. Where standard error is none, a thread prints lines to standard output instead."""

    due = time.monotonic() + FIRST  # when the next line is due, of whichever bar there is then

    def __init__(self, *args, disable: bool = False, **options):
        self.closed, self.silent = threading.Event(), not sys.stderr.isatty()
        super().__init__(*args, disable=disable, file=io.StringIO() if self.silent else sys.stderr, **options)
        if self.silent and not disable:
            threading.Thread(target=self._talk, daemon=True).start()

    def display(self, *args, **options):
        return self.silent or super().display(*args, **options)

    def close(self):
        self.closed.set()
        super().close()

    def _talk(self):
        while not self.closed.wait(0.5):
            if time.monotonic() >= Progress.due:
                Progress.due = time.monotonic() + EVERY
                form = LINE if self.total else "{desc}: {elapsed} so far"
                name = self.desc.removesuffix(": ")
                print(self.format_meter(**self.format_dict | {"bar_format": form, "prefix": name}), flush=True)

"""Drawing in processes of its own, none of which imports PyTorch."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datasets.archive import parallel, time_limit
from fig.figures import is_drawn, write


class Figure(NamedTuple):
    """A figure to be drawn: draw(*what, **options) for `path`, a PNG. key: by which `is_drawn` knows it again."""

    path: Path
    key: str
    draw: Callable
    what: tuple
    options: dict = {}


def draw_together(groups: list[list[Figure]]) -> None:
    """Draw what is not drawn yet, in as many processes as there are cores. One that dies costs its group alone."""
    groups = [group for group in groups if not all(is_drawn(figure.path, figure.key) for figure in group)]
    if not groups:
        return
    for group, done in zip(groups, parallel(_draw, groups, os.cpu_count() or 1, "Drawing", chunk=1), strict=True):
        if not done:
            print(f"Warning: a process died while it drew {', '.join(figure.path.name for figure in group)}. The same "
                  "command draws them. All tables are written.", file=sys.stderr)


@time_limit()
def _draw(group: list[Figure]) -> bool:
    """One after the other: the last one is there only if all are."""
    for figure in group:
        if not is_drawn(figure.path, figure.key):
            write(figure.draw(*figure.what, **figure.options), figure.path, figure.key)
    return True

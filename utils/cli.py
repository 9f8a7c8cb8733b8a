"""Command lines: flags with their defaults in --help, usage errors of one sentence, exits with a sentence."""

import argparse
import functools
import io
import math
import re
import sys
import time
from typing import Literal, get_args, get_origin, get_type_hints

from utils import progress
from utils.errors import CvGDiffError, printable
from utils.run_folder import unlock


def script(main):
    """Decorates main(argv): an error of this project or the system, or Ctrl-C, becomes a sentence and an exit status.

    What is printed appears at once in a pipe too, and no character stops it that the terminal does not know.
    """
    @functools.wraps(main)
    def run(argv=None):
        progress.Progress.due = time.monotonic() + progress.FIRST
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        try:
            return main(argv)
        except CvGDiffError as error:
            print(f"{str(error).rstrip('.')}.", file=sys.stderr)
            sys.exit(error.status)
        except OSError as error:
            print(f"Stopped: {error}. What is written is whole; the same command goes on.", file=sys.stderr)
            sys.exit(1)
        except (KeyboardInterrupt, Exception) as error:
            if KeyboardInterrupt not in (type(error), type(error.__cause__)):  # cause: in an extension's import
                raise
            print("Stopped by Ctrl-C. What is written is whole; the same command goes on.", file=sys.stderr)
            sys.exit(130)
        finally:
            unlock()

    return run


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} cannot be used: expected cpu or cuda")
    return text


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        """The help with its default, unless it says that itself or the flag takes no value."""
        default = action.default
        if "default" in action.help or default is None or action.nargs == 0:
            return action.help
        default = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        return f"{action.help} (default: {default})".replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors are one sentence, and whose flags cannot be abbreviated."""

    def __init__(self, prog: str, doc: str, **options):
        """prog: the command as a person types it; doc: the module's docstring."""
        super().__init__(prog, description=doc, formatter_class=_Formatter, allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {printable(message).rstrip('.')}. All flags: {self.prog} --help\n")

    def add_device(self) -> None:
        """The flag --device, whose text is checked here and whose hardware by utils.device."""
        self.add_argument("--device", type=_device, help="cpu or cuda (default: cuda where there is a GPU)")

    def at_least(self, args: argparse.Namespace, least: dict[str, float]) -> None:
        """Ends with a sentence where a number that was given is smaller than `least` says, or not finite."""
        for name, limit in least.items():
            given = getattr(args, name)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not limit <= value < math.inf:
                    self.error(f"--{name.replace('_', '-')} {value}: expected a number of at least {limit}")


def add_fields(parser, cls, default) -> None:
    """A flag for each of a dataclass's `described_fields`, None where it is not given; a Literal gives the choices.

    default(name): the text for its default.
    """
    for name, (kind, text) in described_fields(cls).items():
        flag, text = "--" + name.replace("_", "-"), f"{text} (default: {default(name)})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, type=type(get_args(kind)[0]), choices=get_args(kind), help=text)
        else:
            parser.add_argument(flag, type=kind, help=text, metavar=kind.__name__.upper())


def described_fields(cls) -> dict[str, tuple[type, str]]:
    """{name: (type, what it means)} of a dataclass whose fields are Annotated[type, text]."""
    return {name: get_args(hint) for name, hint in get_type_hints(cls, include_extras=True).items()}

"""How a recipe or script starts: help and mistakes are answered and libraries made quiet before any is imported."""

import importlib.util
import logging
import os
import signal
import sys
import time
import warnings
from io import TextIOWrapper
from itertools import pairwise

from recipes.cli.errors import UserError
from recipes.cli.help import ROOT, check, read_flags, show

# What libraries say in every run and nobody here can act on.
NOISE = r"`(is_)?gradient_checkpointing(_\w+)?` is deprecated"
# That a faster 4-bit kernel could be downloaded; in every layer and step, that 8 bits are computed from float16.
NOISY_LOGGERS = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


def begin(command: str, *more: str) -> None:
    """Answer `--help`, end with one line where the command line has a mistake, and make libraries quiet.

    The flags are those of the dataclasses in the tuple `ARGUMENTS` of the file `command`, and of the files `more`.
    """
    sys.path.insert(0, "")  # the working directory, as for `python -m`: a user's modules come first
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 shows escapes
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    try:
        if importlib.util.find_spec("trl") is None:
            activate = f"source {ROOT}/.venv/bin/activate, which bash {ROOT}/scripts/quickstart.sh makes"
            raise UserError(f"This Python ({sys.executable}) has no TRL: type {activate}.")
        answer(command, more, words)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # the first process says the same, and this one is ended meanwhile
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if "--log_level debug" not in " ".join(words):
        quiet()


def answer(command: str, more: tuple[str, ...], words: list[str]) -> None:
    first = os.environ.get("RANK", "0") == "0"
    try:
        own = read_flags(command)
        known = own | {name: flag for path in more for name, flag in read_flags(path).items()}
    except (LookupError, OSError, SyntaxError):  # no dataclasses, or a TRL of another layout: its parser will answer
        return
    if {"-h", "--help", "--help_all"} & {*words}:
        if first:
            everything = "--help_all" in words
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
            print(show(command, known if everything else own, everything))
        sys.exit(0)
    from recipes.cli.config import read_config  # not before it is known that there is an environment

    path = next((following for word, following in pairwise(words) if word == "--config"), "")
    config = read_config(path) if path else {}
    if first:  # of several processes, the others are ended with it
        check(words, path, config, known, own)


def expand_home(word: str) -> str:
    """`--output_dir=~/runs` with the home folder, which the shell puts in only where a word begins with it."""
    flag, equals, value = word.partition("=")
    return f"{flag}={os.path.expanduser(value)}" if value.startswith("~") else word


def quiet() -> None:
    """Show progress bars only of what takes seconds and until it is done, and silence known warnings by name."""
    os.environ.setdefault("TQDM_DELAY", "2")
    os.environ.setdefault("TQDM_LEAVE", "")
    warnings.filterwarnings("ignore", NOISE, FutureWarning)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)

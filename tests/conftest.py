"""What all tests share: no network, one thread per process, and real commands that cannot hang."""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"WANDB_MODE": "offline", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def imported_objects_are_not_walked_again():
    """Each trainer calls `gc.collect` when it starts; walking all that torch and transformers made takes 0.7 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_base() -> str:
    """Folder of the tiny world's base model."""
    return str(ROOT / "recipes" / "tiny_world" / "base")


def write_jsonl(path: Path, rows: list[dict]) -> str:
    """Write `rows` as JSON Lines, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def flags(**arguments) -> list[str]:
    """`--name value` for each argument; a list is several values."""
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def recipe_line(step: str, config: Path | None = None, **arguments) -> list[str]:
    """The arguments of a recipe: a YAML, by default the tiny world's, and flags that override it."""
    config = config or ROOT / "recipes" / "configs" / "tiny_world" / f"{step}.yaml"
    return ["--config", str(config), *flags(**arguments)]


def run_recipe(step: str, config: Path | None = None, **arguments):
    """Run a recipe in this process, as its command would, and return its trainer."""
    from recipes.cli.arguments import parse

    recipe = importlib.import_module(f"recipes.{step}")
    return recipe.main(*parse(recipe.ARGUMENTS, recipe_line(step, config, **arguments)))


def run_command(args, timeout=120, ok=True, env=None, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a command with this environment's programs; `stdout` of the result also holds stderr.

    The test fails, and shows the output, if the command outlives `timeout` seconds, fails (`ok=True`) or succeeds
    (`ok=False`). A command that is too slow is killed with every process it started.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [str(arg) for arg in args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=cwd,
        env={**os.environ, "PATH": path, **(env or {})},
        start_new_session=True,
    )
    shown = " ".join(str(arg) for arg in args)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s: {shown}\n{output[-5000:]}", pytrace=False)
    if (process.returncode == 0) != ok:
        pytest.fail(f"exit code {process.returncode}: {shown}\n{output[-5000:]}", pytrace=False)
    return subprocess.CompletedProcess(args, process.returncode, output)

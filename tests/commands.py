"""Runs the project's real commands in tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(recipe: str, config_file: str = "cpu", **arguments) -> list[str]:
    """The `accelerate launch` line of a recipe with the tiny world's YAML and flags that override it."""
    line = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    line += ["--config_file", f"accelerate_configs/{config_file}.yaml", f"recipes/{recipe}.py"]
    line += ["--config", f"recipes/configs/tiny_world/{recipe}.yaml"]
    return line + [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def run_command(line: list[str], env: dict[str, str] | None = None, timeout: int = 240, fails: bool = False):
    """Run `line` in the repository; its output is part of the failure where it does not end as expected."""
    result = subprocess.run(
        line, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout, check=False
    )
    if bool(result.returncode) != fails:
        raise AssertionError(f"{' '.join(line)}\nexit code {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result

"""The project's own files: configurations, pinned versions and the shell scripts."""

import importlib.metadata
import os
import re
import subprocess
import tomllib

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement

from tests.conftest import ROOT

ACCELERATE = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
PINS = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_configs_are_what_accelerate_reads(path):
    config = load_config_from_file(str(path))
    expected = {"cpu": ("NO", 1, True), "multi_cpu": ("MULTI_GPU", 2, True)}
    expected |= {"single_gpu": ("NO", 1, False), "multi_gpu": ("MULTI_GPU", 2, False)}
    expected |= {"fsdp2": ("FSDP", 2, False), "multi_node": ("MULTI_GPU", 16, False)}
    expected |= {f"deepspeed_zero{stage}": ("DEEPSPEED", 2, False) for stage in (2, 3)}
    assert (config.distributed_type.value, config.num_processes, config.use_cpu) == expected[path.stem]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_configs_are_launchable(path):
    text = path.read_text(encoding="utf-8")
    assert f"recipes/{path.stem}.py" in text.split("\n\n")[0]
    assert isinstance(yaml.safe_load(text), dict)


def test_every_dependency_is_pinned_torch_first():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert re.fullmatch(r"torch==[\d.]+", lines[0])
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no local versions, paths or markers
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(PINS[requirement.name]), requirement


def test_the_pinned_versions_are_those_under_test():
    for name in ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"):
        assert importlib.metadata.version(name).split("+")[0] == PINS[name]


def checkout(tmp_path):
    """The scripts in a folder of their own."""
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/setup_env.sh", "scripts/test.sh", "constraints.txt", "pyproject.toml"):
        (folder / name).write_text((ROOT / name).read_text())
    return folder


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def bash(script, *args, path=None):
    env = {**os.environ, "PATH": f"{path}{os.pathsep}/usr/bin{os.pathsep}/bin"} if path else None
    return subprocess.run(["bash", script, *args], capture_output=True, text=True, env=env, timeout=60, check=False)


def test_an_old_python_is_one_clear_line(tmp_path):
    folder, bin_folder = checkout(tmp_path), tmp_path / "bin"
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python"):
        program(bin_folder / name, '[ "$1" = --version ] && echo Python 3.9.2; exit 1')
    result = bash(folder / "scripts" / "test.sh", path=bin_folder)
    assert result.returncode == 1
    assert result.stderr == "error: no Python 3.11 or newer on PATH (python3 is: Python 3.9.2)\n"
    assert not (folder / ".venv").exists()


def test_a_broken_environment_is_named_and_not_removed(tmp_path):
    folder = checkout(tmp_path)
    (folder / ".venv").mkdir()
    result = bash(folder / "scripts" / "test.sh")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {folder}/.venv holds no working Python")


def test_versions_are_installed_once_torch_first_and_again_when_they_change(tmp_path):
    """With a Python whose pip only writes down what it is asked for."""
    folder = checkout(tmp_path)
    log = tmp_path / "pip.log"
    program(
        folder / ".venv" / "bin" / "python",
        f'case "$*" in *"pip install"*) echo "$*" >>"{log}" ;; *pytest*) echo "ran $*" ;; esac',
    )
    for repeat in range(2):
        result = bash(folder / "scripts" / "test.sh", "-k", "nothing")
        assert result.stdout.endswith("ran -m pytest -n 2 --dist loadfile -k nothing\n"), result
        installs = log.read_text().splitlines()
        assert len(installs) == 2, f"run {repeat + 1}"
    assert installs[0].endswith(f"torch=={PINS['torch']}")
    assert f"-c {folder}/constraints.txt -e {folder}[test]" in installs[1]
    with (folder / "constraints.txt").open("a") as file:
        file.write("zipp==3.0\n")
    bash(folder / "scripts" / "test.sh")
    assert len(log.read_text().splitlines()) == 4

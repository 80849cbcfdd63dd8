"""Checks the style of recipes/configs: short files, and hyperparameters of real bases name where they are from."""

import re
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
SOURCED = ("learning_rate", "kl_coef", "num_iterations", "epsilon", "lam", "vf_coef", "lr_scheduler_type")
SOURCE = re.compile(r"\d{4}\.\d{5}|alignment-handbook|OpenRLHF|TRL|the same")

problems = []
for path in sorted(CONFIGS.rglob("*.yaml")):
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) > 75:
        problems.append(f"{path}: {len(lines)} lines, at most 75")
    for number, line in enumerate(lines, 1):
        named = path.parent.name == "tiny_world" or SOURCE.search(line.partition("#")[2])
        if line.split(":")[0] in SOURCED and not named:
            problems.append(f"{path}:{number}: no comment names a source: {line}")
sys.exit("\n".join(problems) or None)

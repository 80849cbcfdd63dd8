"""Answers `--help` and mistyped flags, read from the source text of the dataclasses that hold the arguments.

Importing them takes torch and TRL along, 5 to 15 seconds. Their source says the same: a flag is an annotated field,
and `ARGUMENTS` of a recipe or script names the classes. A test compares it with the real parser.
"""

import argparse
import ast
import difflib
import functools
import importlib.util
import os
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.cli.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FEW = 60  # a command with no more flags shows all of them
# What `--help` shows of a command that has more, in this order.
MOST_USED = """
    model_name_or_path reward_model_name_or_path reward_funcs dataset_name dataset_schema dataset_mapping aggregation
    output_dir resume_from_checkpoint use_peft lora_r lora_target_modules load_in_4bit dtype bf16 use_cpu
    gradient_checkpointing learning_rate num_train_epochs max_steps total_episodes per_device_train_batch_size
    gradient_accumulation_steps max_length assistant_only_loss steps_per_generation num_iterations
    max_completion_length kl_coef missing_eos_penalty critic_learning_rate normalize_scores eval_strategy eval_steps
    save_steps logging_steps log_completions log_level report_to push_to_hub seed
""".split()


@dataclass(frozen=True)
class Flag:
    """A field of a dataclass; `owner` is the class that says its default, `default` is "" for a required one."""

    name: str
    kind: str
    default: str
    help: str
    owner: str

    @property
    def required(self) -> bool:
        return not self.default or (self.name == "output_dir" and self.default == "None")

    @property
    def options(self) -> list[str]:
        names = [self.name, *([f"no_{self.name}"] if self.kind == "bool" and self.default == "True" else [])]
        return [option for name in names for option in (name, name.replace("_", "-"))]


def check(words: list[str], path: str, config: dict[str, Any], known: dict[str, Flag], own: dict[str, Flag]) -> None:
    """Refuse a flag, or a key of the YAML at `path`, that there is not, naming the nearest, and a missing one."""
    options = {"config", "help", "help_all", *(option for flag in known.values() for option in flag.options)}
    flags = [word.removeprefix("--") for word in words if word.startswith("--")]
    for where, names, possible in (("Command line", flags, options), (f"--config {path}", config, known)):
        for name in names:
            if name not in possible:
                close = difflib.get_close_matches(name.replace("-", "_"), possible, n=1)
                hint = f"; did you mean {close[0]}?" if close else ". --help lists the arguments."
                raise UserError(f"{where}: there is no argument {name}{hint}")
    given = {name.replace("-", "_") for name in flags} | {name for name in config if config[name] is not None}
    missing = [f"--{name}" for name, flag in own.items() if flag.required and name not in given]
    if missing:
        raise UserError(f"Command line: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} required.")


class OneLineParser(argparse.ArgumentParser):
    """`ArgumentParser` without abbreviations, whose errors are one line."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def show(command: str, flags: dict[str, Flag], everything: bool) -> str:
    """The help: the most used flags, a line each, or all flags by the class that they come from."""
    width = max(80, shutil.get_terminal_size((119, 24)).columns)
    few = len(flags) > FEW and not everything
    more = f" {os.path.basename(command)} --help_all lists all {len(flags)}." if few else ""
    lines = [ast.get_docstring(tree(command)), "", f"Flags, also as keys of --config FILE.yaml; flags win.{more}"]
    groups: dict[str, list[str]] = {}
    for flag in [flags[name] for name in MOST_USED if name in flags] if few else flags.values():
        words = flag.help if everything else re.split(r"\.(?= [A-Z]|$)", flag.help)[0]
        words += " (required)" if flag.required else f" (default: {flag.default})" if flag.default != "None" else ""
        words = words if everything else textwrap.shorten(words, width - 44, placeholder=" …")
        head, column = f"  --{flag.name} {flag.kind}", " " * 44
        shown = textwrap.wrap(words, width, initial_indent=column, subsequent_indent=column) or [""]
        if len(head) < len(column):
            shown[0] = head + shown[0][len(head) :]
        else:
            shown.insert(0, head)
        groups.setdefault("Most used" if few else flag.owner, []).extend(shown)
    for title, shown in groups.items():
        lines += ["", f"{title}:", *shown]
    return "\n".join(lines)


# Reading source


@functools.cache
def tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def read_flags(command: str) -> dict[str, Flag]:
    """The flags of all dataclasses in the tuple `ARGUMENTS` of a file, in the order of its parser."""
    for node in tree(command).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ARGUMENTS":
            names = [each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)]
            found = [read_class(name, command) for name in names]
            return {name: flag for flags in found for name, flag in flags.items()}
    raise LookupError(f"{command} has no ARGUMENTS")


def read_class(name: str, path: str) -> dict[str, Flag]:
    """The flags of a dataclass that the file `path` defines or imports, those of its bases first."""
    node, path = find_class(name, path)
    found: dict[str, Flag] = {}
    for base in node.bases:
        found |= read_class(ast.unparse(base), path)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
            call = item.value.keywords if isinstance(item.value, ast.Call) else []
            options = {keyword.arg: keyword.value for keyword in call}
            if "init" in options:  # no flag, whatever it is in a base
                found.pop(ast.unparse(item.target), None)
            else:
                flag = read_flag(item, options, name)
                found[flag.name] = flag
    return found


def read_flag(item: Any, options: dict[str, Any], owner: str) -> Flag:
    default = options.get("default") or (item.value if not isinstance(item.value, ast.Call) else None)
    factory = options.get("default_factory")
    if factory is not None:
        default = factory.body if isinstance(factory, ast.Lambda) else ast.Constant("")
    metadata = options.get("metadata", ast.Dict([], []))
    notes = {ast.unparse(key): text(value) for key, value in zip(metadata.keys, metadata.values, strict=True)}
    kind = re.sub(r"None \| |str \| (?=list)| \| (None|str)", "", ast.unparse(item.annotation))
    value = "" if default is None else text(default) or "none"
    return Flag(item.target.id, kind, value, " ".join(notes.get("'help'", "").split()), owner)


def text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def find_class(name: str, path: str) -> tuple[ast.ClassDef, str]:
    """The definition of a class and its file, found through the imports of `path`."""
    imports = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, path
        if isinstance(node, ast.ImportFrom):
            imports += [(alias.name, node) for alias in node.names if (alias.asname or alias.name) == name]
    if not imports:
        raise LookupError(f"{path} has no {name}")
    name, node = imports[0]
    return find_class(name, module_file(node, path))


def module_file(node: ast.ImportFrom, path: str) -> str:
    """The file of the module in `from module import …`, which is not imported."""
    parts = node.module.split(".") if node.module else []
    if node.level:
        folder = Path(path).parents[node.level - 1]
    else:
        spec = importlib.util.find_spec(parts.pop(0))  # of a top-level package, which that does not import
        folder = Path(spec.submodule_search_locations[0])
    folder = folder.joinpath(*parts)
    return str(folder / "__init__.py") if folder.is_dir() else f"{folder}.py"

"""Reads the YAML of `--config`: each key is a flag, and its value is the text that the flag would be given."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from recipes.cli.errors import UserError, did_you_mean
from recipes.cli.help import ROOT


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; plain YAML takes the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep)


UniqueKeyLoader.add_implicit_resolver(  # plain YAML reads 1e-5 as a text, because it has no dot
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789")
)


def read_config(path: str) -> dict[str, Any]:
    """The values of a YAML file by name; the variables in its `env` are set now, before libraries read them.

    A value, or a list of them, is the text that stands there, so that a name of digits stays a name. `null` and what
    holds a mapping are as YAML reads them.
    """
    where = f"--config {path}"
    try:
        content = Path(path).read_text(encoding="utf-8")
        values, texts = yaml.load(content, UniqueKeyLoader), yaml.load(content, yaml.BaseLoader)
    except FileNotFoundError:
        away = "" if Path.cwd() == ROOT or not (ROOT / path).exists() else f" (cd {ROOT} to name it so)"
        raise UserError(f"{where}: there is no such file in {Path.cwd()}{away or did_you_mean(path)}.") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:  # the first: not UTF-8, or a day that no month has
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected lines of the form argument: value.")
    env = texts.get("env") or {}
    if not isinstance(env, dict):
        raise UserError(f"{where}: env takes lines of the form VARIABLE: value, not {env}.")
    os.environ |= {name: str(value) for name, value in env.items()}
    found = {}
    for (name, text), value in zip(texts.items(), values.values(), strict=True):
        items = value if isinstance(value, list) else [value]
        if value is None or any(isinstance(item, dict) for item in items):
            found[name] = value
        else:
            found[name] = os.path.expanduser(text) if isinstance(text, str) else text
    found.pop("env", None)
    return found

"""Cache of intermediate results, so that a stopped evaluation goes on and a longer one reuses what is there."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.cli import lock
from recipes.cli.errors import UserError
from recipes.cli.files import write_text
from recipes.cli.record import digest


class Parts:
    """A folder of JSON values by name, each with what it was made from."""

    def __init__(self, output_dir: str):
        self.folder = Path(output_dir) / "parts"
        if not self.folder.is_dir() and (os.path.isfile(output_dir) or any(Path(output_dir).glob("*"))):
            raise UserError(f"{output_dir} is not empty and holds no evaluation: choose another --output_dir.")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock.hold(os.path.join(output_dir, ".lock"), output_dir)

    def get(self, name: str, made_from: dict, compute: Callable[[], Any]) -> Any:
        """What an earlier run left, or the result of `compute`.

        Raises:
            UserError: it is there and was made from something else.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            different = [key for key in made_from if content["made_from"].get(key) != made_from[key]]
            if different:
                raise UserError(
                    f"{path} was made with another {', '.join(different)}: choose another --output_dir, or the same "
                    "models, prompts and arguments to go on with this one."
                )
            return content["values"]
        print(f"{self.folder}: {name} …", flush=True)
        values = compute()
        write_text(str(path), json.dumps({"made_from": made_from, "values": values}))
        return values


def fingerprint(value: Any) -> str:
    """20 hexadecimal digits that are equal for equal JSON values."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:20]


def identity(path: str) -> list:
    """A model's name, with or without a slash at its end, and a digest of a local one's weights."""
    return [os.path.normpath(path), digest(path) if os.path.isdir(path) else None]

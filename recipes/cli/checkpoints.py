"""Checkpoints on disk: one appears under its name only when it is whole.

It is written to `OUTPUT_DIR/.unfinished/checkpoint-N`. Its manifest, `checkpoint.json`, comes last and lists every
file with its size; then the folder is renamed to `OUTPUT_DIR/checkpoint-N`.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from recipes.cli.files import sync, write_text

MANIFEST = "checkpoint.json"
UNFINISHED = ".unfinished"


def unfinished(output_dir: str, name: str = "") -> str:
    """Where a checkpoint, or a result, is written before it gets its name."""
    return os.path.join(output_dir, UNFINISHED, name)


def problem(folder: str) -> str | None:
    """What keeps a checkpoint from being whole and resumable, `None` where nothing does."""
    if not os.path.isdir(folder):
        return "there is no such folder"
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
        files, resumable = manifest["files"], manifest["resumable"]
    except FileNotFoundError:
        return f"{MANIFEST}, which is written last, is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, size in files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            return f"{name} is missing"
        if os.path.getsize(path) != size:
            return f"{name} has {os.path.getsize(path)} of {size} bytes"
    return None if resumable else "it holds the model only (save_only_model), nothing to go on from"


def all_checkpoints(output_dir: str, by_time: bool = False) -> list[str]:
    """The checkpoints of a run, oldest first; a copy that a user made, such as checkpoint-9.old, is none."""
    paths = sort_checkpoints(output_dir, use_mtime=by_time)
    return [path for path in paths if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", os.path.basename(path))]


def newest_whole(output_dir: str) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint of a run, and a sentence about each newer one that is not whole."""
    skipped = []
    for path in reversed(all_checkpoints(output_dir)):
        why = problem(path)
        if why is None:
            return path, skipped
        skipped.append(f"{path} is not whole: {why}")
    return None, skipped


def last_good_state(output_dir: str) -> str:
    """A sentence that names the newest whole checkpoint of a run."""
    newest, _ = newest_whole(output_dir)
    return f"The last good checkpoint is {newest}." if newest else "There is no checkpoint to go on from."


def put_in_place(folder: str, output_dir: str, files: dict[str, int], resumable: bool) -> str:
    """Give a checkpoint below `.unfinished`, of `files` with their sizes, a manifest and its name; the new path."""
    manifest = {"resumable": resumable, "files": dict(sorted(files.items()))}
    write_text(os.path.join(folder, MANIFEST), json.dumps(manifest, indent=2) + "\n")
    target = os.path.join(output_dir, os.path.basename(folder))
    if os.path.exists(target):  # saved twice at one step; a kill between the two renames is what `recover` mends
        remove(target, output_dir)
    os.rename(folder, target)
    sync(output_dir)
    tidy(output_dir)
    return target


def remove(checkpoint: str, output_dir: str) -> None:
    """Delete a checkpoint; it loses its name first, so that a half-deleted one is never found."""
    aside = unfinished(output_dir, f"old-{os.path.basename(checkpoint)}")
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(unfinished(output_dir), exist_ok=True)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)
    tidy(output_dir)


def tidy(output_dir: str) -> None:
    with contextlib.suppress(OSError):  # something else is in it
        os.rmdir(unfinished(output_dir))


def rotate(output_dir: str, limit: int | None, *protected: str | None) -> None:
    """Delete the oldest whole checkpoints beyond `limit`, but none that is `protected`, as Trainer does."""
    if not limit or limit < 0:
        return
    whole = [path for path in all_checkpoints(output_dir, by_time=True) if problem(path) is None]
    kept = {os.path.realpath(path) for path in protected if path}
    spare = [path for path in whole if os.path.realpath(path) not in kept]
    for path in spare[: max(0, len(whole) - limit)]:
        remove(path, output_dir)


def recover(output_dir: str) -> None:
    """Clear what a killed run left below `.unfinished`; a checkpoint that was whole but had no name yet gets it."""
    for path in Path(unfinished(output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        target = Path(output_dir, path.name)
        if not target.exists() and problem(str(path)) is None:
            path.rename(target)
    shutil.rmtree(unfinished(output_dir), ignore_errors=True)

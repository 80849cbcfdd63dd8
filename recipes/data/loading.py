"""Finds the files of a source and reads their rows, all but text files by `datasets`."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.cli.errors import did_you_mean, first_line
from recipes.data.rows import DataError, Row, RowError, check_row, join_names
from recipes.data.text_files import COMPRESSED, PROMPTS_SUFFIX, TEXT_SUFFIXES, read_text_file

TEXTS = (*TEXT_SUFFIXES, PROMPTS_SUFFIX)
SUFFIXES = (*TEXTS, ".parquet", *(text + packed for text in TEXTS for packed in COMPRESSED))
TOOLS = ("tools", "tool_calls", "functions", "function_call")
_HUB_NAME = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?")  # `name` or `owner/name`
_SPLIT = re.compile(r"([\w.\-]+)(?:\[(\d*):(\d*)\])?")


@dataclass
class Rows:
    """Rows that are read anew each time they are iterated, so that none is held in memory. Can be pickled."""

    source: str
    open: Callable[[], Iterable[Row]]
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return (row.decoded() for row in self.unread())

    def unread(self) -> Iterator[Row]:
        """Rows whose data may still be a line of JSON, which worker processes decode."""
        return islice(self.open(), self.start, self.stop)


def load_rows(source, split: str = "train", name: str | None = None, data_files=None, streaming: bool = False) -> Rows:
    """Opens a dataset; of local sources, no row is read before the rows are iterated.

    Args:
        source: an existing .jsonl, .ndjson, .json, .csv, .txt or .parquet file (all but Parquet may be compressed as
            .gz, .bz2, .xz or .zst), a folder (a copy of a Hub dataset, files named by split, or one written by
            `save_to_disk`), "json", "csv" or "parquet" together with `data_files`, or a Hub name.
        split: a split name; `train[10:20]` takes rows 10 to 19. A single file is the split "train".
        name: the configuration of a Hub dataset or of a copy of one, or a subfolder of a local folder.
        data_files: path, list of paths or mapping from split to paths, relative to the folder or Hub repository.
        streaming: read a Hub dataset while it is iterated instead of downloading it first.
    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise DataError(f"split {split!r} is not a split name; expected e.g. 'train' or 'train[0:1000]'")
    split, start, stop = match[1], int(match[2] or 0), int(match[3]) if match[3] else None
    source = str(source)
    splits = _local_splits(source, name, data_files)
    if splits is None:
        import datasets

        options = {"data_files": data_files, "split": split, "streaming": streaming}
        dataset = _or_data_error(source, lambda: datasets.load_dataset(source, name, **options))
        splits = {split: partial(_numbered, source, dataset)}
    elif split not in splits and Path(source).expanduser().is_file():
        raise DataError(f"{source} is one file, its only split is 'train', but {split!r} was asked for")
    elif split not in splits:
        raise DataError(f"{source} has no split {split!r}; it has {join_names(splits)}")
    return Rows(source, splits[split], start, stop)


def as_rows(rows: Rows | Iterable[dict]) -> Rows:
    """Rows of a dataset or of a list in memory; their file is called "rows", their lines count from 1."""
    if isinstance(rows, Rows):
        return rows
    if hasattr(rows, "features"):  # of `datasets`
        return Rows("rows", partial(_numbered, "rows", rows))
    return Rows("rows", partial(_checked, list(rows)))


def list_splits(source, name: str | None = None) -> list[str]:
    """The splits that `load_rows` can open, without reading any row."""
    splits = _local_splits(str(source), name)
    if splits is None:
        import datasets

        splits = _or_data_error(str(source), lambda: datasets.get_dataset_split_names(str(source), name))
    return list(splits)


def _local_splits(source: str, name: str | None, data_files=None) -> dict[str, Callable[[], Iterable[Row]]] | None:
    """For each split of a file or folder, the function that reads its rows; None for a name on the Hub."""
    path = Path(source).expanduser()
    if data_files is not None and (path.is_dir() or source in ("json", "csv", "parquet")):
        folder = path if path.is_dir() else Path()
        by_split = data_files if isinstance(data_files, dict) else {"train": data_files}
        chosen = {split: [files] if isinstance(files, str | Path) else files for split, files in by_split.items()}
        files_by_split = {split: [folder / Path(file).expanduser() for file in chosen[split]] for split in chosen}
    elif source and path.is_file():
        if name:
            raise DataError(f"{source} is one file, and has no configuration {name!r}")
        files_by_split = {"train": [path]}
    elif source and path.is_dir():
        folder = path / name if name else path
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            import datasets

            saved = _or_data_error(str(folder), lambda: datasets.load_from_disk(str(folder)))
            saved = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return {split: partial(_numbered, str(folder), saved[split]) for split in saved}
        files_by_split = _files_by_split(path, name)
    elif path.is_symlink():
        raise DataError(f"{source} is a link to {os.readlink(path)}, which is not there")
    elif source.endswith(SUFFIXES) or not _HUB_NAME.fullmatch(source):  # a path must not become a look-up on the Hub
        raise DataError(f"{source or 'an empty name'}: no such file or folder{did_you_mean(source)}")
    else:
        return None
    return {split: _read_files(files) for split, files in files_by_split.items()}


def _files_by_split(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """The files that `datasets` finds for each split: by the folder's README.md, else by the names of the files."""
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns, sanitize_patterns

    config = _configuration(folder, name)
    base = folder / (name or "") if config is None else folder / config.get("data_dir", "")
    place = glob.escape(str(base))  # brackets in its name are no pattern
    try:
        listed = (config or {}).get("data_files")
        patterns = sanitize_patterns(listed) if listed else get_data_patterns(place)
    except EmptyDatasetError:
        patterns = {}
    found: dict[str, list[Path]] = {}
    for split in patterns:
        with suppress(FileNotFoundError):  # a copy of a Hub dataset may lack a split
            files = sorted(set(DataFilesList.from_patterns(patterns[split], place)))
            found[str(split)] = [Path(file) for file in files if file.lower().endswith(SUFFIXES)]
    data = {split: [file for file in found[split] if PROMPTS_SUFFIX not in file.suffixes] for split in found}
    if any(data.values()):  # beside data, a .txt is a licence or a note
        found = data
    found = {split: files for split, files in found.items() if files}
    if not found:
        raise DataError(f"{base} holds no {join_names(TEXT_SUFFIXES)} or .parquet file, not even compressed ones")
    return found


def _configuration(folder: Path, name: str | None) -> dict | None:
    """The configuration `name` in the README.md of a copied Hub dataset; None if a plain folder is meant."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import metadata_load

    def read() -> tuple[MetadataConfigs, str | None]:
        configs = MetadataConfigs.from_dataset_card_data(metadata_load(card) or {})
        return configs, configs.get_default_config_name()

    card = folder / "README.md"
    configs, default = _or_data_error(str(card), read) if card.is_file() else ({}, None)
    if configs and (name or default) is None:
        raise DataError(f"{folder} has the configurations {join_names(configs)}: choose one with --dataset_config")
    if (name or default) in configs:
        return configs[name or default]
    if name and not (folder / name).is_dir():
        known = f"its configurations are {join_names(configs)}" if configs else "a configuration here is a subfolder"
        raise DataError(f"{folder} has no subfolder or configuration {name!r}: {known}")
    return None


def _or_data_error(source: str, load: Callable[[], Any]):
    """Failures of the Hub and of `datasets` have dozens of types; the user needs the source and one line."""
    try:
        return load()
    except Exception as error:
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        unknown = isinstance(error, FileNotFoundError | ConnectionError) and not Path(source).expanduser().exists()
        local = f"no file or folder {source!r} is here, and " if unknown else ""
        raise DataError(
            f"{local}`datasets` could not load {source!r}: {type(cause).__name__}: {first_line(cause)}"
        ) from error


def _read_files(paths: list[Path]) -> Callable[[], Iterable[Row]]:
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file{did_you_mean(str(path))}")
        if not path.name.lower().endswith(SUFFIXES):
            known = f"{join_names(TEXTS)}, .parquet, the texts also with {join_names(COMPRESSED)}"
            raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {known}")
    return partial(_rows_of, paths)


def _rows_of(paths: list[Path]) -> Iterator[Row]:
    for path in paths:
        if path.suffix.lower() != ".parquet":
            yield from read_text_file(path)
            continue
        import datasets

        options = {"data_files": {"train": glob.escape(str(path))}, "split": "train", "streaming": True}
        load = partial(datasets.load_dataset, "parquet", **options)
        yield from _numbered(str(path), _or_data_error(str(path), load))


def _checked(rows: list) -> Iterator[Row]:
    for number, data in enumerate(rows, 1):
        try:
            yield Row("rows", number, check_row(data))
        except RowError as error:
            yield Row("rows", number, error)


def _numbered(file: str, dataset: Iterable[dict]) -> Iterator[Row]:
    if hasattr(dataset, "decode"):  # of `datasets`: images and sounds are not used, so their bytes may stay
        dataset = dataset.decode(False)
    rows = enumerate(dataset, 1)
    while True:
        try:
            number, data = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of `datasets`, Arrow and decoders, which have dozens of types
            raise DataError(f"{file}: {type(error).__name__}: {first_line(error)}") from error
        yield Row(file, number, _without_filled_nulls(data))


def _without_filled_nulls(value: Any, in_tools: bool = False) -> Any:
    """Arrow gives every tool the keys of all others, with nulls, and chat templates would render them."""
    if isinstance(value, list):
        return [_without_filled_nulls(item, in_tools) for item in value]
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None or not in_tools}
        return {key: _without_filled_nulls(kept[key], in_tools or key in TOOLS) for key in kept}
    return value

"""Finds the files of a source and reads their rows, all but text files by `datasets`."""

import glob
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.cli.errors import did_you_mean
from recipes.cli.screen import say
from recipes.data.columns import LABELS
from recipes.data.rows import NOT_UTF8, DataError, Row, check_row, failures_as_data_error, join_names, or_error
from recipes.data.text_files import COMPRESSED, read_text_file, suffix_of

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
SUFFIXES = (*DATA_SUFFIXES, ".txt")
TOOLS = ("tools", "tool_calls", "functions", "function_call")
_HUB_NAME = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?")  # `name` or `owner/name`
_SPLIT = re.compile(r"([\w.\-]+)(?:\[(\d*):(\d*)\])?")
_say_once = cache(say)

Splits = dict[str, Callable[[], Iterable[Row]]]  # for each split, the function that reads its rows


@dataclass
class Rows:
    """Rows that are read anew each time they are iterated, so that none is held in memory. Can be pickled."""

    source: str
    open: Callable[[], Iterable[Row]]
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return islice(self.open(), self.start, self.stop)


def load_rows(source, split: str = "train", name: str | None = None, data_files=None, streaming: bool = False) -> Rows:
    """Opens a dataset; of local sources, no row is read before the rows are iterated.

    Args:
        source: an existing .jsonl, .ndjson, .json, .csv, .txt or .parquet file (all but Parquet may be compressed as
            .gz, .bz2, .xz or .zst), a folder (a copy of a Hub dataset, files named by split, or one written by
            `save_to_disk`), "json", "csv" or "parquet" together with `data_files`, or a Hub name.
        split: a split name; `train[10:20]` takes rows 10 to 19. A single file is the split "train".
        name: the configuration of a Hub dataset or of a copy of one.
        data_files: pattern, list of patterns or mapping from split to them, relative to the folder or Hub repository.
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

        with failures_as_data_error(source):
            dataset = datasets.load_dataset(source, name, data_files=data_files, split=split, streaming=streaming)
        splits = {split: partial(_numbered, source, dataset)}
    if split not in splits:
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
    if splits is not None:
        return list(splits)
    import datasets

    with failures_as_data_error(source):
        return datasets.get_dataset_split_names(str(source), name)


def _local_splits(source: str, name: str | None, data_files=None) -> Splits | None:
    """The splits of a file or folder; None for a name on the Hub."""
    path = Path(source).expanduser()
    if data_files is not None and (path.is_dir() or source in ("json", "csv", "parquet")):
        files_by_split = _files_by_split(path if path.is_dir() else Path(), data_files)
    elif source and path.is_file():
        if name:
            raise DataError(f"{source} is one file, and has no configuration {name!r}")
        files_by_split = {"train": [path]}
    elif source and path.is_dir():
        if not name and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            import datasets

            with failures_as_data_error(path):
                saved = datasets.load_from_disk(str(path))
            by_split = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return {split: partial(_numbered, str(path), by_split[split]) for split in by_split}
        config = _configuration(path, name)
        files_by_split = _files_by_split(path / config.get("data_dir", ""), config.get("data_files"))
    elif suffix_of(path) in SUFFIXES or not _HUB_NAME.fullmatch(source):  # a path must not become a look-up on the Hub
        raise DataError(f"{source or 'an empty name'}: no such file or folder{did_you_mean(source)}")
    else:
        return None
    for file in (file for files in files_by_split.values() for file in files):
        if NOT_UTF8.search(str(file)):
            raise DataError(f"{file}: its name is not UTF-8, and no report could hold it; rename it")
        if suffix_of(file) not in SUFFIXES:
            known = f"{join_names(SUFFIXES)}, the texts also with {join_names(COMPRESSED)}"
            raise DataError(f"{file}: cannot read {file.suffix or 'a file without suffix'}; use {known}")
    return {split: partial(_rows_of, files) for split, files in files_by_split.items()}


def _configuration(folder: Path, name: str | None) -> dict[str, Any]:
    """The configuration `name`, or the default one, in the README.md of a copied Hub dataset."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import metadata_load

    card, configs = folder / "README.md", MetadataConfigs()
    with failures_as_data_error(card):
        if card.is_file():
            configs = MetadataConfigs.from_dataset_card_data(metadata_load(card) or {})
        name = name or configs.get_default_config_name() or ("default" if configs else "")
    if name and name not in configs:
        known = join_names(configs) or "none"
        raise DataError(f"{folder} has no configuration {name!r} (--dataset_config); it has {known}")
    return configs.get(name, {})


def _files_by_split(folder: Path, data_files: Any) -> dict[str, list[Path]]:
    """The files of each split as `datasets` finds them: by patterns as in a README.md, else by their names."""
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns, sanitize_patterns

    place = glob.escape(str(folder))  # brackets in its name are no pattern
    found: dict[str, list[Path]] = {}
    with suppress(EmptyDatasetError):
        patterns = sanitize_patterns(data_files) if data_files else get_data_patterns(place)
        for split in patterns:
            with suppress(FileNotFoundError):  # a copy of a Hub dataset may lack a split
                files = DataFilesList.from_patterns(patterns[split], place)
                found[str(split)] = [Path(file) for file in sorted(set(files))]
        everything = set() if data_files else set(map(Path, DataFilesList.from_patterns(["**"], place)))
        left = sorted(file for file in everything.difference(*found.values()) if suffix_of(file) in DATA_SUFFIXES)
        if left:
            _say_once(f"{folder}: not read, as other files are named by split: {join_names(left[:5])}")
    if not data_files:
        suffixes = {suffix_of(file) for files in found.values() for file in files}
        wanted = DATA_SUFFIXES if suffixes & {*DATA_SUFFIXES} else SUFFIXES  # a .txt beside data is a note
        found = {split: [file for file in files if suffix_of(file) in wanted] for split, files in found.items()}
    if not any(found.values()):
        asked = f" for each pattern of data_files {data_files}" if data_files else ""
        raise DataError(f"{folder} holds no {join_names(SUFFIXES)} file{asked}, not even compressed ones")
    return {split: files for split, files in found.items() if files}


def _rows_of(paths: list[Path]) -> Iterator[Row]:
    for path in paths:
        if suffix_of(path) != ".parquet":
            yield from read_text_file(path)
            continue
        import datasets

        options = {"data_files": {"train": glob.escape(str(path))}, "split": "train", "streaming": True}
        with failures_as_data_error(path):
            dataset = datasets.load_dataset("parquet", **options)
        yield from _numbered(str(path), dataset)


def _checked(rows: list) -> Iterator[Row]:
    return (Row("rows", number, or_error(check_row, data)) for number, data in enumerate(rows, 1))


def _numbered(file: str, dataset: Any) -> Iterator[Row]:
    if hasattr(dataset, "decode"):  # images and sounds are not used, so their bytes may stay
        dataset = dataset.decode(False)
    # Whose numbers say nothing without their names: 0 may be "good".
    features = dataset.features or {}
    classes = {name: features[name].names for name in LABELS & features.keys() if hasattr(features[name], "names")}
    with failures_as_data_error(file):
        for number, data in enumerate(dataset, 1):
            named = {name: names[data[name]] for name, names in classes.items() if data[name] in range(len(names))}
            yield Row(file, number, _plain(data | named))


def _plain(value: Any, in_tools: bool = False) -> Any:
    """Numbers as in JSON, and tools as they were: Arrow gives each the keys of all others, with nulls."""
    if isinstance(value, list):
        return [_plain(item, in_tools) for item in value]
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None or not in_tools}
        return {key: _plain(kept[key], in_tools or key in TOOLS) for key in kept}
    return float(value) if isinstance(value, Decimal) else value

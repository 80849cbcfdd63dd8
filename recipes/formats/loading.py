"""Reads rows from files, folders and the Hub, and remembers for every row the file and the line it stands on.

`datasets` guesses types (dates become timestamps, "NA" becomes null, 007 becomes 7.0) and its errors do not name a
line, so text files are read here; Parquet, `save_to_disk` folders and Hub names are read by `datasets`.
"""

import csv
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from recipes.errors import UserError

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(text + packed for text in TEXT_SUFFIXES for packed in COMPRESSED))
# Messages in a cell of CSV, which knows no lists. With single quotes they are Python's, as pandas writes them.
_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value|tool_calls)["']\s*:""")
_SPLIT = re.compile(r"([\w.\-]+)(?:\[(\d*):(\d*)\])?")


class DataError(UserError):
    """Data that cannot be used. `report` is the formatting report where formatting had begun, else None."""

    report: Any = None


class RowError(Exception):
    """One row cannot be used; `message` says what was found, what was expected and what to do."""

    def __init__(self, message: str, column: str | None = None):
        super().__init__(message)
        self.message, self.column = message, column


class LostRows(RowError):
    """What follows in the file cannot be read either, so that leaving out one row would leave out an unknown many."""


class Row(NamedTuple):
    """`line` is 1-based: the physical line in a text file (a CSV header is line 1), else the number of the row."""

    file: str
    line: int
    data: Any  # a dict, the RowError that stands for it, or the line of JSON that holds it

    def read(self) -> dict | RowError:
        return _read_json_line(self.data) if isinstance(self.data, bytes) else self.data


@dataclass
class Rows:
    """Rows that can be read again and again without being held in memory: iterating yields `Row`. Can be pickled."""

    source: str
    open: Callable[[], Iterable[Row]]
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return (row._replace(data=row.read()) for row in self.unread())

    def unread(self) -> Iterator[Row]:
        """Rows whose data may still be a line of JSON, for a process that shall decode it."""
        return islice(self.open(), self.start, self.stop)


def load_rows(source, split: str = "train", name: str | None = None, data_files=None, streaming: bool = False) -> Rows:
    """Opens a dataset; of local sources, no row is read before the rows are iterated.

    Args:
        source: an existing .jsonl, .ndjson, .json, .csv or .parquet file (but for Parquet, perhaps with .gz, .bz2,
            .xz or .zst behind), a folder (a copy of a Hub dataset, files named by split, or one written by
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
    if not str(source):
        raise DataError("the name of the dataset is empty: no such file or folder")
    read = _open(str(source), split, name, data_files, streaming)
    return Rows(str(source), read, start, stop)


def list_splits(source, name: str | None = None, data_files=None) -> list[str]:
    """The splits that `load_rows` can open, without reading any row."""
    path = Path(source).expanduser()
    if isinstance(data_files, dict):
        return list(data_files)
    if data_files is not None or path.is_file():
        return ["train"]
    if path.is_dir():
        if (saved := _subfolder(path, name)) and (saved / "dataset_dict.json").exists():
            return json.loads((saved / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return ["train"] if saved and (saved / "state.json").exists() else list(_files_by_split(path, name))
    _refuse_missing_path(str(source))
    import datasets

    return _or_data_error(str(source), lambda: datasets.get_dataset_split_names(str(source), name))


def _open(source: str, split: str, name: str | None, data_files, streaming: bool) -> Callable[[], Iterable[Row]]:
    path = Path(source).expanduser()
    if isinstance(data_files, dict):
        if split not in data_files:
            raise DataError(f"{source}: no split {split!r} in data_files; it has {_listed(data_files)}")
        data_files = data_files[split]
    if data_files is not None and (path.is_dir() or source in ("json", "csv", "parquet")):
        folder = path if path.is_dir() else Path()
        chosen = [data_files] if isinstance(data_files, str | Path) else data_files
        return _read_files([folder / Path(file).expanduser() for file in chosen])
    if path.is_file():
        if split != "train":
            raise DataError(f"{source} is one file, its only split is 'train', but {split!r} was asked for")
        return _read_files([path])
    if path.is_dir():
        return _open_folder(path, name, split)
    _refuse_missing_path(source)
    import datasets

    options = {"data_files": data_files, "split": split, "streaming": streaming}
    dataset = _or_data_error(source, lambda: datasets.load_dataset(source, name, **options))
    return partial(_numbered, source, dataset)


def _open_folder(path: Path, name: str | None, split: str) -> Callable[[], Iterable[Row]]:
    folder = _subfolder(path, name)
    if folder and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists()):
        import datasets

        dataset = _or_data_error(str(folder), lambda: datasets.load_from_disk(str(folder)))
        by_split = dataset if isinstance(dataset, datasets.DatasetDict) else {"train": dataset}
    else:
        by_split = _files_by_split(path, name)
    if split not in by_split:
        raise DataError(f"{folder or path} has no split {split!r}; it has {_listed(by_split)}")
    found = by_split[split]
    return _read_files(list(map(Path, found))) if isinstance(found, list) else partial(_numbered, str(folder), found)


def _subfolder(path: Path, name: str | None) -> Path | None:
    folder = path / name if name else path
    return folder if folder.is_dir() else None


def _files_by_split(folder: Path, name: str | None) -> dict[str, list[str]]:
    """What `datasets` would put into each split of a folder: as its README.md says, else by the names of the files."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern, sanitize_patterns

    def files(glob: str) -> list[str]:
        try:
            return [file for file in resolve_pattern(glob, str(folder)) if file.lower().endswith(SUFFIXES)]
        except FileNotFoundError:  # one of several patterns for the same split
            return []

    config = _configuration(folder, name)
    if config is None:
        folder = folder / name if name else folder
    elif "data_dir" in config:
        folder = folder / config["data_dir"]
    try:
        given = (config or {}).get("data_files")
        patterns = sanitize_patterns(given) if given else get_data_patterns(str(folder))
    except EmptyDatasetError:
        patterns = {}
    found = {str(split): sorted({file for glob in globs for file in files(glob)}) for split, globs in patterns.items()}
    found = {split: paths for split, paths in found.items() if paths}
    if not found:
        raise DataError(f"{folder} holds no {_listed(TEXT_SUFFIXES)} or .parquet file, not even compressed ones")
    return found


def _configuration(folder: Path, name: str | None) -> dict | None:
    """What the README.md of a copied Hub dataset says of a configuration; None where a folder itself is meant."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import metadata_load

    def read() -> tuple[MetadataConfigs, str | None]:
        configs = MetadataConfigs.from_dataset_card_data(metadata_load(card) or {})
        return configs, configs.get_default_config_name()

    card = folder / "README.md"
    configs, default = _or_data_error(str(card), read) if card.is_file() else ({}, None)
    if configs and (name or default) is None:
        raise DataError(f"{folder} has the configurations {_listed(configs)}: choose one with --dataset_config")
    if (name or default) in configs:
        return configs[name or default]
    if name and not (folder / name).is_dir():
        known = f"its configurations are {_listed(configs)}" if configs else "a configuration here is a subfolder"
        raise DataError(f"{folder} has no subfolder or configuration {name!r}: {known}")
    return None


def _or_data_error(source: str, load: Callable[[], Any]):
    """Hub and `datasets` failures come in dozens of exception types; the user needs the source and the last line."""
    try:
        return load()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        local = "" if Path(source).expanduser().exists() else f"no file or folder {source!r} is here, and "
        raise DataError(f"{local}`datasets` could not load {source!r}: {type(error).__name__}: {reason}") from error


def _refuse_missing_path(source: str) -> None:
    """A path that is not there must not become a Hub lookup: Hub names are `name` or `owner/name`."""
    looks_like_path = source.endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.\-]*(/\w[\w.\-]*)?", source)
    if looks_like_path:
        raise DataError(f"{source}: no such file or folder")


def _listed(names: Iterable) -> str:
    return ", ".join(map(str, names)) or "none"


def _read_files(paths: list[Path]) -> Callable[[], Iterable[Row]]:
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if not path.name.lower().endswith(SUFFIXES):
            known = f"{_listed((*TEXT_SUFFIXES, '.parquet'))}, the texts also with {_listed(COMPRESSED)}"
            raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {known}")
    return partial(_rows_of, paths)


def _rows_of(paths: list[Path]) -> Iterator[Row]:
    for path in paths:
        yield from _read_file(path)


def _read_file(path: Path) -> Iterator[Row]:
    file = str(path)
    if path.suffix.lower() == ".parquet":
        import datasets

        options = {"data_files": {"train": file}, "split": "train", "streaming": True}
        yield from _numbered(file, _or_data_error(file, lambda: datasets.load_dataset("parquet", **options)))
        return
    try:
        with _open_text(path) as stream:
            yield from _read_text(path, stream)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or f"the file is damaged: {error}"
        raise DataError(f"{file}: {reason}") from error


def _open_text(path: Path) -> BinaryIO:
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    import fsspec

    try:
        return fsspec.open(str(path), "rb", compression="infer").open()
    except ValueError as error:
        raise DataError(f"{path}: no package for {path.suffix} is installed; pip install zstandard") from error


def _read_text(path: Path, stream: BinaryIO) -> Iterator[Row]:
    file = str(path)
    suffix = path.suffixes[-2 if path.suffix.lower() in COMPRESSED else -1].lower()
    head = stream.read(64)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: this is UTF-16; convert it, e.g. iconv -f UTF-16 -t UTF-8 {path.name}")
    start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    stream.seek(start)
    if suffix == ".csv":
        yield from _read_csv(file, stream)
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_json_list(file, stream.read())
    elif suffix == ".json" and not stream.readline().rstrip().endswith(b"}"):
        yield Row(file, 1, RowError("one JSON object over many lines; expected a list [...] or an object per line"))
    else:
        stream.seek(start)
        yield from _read_jsonl(file, stream)


def _numbered(file: str, dataset: Iterable[dict]) -> Iterator[Row]:
    try:
        for number, data in enumerate(dataset, 1):
            yield Row(file, number, _without_filled_nulls(data))
    except (OSError, ValueError) as error:  # Arrow's own errors are among these
        raise DataError(f"{file}: {type(error).__name__}: {error}") from error


def _without_filled_nulls(value: Any, in_tools: bool = False) -> Any:
    """Arrow gives every tool call the keys of all others, with nulls, which would be rendered."""
    if isinstance(value, list):
        return [_without_filled_nulls(item, in_tools) for item in value]
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None or not in_tools}
        return {key: _without_filled_nulls(kept[key], in_tools or key in ("tools", "tool_calls")) for key in kept}
    return value


def _read_jsonl(file: str, stream: Iterable[bytes]) -> Iterator[Row]:
    return (Row(file, number, raw) for number, raw in enumerate(stream, 1) if not raw.isspace())


def _read_json_line(raw: bytes) -> dict | RowError:
    try:
        text = raw.decode("utf-8")
        data, end = _decode(text, _skip_space(text, 0))
        if text[end:].strip():
            return RowError(f"text after the JSON object, from character {end + 1} on; one object per line")
        return data
    except UnicodeDecodeError as error:
        return RowError(_not_utf8(raw[error.start]))
    except (ValueError, RecursionError) as error:
        return RowError(_not_json(error))


def _read_json_list(file: str, raw: bytes) -> Iterator[Row]:
    """The elements of one JSON list, each at the line it starts on. Nothing after the first syntax error is read."""
    line, counted = 1, 0
    try:
        text = raw.decode("utf-8")
        position = _skip_space(text, text.index("[") + 1)
        closed = text[position : position + 1] == "]"
        while not closed:
            line, counted = line + text.count("\n", counted, position), position
            data, position = _decode(text, position)
            yield Row(file, line, data)
            position = _skip_space(text, position)
            closed = text[position : position + 1] == "]"
            if not closed:
                if text[position : position + 1] != ",":
                    raise json.JSONDecodeError("expected ',' or ']' after an element", text, position)
                position = _skip_space(text, position + 1)
        position = _skip_space(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("text after the end of the list", text, position)
    except UnicodeDecodeError as error:
        yield Row(file, raw.count(b"\n", 0, error.start) + 1, LostRows(_not_utf8(raw[error.start])))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        yield Row(file, line, LostRows(f"{_not_json(error)}; nothing after it was read"))


def _skip_space(text: str, position: int) -> int:
    return json.decoder.WHITESPACE.match(text, position).end()


def _decode(text: str, position: int) -> tuple[dict | RowError, int]:
    """The object that starts at `position`, or what is wrong with it, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, position)
        escapes = text.find("\\ud", position, end) >= 0 or text.find("\\uD", position, end) >= 0
        return value if isinstance(value, dict) and not escapes else check_row(value), end
    except RowError as error:
        return error, json.JSONDecoder().raw_decode(text, position)[1]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"the key {twice!r} stands twice in one object; remove one of them", twice)
    return result


def _no_constant(constant: str):
    raise RowError(f"{constant} is not valid JSON; write a number or null")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def check_row(value: Any) -> dict:
    """The row itself, if it is an object whose text can be stored; raises RowError."""
    if not isinstance(value, dict):
        raise RowError(f"found a {type(value).__name__}, expected an object {{...}} with named columns")
    for column, cell in value.items():
        check_surrogates(cell, column)
    return value


def check_surrogates(value: Any, column: str) -> None:
    """Half a UTF-16 pair cannot be stored as UTF-8; `datasets` would fail on it much later."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise RowError(f"the text holds half a character ({half}, a lone surrogate); repair it", column) from None
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else (*value, *value.values()):
            check_surrogates(item, column)


def _not_utf8(byte: int) -> str:
    return f"not UTF-8 (byte 0x{byte:02x}), perhaps Latin-1; convert the file, e.g. iconv -f LATIN1 -t UTF-8"


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON at character {error.colno}: {error.msg}; is the file cut off or edited by hand?"
    return "the JSON is nested too deeply" if isinstance(error, RecursionError) else f"not usable as JSON: {error}"


def _read_csv(file: str, stream: Iterable[bytes]) -> Iterator[Row]:
    # Bytes that are not UTF-8 pass as surrogates, so that only their own row is refused.
    reader = csv.reader((raw.decode("utf-8", "surrogateescape") for raw in stream), strict=True)
    csv.field_size_limit(2**31 - 1)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(file, line, LostRows(f"not valid CSV: {error}; is a quote left open? Nothing after it was read"))
            return
        if not cells:
            continue
        if header is None:
            header = _check_header(file, line, cells)
        else:
            yield Row(file, line, _csv_row(header, cells))


def _check_header(file: str, line: int, header: list[str]) -> list[str]:
    problem = None
    if len(set(header)) < len(header):
        problem = f"two columns are called {next(name for name in header if header.count(name) > 1)!r}"
    elif not all(name.strip() for name in header):
        problem = "a column has no name"
    elif len(header) == 1 and re.search("[;\t|]", header[0]):
        problem = f"the only column is {header[0]!r}: columns must be separated by commas"
    if problem:
        raise DataError(f"{file}:{line}: CSV header: {problem}")
    return header


def _csv_row(header: list[str], cells: list[str]) -> dict | RowError:
    if len(cells) != len(header):
        return RowError(
            f"found {len(cells)} fields, expected {len(header)} as in the header; quote fields that hold a comma"
        )
    row = dict(zip(header, cells, strict=True))
    for column, cell in row.items():
        bad = re.search("[\udc80-\udcff]", cell)
        if bad:
            return RowError(_not_utf8(ord(bad[0]) - 0xDC00), column)
        if _MESSAGES.match(cell):
            try:
                row[column] = json.loads(cell)
            except ValueError:
                return RowError(
                    f"found {cell[:40]!r}, messages that are not valid JSON; write them with json.dumps", column
                )
    return row

"""Several formatted datasets as one, with weights."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.mapping import parse_mapping
from recipes.data.rows import DataError, join_names


@dataclass
class Source:
    """One source of a mixture. Fields are named as in TRL's `DatasetConfig`, where it has them.

    `fraction` is the share of the source in the mixture, on any scale; all sources have one, or none.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_files: Any = None
    fraction: float | None = None
    schema: str | None = None
    mapping: Any = None

    @classmethod
    def parse(cls, item: str | Mapping) -> "Source":
        """From `PATH`, `PATH=FRACTION` or a mapping of the fields."""
        if isinstance(item, str):
            path, _, fraction = item.rpartition("=")
            whole = not path or Path(item).expanduser().exists()
            item = {"path": item}
            with suppress(ValueError):  # no number: "=" belongs to the name
                item = item if whole else {"path": path, "fraction": float(fraction)}
        try:
            source = cls(**item)
            source.name = source.name and str(source.name)  # in YAML, 2024 is a number
            source.split = str(source.split)
            usable = source.fraction is None or 0 < source.fraction < float("inf")
        except TypeError:
            fields = join_names(cls.__dataclass_fields__)
            raise DataError(f"datasets: a source has path and perhaps more of {fields}; found {item!r}") from None
        if not usable:
            raise DataError(f"datasets: the fraction of {source.path} is {source.fraction}; expected more than 0")
        return source

    def options(self) -> dict[str, Any]:
        """Those keyword arguments of `format_dataset` that the source has for itself."""
        own = {"schema": self.schema, "mapping": parse_mapping(self.mapping)}
        return {name: value for name, value in own.items() if value}


def parse_sources(items: Iterable[str | Mapping]) -> list[Source]:
    sources = [Source.parse(item) for item in items]
    if len({source.fraction is None for source in sources}) > 1:
        raise DataError("datasets: give every source a fraction, or none")
    return sources


def combine(parts: list, sources: list[Source], streaming: bool, seed: int):
    """Combines formatted datasets into one.

    As in TRL, fractions are shares of the mixture, which is as large as possible without repeating a row, and takes
    the first rows of each source. Streams are interleaved at random instead, until the first one ends.
    """
    from datasets import concatenate_datasets, interleave_datasets

    if sources[0].fraction is None:
        return concatenate_datasets(parts)
    shares = [source.fraction / sum(each.fraction for each in sources) for source in sources]
    if streaming:
        return interleave_datasets(parts, shares, seed)
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    parts = [part.select(range(round(share * total))) for part, share in zip(parts, shares, strict=True)]
    if unused := [source.path for part, source in zip(parts, sources, strict=True) if not len(part)]:
        raise DataError(f"datasets: of {round(total)} rows none is of {unused[0]}: give it a larger fraction")
    return concatenate_datasets(parts)

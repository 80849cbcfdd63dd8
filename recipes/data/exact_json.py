"""A column of any JSON values for `datasets`.

Its own `Json` (5.2) reads 0.7 back as 0.7000000000000001, 1e-12 as 0.0 and "7" as 7, and leaves objects with integers
over 64 bits as text. A column of JSON text, as TRL has for `tools`, would not be decoded for chat templates and reward
functions.
"""

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Json
from datasets.features.features import register_feature


@dataclass
class ExactJson(Json):
    """Stored as text, read and written by `json`."""

    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="ExactJson", init=False, repr=False)

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value)

    def decode_example(self, value: str | None, token_per_repo_id: dict | None = None) -> Any:
        return None if value is None else json.loads(value)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        return storage.storage if isinstance(storage, pa.JsonArray) else storage


with warnings.catch_warnings(action="ignore"):  # it warns that it is experimental
    register_feature(ExactJson, "ExactJson")

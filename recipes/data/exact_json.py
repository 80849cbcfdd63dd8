"""A column of any JSON values for `datasets`, whose own `Json` reads 0.7 back as 0.7000000000000001 and "7" as 7."""

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Json
from datasets.features.features import register_feature


@dataclass
class ExactJson(Json):
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="ExactJson", init=False, repr=False)

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value)

    def decode_example(self, value: str | None, token_per_repo_id: dict | None = None) -> Any:
        return None if value is None else json.loads(value)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        return storage.storage if isinstance(storage, pa.JsonArray) else storage


with warnings.catch_warnings(action="ignore"):  # that this function is experimental
    register_feature(ExactJson, "ExactJson")

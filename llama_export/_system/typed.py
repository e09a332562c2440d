"""JSON documents of a known shape as frozen dataclasses: one reader for manifests, sidecars, reports and cases.

A document's shape is written once, as a dataclass; msgspec checks a parsed document against it. The annotated types
below carry the limits that such documents share.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""A size, an offset or a number of things."""
Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def typed(data: Any, kind: type[T]) -> T:
    """A parsed JSON value as ``kind``. Keys that ``kind`` does not have are ignored.

    Raises:
        ValueError: a missing key or a value of another type or outside its limits; the message ends with its path, as in
            "Expected `int`, got `str` - at `$.weights[0].size`".
    """
    return msgspec.convert(data, kind, strict=True)

"""Objects of the owners' JSON lists, checked for what is needed of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.rows import stream_items


def stream_fields(file: Path, key: str, **fields: type) -> Iterator[tuple[Any, ...]]:
    """Yield the named fields of each object in the list that `key` names.

    Args:
        fields: each with its type: `id=int, caption=str`.

    Raises: ValueError naming file and item where a field is missing or of another type.
    """
    for number, item in enumerate(stream_items(file, key)):
        yield take_fields(item, f"{file}: item {number} of {key!r}", **fields)


def take_fields(item: object, place: str, **fields: type) -> tuple[Any, ...]:
    """Return the named fields of an object. Raises: ValueError naming the place."""
    values = tuple(item.get(field) for field in fields) if isinstance(item, dict) else ()
    if not values or not all(map(isinstance, values, fields.values())):
        wanted = ", ".join(f"{field} ({kind.__name__})" for field, kind in fields.items())
        raise ValueError(f"{place} is {str(item)[:200]}, expected an object with {wanted}")
    return values

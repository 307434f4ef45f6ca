"""Labels of tars that somebody else wrote: from `.cls`, `.json` or `.txt` members.

A rule is `cls`, `txt`, `none`, `json` (the fields `label_index` and `label`) or `json:FIELD`. What
a member says is a `Stated` label: a class index, a class name, or both. An index of -1 or an empty
name is no label, as in the sidecars of the format.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from prep.errors import UsageError
from prep.outcome import Reason, RowFailure

if TYPE_CHECKING:
    from collections.abc import Iterable

Stated = tuple[int | None, str | None]
"""(class index, class name): None where it is not said; both None: no label."""

MAX_CLASSES = 100_000
_MAX_NAME = 200


def check_rule(rule: str) -> str:
    """Return a rule; UsageError when it is none."""
    if rule in ("auto", "cls", "txt", "json", "none") or re.fullmatch(r"json:.+", rule):
        return rule
    raise UsageError(f"label rule {rule!r} must be auto, cls, txt, json, json:FIELD or none")


def stated_label(rule: str, texts: dict[str, bytes]) -> Stated:
    """Return what a sample's members say; RowFailure where the rule's member is not there or odd.

    `texts` holds the members by extension.
    """
    if rule == "none":
        return None, None
    extension = rule.partition(":")[0]
    if extension not in texts:
        raise RowFailure(Reason.BAD_LABEL, f"no .{extension} member")
    if extension == "json":
        return _from_json(texts["json"], rule.partition(":")[2])
    text = _text(texts[extension])
    if extension == "cls" and re.fullmatch(r"-?[0-9]{1,9}", text):
        return _index(int(text)), None
    return None, _name(text)


def _from_json(data: bytes, name: str) -> Stated:
    try:
        values: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise RowFailure(Reason.BAD_LABEL, "its .json is not JSON") from None
    if not isinstance(values, dict):
        raise RowFailure(Reason.BAD_LABEL, "its .json is no object")
    if name:
        return _value(values.get(name), name)
    index, label = values.get("label_index"), values.get("label")
    if index is None or not isinstance(label, str):
        return _value(index if label is None else label, "label")
    if isinstance(index, str):  # _value would take it for a name
        raise RowFailure(Reason.BAD_LABEL, "its .json has an unusable field label_index")
    number, _ = _value(index, "label_index")
    if number is None and label:
        text = f"class index -1 (no label) with the label {_name(label)!r}"
        raise RowFailure(Reason.BAD_LABEL, text)
    return number, _name(label) if label else None


def _value(value: Any, name: str) -> Stated:
    if isinstance(value, int) and not isinstance(value, bool):
        return _index(value), None
    if isinstance(value, str):
        return (None, _name(value.strip())) if value.strip() else (None, None)
    what = "no" if value is None else "an unusable"
    raise RowFailure(Reason.BAD_LABEL, f"its .json has {what} field {name}")


def _index(value: int) -> int | None:
    if not -1 <= value < MAX_CLASSES:
        raise RowFailure(Reason.BAD_LABEL, f"class index {value}")
    return None if value == -1 else value


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise RowFailure(Reason.BAD_LABEL, "not UTF-8") from None


def _name(text: str) -> str:
    if not text or len(text) > _MAX_NAME or not text.isprintable():
        raise RowFailure(Reason.BAD_LABEL, f"not one line of 1 to {_MAX_NAME} characters")
    return text


def class_list(labels: Iterable[Stated]) -> tuple[str, ...]:
    """Return the classes that the labels of a dataset make; UsageError when they make no list.

    Names alone are sorted. Indices alone are named by themselves, from 0 to the highest. Where
    both are given they must be one to one, without a gap.
    """
    found = {label for label in labels if label != (None, None)}
    indices = {index for index, _ in found if index is not None}
    names = {name for _, name in found if name is not None}
    if not indices:
        return tuple(sorted(names))
    if not names:
        return tuple(str(number) for number in range(max(indices) + 1))
    if len(found) != len(indices) or len(found) != len(names) or max(indices) != len(found) - 1:
        raise UsageError(
            "the labels' names and indices do not make one list of classes (a name with two "
            "indices, an index with two names, or a gap); give the list with --classes FILE"
        )
    return tuple(name for _, name in sorted((index, str(name)) for index, name in found))


def label_index(stated: Stated, class_names: dict[str, int]) -> int:
    """Return the position in the class list, -1 for no label; RowFailure for no class of it."""
    index, name = stated
    if index is not None and index >= len(class_names):
        raise RowFailure(Reason.BAD_LABEL, f"class index {index} of {len(class_names)} classes")
    if name is None:
        return -1 if index is None else index
    if name not in class_names:
        raise RowFailure(Reason.BAD_LABEL, f"{name!r} is not in the list of classes")
    if index is not None and class_names[name] != index:
        raise RowFailure(Reason.BAD_LABEL, f"{name!r} is not class {index} of the list")
    return class_names[name]

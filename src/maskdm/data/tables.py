"""Images in a table: parquet files, or a data set saved by the Hugging Face `datasets` library."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maskdm.data.decode import BrokenImage
from maskdm.data.source import Item, Source, class_labels, digest_files
from maskdm.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "img", "images", "picture")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "category")
SPLITS = ("train", "validation", "test")
GROUP = 1000
"""Rows of a saved data set that are read together."""
KEPT = 2048
"""Rows kept in memory, at least, and two groups of them: threads that read in order are that far apart."""


@dataclass
class _Rows:
    """The image column, read a group of rows at a time, the latest groups kept."""

    sizes: Sequence[int]
    read: Callable[[int], pa.ChunkedArray]
    """The image column of a group."""
    kept: OrderedDict[int, pa.ChunkedArray] = field(default_factory=OrderedDict)
    lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(self.sizes, dtype=np.int64))])

    def load(self, index: int) -> Item:
        """The bytes of an image, or the path of its file. Raises BrokenImage for an empty cell."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        with self.lock:
            column = self.kept.get(group)
            if column is None:
                column = self.kept[group] = self._read(group)
                self._forget()
            self.kept.move_to_end(group)
        cell: Any = column[index - int(self.starts[group])].as_py()
        if isinstance(cell, dict):
            path = cell.get("path")
            cell = cell.get("bytes") or (Path(path) if isinstance(path, str) and path else path)
        if not cell:
            raise BrokenImage("empty cell")
        if not isinstance(cell, bytes | Path):
            raise BrokenImage("not the bytes of an image")
        return cell

    def _read(self, group: int) -> pa.ChunkedArray:
        """The image column of a group. Raises BrokenImage where it cannot be read whole."""
        try:
            column = self.read(group)
        except Exception as error:  # pyarrow's readers raise whatever a damaged file leads them to
            raise BrokenImage(f"rows that cannot be read ({_first_line(error)})") from error
        if len(column) != self.sizes[group]:
            raise BrokenImage(f"a group of {self.sizes[group]} rows, of which {len(column)} are there")
        return column

    def _forget(self) -> None:
        rows = sum(map(len, self.kept.values()))
        while len(self.kept) > 2 and rows - len(next(iter(self.kept.values()))) >= KEPT:
            rows -= len(self.kept.popitem(last=False)[1])


@dataclass(frozen=True)
class _Columns:
    """The columns found: the image's, the label's, and the names of integer labels."""

    image: str
    label: str | None
    class_names: tuple[str, ...]


def open_parquet(location: str, names: Sequence[str], open_file: Callable[[str], Any], identify: Callable[[], str] | None = None) -> Source:
    """Parquet files, as one table. `open_file` gives a name's path or opened file. Raises UserError where they do not go together."""
    parquet = _require("pyarrow.parquet", location)
    names, notes = one_split(names)
    try:
        files = [parquet.ParquetFile(open_file(name)) for name in names]
        columns = _find_columns(location, files[0].schema_arrow)
        for name, file in zip(names, files, strict=True):
            if columns.image not in file.schema_arrow.names or (columns.label and columns.label not in file.schema_arrow.names):
                raise UserError(f"{location}: {name} has other columns than {names[0]}; give files of one data set")
        groups = [(file, group) for file in files for group in range(file.num_row_groups)]
        nested = f"{columns.image}.path" if _has_path(files[0].schema_arrow.field(columns.image).type) else None
        paths = _column(files, nested, lambda value: value["path"] if value else None) if nested else None
        values = _column(files, columns.label, lambda value: value) if columns.label else None
    except UserError:
        raise
    except Exception as error:  # pyarrow's readers raise whatever a damaged file leads them to
        raise UserError(f"{location} cannot be read as parquet: {_first_line(error)}; is the file whole?") from error
    rows = _Rows(
        sizes=[file.metadata.row_group(group).num_rows for file, group in groups],
        read=lambda index: groups[index][0].read_row_group(groups[index][1], columns=[columns.image]).column(columns.image),
    )
    identify = identify or partial(digest_files, [(name, Path(open_file(name))) for name in names])
    kind = f"{len(names)} parquet files" if len(names) > 1 else "parquet file"
    return _source(location, kind, notes, rows, columns, paths, values, identify)


def open_hub_folder(location: str, root: Path) -> Source:
    """A folder written by `Dataset.save_to_disk`; of several splits, `train` is taken. Raises UserError."""
    datasets = _require("datasets", location)
    notes: tuple[str, ...] = ()
    try:
        table = datasets.load_from_disk(str(root))
    except Exception as error:  # the library raises what its parts raise; the message is what there is to tell
        raise UserError(f"{location} cannot be loaded by the datasets library: {_first_line(error)}") from error
    if isinstance(table, dict):
        splits = list(table)
        if "train" not in splits and len(splits) > 1:
            raise UserError(f"{location} has the splits {', '.join(splits)}; give one of them, such as {location}/{splits[0]}")
        split = "train" if "train" in splits else splits[0]
        notes = (f"split {split} taken of {', '.join(splits)}",) if len(splits) > 1 else ()
        table = table[split]
    arrow = table.with_format("arrow")
    schema = table.features.arrow_schema
    columns = _find_columns(location, schema)
    cells = arrow.select_columns([columns.image])
    starts = range(0, len(table), GROUP)
    rows = _Rows(
        sizes=[min(GROUP, len(table) - start) for start in starts],
        read=lambda index: cells[starts[index] : starts[index] + GROUP].column(columns.image),
    )
    values = arrow.select_columns([columns.label])[:].column(columns.label).to_pylist() if columns.label else None
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix in (".arrow", ".json"))
    identify = partial(digest_files, [(path.relative_to(root).as_posix(), path) for path in files])
    return _source(location, "data set saved by datasets", notes, rows, columns, None, values, identify)


def _source(
    location: str,
    kind: str,
    notes: tuple[str, ...],
    rows: _Rows,
    columns: _Columns,
    paths: list[Any] | None,
    values: list[Any] | None,
    identify: Callable[[], str],
) -> Source:
    labels, class_names = _labels(location, columns, values)
    return Source(
        name=location,
        description=kind + (f", {len(class_names)} classes" if class_names else ""),
        class_names=class_names,
        notes=notes,
        names=_names(paths, int(rows.starts[-1])),
        labels=labels,
        read=rows.load,
        identify=identify,
    )


def _require(module: str, location: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{location} needs the package {module.split('.')[0]}; pip install 'maskdm[data]'") from error


def one_split(names: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
    """Of files named by split, as the Hugging Face hub lays them out (train-00000-of-00002.parquet, or in folders), those of one."""
    of: dict[str, list[str]] = {}
    for name in names:
        *folders, stem = name.split("/")
        of.setdefault(next((split for split in SPLITS if stem.startswith(split) or split in folders), ""), []).append(name)
    if len(of) < 2 or "" in of:
        return names, ()
    split = next(split for split in SPLITS if split in of)
    return of[split], (f"split {split} taken of {', '.join(of)}; name a file to take another",)


def _find_columns(location: str, schema: pa.Schema) -> _Columns:
    import pyarrow as pa

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    fitting = [name for name in schema.names if holds_images(schema.field(name).type)]
    named = [name for name in IMAGE_COLUMNS if name in fitting]
    if not named and len(fitting) != 1:
        raise UserError(f"{location} has the columns {', '.join(schema.names)}; name the one with encoded images 'image'")
    label = next((name for name in LABEL_COLUMNS if name in schema.names and _is_label(schema.field(name).type)), None)
    return _Columns((named or fitting)[0], label, _class_names(schema, label))


def _is_label(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def _has_path(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and any(kind.field(i).name == "path" for i in range(kind.num_fields))


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """From the schema's key `classes`, comma-joined, or from the ClassLabel that the Hugging Face library notes there."""
    metadata = schema.metadata or {}
    if label is None:
        return ()
    if b"classes" in metadata:
        return tuple(name.strip() for name in metadata[b"classes"].decode("utf-8", "replace").split(","))
    try:
        feature = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][label]
        return tuple(feature["names"]) if feature.get("_type") == "ClassLabel" else ()
    except (ValueError, KeyError, TypeError):  # metadata of another shape: no names there
        return ()


def _column(files: Sequence[Any], name: str | None, pick: Callable[[Any], Any]) -> list[Any]:
    return [pick(value) for file in files for value in file.read(columns=[name]).column(0).to_pylist()]


def _labels(location: str, columns: _Columns, values: list[Any] | None) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    if values is None:
        return None, ()
    if not columns.class_names or any(isinstance(value, str) for value in values):
        return class_labels(values)
    numbers = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    if numbers.max(initial=-1) >= len(columns.class_names):
        named = len(columns.class_names)
        raise UserError(f"{location}: column {columns.label} has class {numbers.max()}, but only {named} classes are named")
    if len(columns.class_names) < 2 or numbers.max(initial=-1) < 0:
        return None, ()
    return np.maximum(numbers, -1), columns.class_names


def _names(paths: list[Any] | None, count: int) -> list[str]:
    """The paths noted in the table, with the row where a path is missing or not unique."""
    if paths is None:
        return [f"row {index}" for index in range(count)]
    times = Counter(paths)
    return [f"row {i}" if not path else path if times[path] == 1 else f"{path} (row {i})" for i, path in enumerate(paths)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

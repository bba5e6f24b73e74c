"""A folder of image files: flat, or with one sub-folder per class."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from maskdm.data.source import Source, class_labels, readable_name

EXTENSIONS = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"}
)
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev"})


@dataclass
class Listing:
    """Files below a folder as (relative path with forward slashes, size, time of change in ns), and what was passed over."""

    images: list[tuple[str, int, int]] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    """Passed-over files by extension."""
    hidden: int = 0
    unreadable: list[str] = field(default_factory=list)
    """Sub-folders that may not be opened."""


def list_folder(root: Path) -> Listing:
    """Every file below a folder. Links are followed; a folder reached twice, as in a loop of links, is listed once."""
    listing = Listing()
    seen: set[tuple[int, int]] = set()
    pending = [("", root)]
    while pending:
        prefix, folder = pending.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = list(os.scandir(folder))
        except OSError:
            listing.unreadable.append(readable_name(prefix) or str(root))
            continue
        below: list[tuple[str, Path]] = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                listing.hidden += 1
            elif _is_folder(entry):
                below.append((f"{prefix}{entry.name}/", Path(entry.path)))
            else:
                _add_file(listing, f"{prefix}{entry.name}", entry)
        # popped from the end: real folders before links to them, so that a folder is listed under its own name
        pending.extend(sorted(below, key=lambda item: (item[1].is_symlink(), item[0]), reverse=True))
    listing.images.sort()
    listing.parquet.sort()
    listing.tars.sort()
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add_file(listing: Listing, name: str, entry: os.DirEntry[str]) -> None:
    extension = os.path.splitext(entry.name)[1].lower()
    if extension in EXTENSIONS:
        try:
            status = entry.stat()
            if stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                listing.images.append((name, status.st_size, status.st_mtime_ns))
        except OSError:  # a link to nowhere: listed, and found broken when decoded
            listing.images.append((name, -1, -1))
    elif extension == ".parquet":
        listing.parquet.append(name)
    elif extension == ".tar":
        listing.tars.append(name)
    else:
        listing.others[extension or "no extension"] += 1


def open_images(location: str, root: Path, listing: Listing) -> Source:
    """The images of a listing that has some."""
    paths = [name for name, _, _ in listing.images]
    tops = [name.split("/", 1)[0] if "/" in name else None for name in paths]
    folders = sorted({top for top in tops if top is not None})
    notes = [*_passed_over(listing)]
    labels, class_names = None, ()
    if None in tops and folders:
        notes.append(f"images lie both in {location} and in its sub-folders: taken as without classes")
    elif len(folders) > 1:
        labels, class_names = class_labels([None if top is None else top for top in tops])
        class_names = tuple(map(readable_name, class_names))
        if {name.lower() for name in folders} <= SPLITS:
            notes.append(f"sub-folders {', '.join(folders)} are taken as classes; give {location}/{folders[-1]} for one alone")
    description = f"folder, {len(folders)} classes" if class_names else "folder"
    return Source(
        name=location,
        description=description,
        class_names=class_names,
        notes=tuple(notes),
        names=[readable_name(path) for path in paths],
        labels=labels,
        read=lambda index: root / paths[index],
        identify=partial(_digest, listing.images),
    )


def _passed_over(listing: Listing) -> list[str]:
    notes: list[str] = []
    others = listing.others + Counter({".parquet": len(listing.parquet), ".tar": len(listing.tars)})
    if others.total():
        kinds = ", ".join(f"{count} {extension}" for extension, count in others.most_common(5))
        notes.append(f"{others.total()} files that are no images passed over: {kinds}{', ...' if len(others) > 5 else ''}")
    if listing.hidden:
        notes.append(f"{listing.hidden} hidden files or folders passed over")
    for name in listing.unreadable:
        notes.append(f"folder {name} may not be read: passed over")
    return notes


def _digest(images: list[tuple[str, int, int]]) -> str:
    digest = hashlib.sha256()
    for name, size, changed in images:
        digest.update(f"{name}\0{size}\0{changed}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()

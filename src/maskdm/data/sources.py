"""From a location, as the user writes it, to the images there."""

from __future__ import annotations

from pathlib import Path

from maskdm.data.arrays import open_array, open_digits
from maskdm.data.elsewhere import is_pattern, open_pattern, open_shards, open_tars, open_url
from maskdm.data.emoji import open_emoji
from maskdm.data.folder import EXTENSIONS, list_folder, open_images
from maskdm.data.index import INDEX, is_index
from maskdm.data.source import Source
from maskdm.data.tables import open_hub_folder, open_parquet
from maskdm.errors import UserError, nearest

BUILT_IN = ("digits", "emoji")
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


def open_source(location: str) -> Source:
    """Open a folder, table, data set folder, array, built-in name, or shards here or behind a URL. Raises UserError naming what is wrong.

    Reads names, sizes and labels; images are read one by one later. A built-in name wins over a folder of that name,
    which ./digits would be.
    """
    match location:
        case "digits":
            return open_digits(location)
        case "emoji":
            return open_emoji(location)
        case _ if is_pattern(location):
            source = open_pattern(location)
        case _ if "://" in location:
            source = open_url(location)
        case _:
            path = Path(location).expanduser()
            source = _open_folder(location, path.resolve()) if path.is_dir() else _open_file(location, path.resolve())
    if len(source) == 0:
        raise UserError(f"{location} holds no images; give one that does, or a built-in: {', '.join(BUILT_IN)}")
    return source


def _open_folder(location: str, root: Path) -> Source:
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return open_hub_folder(location, root)
    if (root / INDEX).is_file() and is_index((root / INDEX).read_bytes()[:200]):
        return open_shards(location, str(root))
    listing = list_folder(root)
    if listing.images:
        return open_images(location, root, listing)
    if listing.parquet:
        return open_parquet(location, listing.parquet, lambda name: root / name)
    if listing.tars:
        return open_tars(location, str(root), listing.tars)
    if listing.unreadable:
        raise UserError(f"folder {location} may not be read: {listing.unreadable[0]}; change its permissions")
    if not listing.others:
        raise UserError(f"folder {location} is empty; put images such as .png or .jpg there, or give another")
    kinds = ", ".join(f"{count} {extension}" for extension, count in listing.others.most_common(3))
    raise UserError(f"folder {location} has no images, only {kinds}; give one with .png, .jpg, .webp ...")


def _open_file(location: str, path: Path) -> Source:
    if not path.exists():
        close = nearest(location, [*BUILT_IN, *_beside(Path(location))])
        raise UserError(f"'{location}' is no folder, file or built-in name ({', '.join(BUILT_IN)}){close}")
    kind = path.suffix.lower()
    if kind == ".parquet":
        return open_parquet(location, [path.name], lambda name: path.parent / name)
    if kind == ".tar":
        return open_tars(location, str(path.parent), [path.name])
    if kind in (".npy", ".npz"):
        return open_array(location, path)
    if kind in EXTENSIONS:
        raise UserError(f"{location} is a single image; give the folder of your images, such as {Path(location).parent}")
    if kind in ARCHIVES:
        raise UserError(f"{location} is an archive; unpack it and give the folder")
    raise UserError(f"{location} is a '{kind}' file; give a folder of images, .parquet, .npz, .npy, or {', '.join(BUILT_IN)}")


def _beside(path: Path) -> list[str]:
    """Names next to a path that does not exist, one of which may have been meant."""
    try:
        return [str(path.parent / entry.name) for entry in path.expanduser().parent.iterdir()][:1000]
    except OSError:
        return []

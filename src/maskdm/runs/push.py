"""`maskdm push`: an export to a hub, on request alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import maskdm
from maskdm.errors import UserError
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import Display
from maskdm.runs.export import MARK, ExportRequest, Format, export


@dataclass(frozen=True)
class PushRequest:
    """What `maskdm push` was asked for."""

    source: Path
    """A run, or what `maskdm export` has written."""
    to: str
    public: bool = False
    licence: str = "unknown"
    formats: tuple[Format, ...] = ("diffusers",)


def push(request: PushRequest, display: Display) -> str:
    """Send an export, or a run exported on the way, to a hub; returns what to print. Raises UserError, naming what is missing."""
    parts = request.to.split("/")
    if len(parts) != 2 or not all(part and all(c.isalnum() or c in "-_." for c in part) for part in parts):
        raise UserError(f"--to is '{request.to}'; give user/name, such as anna/my-flowers")
    is_export = (request.source / MARK).is_file()
    if not is_export:
        RunDirectory.existing(request.source)
    elif request.licence != "unknown" or request.formats != ("diffusers",):
        raise UserError(f"{request.source} is an export already; give --licence and --format to `maskdm export`")
    send = _sender(request)
    if is_export:
        return send(request.source)
    with tempfile.TemporaryDirectory(prefix="maskdm-push-") as place:
        folder = Path(place) / parts[1]
        export(ExportRequest(request.source, folder, request.formats, request.licence, parts[1]), display)
        return send(folder)


def _sender(request: PushRequest) -> Callable[[Path], str]:
    """What sends a folder, once it is sure that it may: before an export is written for nothing."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError("push needs huggingface_hub: pip install huggingface_hub") from None
    token = huggingface_hub.get_token()
    if token is None:
        raise UserError("push needs a token of the hub with the right to write: set HF_TOKEN, or run `hf auth login`")
    api = huggingface_hub.HfApi(token=token)
    base: Any = HfHubHTTPError.__bases__[0]  # of whichever library the hub's own goes by
    unreachable: tuple[type[Exception], ...] = (OSError, base)

    def send(folder: Path) -> str:
        try:
            there = api.repo_exists(request.to)
            if there and api.repo_info(request.to).private is False and not request.public:
                raise UserError(f"{request.to} is there already, for all to see; add --public, or give another --to")
            api.create_repo(request.to, private=not request.public, exist_ok=True)
            private = api.repo_info(request.to).private is not False
            sent: Any = api.upload_folder(repo_id=request.to, folder_path=folder, commit_message=f"maskdm {maskdm.__version__}")
        except HfHubHTTPError as error:
            words = " ".join(str(error.server_message or error).split())
            raise UserError(f"the hub refused {request.to}: {words}; see that the token may write there") from None
        except unreachable as error:
            raise UserError(f"the hub cannot be reached ({' '.join(str(error).split())[:200]}); push again later") from None
        return f"sent to {request.to} ({'private' if private else 'public'}): {sent}"

    return send

"""A web server that drops and stalls connections, and shards as others write them."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from maskdm.data import Dataset


def files_of(folder: Path, below: str) -> dict[str, bytes]:
    """The files of a folder, as the server takes them."""
    return {f"{below}/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_tars(folder: Path, dataset: Dataset, count: int) -> None:
    """A gray data set as shards of WebDataset's layout, in its order."""
    folder.mkdir(parents=True)
    assert dataset.labels is not None
    for number in range(count):
        with tarfile.open(folder / f"train-{number:03d}.tar", "w") as tar:
            for row in range(len(dataset) * number // count, len(dataset) * (number + 1) // count):
                png = io.BytesIO()
                Image.fromarray(dataset.images[row : row + 1][0, ..., 0]).save(png, "PNG")
                for name, body in ((f"a/{row}.cls", str(dataset.labels[row]).encode()), (f"a/{row}.png", png.getvalue())):
                    member = tarfile.TarInfo(name)
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))


@contextmanager
def faulty_server(files: dict[str, bytes], stall: float, ranges: bool = True) -> Generator[tuple[str, list[str]]]:
    """Its address, and the requests it got. Of four requests one is cut off, one stalls midway, one is refused and one served."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            number = len(requests) % 4
            if self.path not in files:
                return self.send_error(404)
            if number == 3:
                with suppress(OSError):  # the reader has left
                    self.send_error(503)
                return None
            body, wanted = files[self.path], self.headers.get("Range")
            if ranges and wanted is not None:
                first, last = wanted.removeprefix("bytes=").split("-")
                body = body[int(first) : int(last) + 1]
            self.send_response(206 if ranges and wanted is not None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body if number == 0 else body[: len(body) // 2 + 1])
                if number == 2:
                    time.sleep(stall)
            except OSError:
                pass  # the reader has left

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # of several processes that read by sixteen threads each

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()

"""Draw images from a model that `maskdm export --format onnx` wrote, with numpy and onnxruntime alone.

python onnx_sample.py model.onnx 16 50 grid.png [class number]
"""

import json
import struct
import sys
import zlib
from typing import Any

import numpy as np
import onnxruntime


def main() -> None:
    """A sheet of images, by DDIM, as a PNG file."""
    path, num, steps, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["maskdm"])
    alpha, sigma, by_eps = (np.array(facts[key]) for key in ("alpha", "sigma", "by_eps"))
    channels, height, width = facts["shape"]
    x = np.random.default_rng(0).standard_normal((num, channels, height, width))
    times = np.linspace(len(alpha) - 1, -1, steps + 1).round().astype(int)[:-1]  # from noise down
    for number, t in enumerate(times):
        inputs: dict[str, Any] = {"sample": x.astype(np.float32), "timestep": np.full(num, t, np.float32)}
        if facts["class_names"]:
            label = np.arange(num) % len(facts["class_names"]) if len(sys.argv) < 6 else np.full(num, int(sys.argv[5]))
            inputs["class_labels"] = label.astype(np.int64)
        output = np.asarray(session.run(["prediction"], inputs)[0], np.float64)
        if facts["target"] == "eps":
            x0 = (x - sigma[t] * output) / alpha[t]
        elif facts["target"] == "x0":
            x0 = output
        else:  # v = by_eps eps - by_x0 x0
            x0 = by_eps[t] * x - sigma[t] * output
        x0 = x0.clip(-1, 1)
        if number + 1 < steps:  # DDIM: the noise that x0 leaves, at the next level
            s = times[number + 1]
            x = alpha[s] * x0 + sigma[s] * (x - alpha[t] * x0) / sigma[t]
        else:
            x = x0
    rows = int(np.ceil(num**0.5))
    sheet = np.zeros((rows * rows, channels, height, width), np.uint8)
    sheet[:num] = ((x + 1) * 127.5).round()
    pixels = sheet.reshape(rows, rows, channels, height, width).transpose(0, 3, 1, 4, 2).reshape(rows * height, -1)
    lines = np.insert(pixels, 0, 0, axis=1).tobytes()
    head = struct.pack(">IIBBBBB", rows * width, rows * height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    with open(out, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


if __name__ == "__main__":
    main()

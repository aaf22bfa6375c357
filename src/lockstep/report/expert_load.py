"""The heat map of a report: how many rows came to each expert of each layer, and how uneven that made the ranks."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

from lockstep.moe.placement import ExpertLoad, Placement, busiest_over_mean

_COLD, _HOT = np.array([232, 238, 247]), np.array([179, 38, 30])
_MOST = 4.0  # times the mean: from here on the colour stays


def heat_map(load: ExpertLoad) -> tuple[str, str]:
    """Return what to read in the map, and the map: a line per layer, a column per expert, in HTML."""
    pairs = np.array(load.pairs, dtype=float)
    num_ranks, (num_layers, num_experts) = len(load.rank_pairs[0]), pairs.shape
    even = Placement.even(num_layers, num_experts, num_ranks).busiest_over_mean(load.pairs)
    had = busiest_over_mean(load.rank_pairs)
    over_mean = pairs / np.maximum(pairs.mean(axis=1, keepdims=True), 1e-12)
    layer, expert = np.unravel_index(over_mean.argmax(), pairs.shape)
    text = (
        f"A line per layer, a column per expert: from none (pale) to {_MOST:g} times the layer's mean or more (red). "
        f"The hottest, expert {expert} of MoE layer {layer}, had {over_mean[layer, expert]:.1f} times the mean. "
        f"The busiest of {num_ranks} ranks had <b>{had:.2f} times</b> the mean of the experts' work"
        f"{'' if round(had, 2) == round(even, 2) else f'; equal shares of experts would have made it {even:.2f}'}."
    )
    share = np.minimum(over_mean / _MOST, 1)[:, :, None]
    image = base64.b64encode(_png(np.rint(_COLD + share * (_HOT - _COLD)).astype(np.uint8))).decode()
    height = max(48, min(480, 12 * num_layers))
    return text, (
        f'<img alt="Heat map of {num_layers} layers by {num_experts} experts" '
        f'src="data:image/png;base64,{image}" style="width:100%;height:{height}px;image-rendering:pixelated">'
    )


def _png(pixels: np.ndarray) -> bytes:
    """Encode `[height, width, 3]` bytes."""
    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # no filters

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

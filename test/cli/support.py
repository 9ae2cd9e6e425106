"""Runs the zigzag command in an empty folder and reads and writes safetensors files."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1}
COMMAND = ""  # set by main()


class Finished:
    """What a run of the command left behind."""

    def __init__(self, process: subprocess.CompletedProcess[bytes]) -> None:
        self.code = process.returncode
        self.out = process.stdout.decode()
        self.err = process.stderr.decode()

    def json(self) -> dict:
        """The one JSON object on stdout; anything else there is an error."""
        return json.loads(self.out)


class CommandTest(unittest.TestCase):
    """A test case with an empty working folder of its own."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def zigzag(self, *arguments: object, timeout: float = 300, env: dict | None = None) -> Finished:
        """Runs the command in the working folder."""
        return run_in(self.folder, *arguments, timeout=timeout, env=env)

    def passes(self, *arguments: object, **options: object) -> Finished:
        """Runs the command and wants exit code 0."""
        finished = self.zigzag(*arguments, **options)
        self.assertEqual(finished.code, 0, f"{arguments}: {finished.err}\n{finished.out}")
        return finished


def clean_environment(extra: dict | None = None) -> dict:
    """The environment without what a launcher or a user may have set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ZIGZAG_", "OMPI_", "PMI"))}
    return {**kept, "LC_ALL": "C", **(extra or {})}


def run_in(
    folder: Path, *arguments: object, timeout: float = 300, env: dict | None = None
) -> Finished:
    """Runs the command in a folder."""
    return Finished(
        subprocess.run(
            [COMMAND, *map(str, arguments)],
            cwd=folder,
            env=clean_environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    )


def read_safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, bytes)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (
            entry["dtype"],
            entry["shape"],
            data[8 + length + begin : 8 + length + end],
        )
    return tensors


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of name -> (dtype, shape, bytes)."""
    header: dict[str, dict] = {}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def float_bytes(count: int, seed: int = 1) -> bytes:
    """`count` float32 numbers between -2 and 2, the same for the same seed."""
    state = seed * 2654435761 % 2**32 or 1
    values = []
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        values.append(state / 2**30 - 2)
    return struct.pack(f"<{count}f", *values)


def pack_file(
    lengths: list[int], heads: int = 4, kv_heads: int = 2, head_dim: int = 8, dout: bool = True
) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a valid input file."""
    tokens = sum(lengths)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q_shape = [tokens, heads, head_dim]
    k_shape = [tokens, kv_heads, head_dim]
    tensors = {
        "q": ("F32", q_shape, float_bytes(tokens * heads * head_dim, 1)),
        "k": ("F32", k_shape, float_bytes(tokens * kv_heads * head_dim, 2)),
        "v": ("F32", k_shape, float_bytes(tokens * kv_heads * head_dim, 3)),
        "cu_seqlens": ("I32", [len(ends)], struct.pack(f"<{len(ends)}i", *ends)),
    }
    if dout:
        tensors["dout"] = ("F32", q_shape, float_bytes(tokens * heads * head_dim, 4))
    return tensors


def main() -> None:
    """Entry of a test script: SCRIPT COMMAND [unittest arguments]."""
    global COMMAND
    COMMAND = str(Path(sys.argv.pop(1)).resolve())
    module = sys.modules["__main__"]
    sys.modules["support"].COMMAND = COMMAND
    unittest.main(module=module)

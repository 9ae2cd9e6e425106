"""Every malformed pack, file, flag and combination.

Each ends with exit code 2 (3: environment) and one sentence, and nothing is written.

docs/bad-input.md is the table of these cases. `bad_input_test.py COMMAND --write` writes it anew.
"""

from __future__ import annotations

import json
import os
import shlex
import struct
import sys
import tempfile
import unittest
from pathlib import Path

import support

PAGE = support.REPOSITORY / "docs" / "bad-input.md"
HEAD = """# Bad input

What `zigzag` says to malformed packs, files, flags and combinations: one sentence on stderr, exit
code 2 (3 where the machine lacks something), before any work, with nothing written.
`test/cli/bad_input_test.py` runs every case and compares this page with what it saw.
"""
RUN_INPUT = "run --input in.safetensors --ranks 2"


def header_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this JSON (or text) as its header."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def changed(**tensors: tuple | None) -> bytes:
    """A valid input file with some tensors replaced, or left out where None."""
    pack = support.pack_file([5, 3])
    for name, tensor in tensors.items():
        if tensor is None:
            del pack[name]
        else:
            pack[name] = tensor
    return support.safetensors_bytes(pack)


def ints(kind: str, *values: int) -> tuple:
    """A cu_seqlens tensor."""
    code = {"I32": "i", "I64": "q"}[kind]
    return (kind, [len(values)], struct.pack(f"<{len(values)}{code}", *values))


def floats(*shape: int, dtype: str = "F32") -> tuple:
    """A tensor of zeros."""
    count = 1
    for size in shape:
        count *= size
    return (dtype, list(shape), bytes(count * support.ITEM_BYTES[dtype]))


VALID = support.safetensors_bytes(support.pack_file([5, 3]))
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

# (what a reader calls it, arguments)
FLAGS = [
    ("no subcommand", ""),
    ("unknown subcommand", "paln"),
    ("unknown flag", "plan --lengths 5 --ranks 2 --frobnicate"),
    ("stray argument", "plan --lengths 5 --ranks 2 7"),
    ("flag without its value", "run --lengths 5 --ranks"),
    ("documents without a path", "run --ranks 2 --documents"),
    ("flag in place of a value", "run --lengths 5 --ranks --json"),
    ("flag given twice", "plan --lengths 5 --ranks 2 --ranks 3"),
    ("no ranks", "plan --lengths 5"),
    ("0 ranks", "plan --lengths 5 --ranks 0"),
    ("negative ranks", "run --lengths 5 --ranks -2"),
    ("fractional ranks", "run --lengths 5 --ranks 1.5"),
    ("too many ranks", "plan --lengths 5 --ranks 2000000"),
    ("too many rank threads", "run --lengths 5 --ranks 100000"),
    ("no source of documents", "run --ranks 2"),
    ("two sources of documents", "run --ranks 2 --lengths 5 --documents a.txt"),
    ("negative length", "plan --lengths 5,-3 --ranks 2"),
    ("length that is a word", "plan --lengths abc --ranks 2"),
    ("empty length", "plan --lengths 5,,3 --ranks 2"),
    ("length beyond 64 bits", "plan --lengths 99999999999999999999 --ranks 2"),
    ("too many tokens", "plan --lengths 281474976710656,1 --ranks 2"),
    ("0 heads", "run --lengths 5 --ranks 2 --heads 0"),
    ("KV heads that do not divide the heads", "run --lengths 5 --ranks 2 --heads 6 --kv-heads 4"),
    ("heads that the default KV heads do not divide", "run --lengths 5 --ranks 2 --heads 7"),
    ("more KV heads than heads", "plan --lengths 5 --ranks 2 --heads 2 --kv-heads 4"),
    (
        "stage that does not divide the KV heads",
        "run --lengths 5 --ranks 2 --kv-heads 8 --kv-heads-per-stage 3",
    ),
    ("stage that is a word", "run --lengths 5 --ranks 2 --kv-heads-per-stage some"),
    ("head_dim too large", "run --lengths 5 --ranks 2 --head-dim 257"),
    ("head_dim 0", "run --lengths 5 --ranks 2 --head-dim 0"),
    ("unsupported type", "run --lengths 5 --ranks 2 --dtype float64"),
    ("unknown device", "run --lengths 5 --ranks 2 --device tpu"),
    ("unknown transport", "run --lengths 5 --ranks 2 --comm gloo"),
    ("GPU transport on the CPU", "run --lengths 5 --ranks 2 --comm nccl"),
    ("host transport on GPUs", "run --lengths 5 --ranks 2 --device cuda --comm threads"),
    ("MPI without mpirun", "run --lengths 5 --comm mpi"),
    ("causal that is not a truth value", "run --lengths 5 --ranks 2 --causal maybe"),
    ("window without numbers", "run --lengths 5 --ranks 2 --window ,"),
    ("window that is a word", "run --lengths 5 --ranks 2 --window wide"),
    ("negative window", "run --lengths 5 --ranks 2 --window -7"),
    ("window beyond every pack", "run --lengths 5 --ranks 2 --window 9223372036854775807"),
    ("window of three numbers", "run --lengths 5 --ranks 2 --window 1,2,3"),
    ("causal window to the right", "run --lengths 5 --ranks 2 --window 4,4"),
    ("scale that is not a number", "run --lengths 5 --ranks 2 --scale nan"),
    ("infinite scale", "run --lengths 5 --ranks 2 --scale inf"),
    ("scale beyond float32", "run --lengths 5 --ranks 2 --scale 1e31"),
    ("scale that float32 loses", "run --lengths 5 --ranks 2 --scale -1e-31"),
    ("negative softcap", "run --lengths 5 --ranks 2 --softcap -1"),
    ("softcap beyond float32", "run --lengths 5 --ranks 2 --softcap 1e31"),
    ("softcap that float32 loses", "bench attention --lengths 5 --softcap 1e-31"),
    ("unknown kernels", "run --lengths 5 --ranks 2 --kernels magic"),
    ("negative seed", "run --lengths 5 --ranks 2 --seed -1"),
    ("both directions", "run --lengths 5 --ranks 2 --backward --forward-only"),
    ("0 tokens at most", "run --documents a.txt --ranks 2 --max-tokens 0"),
    ("rate without the other", "plan --lengths 5 --ranks 2 --tflops 3"),
    ("rate of 0", "plan --lengths 5 --ranks 2 --tflops 0 --gbps 1"),
    ("no benchmark", "bench"),
    ("benchmark over MPI", "bench attention --lengths 50 --comm mpi"),
    ("exchange where there is none", "bench layout --lengths 50 --comm threads"),
    ("0 threads", "bench layout --lengths 50 --threads 0"),
    ("0 repetitions", "bench attention --lengths 50 --repeat 0"),
]

FILES = [
    ("document missing", "run --documents nowhere.txt --ranks 2"),
    ("folder without files", "run --documents empty_folder --ranks 2"),
    ("document that is a pipe", "run --documents pipe --ranks 2"),
    ("file of lengths missing", "plan --lengths-file nowhere.txt --ranks 2"),
    ("file of lengths that is a folder", "plan --lengths-file empty_folder --ranks 2"),
    ("file of lengths without lengths", "plan --lengths-file comment.txt --ranks 2"),
    ("file of lengths with a word", "plan --lengths-file words.txt --ranks 2"),
    ("input missing", "run --input nowhere.safetensors --ranks 2"),
    ("input that is a folder", "run --input empty_folder --ranks 2"),
    ("input that is a pipe", "run --input pipe --ranks 2"),
    ("input with a limit of tokens", "run --input in.safetensors --ranks 2 --max-tokens 5"),
    ("other heads than the input", "run --input in.safetensors --ranks 2 --heads 8"),
    ("other type than the input", "run --input in.safetensors --ranks 2 --dtype bfloat16"),
    ("output in a missing folder", "run --lengths 5 --ranks 2 --output none/o.safetensors"),
    ("output that is a folder", "run --lengths 5 --ranks 2 --output empty_folder"),
    ("output that is a device", "run --lengths 5 --ranks 2 --output /dev/null"),
    ("output over the input", "run --input in.safetensors --ranks 2 --output ./in.safetensors"),
    ("output over a document", "run --documents a.txt --ranks 2 --output a.txt"),
    ("picture in a missing folder", "plan --lengths 5 --ranks 2 --svg none/p.svg"),
]

# (what a reader calls it, the bytes of in.safetensors)
INPUTS = [
    ("empty file", b""),
    ("file of 5 bytes", b"12345"),
    ("text file", b"these are no tensors, but words of some document\n" * 3),
    ("header longer than the file", struct.pack("<Q", 1000) + b"{}"),
    ("header of 2^63 bytes", struct.pack("<Q", 2**63) + b"{}"),
    ("header that is no JSON", header_file("{not json}")),
    ("header that is a list", header_file("[1, 2]")),
    ("header cut off", header_file('{"q": {"dtype": "F3')),
    ("deep JSON", header_file('{"q":' + '{"a":' * 5000 + "1" + "}" * 5001)),
    ("deep lists", header_file('{"q":{"shape":' + "[" * 5000 + "]" * 5000 + "}}")),
    ("tensor given twice", header_file('{"q":%s,"q":%s}' % ((json.dumps(ONE),) * 2), bytes(8))),
    ("field given twice", header_file('{"q":{"dtype":"F32","dtype":"F32"}}')),
    ("field missing", header_file({"q": {"dtype": "F32", "shape": [2]}}, bytes(8))),
    ("unknown field", header_file({"q": {**ONE, "strides": [1]}}, bytes(8))),
    ("unknown type", header_file({"q": {**ONE, "dtype": "F31"}}, bytes(8))),
    ("type that is a number", header_file({"q": {**ONE, "dtype": 7}}, bytes(8))),
    ("negative size", header_file({"q": {**ONE, "shape": [-2]}}, bytes(8))),
    ("fractional size", header_file({"q": {**ONE, "shape": [1.5]}}, bytes(8))),
    ("shape that overflows", header_file({"q": {**ONE, "shape": [2**40, 2**40, 2**40]}}, bytes(8))),
    ("too many dimensions", header_file({"q": {**ONE, "shape": [1] * 40}}, bytes(8))),
    (
        "offsets that do not fit the shape",
        header_file({"q": {**ONE, "data_offsets": [0, 12]}}, bytes(12)),
    ),
    ("offsets backwards", header_file({"q": {**ONE, "data_offsets": [8, 0]}}, bytes(8))),
    ("three offsets", header_file({"q": {**ONE, "data_offsets": [0, 8, 8]}}, bytes(8))),
    (
        "overlapping tensors",
        header_file({"q": ONE, "k": {**ONE, "data_offsets": [4, 12]}}, bytes(12)),
    ),
    (
        "gap between tensors",
        header_file({"q": ONE, "k": {**ONE, "data_offsets": [12, 20]}}, bytes(20)),
    ),
    ("data cut off", VALID[:-10]),
    ("data too long", VALID + b"more"),
    ("no q", changed(q=None)),
    ("no cu_seqlens", changed(cu_seqlens=None)),
    ("q of two dimensions", changed(q=floats(8, 32))),
    ("q of an integer type", changed(q=floats(8, 4, 8, dtype="I32"))),
    ("q of float64", changed(q=floats(8, 4, 8, dtype="F64"))),
    ("k of another type", changed(k=floats(8, 2, 8, dtype="BF16"))),
    ("k of another head_dim", changed(k=floats(8, 2, 16))),
    ("k of fewer tokens", changed(k=floats(7, 2, 8))),
    ("v of other heads than k", changed(v=floats(8, 4, 8))),
    ("dout of another shape", changed(dout=floats(8, 4, 4))),
    ("heads that KV heads do not divide", changed(k=floats(8, 3, 8), v=floats(8, 3, 8))),
    ("no heads", changed(q=floats(8, 0, 8), dout=floats(8, 0, 8))),
    (
        "head_dim of 300",
        changed(
            q=floats(8, 4, 300), k=floats(8, 2, 300), v=floats(8, 2, 300), dout=floats(8, 4, 300)
        ),
    ),
    ("cu_seqlens of floats", changed(cu_seqlens=floats(3))),
    ("cu_seqlens of two dimensions", changed(cu_seqlens=("I32", [1, 3], bytes(12)))),
    ("empty cu_seqlens", changed(cu_seqlens=("I32", [0], b""))),
    ("cu_seqlens that starts at 1", changed(cu_seqlens=ints("I32", 1, 5, 8))),
    ("cu_seqlens that falls", changed(cu_seqlens=ints("I64", 0, 6, 5, 8))),
    ("cu_seqlens that ends elsewhere", changed(cu_seqlens=ints("I64", 0, 5, 4096))),
]

ENVIRONMENT = [
    ("unknown kernels", "run --lengths 5 --ranks 2", {"ZIGZAG_KERNELS": "magic"}, 2),
    ("threads that are a word", "run --lengths 5 --ranks 2", {"ZIGZAG_NUM_THREADS": "many"}, 2),
    ("0 threads", "run --lengths 5 --ranks 2", {"ZIGZAG_NUM_THREADS": "0"}, 2),
    ("too many threads", "run --lengths 5 --ranks 2", {"ZIGZAG_NUM_THREADS": "1025"}, 2),
    ("threads with a blank", "run --lengths 5 --ranks 2", {"ZIGZAG_NUM_THREADS": " 2"}, 2),
    ("deadline in hexadecimal", "run --lengths 5 --ranks 2", {"ZIGZAG_TIMEOUT_S": "0x10"}, 2),
    ("deadline that is a word", "run --lengths 5 --ranks 2", {"ZIGZAG_TIMEOUT_S": "soon"}, 2),
    ("unknown CPU target", "run --lengths 5 --ranks 2", {"ZIGZAG_CPU_TARGET": "mmx"}, 2),
    ("more memory than there is", "run --lengths 1000000000000 --ranks 2", {}, 3),
]


def prepare(folder: Path, content: bytes = VALID) -> None:
    """The files that the cases name."""
    (folder / "empty_folder").mkdir()
    (folder / "a.txt").write_text("a document")
    (folder / "comment.txt").write_text("# no length\n")
    (folder / "words.txt").write_text("5\n7, seven\n")
    (folder / "in.safetensors").write_bytes(content)
    os.mkfifo(folder / "pipe")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Names and contents of all regular files."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sentence_of(
    arguments: str, content: bytes = VALID, env: dict | None = None, code: int = 2
) -> str:
    """Runs one case in a fresh folder and returns its sentence."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, content)
        before = snapshot(folder)
        finished = support.run_in(folder, *arguments.split(), timeout=60, env=env)
        what = f"zigzag {arguments}: {finished.err!r}"
        assert finished.code == code, f"exit code {finished.code} of {what}"
        assert finished.out == "", f"output {finished.out!r} of {what}"
        assert finished.err.startswith("zigzag: "), what
        assert finished.err.count("\n") == 1 and finished.err.endswith("\n"), what
        assert len(finished.err) < 600, what
        assert name not in finished.err, what
        assert snapshot(folder) == before, f"files changed by {what}"
        return finished.err[len("zigzag: ") : -1]


def escaped(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def command_rows(cases: list[tuple]) -> list[list[str]]:
    """Rows of what, command, sentence for (name, arguments[, env[, code]])."""
    rows = []
    for name, arguments, *rest in cases:
        env = rest[0] if rest else {}
        code = rest[1] if len(rest) > 1 else 2
        sentence = sentence_of(arguments, env=env, code=code)
        for machine_dependent in ("; allowed here: ", " needs about "):
            before, found, _ = sentence.partition(machine_dependent)
            sentence = before + found + "..." if found else sentence
        command = " ".join(
            [*(f"{k}={shlex.quote(v)}" for k, v in env.items()), f"zigzag {arguments}".strip()]
        )
        rows.append([name, f"`{escaped(command)}`", escaped(sentence)])
    return rows


def page() -> str:
    """The whole page, from runs of every case."""
    inputs = [
        [name, escaped(sentence_of(RUN_INPUT, content)).replace("'in.safetensors'", "...")]
        for name, content in INPUTS
    ]
    head = ["what", "command", "sentence"]
    return "\n".join(
        [
            HEAD,
            "## Flags\n",
            table(head, command_rows(FLAGS)),
            "## Files\n",
            table(head, command_rows(FILES)),
            f"## Input files\n\nGiven to `zigzag {RUN_INPUT}`; `...` stands for its name.\n",
            table(["content", "sentence"], inputs),
            "## Environment\n",
            table(head, command_rows(ENVIRONMENT)),
        ]
    )


class BadInputTest(unittest.TestCase):
    maxDiff = None

    def test_every_case_gets_its_sentence(self):
        self.assertEqual(page(), PAGE.read_text(), "the page is out of date: run this with --write")


if __name__ == "__main__":
    sys.modules.setdefault("support", support)
    if "--write" in sys.argv:
        support.COMMAND = str(Path(sys.argv[1]).resolve())
        PAGE.write_text(page())
    else:
        support.main()

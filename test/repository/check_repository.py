#!/usr/bin/env python3
"""The rules of this repository that a program can check. Prints one line a finding; exits 1 on any.

check_repository.py [ROOT]     ROOT: the repository; by default the one this file is in
"""

import io
import re
import sys
import tokenize
from pathlib import Path

MAX_LINES = 600
SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".py", ".cmake", ".sh"}
SKIPPED_FOLDERS = {"build", ".git", ".cache", "dist", "__pycache__", "node_modules"}

# Folders of the library and its programs. Tests may restate a formula: that is what checks it.
CODE_FOLDERS = ("src", "include", "cli", "python", "examples")
# The plan is the only place with chunk arithmetic; plan_*.cpp and plan_*.h are parts of it.
PLAN = re.compile(r"^src/plan(_\w+)?\.(cpp|h)$")

WORLD = r"(?:\w+(?:\.|->))*(?:W|world_size|world_size_|world|ranks|num_ranks)(?:\(\))?"
CHUNK_ARITHMETIC = [
    (re.compile(r"(?<![/*])/\s*(?:static_cast<[^>]*>)?\s*\(*\s*(?:2\s*\*\s*)?" + WORLD + r"\b"),
     "a division by the world size"),
    (re.compile(r"//=?\s*\(*\s*(?:2\s*\*\s*)?" + WORLD + r"\b(?=\s*(?:[)\]:,*+-]|$))"),
     "a division by the world size"),
    (re.compile(r"%\s*\(?\s*(?:2\s*\*\s*)?" + WORLD + r"\b(?!\w)"),
     "a remainder by the world size"),
    (re.compile(r"\b2\s*\*\s*" + WORLD + r"\s*-\s*1\s*-"), "the zigzag formula 2W-1-r"),
]  # fmt: skip
# `token % ranks` in a round robin over something else than tokens may say so.
EXCUSE = "not chunk arithmetic:"


def code_of(line: str) -> str:
    """A line of C++ without its comment and without the text of string literals."""
    return re.sub(r"//.*$", "", re.sub(r'"(?:\\.|[^"\\])*"', '""', line))


def python_code(lines: list) -> list:
    """Lines of Python with comments and string literals, docstrings among them, blanked out."""
    code = [list(line) for line in lines]
    text = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        if token.type in text:
            for row in range(token.start[0], token.end[0] + 1):
                begin = token.start[1] if row == token.start[0] else 0
                end = token.end[1] if row == token.end[0] else len(code[row - 1])
                code[row - 1][begin:end] = " " * (end - begin)
    return ["".join(line) for line in code]


def cpp_code(lines: list) -> list:
    """Lines of C++ with comments and the text of string literals left out."""
    code = []
    in_comment = False
    for line in lines:
        in_comment = in_comment or "/*" in line
        code.append("" if in_comment else code_of(line))
        if "*/" in line:
            in_comment = False
    return code


def files(root: Path):
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if any(part in SKIPPED_FOLDERS or part.startswith(".venv") for part in parts[:-1]):
            continue
        if path.is_file() and path.suffix in SOURCE_SUFFIXES:
            yield path, "/".join(parts)


def check_sizes(name: str, lines: list) -> list:
    if len(lines) > MAX_LINES:
        return [f"{name}: {len(lines)} lines; a file has at most {MAX_LINES}"]
    return []


def advice_on_sizes(name: str, lines: list) -> list:
    """What is allowed but should stay rare."""
    aim = 200 if name.endswith((".h", ".cuh")) else 400
    return [f"advice: {name}: {len(lines)} lines; aim at {aim}"] if len(lines) > aim else []


def check_chunk_arithmetic(name: str, lines: list) -> list:
    if not name.startswith(tuple(f"{folder}/" for folder in CODE_FOLDERS)) or PLAN.match(name):
        return []
    is_python = name.endswith(".py")
    found = []
    codes = python_code(lines) if is_python else cpp_code(lines)
    for number, (line, code) in enumerate(zip(lines, codes, strict=True), 1):
        if EXCUSE in line:
            continue
        for pattern, what in CHUNK_ARITHMETIC:
            # `//` opens a comment in C++ and divides in Python.
            if "//=?" in pattern.pattern and not is_python:
                continue
            if pattern.search(code):
                found.append(
                    f"{name}:{number}: {what}; only src/plan.cpp does that: {line.strip()}"
                )
                break
    return found


ENDS_PROCESS = re.compile(
    r"(?<![\w.>:])(?:(?:std::|::)?(?:exit|_exit|_Exit|quick_exit)|(?:std)?::(?:abort|terminate))\s*\("
)
PRINTS = re.compile(
    r"\bstd::(cout|cerr|clog)\b|(?<!\w)(?:std::|fmt::)?(?:printf|puts|print|println)\s*\("
)


def check_no_exit(name: str, lines: list) -> list:
    if not name.startswith(("src/", "include/")):
        return []
    found = []
    for number, line in enumerate(lines, 1):
        code = code_of(line)
        if ENDS_PROCESS.search(code):
            found.append(f"{name}:{number}: the library never ends the process: {line.strip()}")
        if PRINTS.search(code):
            found.append(f"{name}:{number}: the library never prints: {line.strip()}")
    return found


def check_public_header(name: str, text: str) -> list:
    if not name.startswith("include/zigzag/"):
        return []
    found = []
    for match in re.finditer(r'#\s*include\s*[<"]([^>"]+)[>"]', text):
        if re.match(r"(cuda|cudnn|nccl|mpi|nvrtc|Python|nanobind|pybind11|tbb|hwy|fmt)", match[1]):
            found.append(f"{name}: a public header includes <{match[1]}>")
    if "#pragma once" not in text:
        found.append(f"{name}: no #pragma once")
    return found + check_contracts(name, text)


DECLARATION = re.compile(
    r"^\s*(?:template\s*<.*>\s*)?(?:(?:class|struct|enum(?:\s+class)?)\s+(?P<type>\w+)[^;]*\{?$"
    r"|(?:using\s+(?P<alias>\w+)\s*=)"
    r"|(?:\[\[\w+\]\]\s*)?(?:static\s+|constexpr\s+|inline\s+|explicit\s+|virtual\s+|friend\s+)*"
    r"[\w:<>,&*\s]*?\b(?P<function>~?\w+|operator\S+)\s*\()"
)
# The members that the language defines need no words.
PLAIN = re.compile(r"=\s*(default|delete)\s*;|\boperator\s*(==|=|<=>|!=)|^\s*~")


KEYWORDS = ("if", "for", "while", "switch", "return", "static_assert")


def check_contracts(name: str, text: str) -> list:
    """Every public type and function has a comment above it, or above the run it stands in."""
    found = []
    access = ["public"]  # one entry an open brace
    commented = False  # the previous line belongs to a comment, or to a commented declaration's run
    inside = 0  # open parentheses of a declaration over several lines
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if stripped.startswith("//"):
            commented = True
            continue
        code = code_of(line)
        if not stripped or stripped.startswith("#"):
            commented = False
            continue
        label = re.match(r"^(public|protected|private)\s*:", stripped)
        if label:
            access[-1] = label[1]
            commented = False
            continue
        visible = all(entry in ("public", "namespace") for entry in access)
        if visible and inside == 0:
            match = DECLARATION.match(code)
            forward = re.match(r"^\s*(class|struct)\s+\w+\s*;", code)
            if (
                match
                and not forward
                and not PLAIN.search(code)
                and not code.startswith("namespace")
            ):
                what = match["type"] or match["alias"] or match["function"]
                if (
                    what not in ("if", "for", "while", "switch", "return", "static_assert")
                    and not commented
                ):
                    found.append(f"{name}:{number}: '{what}' has no comment above it")
        inside += code.count("(") - code.count(")")
        for character in code:
            if character == "{":
                if re.match(r"^\s*(inline\s+)?namespace\b|^\s*extern\b", code):
                    access.append("namespace")
                elif re.match(r"^\s*(template.*>\s*)?struct\b", code):
                    access.append("public")
                elif re.match(r"^\s*(template.*>\s*)?class\b", code):
                    access.append("private")
                else:
                    access.append("body")
            elif character == "}" and len(access) > 1:
                access.pop()
        # A comment speaks for the lines that follow it without a gap.
        if stripped.endswith(("}", "};")):
            commented = commented and access[-1] in ("public",)
    return found


def check_readme(root: Path) -> list:
    readme = root / "README.md"
    if not readme.is_file():
        return ["README.md: missing"]
    text = readme.read_text(encoding="utf-8")
    found = []
    for command in ("scripts/run", "scripts/test"):
        if not re.search(rf"```(?:sh|bash)\n(?:.*\n)*?{command}\n", text):
            found.append(f"README.md: no code block with the command {command}")
        if not (root / command).is_file():
            found.append(f"{command}: missing, and the README names it")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        if not (root / link).exists():
            found.append(f"README.md: links to {link}, which is not there")
    return found


def check(root: Path) -> list:
    found = check_readme(root)
    for path, name in files(root):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        found += check_sizes(name, lines)
        found += check_chunk_arithmetic(name, lines)
        found += check_no_exit(name, lines)
        found += check_public_header(name, text)
    return found


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2]).resolve()
    found = check(root)
    for path, name in files(root):
        for advice in advice_on_sizes(name, path.read_text(encoding="utf-8").splitlines()):
            print(advice)
    print("\n".join(found) if found else f"{sum(1 for _ in files(root))} files keep the rules")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

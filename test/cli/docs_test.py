"""docs/cli.md holds the help text of the subcommands as the program prints it.

`docs_test.py COMMAND --write` writes it anew.
"""

import re
import sys
import unittest
from pathlib import Path

import support

PAGE = support.REPOSITORY / "docs" / "cli.md"
BLOCK = re.compile(r"<!-- help: ([a-z ]+) -->\n(?:```\n.*?\n```\n)?", re.DOTALL)


def written(page: str) -> str:
    """The page with every help block as the program prints it."""

    def block(match: re.Match[str]) -> str:
        finished = support.run_in(Path("/"), *match[1].split(), "--help")
        lines = [line.rstrip() for line in finished.out.strip().splitlines()]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
        return f"<!-- help: {match[1]} -->\n```\n{text}\n```\n"

    return BLOCK.sub(block, page)


class DocsTest(unittest.TestCase):
    maxDiff = None

    def test_help_texts(self):
        page = PAGE.read_text()
        self.assertGreaterEqual(len(BLOCK.findall(page)), 4)
        self.assertEqual(written(page), page, "the page is out of date: run this with --write")

    def test_environment_variables(self):
        """Every variable that the code reads is on the page."""
        sources = [
            p for folder in ("src", "cli") for p in (support.REPOSITORY / folder).rglob("*.cpp")
        ]
        used = {
            name
            for path in sources
            for name in re.findall(r'"(ZIGZAG_[A-Z0-9_]+)"', path.read_text())
        }
        page = PAGE.read_text()
        self.assertEqual([name for name in sorted(used) if f"`{name}`" not in page], [])


if __name__ == "__main__":
    sys.modules.setdefault("support", support)
    if "--write" in sys.argv:
        support.COMMAND = str(Path(sys.argv[1]).resolve())
        PAGE.write_text(written(PAGE.read_text()))
    else:
        support.main()

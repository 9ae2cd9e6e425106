"""The Python blocks of the pages run in order, as a reader would type them."""

import os
import re
import subprocess
import sys

import pytest
from ranks import ROOT

PAGES = ["docs/python.md", "docs/replacing-ring-flash-attention.md"]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page):
    text = (ROOT / page).read_text()
    if "transformers" in text:
        pytest.importorskip("transformers")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("page", PAGES)
def test_files_for_torchrun_run_by_themselves(page, tmp_path):
    """Blocks that the text names as a file for torchrun, as that file alone."""
    text = (ROOT / page).read_text()
    found = re.findall(r"`torchrun [^`]* (\w+\.py)`.*?^```python\n(.*?)^```", text, re.M | re.S)
    assert found
    for name, block in found:
        (tmp_path / name).write_text(block + "\ndist.destroy_process_group()\n")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        ended = subprocess.run(
            [*torchrun, "--nproc_per_node", "2", tmp_path / name],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr


EVERY_PAGE = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)#\s]+)", prose):
        if not link.startswith("https://"):
            assert (ROOT / page).parent.joinpath(link).exists(), link


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [
        page for page in EVERY_PAGE[1:] if f": {page.removeprefix('docs/')}\n" not in navigation
    ]


def test_api_page_names_everything_public():
    import zigzag_attention

    text = (ROOT / "docs/python-api.md").read_text()
    own = {"CommunicationError", "DeviceError", "__version__"}
    missing = [x for x in zigzag_attention.__all__ if x not in own and f".{x}\n" not in text]
    assert not missing


HELP_WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # an import of it raises
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["compare_pytorch.py", "python_overhead.py"])
def test_benchmarks_explain_their_options_without_torch(name):
    script = ROOT / "benchmarks" / name
    ended = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_TORCH, script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "300"},
    )
    assert ended.returncode == 0, ended.stderr
    options = re.findall(r"^  (-.*)$", ended.stdout, flags=re.MULTILINE)
    assert len(options) > 3
    for option in options:
        assert re.search(r"\S  +\S", option), f"{option} is not explained"

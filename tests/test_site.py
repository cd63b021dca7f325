"""The documentation site: it builds without a warning, needs no network to be read, and has every public name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import m3er_fast
from m3er_fast import functional

pytest.importorskip("furo", reason="the site is built with the extra docs")
from sphinx.util.inventory import InventoryFile

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(folder)]
    # It takes ten seconds; an extension that reads some text in exponential time would never end.
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_page_is_in_the_site(site):
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if not (site / f"{path.stem}.html").is_file()]
    assert missing == []


def test_pages_load_nothing_from_the_network(site):
    sources = r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//'
    sheets = r'<link[^>]+rel="(?:stylesheet|preload)"[^>]+href="(?:https?:)?//'
    inside_sheets = r"""(?:url\(|@import )["']?(?:https?:)?//"""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    assert [path.name for path in pages if re.search(f"{sources}|{sheets}", path.read_text(encoding="utf-8"))] == []
    assert [path.name for path in site.rglob("*.css") if re.search(inside_sheets, path.read_text())] == []


def test_every_public_name_is_in_the_reference(site):
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    known = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    wanted = {
        f"{module.__name__}.{name}"
        for module in (m3er_fast, functional)
        for name in module.__all__
        if not isinstance(getattr(module, name), type(sys))
    }
    assert wanted - known == set()


def test_names_in_the_text_lead_to_the_reference(site):
    method = (site / "method.html").read_text(encoding="utf-8")
    assert 'href="api/functional.html#m3er_fast.functional.memory_scan"' in method


def test_signatures_of_the_reference_name_the_arguments(site):
    shown = {}
    for page in (site / "api").glob("*.html"):
        entries = re.findall(
            r'<dt class="sig sig-object py" id="([^"]+)">(.*?)</dt>', page.read_text("utf-8"), re.DOTALL
        )
        shown |= {name: re.sub(r"<[^>]+>|\s+", "", text) for name, text in entries}
    assert [name for name, text in shown.items() if "(*args,**kwargs)" in text] == []
    assert "(input_dims:Mapping[str,int],num_classes:int," in shown["m3er_fast.M3ERFusion"]
    assert "lengths:Array|None=None" in shown["m3er_fast.M3ERFusion.fit"]
    assert [name for name, text in shown.items() if "ForwardRef" in text] == []

"""The page of xmoe-explain: as text, and in a browser where there is one."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import MISSING, REASON, Browser, chromium

from xmoe_fairseq.explain import plots
from xmoe_fairseq.explain.collect import Choice, Layer, Sentence
from xmoe_fairseq.explain.history import Run
from xmoe_fairseq.explain.page import page

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'>"
LAYERS = [
    Layer(
        f"{side} layer 2", side, [*map(str, range(4)), "zero 0"], 4, [], shared, [5, 0, 3, 2, 1], 9,
        10 + 9 * shared, 1.0, 2.0, {"threshold": 0.5},
    )
    for side, shared in (("encoder", 0), ("decoder", 1))
]  # fmt: skip


def sentence(*source: str) -> Sentence:
    """One expert more at each piece of the source; the target is of one piece."""
    taken = [[Choice(e, 0.5 / (e + 1), 1.0) for e in range(number % 5)] for number in range(len(source))]
    return Sentence({"encoder": [*source], "decoder": ["</s>"]}, [taken, [[Choice(4, 0.25, 0.25)]]])


SENTENCES = [sentence("▁Mo", "tion", "▁on", "</s>"), sentence(f"▁{HOSTILE}", "▁שלום", "x" * 300)]
RUNS = [Run("<b>$a$", {"valid": [(1, 9.0), (2, 8.0)]}), Run("other", {"train": [(1, 90.0), (2, 80.0)]})]
TABLES = {"runs": {"caption": "Runs", "head": ["run", "ppl"], "rows": [["<b>$a$", "8.0"]]}}


@pytest.fixture(scope="module")
def text() -> str:
    figures = {"loads": plots.loads(LAYERS), "learning": plots.learning(RUNS)}
    return page([("checkpoint", f"a/{HOSTILE}.pt"), ("router", "own")], LAYERS, SENTENCES, figures, TABLES)


def block(text: str) -> Any:
    """The data, as a browser finds it."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_what_comes_from_outside_stays_text(text: str) -> None:
    assert HOSTILE not in text and text.lower().count("</script") == 2  # without its >, too
    data = block(text)
    assert data["sentences"][1]["pieces"]["encoder"] == [f"▁{HOSTILE}", "▁שלום", "x" * 300]
    assert data["sentences"][0]["choices"][0][2] == [[0, 0.5, 1.0], [1, 0.25, 1.0]]
    assert data["layers"][1]["dead"] == ["1"] and data["layers"][1]["shared"] == 1
    assert data["tables"] == TABLES and data["about"][0][1] == f"a/{HOSTILE}.pt"
    assert "&lt;b&gt;$a$" in text, "a name in a plot is neither HTML nor TeX"


def test_a_page_needs_nothing_beside_itself_and_runs_its_own_script_only(text: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    )
    assert "{{" not in text
    for name in re.findall(r'(?:src|href)="([^"#]+)"', text):
        assert name.startswith("data:")
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "of two plots, too"


def test_a_placeholder_in_a_name_is_text() -> None:
    about = [("checkpoint", "{{data}}.pt")]
    assert "<h1>{{data}}.pt</h1>" in page(about, LAYERS, SENTENCES, {}, {})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if MISSING:
        pytest.skip(REASON)
    with chromium() as found:
        yield found


@pytest.fixture(params=[400, 1400])
def shown(request: pytest.FixtureRequest, text: str, browser: Browser, tmp_path: Path) -> Browser:
    file = tmp_path / "page.html"
    file.write_text(text)
    browser.complaints()
    browser.open(file, request.param)
    assert browser.run("return innerWidth") == request.param
    return browser


def pieces(browser: Browser) -> list[str]:
    """Their names for a screen reader."""
    return browser.run("return [...document.querySelectorAll('.piece')].map(p => p.ariaLabel)")


FIRST = ["Mo: 0 experts", "tion: 1 expert", "on: 2 experts", "</s>: 3 experts", "</s>: 1 expert"]


def test_it_renders_within_the_width_and_without_complaints(shown: Browser) -> None:
    assert pieces(shown) == FIRST
    assert shown.run("return document.querySelectorAll('svg').length") == 2
    for details in ("false", "true"):
        wide = "return document.documentElement.scrollWidth - innerWidth"
        shown.run(f"document.querySelectorAll('details').forEach(d => d.open = {details})")
        assert shown.run(wide) <= 0
    shown.run(
        "const s = document.getElementById('sentence'); s.value = 1; s.dispatchEvent(new Event('change'))"
    )
    assert shown.run("return document.documentElement.scrollWidth - innerWidth") <= 0
    assert pieces(shown)[0] == f"{HOSTILE}: 0 experts" and shown.run("return document.title") != "taken"
    assert shown.complaints() == []


def test_the_keyboard_goes_everywhere(shown: Browser) -> None:
    def focused() -> list[str]:
        return shown.run("const e = document.activeElement; return [e.id || e.className, e.ariaLabel || '']")

    def detail() -> str:
        return shown.run("return document.getElementById('detail').innerText")

    shown.press("Tab")
    assert focused() == ["sentence", ""]
    shown.press("Tab", "Tab")
    assert focused() == ["piece word none", FIRST[0]]
    shown.press("ArrowRight", "ArrowRight")
    assert focused()[1] == FIRST[2] and "“on”, piece 3 of the encoder" in detail()
    assert re.search(r"encoder layer 2\s+2\s+0 0.50, weight 1.00\s*1 0.25, weight 1.00", detail())
    shown.press("End")
    assert focused()[1] == FIRST[3]
    shown.press("Tab", "Enter")
    assert "“</s>”, piece 1 of the decoder" in detail()
    assert re.search(r"decoder layer 2\s+1\s+zero 0 0.25\s*shared", detail())
    shown.run("document.getElementById('layer').focus()")
    shown.press("ArrowDown")
    assert pieces(shown) == FIRST[:4]
    shown.run("document.getElementById('sentence').focus()")
    shown.press("ArrowDown")
    assert pieces(shown)[1:] == ["שלום: 1 expert", f"{'x' * 300}: 2 experts"]


def test_a_screen_reader_has_a_name_for_everything_it_can_use(shown: Browser) -> None:
    roles = ("button", "combobox", "region", "img", "image", "table", "list")
    nodes = shown.command("Accessibility.getFullAXTree")["nodes"]
    found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert {node["role"]["value"] for node in found} >= {"button", "combobox", "region", "image", "table"}
    assert not [node for node in found if not node.get("name", {}).get("value")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(scheme: str, text: str, browser: Browser, tmp_path: Path) -> None:
    """At least 4.5 : 1 (WCAG 2, 1.4.3), of the chooser's colours and of the quiet text."""
    file = tmp_path / "page.html"
    file.write_text(text)
    browser.open(file, 400, scheme)
    for selector in (".piece", ".quiet", "#legend li", ".expert", "thead th"):
        for ratio in browser.run(CONTRASTS.replace("SELECTOR", selector)):
            assert ratio >= 4.5, selector


CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function over(colours) {  // sRGB of colours laid over one another
  canvas.fillStyle = "white";
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function light(rgb) {
  const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
return [...document.querySelectorAll("SELECTOR")].map(element => {
  const behind = [];
  for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
  const ink = getComputedStyle(element).color;
  const both = [over(behind), over([...behind, ink])].map(light).sort((a, b) => a - b);
  return (both[1] + 0.05) / (both[0] + 0.05);
});
"""


def test_layers_that_are_all_dense_on_one_side_are_left_out() -> None:
    one = [Sentence(each.pieces, each.choices[:1]) for each in SENTENCES]
    data = block(page([("checkpoint", "a.pt")], LAYERS[:1], one, {}, {}))
    assert [layer["side"] for layer in data["layers"]] == ["encoder"]
    assert replace(LAYERS[0], tokens=0, rows=[0] * 5).dead == []

"""The same as a page of HTML that needs nothing beside itself.

What comes from outside (text, names of runs) is in one block of JSON, in which `<` is escaped, and the script
puts it into the page as text; in the plots and the title it is escaped. A policy in the page forbids any
other script, and the network.
"""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from xmoe_fairseq.explain.collect import Layer, Sentence

TEMPLATE = "page.html"
DIGITS = 3


def page(
    about: Sequence[tuple[str, str]], layers: Sequence[Layer], sentences: Sequence[Sentence],
    plots: Mapping[str, str], tables: Mapping[str, Any],
) -> str:  # fmt: skip
    """
    Args:
        about: the first is the checkpoint, whose name is the title.
        plots: <svg> by the name of its place in the template.
        tables: by that name: lists of cells, the first of them titles.
    """
    template = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.S)
    data = {
        "about": about,
        "layers": [described(layer) for layer in layers],
        "sentences": [entry(sentence) for sentence in sentences],
        "tables": tables,
    }
    values = {
        "title": escape("/".join(Path(about[0][1]).parts[-2:])),
        "script hash": b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": json_block(data),
        **{f"plot {name}": svg for name, svg in plots.items()},
    }
    return re.sub(r"\{\{([\w ]+)\}\}", lambda place: values.get(place[1], ""), template)


def described(layer: Layer) -> dict[str, Any]:
    router = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in layer.router.items())
    return {**asdict(layer), "dead": layer.dead, "router": router}


def entry(sentence: Sentence) -> dict[str, Any]:
    choices = [
        [[[c.expert, round(c.probability, DIGITS), round(c.weight, DIGITS)] for c in of] for of in layer]
        for layer in sentence.choices
    ]
    return {"title": sentence.title, "pieces": sentence.pieces, "choices": choices}


def json_block(data: Any) -> str:
    """For a <script type="application/json">, which nothing in the data can end."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

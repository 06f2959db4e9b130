"""The page of xmoe-explain beside scores and tables. Some ten seconds, most of them for starting Python."""

import sys
from pathlib import Path

from experiments.evaluation import call
from xmoe_fairseq_compat.errors import UserError


def write_page(checkpoint: Path, data: str, split: str, page: Path, *more: object) -> None:
    """Says on stderr why there is none: what was scored is there all the same."""
    words = ("xmoe-explain", checkpoint, "--data", data, "--split", split, "--output", page, *more)
    try:
        if not checkpoint.is_file():  # the command would say so, too, but start for some seconds
            raise UserError(f"{checkpoint}: no such file")
        call(words, page.with_suffix(".log"))
        print(f"[explain] {page}", flush=True)
    except UserError as error:
        print(f"[explain] NO PAGE of the experts that tokens take: {error}", file=sys.stderr, flush=True)

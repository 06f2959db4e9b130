"""docs/flags.md is as the code is."""

from experiments import flags_page
from xmoe_fairseq.criterions.routing_log import RATIOS
from xmoe_fairseq.moe.routers.registry import flags_of_routers, registered_routers


def test_the_page_is_written_from_this_code() -> None:
    again = "run: python scripts/run.py experiments.flags_page"
    assert flags_page.PAGE.read_text(encoding="utf-8") == flags_page.page(), again


def test_nothing_is_left_out() -> None:
    page = flags_page.page()
    for name, kind in registered_routers().items():
        assert f"| `{name}` | {kind.description} | {kind.depends_on_batch} |" in page
    for flag in flags_of_routers():
        assert f"| `--{flag.name.replace('_', '-')}` |" in page
    assert RATIOS.keys() <= flags_page.METRICS.keys()

"""xmoe-threshold from end to end: open, search, time what was tried, write."""

import sys
from argparse import Namespace
from functools import partial

from xmoe_fairseq.thresholds.checkpoint import check_paths, open_meter, write_checkpoint
from xmoe_fairseq.thresholds.families import EqualExperts, same_everywhere
from xmoe_fairseq.thresholds.measure import Quality
from xmoe_fairseq.thresholds.report import Report, shorten, table, write_report
from xmoe_fairseq.thresholds.search import Search
from xmoe_fairseq_compat.errors import FlagError


def choose(args: Namespace) -> None:
    """Raises UserError."""
    check_paths(args.checkpoint, args.output)
    meter = open_meter(args.checkpoint, args.data, say, args.max_tokens)
    as_it_is = meter.in_use
    limit = meter.routers[0].limit
    if args.budget is not None and not 1 <= args.budget <= limit:
        raise FlagError(f"--budget must be from 1 to {limit}, what a token may take, got {args.budget:g}")
    start = meter.measure(as_it_is)
    search = Search(meter, EqualExperts(meter, as_it_is) if args.per_layer else same_everywhere(meter))
    if args.budget is None:
        chosen = search.smallest(start.bits_per_token + args.max_loss)
    else:
        chosen = within(search, args.budget)
    tried = sorted((q for q in search.points.values() if q != chosen), key=lambda q: q.flops)
    rows = {"chosen": chosen, **{f"tried {number}": quality for number, quality in enumerate(tried, 1)}}
    times = meter.timed([*rows.values()], start, partial(meter.seconds, as_it_is))
    about = {
        "checkpoint": args.checkpoint.name, "budget, experts per token": args.budget,
        "permitted loss, bits per token": args.max_loss,
        "thresholds": "per layer" if args.per_layer else "one for all layers",
    }  # fmt: skip
    report = Report(about, "as it is", start, dict(zip(rows, times, strict=True)), [*search.points.values()])
    write_checkpoint(args.checkpoint, args.output, chosen.thresholds)
    written = write_report(args.output, report)
    print(table(report), end="")
    print("written: " + ", ".join(str(path) for path in [args.output, *written]))


def within(search: Search, experts: float) -> Quality:
    """The largest setting at which a token takes no more experts; each layer, if it can be told."""
    if isinstance(search.family, EqualExperts):
        return search.at(search.family.setting(experts))
    chosen = search.largest(lambda quality: quality.experts_per_token, experts)
    assert chosen  # one expert per token is within any budget
    return chosen


def say(quality: Quality) -> None:
    if not sys.stderr.isatty():  # no bar to see
        numbers = f"{quality.bits_per_token:.4f} bits, {quality.experts_per_token:.3f} experts per token"
        print(f"t {shorten(quality.thresholds)}: {numbers}", flush=True)

"""Writes docs/flags.md: models, flags, routers and logged numbers, as the code has them.

python scripts/run.py experiments.flags_page          (a test says when it must be run again)
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY

import xmoe_fairseq  # noqa: F401  (registers models and criterions)
from experiments.train import ROOT
from xmoe_fairseq.criterions.moe_loss import MoELossConfig
from xmoe_fairseq.criterions.routing_log import SHOWN
from xmoe_fairseq.flags import CommonFlags, MoEConfig
from xmoe_fairseq.moe.routers.registry import flags_of_routers, registered_routers
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.errors import flag
from xmoe_fairseq_compat.files import write_atomically

PAGE = ROOT / "docs/flags.md"
LANGUAGE_MODEL = "xmoe_transformer_lm"
# Keys of the log without moe_encoder_ or moe_decoder_.
METRICS = {
    "experts_per_token": "experts that computed a token, shared ones included",
    "flops_vs_dense_ffn": "FLOPs of the MoE layers (router included; for `gshard` all its slots, used or "
    "not) over those of the dense FFN that they replace",
    "flops_vs_all_experts": "the same over those with all experts",
    "load_balance_loss": "E x sum over experts of (mean probability x share of first choices), for every "
    "router, trained with it or not; E = one expert takes all. It is 1 when either is even, so a router that "
    "is still undecided shows 1 although most experts are dead: look at `dead_experts`",
    "z_loss": "unscaled",
    "cheap_per_token": "zero, copy and constant experts that a token took; only where there are any",
    "dropped_share": "of the (token, expert) pairs chosen; 0 unless there is a capacity",
    "load_cv": "standard deviation / mean of the experts' loads; 0 = even, sqrt(E/n - 1) if n of E share all",
    "max_violation": "the largest load over the mean one, less 1: 0 = even, E - 1 = one expert takes all "
    "(arXiv 2408.15664)",
    "dead_experts": "experts of all layers together that computed no token",
    "active_experts": "with --moe-adapt-experts-every: experts in use, mean over layers; loads, dead experts "
    "and `load_balance_loss` are of these alone",
    "router_entropy": "nats; ln E when undecided",
    "threshold": "t or tau of the `threshold` router, mean over layers; of `expert_threshold` over experts",
    "l1_coeff": "lambda of the `relu` router",
    "learned_threshold": "G of the `topany` router, mean over experts in use and layers",
}


LOADS = """\
A load is a number of (token, expert) pairs that were computed, second and further choices like
first ones. Experts that get none in a whole `--log-interval` are named in a warning. Each
validation adds two lines to `moe_load.jsonl` in `--save-dir`: of the validated set, and as
`training` of the epoch so far, with each layer's `tokens`, `rows` and `first_choices` by expert,
`active_experts` and how even the loads are, and all numbers above of each side; with
`--tensorboard-logdir` the rows are histograms, too, `moe_load/` and the layer's name, whose axis is
the expert. (wandb by `--wandb-project` was tried with 0.31 and `WANDB_MODE=offline`, which `wandb
sync` sends later; each epoch leaves an empty run folder more.)

With `--ffn-sparsity-coeff` a dense model's log has `ffn_active`, the share of the FFNs' neurons that are
above 0 for a token, and `ffn_penalty`, without the coefficient.

At its start a training says how many parameters a token meets (those that all share, and its
experts'), as `xmoe-checkpoint info` does: with a fixed t at most, with a budget about, with top-k
exactly; and which routing the flags that were left out stand for. A checkpoint holds that, so it
means the same whatever later defaults are. `xmoe-checkpoint info` also says how many experts the
model took in the last validation.
"""


def row(name: str, default: Any, text: str) -> list[str]:
    none = default is None or default is False
    shown = f"{default:g}" if type(default) is float else "" if none else str(default)
    return [f"`{flag(name)}`", shown, linked(text)]


def linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def rows_of(record: Any, names: Iterable[str]) -> list[list[str]]:
    known = {field.name: field for field in fields(record)}
    return [row(name, known[name].default, known[name].metadata["help"]) for name in names]


def names_of(record: Any) -> list[str]:
    return [field.name for field in fields(record) if not field.name.startswith("_")]


def flag_tables() -> Iterator[str]:
    titles = ["flag", "default", "meaning"]
    yield "## Flags of models\n\nWhatever the router:\n"
    common = rows_of(CommonFlags, (name for name in names_of(CommonFlags) if name != "moe_router"))
    known = f"see [Routers](#routers): {', '.join(registered_routers())}"
    yield markdown(titles, [row("moe_router", CommonFlags.moe_router, known), *common])
    yield "Of some routers; given with another one, most are refused:\n"
    takers = [[*row(f.name, f.default, f.help), ", ".join(names)] for f, names in flags_of_routers().items()]
    yield markdown([*titles, "routers"], takers)
    yield "Of language models:\n"
    ours = MODEL_DATACLASS_REGISTRY[LANGUAGE_MODEL]
    own = [name for name in vars(ours)["__annotations__"] if name not in names_of(MoEConfig)]
    yield markdown(titles, rows_of(ours, own))
    yield "## Flags of criterions\n"
    yield markdown(titles, rows_of(MoELossConfig, names_of(MoELossConfig)))


def page() -> str:
    archs = [name for name, model in ARCH_MODEL_NAME_REGISTRY.items() if model.startswith("xmoe_")]
    criterions = [
        name for name, kind in CRITERION_DATACLASS_REGISTRY.items() if issubclass(kind, MoELossConfig)
    ]
    routers = [
        [f"`{name}`", linked(kind.description), kind.depends_on_batch]
        for name, kind in registered_routers().items()
    ]
    head = f"""# Flags, routers and logged numbers

Written by `python scripts/run.py experiments.flags_page` from the code. `fairseq-train --user-dir
xmoe_fairseq --arch ARCH --help` says the same.

`--arch`: {listed(archs)}. They take all flags of fairseq's `transformer` and `transformer_lm`.

`--criterion`: {listed(criterions)}, with the options of fairseq's criterions of those names.
"""
    logged = f"""## Logged numbers

Of training and validation, and for TensorBoard, as `moe_encoder_...` and `moe_decoder_...`: ratios of sums
over all tokens since the last record (for a validation: all of it), layer by layer, then their mean.
So they do not depend on `--update-freq`, the number of ranks or the batch size. Log lines show
{listed(SHOWN)}; `--log-format json`, TensorBoard, wandb and `moe_load.jsonl` have them all.
"""
    return "\n".join([
        head, *flag_tables(),
        "## Routers\n\nWhich to take when: [routers.md](routers.md).\n",
        markdown(["`--moe-router`", "a token's experts", "depends on the batch"], routers),
        logged, markdown(["key", "meaning"], [[f"`{key}`", linked(text)] for key, text in METRICS.items()]),
        LOADS,
    ])  # fmt: skip


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


if __name__ == "__main__":
    write_atomically(PAGE, page())
    print(f"{Path(PAGE).relative_to(ROOT)} is written")

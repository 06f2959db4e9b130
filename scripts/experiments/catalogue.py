"""The data of the experiments, checked: models.toml, presets/TASK/PRESET.toml and tasks.toml.

A FlagError names the file, the field and the rule.
"""

import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from xmoe_fairseq_compat.errors import FlagError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
Flags = dict[str, str | int | float]  # of fairseq-train, without the dashes; true: given, false: not given
Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class Model:
    """How a token meets an FFN."""

    label: str
    flags: Flags  # those of its router; they overrule the preset's
    colour: str  # in plots, as matplotlib has them
    marker: str = "o"
    # wide: dense, in the preset's wider FFNs; split: its experts are the dense FFN itself.
    kind: Literal["dense", "wide", "sparse", "split"] = "sparse"
    split: int = 1  # s: an expert has 1/s of the dense FFN's width, and there are s times as many
    capacity: bool = False  # it has the paper's capacity factor, s, where the preset is the paper's
    causal: bool = True  # a token sees none of the later ones
    max_batch_tokens: int = 0  # where memory or time grow faster than they; 0: the preset's


def length(flags: Flags) -> str:
    """Of a training."""
    if updates := str(flags.get("max-update", "")):
        return f"{int(updates):,} updates" if updates.isdigit() else f"{updates} updates"
    return f"{flags['max-epoch']} epochs"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One size of one task."""

    about: str  # the dense model in words
    flags: Flags
    ffn_dim: int
    experts: int  # of the dense FFN's width; 0: fairseq's own dense model, without the plugin
    batch_tokens: int  # on one device in one forward pass
    update_tokens: int
    # Flags for the models with a router, by its name; t as in the paper.
    routers: dict[str, Flags] = field(default_factory=lambda: {"threshold": {"moe-threshold": 0.9}})
    cpu: bool = False
    paper_capacity: bool = False
    wide_ffn_dim: int = 0  # of a dense model with as many parameters as the sparse ones; 0: there is none

    def __str__(self) -> str:
        device = "CPU" if self.cpu else "GPU"
        update = f"{self.update_tokens:,} tokens"
        return f"{self.about}, FFN {self.ffn_dim}; {update} x {length(self.flags)}; {device}"


@dataclass(frozen=True, kw_only=True)
class TranslationPreset(Preset):
    beam: int
    best_by_bleu: bool = True  # each validation translates, and the best checkpoint is that of the best BLEU


@dataclass(frozen=True, kw_only=True)
class LanguageModelPreset(Preset):
    sample_tokens: int
    seen_tokens: int = 0  # of a sample, which are context only when it is scored


TASKS: dict[str, type[Preset]] = {"wmt": TranslationPreset, "lm": LanguageModelPreset}


def models() -> dict[str, Model]:
    path = FOLDER / "models.toml"
    found = {name: record(Model, table, f"{path}: {name}") for name, table in read(path).items()}
    for name, model in found.items():
        if (model.kind in ("dense", "wide")) != (model.flags.get("moe-freq") == 0):
            raise FlagError(f"{path}: {name}: kind dense or wide and the flag moe-freq = 0 go together")
    return found


def presets(task: str) -> dict[str, Preset]:
    found = {}
    routers = {router_of(model) for model in models().values()}
    for path in sorted((FOLDER / "presets" / task).glob("*.toml")):
        preset = found[path.stem] = record(TASKS[task], read(path), str(path))
        if not {"max-update", "max-epoch"} & {*preset.flags}:
            raise FlagError(f"{path}: flags must say max-update or max-epoch")
        if unknown := {*preset.routers} - routers:
            raise FlagError(f"{path}: routers: no model has the router {', '.join(sorted(unknown))}")
    return found


def router_of(model: Model) -> str:
    return str(model.flags.get("moe-router", "threshold"))  # the flag's own default


def task_flags(task: str) -> Flags:
    path = FOLDER / "tasks.toml"
    flags: Flags | None = read(path).get(task)
    if flags is None or not fits(flags, Flags):
        raise FlagError(f"{path}: {task} must be {in_words(Flags)}, got {flags!r}")
    return flags


def read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # TOML's, and what is no UTF-8
        raise FlagError(f"{path}: {error}") from None


def record(kind: type[Record], table: Any, where: str) -> Record:
    """Raises FlagError: a field that is missing, unknown, of another type, or a number that is too small."""
    if not isinstance(table, dict):
        raise FlagError(f"{where} must be a table of fields, got {table!r}")
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    for name, value in table.items():
        if name not in known:
            raise FlagError(f"{where}: there is no field {name}; it may have {', '.join(known)}")
        if not fits(value, known[name].type):
            raise FlagError(f"{where}: {name} must be {in_words(known[name].type)}, got {value!r}")
        least = 0 if known[name].default == 0 or name == "experts" else 1
        if type(value) is int and value < least:
            raise FlagError(f"{where}: {name} must be at least {least}, got {value}")
    for name, one in known.items():
        if name not in table and one.default is MISSING and one.default_factory is MISSING:
            raise FlagError(f"{where}: the field {name} is missing")
    return kind(**table)


def fits(value: Any, wanted: Any) -> bool:
    if get_origin(wanted) is Literal:
        return value in get_args(wanted)
    if get_origin(wanted) is dict:
        content = get_args(wanted)[1]
        return isinstance(value, dict) and all(fits(one, content) for one in value.values())
    if wanted == str | int | float:  # bool is an int
        return isinstance(value, (str, int, float))
    return type(value) is wanted


def in_words(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(get_args(wanted))}"
    return wanted.__name__ if isinstance(wanted, type) and not get_args(wanted) else "a table of flags"


def listing() -> str:
    """Presets and models with what they are, for --help."""
    sections: dict[str, dict[str, Any]] = {f"PRESET of {task}": presets(task) for task in TASKS}
    sections["MODEL"] = {name: model.label for name, model in models().items()}
    lines = []
    for title, entries in sections.items():
        width = max(map(len, entries)) + 2
        lines += ["", title, *(f"  {name:<{width}}{about}" for name, about in entries.items())]
    return "\n".join(lines)

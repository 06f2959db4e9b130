"""A router of a user's own, as docs/extending.md has it: trained, evaluated, and missed."""

import json
import re
import shlex
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch
from commands import PLUGIN, run
from documented import DOCS, example
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer
from torch import Tensor
from toy import language_model, sentences

from xmoe_fairseq.moe import (
    Routing,
    ThresholdRouter,
    TokenRouter,
    TopKRouter,
    record_routing,
    register_router,
)
from xmoe_fairseq.moe.routers import registry
from xmoe_fairseq.router_args import read_router_args
from xmoe_fairseq.trainer import MoETrainer
from xmoe_fairseq_compat.errors import CheckpointError, FlagError

OWN = example("extending.md", "## A router", "python")
COMMANDS = re.split(r"\n(?=fairseq)", example("extending.md", "## A router", "bash").replace("\\\n", ""))


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ROUTERS", dict(registry._ROUTERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a user-dir, and the checkpoint that is trained with it."""
    made = tmp_path_factory.mktemp("own")
    (made / "own_routers").mkdir()
    (made / "own_routers" / "__init__.py").write_text(OWN)
    return made


@pytest.fixture(scope="module")
def trained(folder: Path, corpus: tuple[Path, Path]) -> Path:
    run(*here(COMMANDS[0], folder, corpus[1]), "--num-workers", "0")
    return folder / "checkpoints/own/checkpoint_last.pt"


def here(command: str, folder: Path, data: Path) -> list[str]:
    """A documented command, with its folders where the test has them."""
    for name, path in (("data/lm-sample/bin", data), ("own_routers", folder / "own_routers")):
        command = command.replace(f" {name} ", f" {path} ")
    return shlex.split(command.replace("checkpoints/own", f"{folder}/checkpoints/own"))


def perplexity(output: str) -> float:
    return float(re.findall(r"Perplexity: ([\d.]+)", output)[-1])


def test_the_documented_commands(folder: Path, trained: Path, corpus: tuple[Path, Path]) -> None:
    evaluate = here(COMMANDS[1], folder, corpus[1])
    at = evaluate.index("--model-overrides")
    as_trained, other = run(*evaluate[:at]), run(*evaluate)
    assert perplexity(as_trained) != perplexity(other)
    same = run(*evaluate[:at], "--model-overrides", "{'moe_router_args': '{\"factor\": 3}'}")
    assert perplexity(same) == perplexity(as_trained)
    output = run(
        *evaluate[:at], "--model-overrides", "{'moe_router_args': '{\"factor\": 0}'}", succeeds=False
    )
    assert (
        output.splitlines()[-1] == "fairseq-eval-lm: error: --moe-router-args: factor must be above 0, got 0"
    )


def test_going_on_asks_for_its_arguments(folder: Path, trained: Path, corpus: tuple[Path, Path]) -> None:
    command = here(COMMANDS[0], folder, corpus[1])
    at = command.index("--moe-router-args")
    less = [*command[:at], *command[at + 2 :], "--max-update", "21", "--no-save"]
    asked = re.search(r"; add (.*) to keep them, or (.*) to change them$", run(*less, succeeds=False))
    assert asked and shlex.split(asked[1]) == ["--moe-router-args", '{"factor": 3.0}']
    for words in asked.groups():
        assert 'num_updates": "21' in run(*less, *shlex.split(words), "--log-format", "json")
    # Another router, asked for: the arguments are not its own.
    assert 'num_updates": "21' in run(*less, "--moe-router", "topk", "--log-format", "json")


@pytest.mark.parametrize("tool", ["fairseq-generate", "fairseq-eval-lm", "fairseq-validate"])
@pytest.mark.parametrize("own", [True, False])
def test_every_command_opens_it_with_its_user_dir(
    own: bool, tool: str, folder: Path, trained: Path, corpus: tuple[Path, Path]
) -> None:
    user_dir = ("--user-dir", folder / "own_routers") if own else PLUGIN
    flags = ("--path", trained, "--cpu", "--batch-size", 4, "--num-workers", 0)
    if tool == "fairseq-generate":
        flags += ("--task", "language_modeling", "--prefix-size", 1, "--sample-break-mode", "eos")
    output = run(tool, corpus[1], *user_dir, *flags, succeeds=own)
    if not own:
        assert "Traceback" not in output
        assert output.splitlines()[-1] == (
            f"{tool}: error: cannot load checkpoint {trained}: its router above_average is not registered; "
            f"add the --user-dir that registers it, in training {folder / 'own_routers'}"
        )


def test_its_weights_can_be_read_without_it(trained: Path) -> None:
    """As an average of checkpoints does; only a model cannot be built, or with another router."""
    assert checkpoint_utils.load_checkpoint_to_cpu(str(trained))["model"]
    with pytest.raises(CheckpointError, match=": its router above_average is not registered; add the --user"):
        checkpoint_utils.load_model_ensemble([str(trained)], {})
    other = {"moe_router": "topk", "moe_router_args": ""}
    assert checkpoint_utils.load_model_ensemble([str(trained)], other)


def test_a_dummy_batch_is_told_to_any_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_prepare_sample", lambda self, sample, is_dummy: (sample, sample is None))
    trainer = object.__new__(MoETrainer)
    for router in ("topk", "gshard"):
        trainer._model = language_model(moe_router=router)
        for sample in (None, {}):
            trainer._prepare_sample(sample)
            (kind,) = [m for m in trainer._model.modules() if isinstance(m, registry.RouterKind)]
            assert kind.counting == (sample is not None)


def test_hydra_takes_it(folder: Path, corpus: tuple[Path, Path], tmp_path: Path) -> None:
    (words,) = re.findall(r"^\(hydra: `(.*)`\.\)", (DOCS / "extending.md").read_text(), flags=re.M)
    flags = (
        f"common.user_dir={folder / 'own_routers'}", "common.cpu=true", "dataset.num_workers=0",
        "task=language_modeling", f"task.data={corpus[1]}", "task.tokens_per_sample=16",
        "dataset.batch_size=4",
        "optimization.max_update=2", "optimization.lr=[0.001]", "optimizer=adam", "checkpoint.no_save=true",
        "criterion._name=moe_cross_entropy", "+model._name=xmoe_transformer_lm",
        "+model.decoder_embed_dim=32", "+model.decoder_input_dim=32", "+model.decoder_output_dim=32",
        "+model.decoder_layers=2",
        f"hydra.run.dir={tmp_path}", *shlex.split(words),
    )  # fmt: skip
    assert "AboveAverageRouter(" in run("fairseq-hydra-train", *flags)


def test_help_lists_it(folder: Path) -> None:
    (folder / "percent").mkdir()
    (folder / "percent/__init__.py").write_text(
        OWN.replace("the most probable", "100 % of the most probable")
    )
    assert "100 % of the" in run(
        "fairseq-train", "--user-dir", folder / "percent", "--arch", "xmoe_transformer", "--help"
    )
    output = run(
        "fairseq-train", "--user-dir", folder / "own_routers", "--arch", "xmoe_transformer_lm", "--help"
    )
    text = " ".join(output.split())
    assert "above_average (the most probable, and every other at least `factor` times as probable" in text
    assert "together, or each of at least tau), above_average (" in text


def test_the_documented_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    scope: dict = {}
    exec(example("extending.md", "## A router", "python", 1), scope)
    probs_TE, chosen_TE = scope["routing"].probs_TE, scope["routing"].combine_weights() > 0
    best_TE = torch.nn.functional.one_hot(probs_TE.argmax(dim=1), 8).bool()
    assert torch.equal(chosen_TE, (probs_TE >= 1.5 / 8) | best_TE)
    assert scope["y"].shape == (2, 5, 16)


class Own(TopKRouter):
    description = "k, or of the arguments"

    def __init__(
        self, model_dim: int, num_experts: int, k: int, noise: float | None = None, *, hard=True
    ) -> None:
        super().__init__(model_dim, num_experts, k)
        self.noise, self.hard = noise, hard

    @classmethod
    def from_config(cls, place: registry.Place, **arguments: object) -> "Own":
        return cls(place.model_dim, place.num_experts, **arguments)


def test_arguments_reach_the_constructor() -> None:
    register_router("own")(Own)
    model = language_model(moe_router="own", moe_router_args='{"k": 3, "noise": 1, "hard": false}')
    with record_routing(model) as records:
        model(sentences([4, 4]))
    router = records[0][0].router
    assert (router.k, router.noise, router.hard, records[0][1].experts_per_token) == (3, 1, False, 3.0)
    for text in ('{"k": 3}', '{"k": 3, "noise": null}'):
        assert language_model(moe_router="own", moe_router_args=text)


OBJECT = "--moe-router-args must be a JSON object, each name once, such as '{\"factor\": 2.0}'"


def test_any_annotation_will_do() -> None:
    """Also one that isinstance does not take, or that is no JSON type, or that cannot be evaluated."""

    class Form(TypedDict):
        size: int

    for annotation, text in (
        (Any, "true"),
        (Form, '{"size": 1}'),
        (tuple[int, ...], "[1]"),
        ("np.none", "1"),
    ):

        class Annotated(Own):
            def __init__(self, model_dim: int, num_experts: int, v: annotation) -> None:
                super().__init__(model_dim, num_experts, 1)

        assert read_router_args("own", Annotated, f'{{"v": {text}}}') == {"v": json.loads(text)}


def test_a_subclass_may_take_more_and_in_another_order() -> None:
    @register_router("own")
    class Sharp(ThresholdRouter):
        def __init__(self, model_dim: int, num_experts: int, sharp: float = 1.0, **more: Any) -> None:
            super().__init__(model_dim, num_experts, **more)
            self.sharp = sharp

        @classmethod
        def from_config(cls, place: registry.Place, sharp: float) -> "Sharp":
            router = super().from_config(place)
            router.sharp = sharp
            return router

    model = language_model(moe_router="own", moe_threshold=0.4, moe_router_args='{"sharp": 2}')
    router = next(module for module in model.modules() if isinstance(module, Sharp))
    assert (router.threshold, router.max_experts_per_token, router.sharp) == (0.4, 4, 2)


TAKES = "--moe-router own takes, k (int), noise (float or NoneType), hard (any value)"


@pytest.mark.parametrize(
    "router, text, message",
    [
        ("own", "", "--moe-router-args must give k, which --moe-router own needs, got none"),
        ("own", "{k: 2}", f"{OBJECT}, got {{k: 2}}"),
        ("own", "[2]", f"{OBJECT}, got [2]"),
        ("own", {"k": 2}, "got {'k': 2}; for hydra, quote it once more: \"+model.moe_router_args='{...}'\""),
        ("own", '{"k": NaN}', f'{OBJECT}, got {{"k": NaN}}'),  # which no rule like k < 1 would refuse
        ("own", '{"k": 2, "k": 3}', f'{OBJECT}, got {{"k": 2, "k": 3}}'),
        ("own", '{"k": 2, "nois": 1}', f"must name what {TAKES}, got nois; did you mean noise?"),
        ("own", '{"k": 2.5}', "--moe-router-args: k must be of type int, got 2.5"),
        ("own", '{"k": true}', "--moe-router-args: k must be of type int, got true"),
        (
            "own",
            '{"k": 2, "noise": "x"}',
            '--moe-router-args: noise must be of type float or NoneType, got "x"',
        ),
        ("own", '{"k": 9}', "--moe-router-args: k must be a whole number in [1, num_experts = 8], got 9"),
        (
            "topk",
            '{"k": 2}',
            "with --moe-router topk, which takes --moe-topk, --moe-balance, --moe-balance-step, "
            "--moe-zero-experts, --moe-copy-experts, --moe-constant-experts, --moe-cheap-balance, "
            'got {"k": 2}',
        ),
        ("gshard", '{"k": 2}', 'must be empty with --moe-router gshard, which takes none, got {"k": 2}'),
    ],
)
def test_arguments_that_are_none_of_the_routers(router: str, text: object, message: str) -> None:
    register_router("own")(Own)
    with pytest.raises(FlagError) as error:
        language_model(moe_router=router, moe_router_args=text)
    assert str(error.value).endswith(message) and str(error.value).startswith("--moe-router-args")


def test_what_a_router_declares_is_heeded() -> None:
    """One without scores, which goes by ids, knows the dictionary, and is not causal."""

    @register_router("own")
    class Parity(TokenRouter):
        is_causal, goes_by_ids = False, True

        def __init__(self, model_dim: int, num_experts: int, symbols: int) -> None:
            super().__init__(model_dim, num_experts, flops_per_token=0)
            self.to_one = registry.router_named("hash")(model_dim, num_experts, torch.arange(symbols) % 2)

        @classmethod
        def from_config(cls, place: registry.Place) -> "Parity":
            return cls(place.model_dim, place.num_experts, len(place.dictionary))

        def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
            return self.to_one(x_TD, ids_T)

    with pytest.raises(FlagError, match="--moe-router own cannot be used in a decoder"):
        language_model(moe_router="own")
    Parity.is_causal = True
    with pytest.raises(FlagError, match="--moe-router-temperature must be 1 with --moe-router own"):
        language_model(moe_router="own", moe_router_temperature=2.0)
    model, tokens = language_model(moe_router="own"), sentences([4, 4])
    with record_routing(model) as records:
        model(tokens)
    ((_, routing),) = records[:1]
    assert torch.equal(routing.expert_R[routing.token_R.argsort()], tokens.T.flatten() % 2)

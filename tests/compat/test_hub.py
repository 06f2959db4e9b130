"""One test per patch of fairseq's Python interface, which fails where the patch is taken away."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq.dataclass.configs import GenerationConfig
from fairseq.hub_utils import GeneratorHubInterface, from_pretrained
from omegaconf import OmegaConf

from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.hub import check_before_a_result_is_used, refuse_settings_of_nothing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lenpenn": 2.0}, "generation has no setting lenpenn; did you mean lenpen?"),
        ({"colour": 2.0}, "generation has no setting colour"),
        ({"replace_unk": ""}, "replace_unk is for fairseq-generate and fairseq-interactive: leave it out"),
        (
            {"print_alignment": "soft", "verbose": True},
            "print_alignment='soft' cannot be printed: leave",
        ),
    ],
)
def test_settings_that_would_be_passed_over_are_refused(settings: dict[str, Any], message: str) -> None:
    hub = SimpleNamespace(cfg=OmegaConf.create({"generation": OmegaConf.structured(GenerationConfig())}))
    with pytest.raises(FlagError) as error:
        GeneratorHubInterface.generate(hub, [], **settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    for folders in ((tmp_path / "none",), (tmp_path, "model.pt", tmp_path / "none")):
        with pytest.raises(FlagError, match="/none does not exist: "):
            from_pretrained(*map(str, folders))


def test_settings_that_are_known_pass() -> None:
    """As far as the task, which has the last word."""

    def build(models: Any, args: Any, prefix_allowed_tokens_fn: Any) -> Any:
        raise LookupError(args.lenpen, args.beam, args.keep_inference_langtok)

    generation = OmegaConf.create({"generation": OmegaConf.structured(GenerationConfig())})
    hub = SimpleNamespace(cfg=generation, task=SimpleNamespace(build_generator=build), models=[])
    with pytest.raises(LookupError) as error:
        GeneratorHubInterface.generate(
            hub, [], 3, lenpen=2.0, keep_inference_langtok=True, skip_invalid_size_inputs=True
        )
    assert error.value.args == (2.0, 3, True)


def test_a_model_is_asked_before_its_translation_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(model: str) -> None:
        if model == "bad":
            raise FloatingPointError(model)

    def generate(self: Any, error: type[Exception] | None) -> str:
        if error:
            raise error
        return "translation"

    monkeypatch.setattr(plugins, "checks", [check])
    kind = type("Hub", (), {"generate": generate, "models": ["good"]})
    check_before_a_result_is_used(SimpleNamespace(GeneratorHubInterface=kind))
    hub: Any = kind()
    assert hub.generate(None) == "translation"
    for error in (AssertionError, LookupError):
        with pytest.raises(error):
            hub.generate(error)
    hub.models = ["good", "bad"]
    for error in (None, AssertionError):
        with pytest.raises(FloatingPointError):
            hub.generate(error)
    with pytest.raises(LookupError):
        hub.generate(LookupError)


def test_arguments_by_place_reach_the_search() -> None:
    given: list[Any] = []
    kind = type("Hub", (), {"generate": lambda self, *args, **kwargs: given.extend(args)})
    refuse_settings_of_nothing(SimpleNamespace(GeneratorHubInterface=kind))
    hub = kind()
    hub.cfg = SimpleNamespace(generation={"lenpen": 1.0})
    hub.generate("tokens", 3, True, False, {"constraints": None}, lenpen=2.0)
    assert given == ["tokens", 3, True, False, {"constraints": None}]

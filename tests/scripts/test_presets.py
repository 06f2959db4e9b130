"""What the training scripts would train: the paper's sizes, the arithmetic, flags that fairseq takes."""

import pytest
from fairseq import options
from plan import Plan
from plot_runs import COLOURS
from presets import MODELS, PRESETS, Model

import xmoe_fairseq  # noqa: F401  (registers the models)
from xmoe_fairseq.config import read_moe_config
from xmoe_fairseq.moe.routers.threshold import max_experts_per_token
from xmoe_fairseq.moe.routers.topk import experts_per_token


@pytest.mark.parametrize(
    "task, model, layer",
    [
        ("wmt", "switch", "32 experts x 2048"),
        ("wmt", "topk-s2", "64 experts x 1024"),
        ("wmt", "xmoe-s4", "128 experts x 512"),
        ("lm", "switch", "8 experts x 3072"),
        ("lm", "topk-s2", "16 experts x 1536"),
        ("lm", "xmoe-s4", "32 experts x 768"),
        ("lm", "xmoe-s8", "64 experts x 384"),
        ("lm", "dense", "FFN 3072; dense"),
    ],
)
def test_the_papers_sizes(task: str, model: str, layer: str) -> None:
    assert Plan(task, "paper", model, 2).lines()[0].endswith(layer)


@pytest.mark.parametrize(
    "plan, line",
    [
        (Plan("wmt", "paper", "xmoe-s2", 2), "2 GPUs x 16,384 tokens x update-freq 32 = 1,048,576 tokens"),
        (Plan("wmt", "paper", "xmoe-s2", 1), "1 GPU x 16,384 tokens x update-freq 64 = 1,048,576 tokens"),
        (Plan("wmt", "paper", "gshard", 2), "2 GPUs x 4,096 tokens x update-freq 128 = 1,048,576 tokens"),
        (Plan("lm", "paper", "xmoe-s8", 8), "8 GPUs x 16,384 tokens x update-freq 2 = 262,144 tokens"),
        (
            Plan("lm", "tiny", "dense", 1),
            "1 process on the CPU x 1,024 tokens x update-freq 1 = 1,024 tokens",
        ),
    ],
)
def test_an_update_has_as_many_tokens_on_any_number_of_gpus(plan: Plan, line: str) -> None:
    assert plan.check().lines()[1].startswith(line)


@pytest.mark.parametrize(
    "plan, message",
    [
        (Plan("wmt", "huge", "dense", 1), "PRESET must be one of tiny, claims, small, paper, got huge"),
        (Plan("wmt", "tiny", "xmoe", 1), "MODEL must be one of dense, dense-wide, .*, got xmoe"),
        (Plan("wmt", "paper", "dense", 3), "GPUS must divide 1,048,576 tokens per update into .*, got 3"),
        (Plan("lm", "small", "dense", 0), "GPUS must divide .*, got 0"),
        (Plan("lm", "tiny", "dense-wide", 1), "dense-wide is a model of the preset claims, got tiny"),
        (Plan("lm", "tiny", "expert-choice", 1), "expert-choice cannot be used in a language model"),
    ],
)
def test_what_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.check()


@pytest.mark.parametrize("preset", ["tiny", "claims", "small", "paper"])
@pytest.mark.parametrize("task", PRESETS)
def test_fairseq_takes_the_flags(task: str, preset: str) -> None:
    """And the plugin's rules hold for every model of the size."""
    for model in MODELS:
        if (task, model) == ("lm", "expert-choice") or (model == "dense-wide" and preset != "claims"):
            continue
        plan = Plan(task, preset, model, 1).check()
        args = options.parse_args_and_arch(options.get_training_parser(), ["folder", *plan.flags()])
        config = read_moe_config(args, ("encoder", "decoder") if task == "wmt" else ("decoder",))
        assert config.has_experts("decoder") == (task == "lm" and not plan.is_dense)
        as_paper = preset == "paper" and model.startswith(("xmoe", "topk", "switch"))
        assert config.moe_capacity_factor == (plan.split if as_paper else 0)
        assert config.moe_eval_capacity_factor == 0
        assert config.moe_target_experts_per_token == (plan.split / 2 if "budget" in model else 0)
        if preset == "paper" and model.startswith("xmoe"):
            assert (config.moe_threshold, max_experts_per_token(config)) == (0.9, 0)
        rows = args.max_tokens if task == "wmt" else args.batch_size * args.tokens_per_sample
        assert rows * args.update_freq[0] == plan.size.tokens_per_update


def test_a_models_name_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "dense-to-sparse", MODELS["xmoe-s4"])
    monkeypatch.setitem(MODELS, "xmoe-off", Model())
    sparse, dense = (Plan("lm", "paper", name, 1).check() for name in ("dense-to-sparse", "xmoe-off"))
    assert sparse.flags() == Plan("lm", "paper", "xmoe-s4", 1).flags()
    assert sparse.lines()[0].endswith("32 experts x 768")
    assert dense.flags() == Plan("lm", "paper", "dense", 1).flags()


def test_every_model_has_a_colour() -> None:
    assert set(COLOURS) == set(MODELS)


def test_models_use_as_much_compute_as_the_dense_ffn() -> None:
    """What a token takes, in dense FFNs: experts per token over the split."""
    per_token = {"gshard": 2}
    for name, kind in MODELS.items():
        if not kind.router or kind.router == "threshold" and not kind.cut:
            continue
        args = options.parse_args_and_arch(
            options.get_training_parser(), ["folder", *Plan("wmt", "tiny", name, 1).flags()]
        )
        config = read_moe_config(args, ())
        single = config.moe_router in ("hash", "base")
        assert per_token.get(name, 1 if single else experts_per_token(config)) / kind.split == 1

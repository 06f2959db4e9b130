"""What the training scripts would train: the paper's sizes, the arithmetic, flags that fairseq takes."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run as command
from commands import script
from documented import example
from fairseq import options
from matplotlib.colors import is_color_like
from matplotlib.lines import Line2D

import xmoe_fairseq  # noqa: F401  (registers the models)
from experiments import catalogue, compare, score, train
from experiments.catalogue import TASKS, models, presets
from experiments.plan import Plan
from xmoe_fairseq.config import read_moe_config
from xmoe_fairseq.moe.routers.threshold_flags import max_experts_per_token
from xmoe_fairseq.moe.routers.topk import experts_per_token
from xmoe_fairseq_compat.errors import FlagError

SIZES = [(task, preset) for task in TASKS for preset, size in presets(task).items() if size.experts]

DEMOS = "xmoe-s4-normalized"  # the one name that says neither budget nor rule


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
        (("wmt", "paper", "xmoe-s2", 2), "2 GPUs x 16,384 tokens x update-freq 32 = 1,048,576 tokens"),
        (("wmt", "paper", "xmoe-s2", 1), "1 GPU x 16,384 tokens x update-freq 64 = 1,048,576 tokens"),
        (("wmt", "paper", "gshard", 2), "2 GPUs x 4,096 tokens x update-freq 128 = 1,048,576 tokens"),
        (("lm", "paper", "xmoe-s8", 8), "8 GPUs x 16,384 tokens x update-freq 2 = 262,144 tokens"),
        (("lm", "tiny", "dense", 1), "1 process on the CPU x 1,024 tokens x update-freq 1 = 1,024 tokens"),
    ],
)
def test_an_update_has_as_many_tokens_on_any_number_of_gpus(
    plan: tuple[str, str, str, int], line: str
) -> None:
    assert Plan(*plan).lines()[1].startswith(line)


@pytest.mark.parametrize(
    ("preset", "asked", "device", "flags"),
    [
        ("claims", None, "1 process on the CPU x ", {"--cpu"}),
        ("claims", "", "1 process on the CPU x ", {"--cpu"}),
        ("claims", "0", "1 process on the CPU x ", {"--cpu"}),
        ("claims", "1", "1 GPU x ", set()),
        ("small", "2", "2 GPUs x ", {"--bf16"}),
    ],
)
def test_where_it_trains(
    preset: str, asked: str | None, device: str, flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preset for the CPU there, unless GPUS names GPUs: as it was, in fp32."""
    monkeypatch.delenv("GPUS", raising=False)
    if asked is not None:
        monkeypatch.setenv("GPUS", asked)
    plan = train.plan_here("lm", preset, "dense")
    assert plan.lines()[1].startswith(device)
    assert {"--cpu", "--bf16"} & {*plan.flags()} == flags


def test_a_run_is_scored_where_it_was_trained() -> None:
    about = {"task": "lm", "preset": "claims", "model": "dense"}
    assert Plan.of_run(about).on_cpu and Plan.of_run(about | {"moved_to_gpus": False}).on_cpu
    assert not Plan.of_run(about | {"moved_to_gpus": True}).on_cpu


@pytest.mark.parametrize("flags", [["--max-update", "100"], ["--lr", "1", "--max-update=100", "--no-save"]])
def test_the_users_number_of_updates_is_announced(flags: list[str]) -> None:
    plan = Plan("wmt", "claims", "dense")
    assert plan.lines()[1].endswith("; 2,500 updates") and plan.lines(flags)[1].endswith("; 100 updates")


@pytest.mark.parametrize(
    "plan, message",
    [
        (("wmt", "huge", "dense", 1), "PRESET must be one of claims, demo, dense_to_sparse, .*, got huge"),
        (("wmt", "tiny", "xmoe", 1), "MODEL must be one of dense, dense-wide, .*, got xmoe"),
        (("wmt", "paper", "dense", 3), "GPUS must divide 1,048,576 tokens per update into .*, got 3"),
        (("lm", "small", "dense", 0), "GPUS must divide .*, got 0"),
        (("lm", "tiny", "dense-wide", 1), "dense-wide wants a preset with wide_ffn_dim, .*, got tiny"),
        (("lm", "tiny", "expert-choice", 1), "expert-choice cannot be used in a language model"),
        (("lm", "dense_to_sparse", "hash", 1), "of fairseq's own model: MODEL must be dense, got hash"),
    ],
)
def test_what_is_refused(plan: tuple[str, str, str, int], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        Plan(*plan)


@pytest.mark.parametrize("task, preset", SIZES)
def test_fairseq_takes_the_flags(task: str, preset: str) -> None:
    """And the plugin's rules hold for every model of the size, which is what the preset says it is."""
    for name, model in models().items():
        wide = catalogue.presets(task)[preset].wide_ffn_dim
        if (task == "lm" and not model.causal) or (model.kind == "wide" and not wide):
            continue
        plan = Plan(task, preset, name)
        args = options.parse_args_and_arch(options.get_training_parser(), ["folder", *plan.flags()])
        config = read_moe_config(args, ("encoder", "decoder") if task == "wmt" else ("decoder",))
        both = task == "wmt" and preset in ("tiny", "demo", "routers", "claims") and model.causal
        assert config.has_experts("decoder") == ((task == "lm" or both) and not plan.is_dense)
        factor = model.split if preset == "paper" and model.capacity else 0
        assert config.moe_capacity_factor == factor
        assert config.moe_eval_capacity_factor == 0
        has_budget = "budget" in name or name == DEMOS
        target = model.split / 2 if has_budget else 0
        if config.moe_router == "threshold" and not plan.is_dense:
            assert config.moe_target_experts_per_token == target
        if preset == "paper" and config.moe_router == "threshold" and model.kind == "sparse":
            t = None if has_budget else 0.9
            assert (config.moe_threshold, max_experts_per_token(config)) == (t, 0)
            assert config.moe_threshold_rule == named_rule(name)
        assert (args.encoder_ffn_embed_dim if task == "wmt" else args.decoder_ffn_embed_dim) == plan.ffn_dim
        assert args.validate_interval_updates == args.save_interval_updates
        rows = args.max_tokens if task == "wmt" else args.batch_size * args.tokens_per_sample
        assert rows * args.update_freq[0] == plan.size.update_tokens


def named_rule(name: str) -> str:
    rules = ("probability", "relative")
    return next((rule for rule in rules if name.endswith(rule)), "probability" if name == DEMOS else "mass")


def test_a_budget_that_is_typed_takes_the_place_of_the_presets_threshold() -> None:
    plan = Plan("lm", "tiny", "xmoe-s4")
    assert "--moe-threshold" in plan.flags()
    rule = ["--moe-threshold-rule", "probability"]  # whose tau is not the t of a mass
    for given in (["--moe-target-experts-per-token", "3"], ["--moe-layer-thresholds=0.5"], rule):
        words = plan.flags(given)
        assert "--moe-threshold" not in words and words[-len(given) :] == given
    assert plan.flags([*rule, "--moe-threshold", "0.08"]).count("--moe-threshold") == 1
    assert "--moe-threshold" in plan.flags(["--moe-threshold-rule", "mass"])


@pytest.mark.parametrize("task", TASKS)
def test_flags_of_fairseqs_own_model(task: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue("mt_data" if task == "wmt" else "lm_data")
    plan = Plan(task, "dense_to_sparse", "dense")
    _, *words = train.command(plan, data, Path("run"), 1, ["--lr", "1", "--max-update=2"])
    assert not any("moe" in word for word in words)  # neither flags nor --user-dir
    assert words.count("--lr") == 1 and "--max-update" not in words  # the user's take the preset's place
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    assert (args.lr, args.max_update, args.decoder_ffn_embed_dim) == ([1], 2, 1024)


def test_models_use_as_much_compute_as_the_dense_ffn() -> None:
    """What a token takes, in dense FFNs: experts per token over the split."""
    per_token = {"gshard": 2}
    for name, model in models().items():
        is_adaptive = model.flags.get("moe-router") in ("threshold", "expert_threshold", "relu", "topany")
        adaptive = is_adaptive and model.kind == "sparse"
        if model.kind in ("dense", "wide") or adaptive:
            continue
        args = options.parse_args_and_arch(
            options.get_training_parser(), ["folder", *Plan("wmt", "tiny", name).flags()]
        )
        config = read_moe_config(args, ())
        single = config.moe_router in ("hash", "base")
        routed = per_token.get(name, 1 if single else experts_per_token(config))
        expected = 0.5 if name == "dense-narrow" else 1
        assert (routed + config.moe_shared_experts) / model.split == expected


def test_every_model_can_be_drawn() -> None:
    colours = [model.colour for model in models().values()]
    assert all(map(is_color_like, colours)) and len({*colours}) == len(colours)
    assert {model.marker for model in models().values()} <= set(Line2D.markers)


def test_help_explains_presets_and_models() -> None:
    said = script("lm/train.sh", "--help")
    assert "xmoe-s4-budget" in said and "half the dense FFN's FLOPs" in said
    assert "PRESET of lm" in said and "12 layers, width 768" in said
    assert all(f"\n  {name}  " in said for name in models())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data, in use."""
    copy = tmp_path / "experiments"
    shutil.copytree(catalogue.FOLDER, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(catalogue, "FOLDER", copy)
    return copy


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("models.toml", "[hash]", "[hash]\nspilt = 2", "models.toml: hash: there is no field spilt; it may"),
        ("models.toml", 'colour = "#2ca02c"\n', "", "models.toml: hash: the field colour is missing"),
        ("models.toml", "split = 2", 'split = "2"', "models.toml: dense-narrow: split must be int, got '2'"),
        (
            "models.toml",
            "split = 2",
            "split = true",
            "models.toml: dense-narrow: split must be int, got True",
        ),
        ("models.toml", '"wide"', '"wild"', "kind must be one of dense, wide, sparse, split, got 'wild'"),
        ("models.toml", "[dense]", "one = 1\n[dense]", "models.toml: one must be a table of fields"),
        ("models.toml", "[hash]", "[hash", "models.toml: Expected ']'"),
        ("presets/lm/tiny.toml", "cpu = true", "beam = 5", "tiny.toml: there is no field beam; it may have"),
        ("presets/lm/tiny.toml", "ffn_dim = 512\n", "", "tiny.toml: the field ffn_dim is missing"),
        (
            "models.toml",
            "split = 2",
            "split = 0",
            "models.toml: dense-narrow: split must be at least 1, got 0",
        ),
        (
            "models.toml",
            "moe-freq = 0",
            "moe-freq = 2",
            "dense: kind dense or wide and the flag moe-f",
        ),
        (
            "models.toml",
            'kind = "dense"',
            "",
            "dense: kind dense or wide and the flag moe-freq",
        ),
        (
            "presets/lm/tiny.toml",
            "experts = 4",
            "experts = -1",
            "experts must be at least 0, got -1",
        ),
        (
            "presets/lm/tiny.toml",
            "max-update",
            "max-updates",
            "flags must say max-update or max-epoch",
        ),
        (
            "presets/lm/tiny.toml",
            "[routers.thr",
            "[routers.tr",
            "routers: no model has the router treshold",
        ),
        ("tasks.toml", "[lm]", "[ml]", "tasks.toml: lm must be a table of flags, got None"),
        ("presets/lm/tiny.toml", "dropout = 0", "dropout = [0]", "tiny.toml: flags must be a table of flags"),
    ],
)
def test_a_file_that_is_wrong_is_named(folder: Path, name: str, old: str, new: str, message: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
    with pytest.raises(FlagError) as error:
        Plan("lm", "tiny", "dense").flags()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder / name))


def test_a_file_that_is_no_text_is_named(folder: Path) -> None:
    (folder / "models.toml").write_bytes(b"\xff")
    with pytest.raises(FlagError, match="models.toml: 'utf-8' codec can't decode"):
        catalogue.models()


def test_a_model_that_names_no_router_has_the_presets_flags_for_the_default(folder: Path) -> None:
    with (folder / "models.toml").open("a") as file:
        file.write('[plain]\nlabel = ""\nsplit = 4\nflags = {}\ncolour = "k"\nmarker = "o"\n')
    assert "--moe-threshold 0.6" in " ".join(Plan("lm", "tiny", "plain").flags())


def test_the_documented_baseline_model(
    folder: Path, lm_data: Path, tmp_path: Path, with_forks: Callable[..., None]
) -> None:
    heading = "## A baseline model"
    with (folder / "models.toml").open("a") as file:
        file.write("\n" + example("extending.md", heading, "toml"))
    training, scoring, comparing = map(shlex.split, example("extending.md", heading, "bash").splitlines())
    assert training[:2] == ["bash", "scripts/lm/train.sh"] and scoring[:2] == ["bash", "scripts/lm/score.sh"]
    *given, data, run = training[2:]
    assert (data, run) == ("data/lm-sample", "runs/lm-xmoe-s4-ones")
    here = tmp_path / run
    with pytest.raises(SystemExit, match="0"):
        with_forks(train.main, "lm", *given, lm_data, here, "--max-update", 2, "--batch-size", 2)
    assert "2 updates" in command("xmoe-checkpoint", "info", here / "checkpoint_last.pt")
    assert Plan("lm", *given).lines()[0].endswith("16 experts x 128")

    assert scoring[2:] == [run]
    with_forks(score.main, "lm", here)
    assert comparing[1:] == ["scripts/compare.sh", "runs/lm-xmoe-s4", run]
    other = shutil.copytree(here, tmp_path / comparing[2])
    (other / "run.json").write_text((other / "run.json").read_text().replace("xmoe-s4-ones", "xmoe-s4"))
    with_forks(compare.main, other, here, "--out", tmp_path)
    names = [row.split(" | ")[0] for row in (tmp_path / "compare.md").read_text().splitlines()[2:]]
    assert names == [f"| {model} --max-update 2 --batch-size 2" for model in ("xmoe-s4", "xmoe-s4-ones")]

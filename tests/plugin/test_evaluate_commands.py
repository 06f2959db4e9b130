"""Generation and scoring with the stock commands."""

import re
from pathlib import Path
from typing import Any

import pytest
from commands import PLUGIN, logged, run
from fairseq import checkpoint_utils
from tolerances import printed

from xmoe_fairseq.models.language_model import XMoETransformerLanguageModel
from xmoe_fairseq.moe import moe_layers
from xmoe_fairseq_compat.errors import FlagError

GENERATE = (
    *PLUGIN, "--cpu", "--num-workers", "0", "--source-lang", "en", "--target-lang", "de", "--beam", "3",
    "--max-len-b", "20",
)  # fmt: skip


def hypotheses(output: str) -> dict[int, tuple[str, float]]:
    found = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", output, re.M)
    return {int(number): (text, float(score)) for number, score, text in found}


def test_translations_do_not_depend_on_the_batch(
    corpus: tuple[Path, Path], translation_checkpoint: Path
) -> None:
    flags = (corpus[0], *GENERATE, "--path", translation_checkpoint)
    together = hypotheses(run("fairseq-generate", *flags, "--batch-size", 12))
    alone = hypotheses(run("fairseq-generate", *flags, "--batch-size", 1))
    assert len(together) == 12
    for number, (text, score) in together.items():
        assert alone[number][0] == text
        assert alone[number][1] == printed(score, 4)


def test_interactive(corpus: tuple[Path, Path], translation_checkpoint: Path) -> None:
    output = run(
        "fairseq-interactive", corpus[0], *GENERATE, "--path", translation_checkpoint,
        "--skip-invalid-size-inputs-valid-test", stdin="w1 w2 w3\nw4\n",
    )  # fmt: skip
    assert set(hypotheses(output)) == {0, 1}


ALL_UNKNOWN = ("--unkpen", -1000, "--max-len-b", 2, "--min-len", 2)  # and there is one word to copy


def test_unknown_words_are_copied_or_looked_up(
    corpus: tuple[Path, Path], translation_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "words").write_text("foo Fu\n")
    for language in ("en", "de"):
        (tmp_path / f"test.{language}").write_text("foo\nbar\n")
    run(
        "fairseq-preprocess", "-s", "en", "-t", "de", "--srcdict", corpus[0] / "dict.en.txt", "--tgtdict",
        corpus[0] / "dict.de.txt", "--testpref", tmp_path / "test", "--destdir", tmp_path / "raw",
        "--dataset-impl", "raw",
    )  # fmt: skip
    flags = (*GENERATE, *ALL_UNKNOWN, "--path", translation_checkpoint, "--replace-unk")
    raw = run("fairseq-generate", tmp_path / "raw", *flags, tmp_path / "words", "--dataset-impl", "raw")
    assert {number: text for number, (text, _) in hypotheses(raw).items()} == {0: "Fu Fu", 1: "bar bar"}
    typed = run("fairseq-interactive", corpus[0], *flags, stdin="foo\nbar\n")
    assert {number: text for number, (text, _) in hypotheses(typed).items()} == {0: "foo foo", 1: "bar bar"}


@pytest.mark.parametrize("kind", ["ordered", "unordered"])
def test_constraints_are_kept(kind: str, corpus: tuple[Path, Path], translation_checkpoint: Path) -> None:
    flags = (corpus[0], *GENERATE, "--path", translation_checkpoint, "--constraints", kind)
    batch = ("--batch-size", 3, "--buffer-size", 3)
    output = run("fairseq-interactive", *flags, *batch, stdin="w1 w2\tW9\tW8 W7\nw3 w4\nw5\tW3\n")
    found = {number: text.split() for number, (text, _) in hypotheses(output).items()}
    assert found[0].index("W8") + 1 == found[0].index("W7") and "W9" in found[0] and "W3" in found[2]
    assert len(found) == 3 and (kind == "unordered" or found[0].index("W9") < found[0].index("W8"))


def validate(corpus: Path, checkpoint: Path, overrides: str, succeeds: bool = True) -> str:
    return run(
        "fairseq-validate", corpus, *PLUGIN, "--cpu", "--num-workers", 0, "--task", "translation",
        "--batch-size", 4, "--log-format", "json", "--path", checkpoint, "--valid-subset", "test",
        "--model-overrides", overrides, succeeds=succeeds,
    )  # fmt: skip


@pytest.mark.parametrize(
    "overrides, low, high",
    [
        ("{'moe_threshold': 0.0}", 1.0, 1.0),
        ("{}", 1.5, 4.0),
        ("{'moe_threshold': 1.0, 'moe_max_experts_per_token': 0}", 8.0, 8.0),
        ("{'moe_threshold_rule': 'probability', 'moe_threshold': 0.6}", 1.0, 1.2),
        ("{'moe_threshold_rule': 'probability', 'moe_threshold': 0.08}", 1.5, 4.0),
        ("{'moe_threshold_rule': 'relative', 'moe_threshold': 0.5}", 1.1, 4.0),
        ("{'moe_router': 'topk', 'moe_topk': 3}", 3.0, 3.0),
    ],
)
def test_threshold_and_k_can_be_changed_at_evaluation(
    overrides: str, low: float, high: float, corpus: tuple[Path, Path], translation_checkpoint: Path
) -> None:
    record = logged(validate(corpus[0], translation_checkpoint, overrides), "test")[-1]
    for side in ("encoder", "decoder"):
        assert low <= record[f"test_moe_{side}_experts_per_token"] <= high


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("{'moe_threshold': -0.1}", "--moe-threshold must be in [0, 1], got -0.1"),
        ("{'moe_thresold': 0.5}", "has no setting moe_thresold; did you mean moe_threshold?"),
        (
            "{'moe_router': 'relu', 'moe_topk': 1}",
            "moe_topk counts for nothing in a trained relu model, got 1",
        ),
        ("{'moe_loss_coeff': 0.5}", "is no setting of a model, but a flag: --moe-loss-coeff"),
        ("{'dropuot': 0.5}", "has no setting dropuot; did you mean dropout?"),
        (
            "{'decoder_layers': '${oc.env:HOME}'}",
            "not a reference to one, got '${oc.env:HOME}'",
        ),
        (
            "{'moe_threshold_rule': 'best', 'moe_threshold': 0.1}",
            "must be one of auto, mass, probability, relative, got best",
        ),
        ("{'moe_threshold': None}", "--model-overrides: moe_threshold must have a value, got None"),
        ("{'moe_threshold': 'high'}", "moe_threshold must be of type float, got 'high'"),
        (
            "{'moe_router': 'best'}",
            "topk, got best; a router of somebody's own needs the --user-dir that registers it",
        ),
    ],
)
def test_overrides_are_checked(
    overrides: str, message: str, corpus: tuple[Path, Path], translation_checkpoint: Path
) -> None:
    output = validate(corpus[0], translation_checkpoint, overrides, succeeds=False)
    last = output.strip().splitlines()[-1]
    assert last.startswith("fairseq-validate: error: ") and last.endswith(message)
    assert "Traceback" not in output


def test_from_pretrained_refuses_what_the_model_does_not_know(
    corpus: tuple[Path, Path], language_checkpoint: Path
) -> None:
    def load(**overrides: Any) -> Any:
        folder, name = str(language_checkpoint.parent), language_checkpoint.name
        return XMoETransformerLanguageModel.from_pretrained(folder, name, str(corpus[1]), **overrides)

    with pytest.raises(FlagError, match="no setting moe_treshold; did you mean moe_threshold?"):
        load(moe_treshold=0.5)
    assert moe_layers(load(moe_threshold=0.25).models[0])[0].router.threshold == 0.25
    with pytest.raises(FlagError, match=f"{language_checkpoint} has no setting dropuot"):
        checkpoint_utils.load_model_ensemble([str(language_checkpoint)], {"dropuot": 0.5})


def test_eval_lm(corpus: tuple[Path, Path], language_checkpoint: Path) -> None:
    def perplexity(*flags: str) -> float:
        output = run(
            "fairseq-eval-lm", corpus[1], *PLUGIN, "--cpu", "--num-workers", "0", "--path",
            language_checkpoint, "--tokens-per-sample", 32, *flags,
        )  # fmt: skip
        return float(re.findall(r"Perplexity: ([\d.]+)", output)[-1])

    alone, together = perplexity("--batch-size", "1"), perplexity("--batch-size", "8")
    assert alone == printed(together, 2)
    assert 1 < alone < 60
    assert perplexity("--batch-size", "8", "--model-overrides", "{'moe_threshold': 0.0}") != alone


@pytest.mark.parametrize("tool", ["fairseq-generate", "fairseq-eval-lm", "fairseq-validate"])
def test_a_checkpoint_opened_without_user_dir(
    tool: str, corpus: tuple[Path, Path], translation_checkpoint: Path, language_checkpoint: Path
) -> None:
    is_lm = tool == "fairseq-eval-lm"
    checkpoint = language_checkpoint if is_lm else translation_checkpoint
    flags = ("--cpu", "--batch-size", 4, "--task", "language_modeling" if is_lm else "translation")
    output = run(tool, corpus[is_lm], *flags, "--path", checkpoint, succeeds=False)
    name = "xmoe_transformer_lm_tiny" if is_lm else "xmoe_transformer_tiny"
    assert output.splitlines()[-1] == (
        f"{tool}: error: cannot load checkpoint {checkpoint}: no model is known by the name {name!r}; add"
        " --user-dir xmoe_fairseq"
    )
    assert "Traceback" not in output

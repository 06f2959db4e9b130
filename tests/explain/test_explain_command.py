"""xmoe-explain on models that fairseq-train has trained for a few updates."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import hostile
import pytest
import sentencepiece
import torch
from commands import TINY_LM, TINY_MT, TRAIN, call, run
from documented import example

from xmoe_fairseq.explain import explain_command

FEW = (*TRAIN, "--max-update", 4, "--validate-interval-updates", 2)


@pytest.fixture(scope="module")
def data(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders mt and lm as of data-prep: whole words are the pieces."""
    folder = tmp_path_factory.mktemp("data")
    words = [f"{letter}{number}" for letter in "wW" for number in range(30)]
    (folder / "words").write_text(" ".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words"), model_prefix=str(folder / "spm"), model_type="word", vocab_size=61,
        bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    for name, binarised in zip(("mt", "lm"), corpus, strict=True):
        shutil.copytree(binarised, folder / name / "bin")
        shutil.copy(folder / "spm.model", folder / name)
        for path in (folder / name / "bin").glob("dict*.txt"):
            path.write_text("".join(f"▁{line}\n" for line in path.read_text().splitlines()))
    return folder


def trained(data: Path, folder: Path, *flags: object) -> Path:
    """A checkpoint, beside its log."""
    printed = run("fairseq-train", data / "bin", *flags, *FEW, "--save-dir", folder)
    (folder / "train.log").write_text(printed)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def translation(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(data / "mt", tmp_path_factory.mktemp("mt-run"), *TINY_MT)


@pytest.fixture(scope="module")
def language_model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(data / "lm", tmp_path_factory.mktemp("lm-run"), *TINY_LM, "--decoder-layers", 4)


def shown(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    return json.loads(found[1])


def test_a_set_of_a_translation_model(translation: Path, data: Path, corpus: tuple[Path, Path]) -> None:
    said = run("xmoe-explain", translation, "--data", data / "mt", "--split", "test", "--sentences", 3)
    page = translation.with_suffix(".html")
    assert said.rstrip().endswith(f"written: {page}")
    found = shown(page)
    assert [layer["name"] for layer in found["layers"]] == ["encoder layer 2", "decoder layer 2"]
    assert len(found["sentences"]) == 3
    text = (corpus[0].parent / "test.en").read_text().splitlines()
    for title, one in zip((text[i] for i in (2, 6, 10)), found["sentences"], strict=True):
        assert one["title"] == title
        assert one["pieces"]["encoder"] == [*(f"▁{word}" for word in title.split()), "</s>"]
        assert one["pieces"]["decoder"] == ["</s>", *(f"▁{word.upper()}" for word in title.split())]
        assert [len(of) for of in one["choices"]] == [len(one["pieces"]["encoder"])] * 2
    assert found["sentences"][0]["title"].split()[0] in said and "encoder layer 2" in said
    assert found["layers"][0]["tokens"] == found["layers"][1]["tokens"] > 30
    text = page.read_text()
    assert all(name in text for name in ("experts-", "learning-", "perplexity", "updates"))
    (row,) = found["tables"]["runs"]["rows"]
    assert row[1] == "4" and re.fullmatch(r"\d\.\d\d, \d\.\d\d", row[3])


def test_text_for_a_language_model(language_model: Path, translation: Path, tmp_path: Path) -> None:
    """By the data that it was trained on, with another t, beside another run."""
    page, hostile_text = tmp_path / "new/page.html", "w3 w4 w5 </script> [bold]w6[/]"
    text, others = ("--text", "w1 w2", hostile_text), ("--runs", translation.parent)
    said = run("xmoe-explain", language_model, *text, *others, "--moe-threshold", 1, "--output", page)
    found = shown(page)
    first, second = found["sentences"]
    assert first["pieces"] == {"decoder": ["</s>", "▁w1", "▁w2"]} and "<unk>" in second["title"]
    assert [len(choices) for of in first["choices"] for choices in of] == [1] * 6  # the default rule's top-1
    assert {layer["tokens"] for layer in found["layers"]} == {3 + 5}  # unknown words are one piece together
    assert [row[0] for row in found["tables"]["runs"]["rows"]] == [
        language_model.parent.name, translation.parent.name,
    ]  # fmt: skip
    assert "cost: 1.00 of 8 experts per token, " in said and "of the text" in said


def test_text_for_a_translation_model(translation: Path, data: Path, tmp_path: Path) -> None:
    flags = ("--text", "w1 w2 w3", "--data", data / "mt/bin", "--output", tmp_path / "page.html")
    status, said = call(explain_command.main, "xmoe-explain", translation, *flags)
    assert status == 0, said
    text, *of_set = shown(tmp_path / "page.html")["sentences"]
    assert text["pieces"]["encoder"] == ["▁w1", "▁w2", "▁w3", "</s>"] and len(of_set) == 12
    assert text["pieces"]["decoder"][0] == "</s>"


def test_the_commands_of_the_documentation(translation: Path, language_model: Path, data: Path) -> None:
    block = example("explain.md", "## The command", "bash")
    places = {
        "runs/mt/checkpoint_best.pt": translation, "runs/lm-xmoe/checkpoint_best.pt": language_model,
        "data/mt-sample": data / "mt", "runs/lm-dense runs/lm-switch": translation.parent,
        "The file was not found.": "w1 w2", "1 hectare": "w3",
    }  # fmt: skip
    for text, place in places.items():
        assert text in block
        block = block.replace(text, str(place))
    for command in block.splitlines():
        status, said = call(explain_command.main, *shlex.split(command, comments=True))
        assert status == 0, said


def test_errors(translation: Path, language_model: Path, data: Path, tmp_path: Path) -> None:
    here, out = ("--data", data / "mt"), ("--output", tmp_path / "page.html")
    dense, moved = hostile.checkpoint(tmp_path), tmp_path / "moved.pt"
    state = torch.load(translation, weights_only=True)
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    state["cfg"]["model"] |= {"moe_router": "topk", "moe_target_experts_per_token": 0}
    state["cfg"]["model"]["moe_threshold_rule"] = "mass"  # as other routers' models have it
    state["model"] = {name: value for name, value in state["model"].items() if "budget" not in name}
    torch.save(state, moved)
    (tmp_path / "same.html").symlink_to(translation)
    bad = [
        ((tmp_path / "none.pt", *here), "none.pt: no such file"),
        ((tmp_path, *here), f"{tmp_path}: is a folder, no checkpoint"),
        ((dense, "--data", tmp_path / "data"), f"CHECKPOINT must be of a model with experts, and {dense} is"),
        ((moved, *out), f"--data must be given: {moved} was trained on {tmp_path / 'gone'}, which is"),
        ((moved, *here, "--moe-threshold", 0.5), "--moe-threshold goes with --moe-router threshold, and the"),
        ((translation, "--data", tmp_path), "--data must be a folder of data-prep or fairseq-preprocess"),
        ((translation, *here, "--split", "dev"), "no set 'dev' of en-de in "),
        ((translation, *here, "--moe-threshold", 2), "--moe-threshold: "),
        ((translation, *here, "--sentences", 0), "--sentences must be at least 1, got 0"),
        ((translation, *here, "--tokens", -1), "--tokens must be at least 0, got -1"),
        ((translation, *here, "--text", " "), "--text must hold a word, got nothing"),
        ((translation, *here, "--runs", tmp_path), "--runs must be folders with train.log, what fairseq"),
        ((translation, *here, "--output", tmp_path / "a.txt"), "--output must be a file that ends in .html"),
        ((translation, *here, "--output", tmp_path / "same.html"), "which would be overwritten; name"),
        ((translation, *here, "--output", moved / "a.html"), "cannot write "),
    ]  # fmt: skip
    for arguments, message in bad:
        status, said = call(explain_command.main, "xmoe-explain", *arguments)
        last = said.rstrip("\n").rpartition("\n")[2]
        assert status == 1 and message in last and "Traceback" not in said, (arguments, said)
        assert last.startswith("xmoe-explain: error: ")
    assert not (tmp_path / "page.html").exists()

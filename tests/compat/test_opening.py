"""Folders and files that a user names."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from commands import run
from fairseq import checkpoint_utils, tasks, utils

from xmoe_fairseq_compat.errors import FlagError, UserError, one_line


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/none.pt", "--path: there is no checkpoint {}/none.pt"),
        ("{}", "--path must name a checkpoint, and {} is a folder"),
        (
            "{}/run",
            "--path must name a checkpoint, and {0}/run is a folder; name a file in it, such as {0}/run/chec",
        ),
        (None, "--path must name a checkpoint, such as checkpoints/checkpoint_best.pt"),
    ],
)
def test_a_checkpoint_that_cannot_be_opened(path: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint_best.pt").touch()
    with pytest.raises(FlagError) as error:
        checkpoint_utils.load_model_ensemble([path and path.format(tmp_path)])
    assert str(error.value).startswith(message.format(tmp_path))


def test_a_checkpoint_that_is_named_by_a_shard(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=f"^--path: there is no checkpoint {tmp_path}/x_part0.pt$"):
        checkpoint_utils.load_model_ensemble([f"{tmp_path}/x.pt"], strict=False, num_shards=2)


def test_a_save_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/checkpoints"):
        with pytest.raises(
            FlagError, match=f"--save-dir must be a folder that can be written, got {folder}: Not a"
        ):
            checkpoint_utils.verify_checkpoint_directory(str(folder))


def test_a_user_dir_that_cannot_be_imported(tmp_path: Path) -> None:
    with pytest.raises(
        FlagError, match="^--user-dir must be a folder or an installed package, got /nowhere$"
    ):
        utils.import_user_module(Namespace(user_dir="/nowhere"))
    broken = tmp_path / "broken_user_dir"
    broken.mkdir()
    (broken / "__init__.py").write_text("from . import layers\n")
    (broken / "layers.py").write_text("\nimport no_such_library\n")
    with pytest.raises(UserError) as error:
        utils.import_user_module(Namespace(user_dir=str(broken)))
    reason = f"ModuleNotFoundError: No module named 'no_such_library' ({broken}/layers.py:2)"
    assert str(error.value) == f"--user-dir {broken}: {reason}"


@pytest.mark.parametrize("task", ["translation", "language_modeling"])
@pytest.mark.parametrize("name", ["none", "file"])
def test_a_data_folder_that_is_none(task: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state = "is a file" if name == "file" else "does not exist"
    with pytest.raises(FlagError, match=f"^data must be a folder .*, and {tmp_path}/{name} {state}$"):
        tasks.setup_task(Namespace(task=task, data=f"{tmp_path}/{name}"))


@pytest.fixture
def german_english(tmp_path: Path) -> Path:
    for name in ("dict.de.txt", "dict.en.txt", "train.de-en.de.idx"):
        (tmp_path / name).touch()
    return tmp_path


def pair(folder: Path, source: str | None, target: str | None) -> tuple[str, str]:
    cfg: Any = Namespace(task="translation", data=str(folder), source_lang=source, target_lang=target)
    cfg = tasks.setup_task(cfg).cfg
    return cfg.source_lang, cfg.target_lang


def test_one_language_gives_the_other(german_english: Path) -> None:
    """fairseq passes over a language that is given alone."""
    assert pair(german_english, None, None) == pair(german_english, "de", None) == ("de", "en")
    assert pair(german_english, None, "de") == pair(german_english, "en", None) == ("en", "de")


@pytest.mark.parametrize(("source", "target"), [("xx", None), (None, "xx"), ("xx", "en"), ("en", "xx")])
def test_languages_that_the_data_does_not_have(source: str, target: str, german_english: Path) -> None:
    flag = "--source-lang" if source == "xx" else "--target-lang"
    message = f"^{flag} must have a dictionary dict.xx.txt in {german_english}, which holds de-en$"
    with pytest.raises(FlagError, match=message):
        pair(german_english, source, target)


def test_data_without_languages(tmp_path: Path) -> None:
    (tmp_path / "dict.de.txt").touch()
    with pytest.raises(
        FlagError, match=f"^--source-lang and --target-lang must both be given for {tmp_path}$"
    ):
        pair(tmp_path, "de", None)


def test_files_and_flags_end_a_command_with_one_line() -> None:
    with pytest.raises(FileNotFoundError) as missing:
        Path("/nowhere").read_text()
    assert one_line(missing.value) == "/nowhere: No such file or directory"
    assert one_line(FileNotFoundError("Dataset not found: x (folder)")) == "Dataset not found: x (folder)"
    assert one_line(FileExistsError("folder/dict.txt")) == "folder/dict.txt: FileExistsError"
    assert one_line(ImportError("Please install sacremoses")) == "Please install sacremoses"
    assert one_line(ImportError("cannot import name x")) is None
    assert one_line(ConnectionResetError(104, "Connection reset by peer")) is None
    assert one_line(AssertionError("--path required for generation!")) == "--path required for generation!"
    assert one_line(ValueError("not a flag - but a sentence")) is None
    assert one_line(AssertionError("--flag\nand more")) is None
    assert one_line(TypeError("--beam")) is None


def test_commands(corpus: tuple[Path, Path]) -> None:
    def last_line(*command: object) -> str:
        output = run(*command, succeeds=False)  # type: ignore[arg-type]
        assert "Traceback" not in output
        return output.splitlines()[-1]

    mt, lm = corpus
    for command in ("generate", "interactive", "validate"):
        more = ("--batch-size", 1) if command == "validate" else ()
        line = last_line(f"fairseq-{command}", mt, *more, "--path", "none.pt", "--cpu")
        assert line == f"fairseq-{command}: error: --path: there is no checkpoint none.pt"
    assert "no checkpoint none.pt" in last_line("fairseq-eval-lm", lm, "--path", "none.pt", "--cpu")
    generate = ("fairseq-generate", mt, "--path", "none.pt", "--cpu")
    assert "'tokenizer.source_lang' is not Optional" in last_line(*generate, "--tokenizer", "moses")
    missing = last_line("fairseq-score", "--sys", "/nowhere", "--ref", "/nowhere")
    assert missing == "fairseq-score: error: System output file /nowhere does not exist"

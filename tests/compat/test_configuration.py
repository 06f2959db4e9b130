"""What fairseq makes of flags and of its own configurations."""

import dataclasses
import re

import pytest
from fairseq import options
from fairseq.dataclass import FairseqDataclass


def test_configs_as_defaults() -> None:
    @dataclasses.dataclass
    class Inner(FairseqDataclass):
        width: int = 1

    @dataclasses.dataclass
    class Outer(FairseqDataclass):
        inner: Inner = Inner()

    assert Outer.__dataclass_fields__["inner"].default == Inner()
    assert dataclasses.dataclass.__module__ == "dataclasses", "the standard library must be as it was"


def test_bf16_does_not_ask_for_a_tpu() -> None:
    arguments = ["data", "--bf16", "--cpu", "--batch-size", "1", "--arch", "transformer_tiny"]
    parsed = options.parse_args_and_arch(options.get_training_parser(), arguments)
    assert parsed.bf16 and not parsed.tpu


def help_of_training(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        options.parse_args_and_arch(options.get_training_parser(), ["--help", *arguments])
    assert not end.value.code
    return capsys.readouterr().out


def test_help_has_the_flags_of_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--arch", "transformer_lm", "--task", "language_modeling", "--optimizer", "adam")
    text = help_of_training(capsys, *chosen)
    for flag in ("--decoder-layers", "--tokens-per-sample", "--adam-betas", "--max-update"):
        assert len(re.findall(rf"^  {flag} ", text, re.M)) == 1
    assert "--decoder-layers" not in help_of_training(capsys)


def test_training_without_an_architecture_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        options.parse_args_and_arch(options.get_training_parser(), ["data"])
    assert end.value.code == 2 and "error: --arch must be given" in capsys.readouterr().err

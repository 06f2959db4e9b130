"""What a command says when it was interrupted, or when a process it started failed."""

import sys
from types import SimpleNamespace

import pytest
from torch.multiprocessing import ProcessRaisedException

from xmoe_fairseq_compat import endings
from xmoe_fairseq_compat.errors import UserError


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("fairseq-train", "; run it again to go on"),
        ("fairseq-generate", ""),  # which begins anew, as do
        ("xmoe-checkpoint", ""),
        ("xmoe-convert", ""),
        ("xmoe-explain", ""),
        ("xmoe-threshold", ""),
    ],
)
def test_an_interruption_takes_one_line(
    command: str, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/bin/{command}"])
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == f"{command}: interrupted{how}\n"


def test_a_user_s_own_program_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py"])
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "interrupted;" not in capsys.readouterr().err


def page(last_line: str) -> str:
    """As torch.multiprocessing hands it on."""
    where = 'Traceback (most recent call last):\n  File "x.py", line 1, in _wrap\n    fn(i, *args)\n'
    return f"\n\n-- Process 1 terminated with the following error:\n{where}{last_line}\n"


@pytest.mark.parametrize(
    "last_line, kind, text",
    [
        ("xmoe_fairseq_compat.errors.FlagError: --x must be 1: got 2", UserError, "--x must be 1: got 2"),
        ("ValueError: nothing of ours", ProcessRaisedException, "nothing of ours"),
        ("os.path: no error", ProcessRaisedException, "no error"),
    ],
)
def test_a_spawned_rank_ends_with_its_line(last_line: str, kind: type[Exception], text: str) -> None:
    """one_line_from_spawned_ranks"""

    def call_main(*_: object) -> None:
        raise ProcessRaisedException(page(last_line), 1, 2)

    module = SimpleNamespace(call_main=call_main)
    endings.one_line_from_spawned_ranks(module)
    with pytest.raises(kind) as error:
        module.call_main("cfg", print)
    assert str(error.value).strip().endswith(text)
    assert ("\n" in str(error.value)) == (kind is ProcessRaisedException)

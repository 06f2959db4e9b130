"""Mends of ranks.py that need no ranks."""

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.ranks import unreadable


def test_what_could_not_be_read_is_the_last_line_of_a_workers_traceback() -> None:
    error = OSError(
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nOSError: no such block\n'
    )
    assert str(unreadable(error, [])) == "cannot read a batch of the data: OSError: no such block"
    assert str(unreadable(EOFError(), [])) == "cannot read a batch of the data: EOFError: EOFError()"


def test_an_error_that_names_its_file_stays() -> None:
    assert str(unreadable(UserError("train.bin is damaged"), [])) == "train.bin is damaged"

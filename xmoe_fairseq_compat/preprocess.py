"""What fairseq-preprocess needs: text that is text, two sides of one length, one dictionary in a folder."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from typing import Any

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.registry import patch, wrap

BLOCK = 1 << 24  # bytes that are read at once: a choice


def count_lines(file: str) -> int:
    """Lines of a text; the last may lack its line feed.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    decoder, lines, last = codecs.getincrementaldecoder("utf-8")(), 0, b""
    try:
        with open(file, "rb") as opened:
            while block := opened.read(BLOCK):
                decoder.decode(block)
                lines, last = lines + block.count(b"\n"), block
        decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"{file}, line {lines + 1} or later: not UTF-8; encode the file anew") from None
    return lines + bool(last and not last.endswith(b"\n"))


def texts(args: Any) -> Iterator[tuple[str, str, list[str]]]:
    """Name of each set that is to be written, its flag, and its files: one, or both sides."""
    for name in ("train", "valid", "test"):
        prefixes = getattr(args, f"{name}pref")
        several = prefixes.split(",") if prefixes and name != "train" else [prefixes]
        for number, prefix in enumerate(filter(None, several)):
            languages = [args.source_lang, args.target_lang][: 1 if args.only_source else 2]
            files = [f"{prefix}.{language}" if language else prefix for language in languages]
            yield f"{name}{number or ''}", f"--{name}pref", files


def check_texts(args: Any) -> None:
    """Raises UserError where two sides have not as many lines, or a text is none."""
    for _, flag, files in texts(args):
        counts = {file: count_lines(file) for file in files}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{file} has {count:,}" for file, count in counts.items())
            raise UserError(f"{flag}: both sides must have as many lines; {said}")


def check_folder(args: Any, dictionary_path: Any) -> None:
    """Raises UserError where --destdir would keep sets that were binarised with another dictionary."""
    from fairseq.data import Dictionary

    sides = [(args.source_lang, args.srcdict), (args.target_lang, args.tgtdict)]
    for language, given in sides[: 1 if args.only_source else 2]:
        there = dictionary_path(language, args.destdir)
        if not os.path.exists(there):
            continue
        if not given:
            how = "to add sets give it as --srcdict, and --tgtdict, without --joined-dictionary"
            raise UserError(f"{there} is there already; {how}; or give another --destdir")
        sets = {name.split(".")[0] for name in os.listdir(args.destdir) if name.endswith(".idx")}
        kept = sets - {name for name, *_ in texts(args)}
        if kept and Dictionary.load(there).digest != Dictionary.load(given).digest:
            rule = f"{args.destdir} would keep {', '.join(sorted(kept))} of its present {there}"
            raise UserError(f"{rule}, and {given} is another dictionary; give another --destdir")


@patch("fairseq_cli.preprocess")
def binarise_what_belongs_together(module: Any) -> None:
    """Every torch: fairseq-preprocess puts sets of two dictionaries into one folder, pairs of unequal length
    too; and bytes that are no text end in "negative seek position"."""

    @wrap(module, "main")
    def main(plain: Any, args: Any) -> Any:
        check_folder(args, module._dict_path)
        if not args.dict_only:
            check_texts(args)
        try:
            return plain(args)
        except AssertionError as error:
            if "--" not in str(error):
                raise
            raise UserError(str(error)) from error  # of which flags go together

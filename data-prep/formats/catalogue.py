"""gettext message catalogues, compiled (.mo) or as text (.po): pairs of message and translation."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from babel.messages.mofile import read_mo
from babel.messages.pofile import PoFileError, read_po
from textio import DataError

BROKEN = (AttributeError, KeyError, LookupError, OSError, PoFileError, TypeError, ValueError, struct.error)
DATE = re.compile(rb"P(OT-Creation-Date:|O-Revision-Date:)")


def catalogue_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Singular and, where there is one, the plural with the last plural form. Fuzzy entries are left out."""
    # An empty date in the header would stop Babel: rename the fields, to names of the same length.
    data = io.BytesIO(DATE.sub(rb"X\1", path.read_bytes()))
    try:
        catalogue = read_mo(data) if path.suffix == ".mo" else read_po(data, abort_invalid=True)
    except BROKEN as error:
        raise DataError(f"{path}: not a message catalogue ({error})") from None
    for message in catalogue:
        if not message.id or message.fuzzy:
            continue
        if isinstance(message.id, str):
            yield message.id, str(message.string or "")
        elif isinstance(message.string, (list, tuple)):
            singular, plural = message.id
            yield singular, message.string[0] or ""
            if len(message.string) > 1:
                yield plural, message.string[-1] or ""

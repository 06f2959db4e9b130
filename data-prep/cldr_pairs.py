"""SYNTHETIC parallel text: dates, times, quantities, amounts of money and lists in two languages.

Made from the Unicode CLDR tables inside the Babel package: no person wrote or translated these lines.
They are correct, regular and quickly learnable, so a small model shows in minutes that it learns;
they say nothing about translating real text. Same seed and Babel version, same pairs. No side of any
line occurs twice, so train, valid and test are disjoint on both sides.
"""

from __future__ import annotations

import argparse
import datetime
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from babel import Locale, UnknownLocaleError, dates, lists, numbers, units
from counts import new_parser, report
from digests import DigestSet, digest
from outputs import atomic_writers, check_files
from textio import DataError, in_chunks, normalize, run

Pair = tuple[str, str]
BABEL_NAMES = {"zh": "zh_Hans"}
PSEUDO_CODES = {"XA", "XB", "XXX", "ZZ", "mul", "root", "und", "zxx"}  # CLDR's: tests, unknown, several, none
SPLITS = ("train", "valid", "test")
# Choices:
MOST_NAMES = 4  # in a list
MOST_PAIRS = 10_000_000
GIVE_UP_AFTER = 10_000  # draws in a row without a new pair


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--source-lang", default="en")
    parser.add_argument("--target-lang", required=True, help="de, ru, uk, he, zh or another known to Babel")
    parser.add_argument("--train", type=int, default=20_000, help="pairs (default: %(default)s)")
    parser.add_argument("--valid", type=int, default=500, help="pairs (default: %(default)s)")
    parser.add_argument("--test", type=int, default=500, help="pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out-prefix", type=Path, required=True, help="PREFIX.{train,valid,test}.LANG")
    args = parser.parse_args()
    for split in SPLITS:
        if not 1 <= getattr(args, split) <= MOST_PAIRS:
            raise DataError(f"--{split} must be from 1 to {MOST_PAIRS}, got {getattr(args, split)}")
    write(args)


class Generator:
    """Draws one pair at a time; each method under KINDS formats the same fact in both languages."""

    def __init__(self, source_lang: str, target_lang: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.locales = self._locale(source_lang), self._locale(target_lang)
        source, target = self.locales
        # sorted: the order of CLDR's tables is no promise
        self.territories = sorted(k for k in source.territories if k in target.territories and len(k) == 2)
        self.languages = sorted(k for k in source.languages if k in target.languages and len(k) <= 3)
        self.currencies = sorted(c for c in source.currencies if c in target.currencies)
        for names in (self.territories, self.languages, self.currencies):
            names[:] = [name for name in names if name not in PSEUDO_CODES]
        self.units = sorted(u for u in source.unit_display_names if self._formats(u))
        if min(map(len, (self.territories, self.languages, self.currencies, self.units))) < MOST_NAMES:
            raise DataError(f"CLDR has too few names in both {source_lang} and {target_lang}; take others")
        self.kinds = [self.date, self.date_and_time, self.quantity, self.money, self.places, self.tongues]

    @staticmethod
    def _locale(lang: str) -> Locale:
        try:
            return Locale.parse(BABEL_NAMES.get(lang, lang))
        except (UnknownLocaleError, ValueError):
            raise DataError(f"language {lang!r} is unknown to Babel; give a code such as de or uk") from None

    def _formats(self, unit: str) -> bool:
        try:
            self._both(lambda locale: units.format_unit(1, unit, "long", locale=locale))
        except units.UnknownUnitError:
            return False
        return True

    def _both(self, form: Callable[[Locale], str]) -> Pair:
        source, target = (normalize(form(locale)) for locale in self.locales)
        return source, target

    def draw(self) -> Pair:
        return self.random.choice(self.kinds)()

    def date(self) -> Pair:
        day = datetime.date(1800, 1, 1) + datetime.timedelta(self.random.randrange(100_000))
        style = self.random.choice(["full", "long", "medium"])
        return self._both(lambda locale: dates.format_date(day, style, locale))

    def date_and_time(self) -> Pair:
        time = datetime.datetime(2024, 1, 1) + datetime.timedelta(minutes=self.random.randrange(600_000))
        style = self.random.choice(["full", "long"])
        return self._both(
            lambda locale: (
                dates.format_date(time, style, locale)
                + ", "
                + dates.format_time(time, "short", locale=locale)
            )
        )

    def quantity(self) -> Pair:
        unit = self.random.choice(self.units)
        number = self.random.choice(
            [
                self.random.randrange(1, 30),
                self.random.randrange(1, 10_000),
                round(self.random.random() * 100, 1),
            ]
        )
        return self._both(lambda locale: units.format_unit(number, unit, "long", locale=locale))

    def money(self) -> Pair:
        currency = self.random.choice(self.currencies)
        amount = self.random.randrange(1, self.random.choice([100, 100_000]))
        return self._both(
            lambda locale: numbers.format_currency(amount, currency, locale=locale, format_type="name")
        )

    def places(self) -> Pair:
        codes = self.random.sample(self.territories, self.random.randrange(2, MOST_NAMES + 1))
        style = self.random.choice(["standard", "or"])
        return self._both(
            lambda locale: lists.format_list([locale.territories[c] for c in codes], style, locale)
        )

    def tongues(self) -> Pair:
        codes = self.random.sample(self.languages, self.random.randrange(2, 4))
        return self._both(
            lambda locale: lists.format_list([locale.languages[c] for c in codes], locale=locale)
        )


def write(args: argparse.Namespace) -> None:
    langs = args.source_lang, args.target_lang
    names = [Path(f"{args.out_prefix}.{split}.{lang}") for split in SPLITS for lang in langs]
    check_files([*names, args.counts])
    generator = Generator(*langs, args.seed)
    seen = DigestSet(), DigestSet()
    counts = Counter(drawn=0)
    with atomic_writers(names) as files:
        # Test and valid first, so that they stay the same whatever the size of train.
        for split, sides in reversed([*zip(SPLITS, in_chunks(files, 2), strict=True)]):
            failures = 0
            while counts[split] < getattr(args, split):
                counts["drawn"] += 1
                if failures == GIVE_UP_AFTER:
                    raise DataError(
                        f"--{split} {getattr(args, split)}: only {counts[split]} more different "
                        f"pairs could be made for {'-'.join(langs)}; ask for fewer"
                    )
                if not is_new(pair := generator.draw(), seen):
                    failures += 1
                    continue
                failures = 0
                counts[split] += 1
                for file, side in zip(sides, pair, strict=True):
                    file.write(side + "\n")
    report(counts, args.counts)


def is_new(pair: Pair, seen: tuple[DigestSet, DigestSet]) -> bool:
    """Also refuses pairs that are the same in both languages: nothing to translate."""
    source, target = map(digest, pair)
    if pair[0] == pair[1] or source in seen[0] or target in seen[1]:
        return False
    return seen[0].add(source) and seen[1].add(target)


if __name__ == "__main__":
    run(main)

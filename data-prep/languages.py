"""What the packages corpora must know of a language: its names in paths, its script, its length."""

from __future__ import annotations

import re
from dataclasses import dataclass

from textio import DataError


@dataclass(frozen=True)
class Language:
    code: str
    folders: tuple[str, ...]  # in paths, as locale names
    package: str = ""  # in package names; the code if empty
    script: re.Pattern[str] | None = None  # letters that a translation must have; None: Latin, as English
    latin_share: float = 0.5  # of Latin letters at most, where there is a script
    length: float = 1.0  # characters expected for one English character

    @property
    def in_packages(self) -> str:
        return self.package or self.code


CYRILLIC = re.compile(r"[\u0400-\u04ff]")
LANGUAGES = {
    language.code: language
    for language in (
        Language("de", ("de", "de_DE", "de-DE")),
        Language("ru", ("ru", "ru_RU", "ru-RU"), script=CYRILLIC),
        Language("uk", ("uk", "uk_UA", "uk-UA"), script=CYRILLIC),
        Language("he", ("he", "he_IL", "he-IL", "iw"), script=re.compile(r"[\u0590-\u05ff]"), length=0.77),
        Language(
            "zh",
            ("zh_CN", "zh-CN", "zh_Hans", "zh-Hans", "zh-hans", "zh_Hans_CN", "zh"),
            package="zh-cn",
            script=re.compile(r"[\u4e00-\u9fff]"),
            latin_share=0.75,  # a Chinese character says as much as three letters
            length=1 / 3,
        ),
    )
}


def language(code: str) -> Language:
    if code not in LANGUAGES:
        raise DataError(f"--lang must be one of {', '.join(LANGUAGES)}, got {code!r}")
    return LANGUAGES[code]

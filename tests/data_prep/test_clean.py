"""Cleaning steps: each does what it says to the letter, leaves alone what is fine, and is counted."""

import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clean import Cleaner, Dropped, mask, normalize
from data_prep.clean_config import CleanConfig, NormalizeConfig, PiiConfig, QualityConfig, WebConfig
from data_prep.language import language_of
from data_prep.pipeline import prepare
from data_prep.quality import quality_problem
from data_prep.web import web_text

PROSE = """The harbour was quiet when the boats came back that evening, and nobody spoke of the storm.
She counted the nets twice, wrote the number in a small book, and walked to the end of the pier.
It would be dark in an hour, so the lamps were lit along the road to the old customs house.
Two men carried a crate of fish past the church, arguing about the price they had been given."""


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text())
def test_normalising_twice_changes_nothing_and_leaves_only_what_it_promises(text):
    once = normalize(text, NormalizeConfig())
    assert normalize(once, NormalizeConfig()) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not [c for c in once if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    assert not set(once) & {"\r", "\u2028", "\u2029", "\x85", "\ufeff"}


def test_normalising_keeps_letters_and_lines():
    assert normalize("\ufeffna\u0131\u0308ve\r\nA\u030angstr\u00f6m\rtab\t\x07end\u2028x",
                     NormalizeConfig()) == "naı̈ve\nÅngström\ntab\tend\nx"
    off = NormalizeConfig(nfc=False, line_ends=False, control_characters=False)
    assert normalize("e\u0301\r\n\x07", off) == "e\u0301\r\n\x07"


MASKED = [
    ("write to bob.smith+x@mail.example.co.uk, now", "write to [EMAIL], now", "emails"),
    ("<a@b.de>", "<[EMAIL]>", "emails"), ("hosts 8.8.8.8, 9.9.9.9:53.", "hosts [IP], [IP]:53.", "ip_addresses"),
    ("at 2001:4860:4860::8888 or 2606:4700:4700:0:0:0:0:1111", "at [IP] or [IP]", "ip_addresses"),
    ("id AKIAIOSFODNN7EXAMPLE.", "id [KEY].", "keys"), ("t=ghp_" + "a1" * 18, "t=[KEY]", "keys"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----\nrest", "[KEY]\nrest", "keys"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N", "[KEY]", "keys")]
LEFT = ["10.0.0.1 and 127.0.0.1 are private", "version 1.2.3.4.5", "999.1.2.3", "a::b and std::vector", "12:30:45",
        "def f(x)->a.b.c@d", "@decorator\ndef g(): pass", "skeleton key, ask-me-anything", "fe80::1", "user@localhost"]


@pytest.mark.parametrize("text, expected, kind", MASKED)
def test_addresses_and_keys_are_masked_and_counted(text, expected, kind):
    found, counts = mask(text, PiiConfig())
    assert found == expected
    assert {name for name, count in counts.items() if count} == {f"masked_{kind}"}
    assert mask(text, PiiConfig(**{kind: False}))[0] == text
    assert mask(found, PiiConfig())[0] == found


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_like_an_address_stays(text):
    assert mask(text, PiiConfig())[0] == text


BAD = {
    "min_words": "too few words here", "max_mean_word_length": " ".join(["supercalifragilistic"] * 60),
    "min_mean_word_length": "the a of to be b c and " * 20, "max_symbol_ratio": PROSE + " #" * 30,
    "max_bullet_lines": "\n".join(f"- the {i} thing to have and to be of use with that" for i in range(20)),
    "max_ellipsis_lines": "\n".join(line + "..." if i % 2 else line for i, line in enumerate(PROSE.split("\n"))),
    "min_alphabetic_words": PROSE + " 1234" * 40, "min_stop_words": "grey water runs down every single old stone " * 9,
    "max_repeated_lines": "\n".join([PROSE, *["the same short line of text"] * 8]),
    "max_repeated_paragraph_characters": "\n\n".join([PROSE.replace("\n", " ")] * 2),
    "max_top_2gram": PROSE + " blue whale and" * 40,
    "max_repeated_5grams": PROSE + " " + PROSE.replace("\n", " ").replace("harbour", "port")}


@pytest.mark.parametrize("reason", BAD)
def test_each_quality_bound_drops_its_case_and_prose_passes(reason):
    assert quality_problem(PROSE, QualityConfig()) is None
    off = {name: None for name in QualityConfig.model_fields}
    fields = {"max_top_2gram": "max_top_ngram", "max_repeated_5grams": "max_repeated_ngrams"}
    field = fields.get(reason, reason)
    only = QualityConfig(**off | {field: getattr(QualityConfig(), field)})
    assert quality_problem(BAD[reason], only)[0] == reason
    assert quality_problem(BAD[reason], QualityConfig(**off)) is None


WORDS = st.lists(st.sampled_from(["a", "bb", "ccc", "d", "ee"]), min_size=1, max_size=60)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(words=WORDS, n=st.integers(2, 6))
def test_ngram_shares_equal_a_slow_count(words, n):
    off = {name: None for name in QualityConfig.model_fields}
    total = sum(map(len, words))
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    repeats = [c for c in counts if counts[c] > 1]
    top = max((counts[c] * sum(map(len, c)) for c in repeats), default=0) / total
    covered, seen = set(), set()
    for i, gram in enumerate(grams):
        if gram in seen:
            covered |= set(range(i, i + n))
        seen.add(gram)
    repeated = sum(len(words[i]) for i in covered) / total
    text = " ".join(words)
    for field, value in (("max_top_ngram", top), ("max_repeated_ngrams", repeated)):
        for bound, breaks in ((value + 1e-9, False), (value - 1e-9, value > 0)):
            config = QualityConfig(**off | {field: {n: bound}})
            assert (quality_problem(text, config) is not None) == breaks


def test_web_rules_take_out_lines_and_drop_pages():
    page = f"Home | About\n{PROSE}\nShare this\nPlease enable javascript to see it.\nWe use cookies on this site."
    kept, problem = web_text(page, WebConfig(min_sentences=4))
    assert (kept, problem) == (PROSE, None)
    assert web_text(page, WebConfig(min_sentences=5))[1][0] == "web_few_sentences"
    assert web_text(page + " {", WebConfig())[1][0] == "web_curly_bracket"
    assert web_text("Lorem Ipsum dolor.", WebConfig())[1][0] == "web_lorem_ipsum"


@pytest.mark.parametrize("code, text", [
    ("en", PROSE), ("de", "Der Hund ist im Haus, und die Katze sitzt auf dem Dach, weil es nicht mehr regnet."),
    ("fr", "Le chat est dans la maison avec les enfants, et il ne veut pas sortir sous la pluie."),
    ("es", "El perro no está en la casa de los niños, pero su dueño lo busca por el jardín."),
    ("it", "Il gatto è nella casa con i bambini e non vuole uscire perché piove sul tetto."),
    ("pt", "O menino não foi para a escola com os seus amigos, mas ficou em casa por causa da chuva."),
    ("nl", "De kat is niet in het huis, maar de hond ligt op de mat bij de deur van de keuken."),
    ("ru", "Мальчик не пошёл в школу."), ("el", "Το αγόρι δεν πήγε στο σχολείο."), ("ja", "東京は日本の首都です。"),
    ("zh", "中国的首都是北京。"), ("ko", "서울은 대한민국의 수도이다."), ("ar", "لم يذهب الولد إلى المدرسة"),
    ("he", "הילד לא הלך"),
    ("hi", "लड़का स्कूल नहीं गया"), ("th", "เด็กไม่ได้ไปโรงเรียน")])
def test_languages_are_told_apart(code, text):
    assert language_of(text)[0] == code


def test_every_step_is_counted_with_examples_in_the_manifest(make_config, tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    texts = {"a": PROSE, "b": PROSE.replace("\n", "\r\n") + "\nmail me@example.org", "c": "short",
             "d": BAD["min_stop_words"],
             "e": "Der Mann und die Frau sind in dem Haus, und das Kind ist nicht da. " * 9, "f": PROSE + " {x}"}
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text, newline="")
    clean = {"normalize": {}, "pii": {}, "quality": {"min_stop_words": None, "max_repeated_ngrams": None,
                                                     "max_top_ngram": None, "max_repeated_lines": None},
             "language": {"allow": ["en"]}}
    source = {"kind": "text", "name": "t", "path": str(root)}
    config = make_config(tmp_path / "d", sources=[source], splits={}, clean=clean)
    made = prepare(config).provenance
    assert {k: n["documents"] for k, n in made["counts"]["t"].items()} == {"kept": 3, "min_words": 1, "language": 2}
    assert made["counts"]["t"]["language"]["bytes"] == len(texts["d"]) + len(texts["e"])
    assert made["examples"]["t"]["min_words"] == [
        {"source": "t", "path": "c.txt", "detail": "1, at least 50"}]
    assert made["changes"] == {"t": {"masked_emails": 1, "normalized": 1}}
    page = (tmp_path / "d" / "summary.html").read_text()
    assert "min_words" in page and "c.txt" in page and "masked_emails" in page
    web = prepare(make_config(tmp_path / "e", sources=[source], splits={},
                              clean={"web": {"min_sentences": 3}})).provenance["counts"]["t"]
    assert web["web_curly_bracket"]["documents"] == 1 and web["web_few_sentences"]["documents"] == 2


def test_what_cleaning_leaves_empty_is_dropped_not_written():
    cleaner = Cleaner(CleanConfig(normalize=NormalizeConfig()))
    assert cleaner.document("\x07\ufeff \n".encode()) == Dropped("nothing_left", "cleaning leaves only white space")

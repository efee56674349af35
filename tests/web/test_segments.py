"""Texts become sentences that an engine speaks well: none too long or too short, and no word is lost."""

from __future__ import annotations

import pytest
import sentencex
from hypothesis import given
from hypothesis import strategies as st

from residency.web.speech import segments
from residency.web.speech.segments import sentences

_PARTS = [
    "Dr", "e.g.", ".", "!", "?", "。", "！", "“", "”", '"', "'", "(", ")", "「", "」", " ", "\n", "\n\n", "\t",
    "\u200b", "\u2028", "\u3000", "3.14", "a", "Word", "你", "好", "，", ",", "[Laughter]", "[", "]",
    "…", "😀", "\u0301", "\u200d", "مرحبا", "؟", "ไทย", "\x00", "\x1c", "\ud83d", "—",
]  # fmt: skip
texts = st.lists(st.sampled_from(_PARTS), max_size=200).map("".join) | st.text(st.characters(), max_size=300)


def readable(text: str) -> str:
    """The characters of a text but for white space and halves of a character, in order."""
    return "".join(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())


@given(texts, st.integers(1, 400), st.sampled_from(["en", "zh", "de", "xx", ""]))
def test_no_character_is_lost_or_moved(text: str, most: int, language: str) -> None:
    found = sentences(text, most, language)
    assert readable("".join(found)) == readable(text)
    assert all(0 < len(each) <= most and each == " ".join(each.split()) for each in found)


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20), max_size=100))
def test_words_stay_whole_where_they_fit(words: list[str]) -> None:
    found = sentences(" ".join(words), 40)
    assert " ".join(found).split() == " ".join(words).split() or any(segments._WEIGHED[1].search(w) for w in words)


@pytest.mark.parametrize(
    "expected",
    [
        ["Dr. Smith paid 3.14 dollars at 5 p.m. on Jan. 5th.", "He left early."],
        ["The U.S. Army is here, e.g. in D.C. today.", "Visit www.example.com.", "Version 2.0.1 is out."],
        ['"Really? I know." she said.', "We went to the park."],
        ["我们去公园吧？", "他说：“走吧！”", "我们就走了。", "价格是3.14元。"],
        ["「こんにちは。」", "元気ですか？", "行きましょう！"],
        ["यह एक वाक्य है।", "यह दूसरा वाक्य है।"],
        ["مرحبا بكم هنا.", "كيف حالك اليوم؟", "أنا بخير اليوم."],
    ],
    ids=lambda expected: expected[0],
)
def test_abbreviations_decimals_and_quotes_end_no_sentence(expected: list[str]) -> None:
    between = "" if segments._WEIGHED[1].search(expected[0]) else " "
    assert sentences(between.join(expected)) == expected


def test_the_language_of_the_caller_selects_abbreviations() -> None:
    text = "Das war am 3. Mai im letzten Jahr. Dr. Müller kam z.B. heute."
    assert sentences(text, language="de") == ["Das war am 3. Mai im letzten Jahr.", "Dr. Müller kam z.B. heute."]


def test_blank_lines_end_sentences_and_other_white_space_is_one_space() -> None:
    found = sentences("  A heading here\r\n \r\nThe first\nline.\t Then it\u3000goes on ")
    assert found == ["A heading here", "The first line.", "Then it goes on"]


def test_short_sentences_are_spoken_with_a_neighbour() -> None:
    assert sentences("Yes. I will do that. No.") == ["Yes. I will do that. No."]
    assert sentences("1. First item. 2. Second item.") == ["1. First item.", "2. Second item."]
    assert sentences("好。我们明天去公园。是的。") == ["好。我们明天去公园。是的。"]
    assert sentences("Wait! Ok? ... Go. !") == ["Wait! Ok? ... Go. !"]
    assert sentences("1.") == ["1."]


def test_tags_stay_with_a_sentence() -> None:
    assert sentences("That is funny. [Laughter] And then we left. [Sigh]") == [
        "That is funny.",
        "[Laughter] And then we left. [Sigh]",
    ]
    long = sentences("今天天气很好[Surprise-oh]" * 40, 30)
    assert max(map(len, long)) <= 30
    assert sum(each.count("[Surprise-oh]") for each in long) == 40


def test_nothing_to_speak_is_no_sentence() -> None:
    assert sentences("") == sentences(" \n\t\u3000\n") == []
    assert sentences("...") == ["..."]
    with pytest.raises(ValueError, match="at least 1"):
        sentences("text", 0)


def test_long_sentences_are_divided_evenly_at_clauses() -> None:
    clause = "we went to the park with 1,000 friends"
    parts = sentences(f"{clause}, " * 10 + "and left.", 150)
    assert all(each.endswith((f"{clause},", "and left.")) for each in parts)
    assert min(map(len, parts)) > 60
    assert [len(each) for each in sentences("我们今天去公园，天气很好，" * 40)] == [260, 260]


def test_long_sentences_without_clauses_are_divided_at_spaces_or_chinese_characters() -> None:
    assert set(" ".join(sentences("word " * 500)).split()) == {"word"}
    assert [len(each) for each in sentences("天" * 1000)] == [250] * 4
    mixed = sentences("我喜欢iPhone" * 100, 50)
    assert sum(each.count("iPhone") for each in mixed) == 100


def test_a_long_quote_is_divided_at_its_sentences() -> None:
    said = "I asked Mr. Smith for advice."
    found = sentences(f'He wrote: "{" ".join([said] * 20)}" Then he left.')
    assert found == [f'He wrote: "{said}', *[said] * 18, f'{said}"', "Then he left."]
    assert sentences("“" + "我们今天去公园。" * 40 + "”")[1] == "我们今天去公园。"


def test_no_character_with_its_accents_or_emoji_is_cut() -> None:
    assert all(len(each) % 2 == 0 for each in sentences("a\u0301" * 500, 99))
    family = "👩\u200d👧\U0001f3fd"
    assert all(each == family * (len(each) // 4) for each in sentences(family * 100, 50))


@pytest.mark.parametrize(
    "repeated",
    ["word ", "a", ".", ". ", "。", "你好。", "“你好。”", "“你好。", '"Go." ', '"', "(", "[", "[Laughter]",
     "😀", "\u0301", "👩\u200d", "مرحبا ", "\n", " ", "a\n\n", ",", "，", "3.14", "Dr. ", "http://a.b",
     "\ud800", "\u202e", "สวัสดี"],
    ids=ascii,
)  # fmt: skip
def test_work_grows_with_the_length_only(repeated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """sentencex takes time by the square of what it gets: that is bounded, and no character is read often."""
    searched = [0]
    divide = sentencex.segment

    def counting(language: str, text: str) -> list[str]:
        assert len(text) <= segments._BLOCK
        searched[0] += len(text)
        return divide(language, text)

    monkeypatch.setattr(sentencex, "segment", counting)
    text = (repeated * 100_000)[:100_000]
    found = sentences(text)
    assert readable("".join(found)) == readable(text)
    assert searched[0] <= 4 * len(text)

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from residency.engines import text
from residency.errors import InvalidInput


@pytest.mark.parametrize(
    "said",
    ["Hello.", "Café naïve, Ürümqi, Łódź and Đà Nẵng!", "It's 5 °C – “mild”, isn’t it?", "π is about 3.14, µ is small",
     "42", "1st of May; №5 😀", "“Ｆｕｌｌ　ｗｉｄｔｈ”", "2º and 3ª", "x² + y³"],
)  # fmt: skip
def test_latin_texts_pass(said: str) -> None:
    text.english(said)


@pytest.mark.parametrize(
    ("said", "word"),
    [("你好，世界", "你好"), ("こんにちは", "こんにちは"), ("안녕하세요", "안녕하세요"), ("Привет, мир", "Привет"),
     ("مرحبا", "مرحبا"), ("שלום", "שלום"), ("नमस्ते", "न"), ("Καλημέρα", "Καλημέρα"),
     ("I live in 上海 now, and this is a long English sentence", "上海")],
)  # fmt: skip
def test_words_that_would_be_left_out_are_named(said: str, word: str) -> None:
    with pytest.raises(InvalidInput, match=word) as refused:
        text.english(said)
    assert "--model-path" in refused.value.en
    assert "--model-path" in refused.value.zh


def test_full_width_punctuation_becomes_half_width() -> None:
    assert text.english("Wait！ Why？ Well，yes。") == "Wait! Why? Well,yes."


@pytest.mark.parametrize("nothing", ["", "  \n\t", None])
def test_empty_texts_are_refused(nothing: str | None) -> None:
    with pytest.raises(InvalidInput, match="Target Text is empty") as refused:
        text.required(nothing, "Target Text", "目标文本")
    assert "目标文本为空" in refused.value.zh


def test_long_texts_are_refused() -> None:
    assert len(text.required("a" * 5000, "Target Text", "目标文本")) == 5000
    with pytest.raises(InvalidInput, match="5,001 characters"):
        text.required("a" * 5001, "Target Text", "目标文本")


@pytest.mark.parametrize(
    "said",
    ["你好，世界", "我们在KTV唱歌😀", "[Japanese]こんにちは、ｶﾀｶﾅ々", "[Korean]안녕하세요", "ㄅㄆㄇ",
     "Où est la gare ?", "¿Qué tal?", "The Russian word for peace is мир.",
     "α + β = γ", "3.14", "", "𝐇ello", "[Cantonese]你食咗飯未呀"],
)  # fmt: skip
def test_step_audio_gets_the_languages_that_it_may_speak(said: str) -> None:
    text.spoken_by_step_audio(said)


@pytest.mark.parametrize(
    ("said", "word"),
    [("Привет, мир! OK?", "Привет"), ("مرحبا بالعالم", "مرحبا"), ("שלום עולם", "שלום"), ("สวัสดีครับ", "สว"),
     ("नमस्ते दुनिया", "नमस"), ("Καλημέρα κόσμε", "Καλημέρα"), ("[Laughter] Да [Surprise-ah]", "Да"),
     ("Բարեւ", "Բարեւ"), ("გამარჯობა", "გამარჯობა")],
)  # fmt: skip
def test_step_audio_refuses_scripts_of_which_it_speaks_no_language(said: str, word: str) -> None:
    with pytest.raises(InvalidInput, match=word) as refused:
        text.spoken_by_step_audio(said)
    assert all(name in refused.value.en for name in ("Chinese", "English", "[Japanese]", "[Korean]"))
    assert all(name in refused.value.zh for name in ("中文", "英语", "日语", "韩语"))


ROOT = Path(__file__).resolve().parents[2]
CHECKS = [text.english, text.spoken_by_step_audio]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "said",
    ["Guten Tag, wie geht es Ihnen heute? Ich freue mich sehr.", "Bonjour, je m'appelle Marie et j'habite à Paris.",
     "Hola, me llamo Juan y vivo en la ciudad de Madrid.", "Xin chào, tôi tên là Nam và tôi sống ở Hà Nội.",
     "Ciao, mi chiamo Marco e abito a Roma con la mia famiglia.", "Merhaba, benim adım Ahmet ve İstanbul'da yaşıyorum.",
     "Witam, nazywam się Piotr i mieszkam w Warszawie.", "[Laughter] Das ist ein kurzer Satz auf Deutsch."],
)  # fmt: skip
def test_other_languages_in_latin_letters_are_refused(check: Callable[[str], object], said: str) -> None:
    with pytest.raises(InvalidInput, match=re.sub(r"\[.*\] ", "", said)[:20]):
        check(said)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "said",
    ["Guten Tag, wie geht's?", "OK OK OK OK OK OK OK OK", "La la la la la la la la", "Ha ha ha ha ha ha ha",
     "Johann Sebastian Bach, Ludwig van Beethoven, Wolfgang Amadeus Mozart, Franz Schubert, Johannes Brahms",
     "Nguyen Van Anh, Tran Thi Mai, Le Hoang Nam, Pham Minh Duc, Hoang Thi Lan",
     "u r gr8 c u l8r m8 lol brb omg thx np",
     "Konnichiwa, watashi no namae wa Tanaka desu. Yoroshiku onegaishimasu.",
     "Annyeonghaseyo, je ireumeun Kim Minsu imnida, mannaseo bangapseumnida.",
     "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor.",
     "The Schadenfreude of the Zeitgeist and the Weltanschauung of Kindergarten",
     "Deja vu, a la carte, en route, faux pas, café",
     "Sein oder nicht sein, said Hamlet in the German translation of the play.", "[Sigh] no [Breathing] no no no no no",
     "HELLO EVERYBODY, THIS IS A TEXT IN CAPITAL LETTERS ONLY",
     "Mississippi, Tennessee, Minnesota, Wisconsin, Oklahoma, Ohio"],
)  # fmt: skip
def test_short_texts_and_doubtful_ones_pass(check: Callable[[str], object], said: str) -> None:
    check(said)


def test_no_sentence_of_the_guides_is_refused() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*/*.md")]
    prose = (re.sub("```.*?```|`[^`]*`", "", file.read_text(), flags=re.DOTALL) for file in files)
    sentences = [part for each in prose for part in re.split(r"(?<=[.!?;:。！？；：])\s*|\s*\|\s*|\n\s*\n", each)]
    assert len(sentences) > 5000
    for sentence in sentences:
        text.spoken_by_step_audio(sentence)

"""Language: what is spliced in is found and named; English mathematics, names and quotations are not taken for it."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from distill.filters import language
from distill.filters.function_words import LANGUAGES
from distill.filters.words import cut_words
from distill.recipe import LanguageFilter
from tests.distill.small_run import problem, trace

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "traces").is_dir(), reason="no real traces (DISTILL_DATA)")

ENGLISH = "A farmer has 12 cows and sells 5 of them. How many cows does the farmer have now?"
THINKING = (
    "Okay, let me think about this problem. The farmer has 12 cows in total, and then he sells 5 of them. So I need to "
    "find how many are left. That would be 12 minus 5, which is 7. Wait, let me check that again to be sure. "
)
SPLICED = {
    "Chinese": "让我重新检查一下这个计算过程是否正确。",
    "Japanese": "もう一度この計算を確認してみましょう。",
    "Korean": "이 계산을 다시 한번 확인해 보겠습니다 그리고 답을 씁니다.",
    "Cyrillic": "Давайте проверим это вычисление ещё раз и запишем ответ.",
    "Arabic": "دعنا نتحقق من هذا الحساب مرة أخرى ثم نكتب الجواب.",
    "Hebrew": "בואו נבדוק את החישוב הזה שוב ונכתוב את התשובה.",
    "Devanagari": "आइए इस गणना को फिर से जांचें और उत्तर लिखें।",
    "Thai": "ลองตรวจสอบ การคำนวณ นี้อีกครั้ง แล้วเขียน คำตอบ",
    "Greek": "Ας ελέγξουμε ξανά αυτόν τον υπολογισμό και ας γράψουμε την απάντηση.",
    "de": "Also müssen wir jetzt noch einmal prüfen, ob die Rechnung stimmt, und dann ist das Ergebnis klar.",
    "fr": "Donc il faut vérifier encore une fois que le calcul est bien juste, et ensuite on peut donner la réponse.",
    "es": "Entonces vamos a comprobar otra vez que el cálculo es correcto, y luego podemos dar la respuesta.",
    "it": "Quindi dobbiamo controllare ancora una volta che il calcolo sia giusto, e poi possiamo dare la risposta.",
    "pt": "Então vamos verificar mais uma vez se o cálculo está certo, e depois podemos dar uma resposta.",
    "nl": "Dus we moeten nu nog een keer controleren of het klopt, en dan kunnen we het antwoord geven.",
}
FULL = {
    "de": "Ein Bauer hat 12 Kühe und verkauft 5 davon. Wie viele Kühe hat er jetzt noch?",
    "fr": "Un fermier a 12 vaches et il en vend 5. Combien de vaches est-ce que le fermier a maintenant ?",
    "es": "Un granjero tiene 12 vacas y vende 5 de ellas. ¿Cuántas vacas tiene ahora el granjero?",
    "Chinese": "一个农民有12头牛，卖掉了5头。现在还剩多少头牛？",
    "Cyrillic": "У фермера было 12 коров, он продал 5 из них. Сколько коров осталось у фермера?",
}


def verdict(text, asked=ENGLISH, settings=None):
    of = problem(asked)
    found = trace(of, f"{text}\n</think>\n\n\\boxed{{7}}")
    [said] = language.check([found], {of["id"]: of}, settings or LanguageFilter())
    return said


def test_english_thinking_about_an_english_problem():
    assert verdict(THINKING) == verdict(THINKING)
    assert verdict(THINKING).passed and verdict(THINKING).measured == {"consistency": 1.0}


@pytest.mark.parametrize("name", SPLICED)
def test_one_foreign_sentence_is_found_and_named(name):
    said = verdict(THINKING + SPLICED[name] + " " + THINKING)
    assert not said.passed and f"({name})" in said.reason
    assert 0.5 < said.measured["consistency"] < 1


@pytest.mark.parametrize("name", FULL)
def test_each_problems_own_language_is_the_target(name):
    assert language.main_language(cut_words([FULL[name]])[0]).name == name
    assert verdict(SPLICED[name] * 3, FULL[name]).passed
    assert not verdict(THINKING, FULL[name]).passed
    assert not verdict(SPLICED[name] * 3 + THINKING, FULL[name]).passed


def test_the_recipe_can_name_the_language():
    assert not verdict(THINKING, settings=LanguageFilter(language="fr")).passed
    assert verdict(SPLICED["fr"] * 3, settings=LanguageFilter(language="fr")).passed


@pytest.mark.parametrize(
    "text",
    [
        "We have $\\alpha + \\beta = \\gamma$ and Δx Δt, so αβ = π. Thus θ ≈ 3.",
        "sin x + cos x = sin y, sin 2x = 2 sin x cos x, so sin x sin y cos x per second plus sin z.",
        "The prices are $5 and $10, so in total it is $15. Then $20 more.",
        "Bonjour is a French word. María García and Jürgen Müller from São Paulo have 5 apples.",
        "```python\nfor la in de: que = el\nlos = las + un\nde = la\n```\nSo the answer is 7.",
        "In code, `el la los las que de un una` is a list. So we can see that it is fine.",
        "∑ ∫ → ≤ ≥ ² ³ ½ ✓ ✅ 😀 “quotes” – dashes… and so on.",
        "pH and DNA, ABC is a triangle, PQR is another, XYZ is the third, and so on to the end.",
    ],
)
def test_formulas_code_names_and_signs_have_no_language(text):
    assert verdict(THINKING + text).passed, verdict(THINKING + text).reason


def test_formulas_are_exempt_in_a_problem_of_another_script():
    text = "我们设 $x$ 为未知数，则 \\(x + 5 = 12\\)，所以 $\\text{total value of everything here} = 7$。答案是七。"
    assert verdict(text, FULL["Chinese"]).passed


def test_one_chinese_word_in_english_is_a_slip_and_one_english_word_in_chinese_is_none():
    mixed = THINKING * 20 + "so the shop sells them先后 at that price. " + THINKING * 20
    assert not verdict(mixed).passed and verdict(mixed, settings=LanguageFilter(max_run=2)).passed
    borrowed = SPLICED["Chinese"] * 20 + "所以 Alice 的苹果最多。" + SPLICED["Chinese"] * 20
    assert verdict(borrowed, FULL["Chinese"]).passed
    assert not verdict(borrowed, FULL["Chinese"], LanguageFilter(max_run=0)).passed


def test_what_the_problem_quotes_may_be_quoted():
    asked = "Translate the sentence 'Je ne sais pas ce que tu veux dire' into English and count its words, please."
    text = "The sentence is 'Je ne sais pas ce que tu veux dire', so it means that I do not know what you mean. "
    assert verdict(text, asked).passed
    assert not verdict(text, ENGLISH).passed


def test_thresholds():
    text = THINKING * 5 + "让我重新检查一下。 " + THINKING * 5
    assert not verdict(text).passed
    assert verdict(text, settings=LanguageFilter(max_run=10)).passed
    assert not verdict(text, settings=LanguageFilter(max_run=10, min_share=0.999)).passed


@pytest.mark.parametrize("text", ["", "7", "12 + 5 = 17", "\0" * 50, "\ud800\udfff", "😀" * 40, "\\frac{1}{2}"])
def test_texts_without_words_pass(text):
    assert verdict(text, "$1+1$").passed


def test_every_language_has_words_of_its_own():
    from distill.filters.function_words import function_words

    masks = function_words().values()
    for bit in range(len(LANGUAGES)):
        assert sum(mask == 1 << bit for mask in masks) >= 15, LANGUAGES[bit]


def real(name):
    with gzip.open(DATA / "traces" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def judged(rows, settings):
    asked = cut_words([row["prompt"] for row in rows])
    texts = cut_words([row["response"] for row in rows])
    return [language._check(text, of, settings) for text, of in zip(texts, asked, strict=True)]


@needs_data
def test_real_traces_are_rejected_only_where_they_are_mixed():
    rows = real("r1_normal") + real("others_normal")
    rejected = [
        (row["model"][:4], row["id"])
        for row, v in zip(rows, judged(rows, LanguageFilter()), strict=True)
        if not v.passed
    ]
    # Read by eye: each of them has a clause or a word of Chinese, or of Russian, in the middle of English.
    assert rejected == [
        ("deep", "gsm8k-normal-374"), ("QwQ-", "gsm8k-normal-509"), ("s1.1", "gsm8k-normal-572"),
        ("s1.1", "gsm8k-normal-66"), ("s1.1", "gsm8k-normal-67"), ("s1.1", "gsm8k-normal-88"),
        ("s1.1", "gsm8k-normal-196"), ("s1.1", "gsm8k-normal-267"), ("s1.1", "gsm8k-normal-275"),
        ("s1.1", "gsm8k-normal-287"), ("s1.1", "gsm8k-normal-299"),
    ]  # fmt: skip


@needs_data
def test_sentences_spliced_into_real_traces_are_found():
    pick = random.Random(0)
    rows = real("r1_normal")
    clean = [row for row, v in zip(rows, judged(rows, LanguageFilter()), strict=True) if v.passed][::3]
    missed = dict.fromkeys(SPLICED, 0)
    for name, sentence in SPLICED.items():
        spliced = []
        for row in clean:
            parts = row["response"].split(". ")
            at = pick.randrange(len(parts))
            spliced.append({**row, "response": ". ".join([*parts[:at], sentence, *parts[at:]])})
        missed[name] = sum(v.passed for v in judged(spliced, LanguageFilter()))
    assert max(missed.values()) <= 0.02 * len(clean), missed

"""Every scorer on the shelf, by merely existing; then what each one alone promises."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import registry
from luthier.records import Score
from luthier.scorers import _json
from luthier.text.words import script, words

SCORERS = registry.names("scorers")
TEXTS = {
    "english": "The cat sat on the mat, quietly.",
    "one word": "billing",
    "chinese": "今天下午三点来取雨伞。",
    "thai": "ซ่อมจักรยานวันพรุ่งนี้ได้ไหม",
    "hindi": "कल सुबह साइकिल ठीक करनी है",
    "arabic": "أريد إصلاح الدراجة غدا",
    "emoji": "🎉👩‍👩‍👧 🇫🇷",
    "punctuation": "?!",
    "json": '{"intent": "book", "item": "bike", "day": null, "n": 2}',
    "nested json": '{"a": {"b": [1, {"c": "x"}], "d": []}, "e": [{"k": 1}, {"k": 2}], "f": {}}',
    "number": "-42.5",
    "long": "word " * 300,
}


@pytest.fixture(params=SCORERS)
def scorer(request):
    return registry.make("scorers", request.param)


@pytest.mark.parametrize("kind", TEXTS)
def test_gold_is_its_own_equal(scorer, kind):
    score = scorer.score(TEXTS[kind], TEXTS[kind])
    if score.value is None:
        assert score.reason
    else:
        assert score.value == pytest.approx(1.0, abs=1e-9)
        assert scorer.aggregate([score, score]) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("kind", TEXTS)
def test_an_empty_answer_is_wrong(scorer, kind):
    assert scorer.score("", TEXTS[kind]).value in (0.0, None)


@settings(max_examples=60, deadline=None)
@given(answer=st.text(max_size=60), gold=st.text(max_size=60))
@pytest.mark.parametrize("name", SCORERS)
def test_any_text_is_judged_within_bounds_and_as_plain_json(name, answer, gold):
    scorer = registry.make("scorers", name)
    for told in (answer, gold):
        score = scorer.score(told, gold)
        assert score.reason if score.value is None else 0 <= score.value <= 1
        assert not scorer.binary or score.value in (0, 1, None)
        json.dumps(dict(score.parts), allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(gold=st.text(max_size=60).filter(str.strip))
@pytest.mark.parametrize("name", SCORERS)
def test_any_gold_is_its_own_equal(name, gold):
    value = registry.make("scorers", name).score(gold, gold).value
    assert value is None or value >= 1 - 1e-6


def test_the_aggregate_is_a_pure_function_of_items(scorer):
    rng = random.Random(0)
    golds = ['{"a": 1, "b": "x y"}', '{"a": 2, "b": "longer words here"}', '{"b": "今天"}'] * 4
    scores = [scorer.score(rng.choice(golds), gold) for gold in golds]
    kept = [
        Score(**json.loads(json.dumps({"value": s.value, "reason": s.reason, "parts": dict(s.parts)}))) for s in scores
    ]
    whole = scorer.aggregate(scores)
    assert scorer.aggregate(scores) == whole  # aggregating changes nothing
    assert scorer.aggregate(kept) == pytest.approx(whole)  # nor does a trip to disk
    assert scorer.aggregate(rng.sample(scores, len(scores))) == pytest.approx(whole)  # nor order
    assert scorer.aggregate([*scores, Score(None, "not scored")]) == pytest.approx(whole)  # UNSCORED leaves the rate
    assert scorer.aggregate([Score(None, "not scored")]) is None


# ---- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("Paris.", "paris", True),
        ('"Paris"', "Paris", True),
        ("  New\n York ", "new york", True),
        ("ﬁne", "fine", True),
        ("５", "5", True),
        ("-5", "5", False),
        (".5", "5", False),
        ("?", "!", False),
        ("巴黎。", "巴黎", True),
        ('{"b": 2, "a": 1.0}', '{"a":1,"b":2}', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": "X "}', '{"a": "x"}', True),
        ('{"a": 1} ok', '{"a": 1}', False),
        ("[1, 2]", "[2, 1]", False),
        ("{not json}", "{Not JSON}", True),
    ],
)
def test_exact(answer, gold, same):
    assert registry.make("scorers", "exact").score(answer, gold).value == same


def test_exact_strict_counts_every_character():
    strict = registry.make("scorers", {"name": "exact", "strict": True})
    assert strict.score("Paris", "paris").value == 0
    assert strict.score('{"a": "x"}', '{"a": "X"}').value == 0
    assert strict.score('{"a":"x"}', '{"a": "x"}').value == 1
    bare = registry.make("scorers", {"name": "exact", "strict": True, "json_values": False})
    assert bare.score('{"a":"x"}', '{"a": "x"}').value == 0


# ---- words, f1, rouge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't stop, e-mail me!", ["don", "t", "stop", "e", "mail", "me"]),
        ("今天 OK", ["今", "天", "ok"]),
        ("कल सुबह", ["कल", "सुबह"]),
        ("ที่", ["ที่"]),
        ("a🎉b", ["a", "🎉", "b"]),
        ("…", [".", ".", "."]),
        ("", []),
    ],
)
def test_words(text, wanted):
    assert words(text) == wanted


def test_script():
    assert [script(t) for t in ("hello", "今天 very good", "今日は雨", "สวัสดี", "", "say hello to 今 now")] == [
        "spaced", "han", "kana", "thai", "spaced", "spaced",
    ]  # fmt: skip


def test_f1_by_hand():
    f1 = registry.make("scorers", "f1")
    score = f1.score("the red bike", "red bike shed repair")
    assert score.parts == {"precision": pytest.approx(2 / 3), "recall": pytest.approx(0.5)}
    assert score.value == pytest.approx(4 / 7)
    assert f1.score("天气好", "天气").value == pytest.approx(0.8)
    assert f1.score("a a a", "a").value == pytest.approx(0.5)


def test_rouge_agrees_with_the_library_on_latin_text():
    from rouge_score.rouge_scorer import RougeScorer

    answer, gold = "the cat was found under the bed", "the cat was under the big bed"
    wanted = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(gold, answer)
    score = registry.make("scorers", "rouge").score(answer, gold)
    assert score.value == pytest.approx(wanted["rougeL"].fmeasure)
    assert score.parts["rouge2"] == pytest.approx(wanted["rouge2"].fmeasure)


# ---- bleu, chrf -----------------------------------------------------------------------------------------------------

CORPUS = [
    ("the cat sat on a mat", "the cat sat on the mat"),
    ("dogs bark", "the dogs bark loudly at night"),
    ("completely different words here", "nothing shared at all between them"),
    ("he went to the market to buy bread and milk", "he went to the market and bought bread and milk"),
]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_value_agrees_with_sacrebleu(name):
    import sacrebleu

    scorer = registry.make("scorers", name)
    scores = [scorer.score(answer, gold) for answer, gold in CORPUS]
    corpus = sacrebleu.corpus_bleu if name == "bleu" else sacrebleu.corpus_chrf
    wanted = corpus([a for a, _ in CORPUS], [[g for _, g in CORPUS]]).score / 100
    assert scorer.aggregate(scores) == pytest.approx(wanted)
    mean = sum(score.value for score in scores) / len(scores)
    assert scorer.aggregate(scores) != pytest.approx(mean)
    assert "version" in scorer.signature()


def test_bleu_chooses_its_tokeniser_by_script():
    bleu = registry.make("scorers", "bleu")
    assert bleu.score("今天天气很好", "今天天气很好啊").parts["tokenize"] == "zh"
    assert bleu.score("a", "สวัสดีครับ").parts["tokenize"] == "char"
    assert bleu.score("今天天气很好", "今天天气很好啊").value > 0.5  # by words it would be 0


# ---- json_fields ----------------------------------------------------------------------------------------------------

GOLD = '{"intent": "book", "item": "bike", "day": null, "n": 2}'


def judge(answer, gold=GOLD, **options):
    return registry.make("scorers", {"name": "json_fields", **options}).score(answer, gold)


@pytest.mark.parametrize(
    ("answer", "value", "strict"),
    [
        (GOLD, 1.0, True),
        ("```json\n" + GOLD + "\n```", 1.0, False),
        ("Sure: " + GOLD + " Anything else? {}", 1.0, False),
        ("Use { and }. " + GOLD, 1.0, False),
        ('{"intent": "BOOK ", "item": "car", "day": null, "n": 2.0}', 0.75, True),
        ('{"intent": "book", "item": "bike", "n": 2}', 0.75, True),
        ('{"intent": "book", "item": "bike", "day": "null", "n": 2}', 0.75, True),
        ("[1, 2]", 0.0, True),
        ("2", 0.0, True),
    ],
)
def test_json_fields(answer, value, strict):
    score = judge(answer)
    assert score.value == pytest.approx(value)
    assert score.parts["parsed"] and score.parts["strict"] is strict
    assert score.parts["exact"] is (value == 1.0)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no idea",
        GOLD[:-1],
        GOLD[:20],
        '{"a": {"intent": "book", "item": "bike"}, "b": ',
        '{"n": NaN}',
        "{" * 5000,
        "[" * 100_000,
        '{"n": 1e999}',
    ],
)
def test_an_unreadable_answer_is_wrong_not_unscored(answer):
    score = judge(answer)
    assert score.value == 0
    assert score.parts["parsed"] is False and score.parts["exact"] is False
    assert set(score.parts["fields"].values()) == {"omitted"}


@pytest.mark.parametrize("gold", ["book a bike", "", "{'a': 1}", '{"a": NaN}', "{" + '"a":{' * 100 + "}" * 101])
def test_a_gold_that_is_not_json_is_unscored(gold):
    score = judge(GOLD, gold)
    assert score.value is None and "not JSON" in score.reason


def test_tags_of_fields():
    score = judge('{"intent": "quote", "item": "bike", "colour": "red", "n": 2}')
    assert score.parts["fields"] == {
        "intent": "mismatch", "item": "match", "day": "omitted", "n": "match", "colour": "invented",
    }  # fmt: skip
    assert score.value == 0.5 and not score.parts["exact"]
    assert score.parts["values"]["colour"] == "red" and score.parts["gold"]["day"] is None


def test_an_invented_field_spoils_the_record_but_not_the_share():
    score = judge('{"intent": "book", "item": "bike", "day": null, "n": 2, "x": 1}')
    assert score.value == 1.0 and not score.parts["exact"]


def test_null_and_missing():
    missing, nulls = '{"intent": "book", "item": "bike", "n": 2}', GOLD[:-1] + ', "x": null}'
    assert judge(missing).value == 0.75 and not judge(nulls).parts["exact"]
    assert judge(missing, null_is_missing=True).parts["exact"]
    assert judge(nulls, null_is_missing=True).parts["exact"]
    assert judge("{}", '{"a": null}', null_is_missing=True).value == 1
    assert judge("none", '{"a": null}', null_is_missing=True).value == 0


def test_values_strict_normal_lenient():
    gold, answer = '{"a": 3, "b": "X", "c": true, "d": 1}', '{"a": "3", "b": "x", "c": "true", "d": 1.0}'
    assert judge(answer, gold, values="strict").value == 0
    assert judge(answer, gold).value == 0.5
    assert judge(answer, gold, values="lenient").value == 1
    assert judge('{"c": 1}', '{"c": true}', values="lenient").value == 0


def test_nested_objects_open_into_paths():
    gold = '{"who": {"name": "Ann", "city": "Bonn"}, "n": 1}'
    score = judge('{"who": {"name": "Ann", "city": "Köln"}, "n": 1}', gold)
    assert score.parts["fields"] == {"who.name": "match", "who.city": "mismatch", "n": "match"}
    flat = judge('{"who": "Ann", "n": 1}', gold)
    assert flat.parts["fields"] == {"who.name": "omitted", "who.city": "omitted", "who": "invented", "n": "match"}


def test_lists_of_records_are_aligned():
    gold = '{"lines": [{"item": "a", "n": 1}, {"item": "b", "n": 2}]}'
    swapped = judge('{"lines": [{"item": "b", "n": 2}, {"item": "a", "n": 9}]}', gold)
    assert swapped.value == 0.75 and swapped.parts["fields"]["lines[0].n"] == "mismatch"
    more = judge('{"lines": [{"item": "a", "n": 1}, {"item": "z", "n": 5}, {"item": "b", "n": 2}]}', gold)
    assert more.value == 1 and not more.parts["exact"]
    assert [path for path, tag in more.parts["fields"].items() if tag == "invented"] == ["lines[2].item", "lines[2].n"]
    assert judge('{"lines": []}', gold).value == 0


def test_lists_of_plain_values_are_one_value():
    gold = '{"tags": ["a", "b"]}'
    assert judge('{"tags": ["b", "a"]}', gold).value == 0
    assert judge('{"tags": ["b", "A"]}', gold, ordered=False).value == 1
    assert judge('{"tags": ["b", "b"]}', gold, ordered=False).value == 0


def test_a_whole_answer_may_be_a_list_or_a_number():
    assert judge("Here: [1, 2]", "[1, 2]").value == 1
    assert judge("42", "42").value == 1 and judge("41", "42").value == 0
    assert judge("{}", "{}").value == 1 and judge('{"a": 1}', "{}").value == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(gold=json_values, answer=json_values)
def test_json_fields_holds_for_any_json(gold, answer):
    own = judge(json.dumps(gold), json.dumps(gold))
    assert own.value == 1 and own.parts["exact"]
    score = judge(json.dumps(answer), json.dumps(gold))
    assert 0 <= score.value <= 1
    assert not score.parts["exact"] or score.value == 1
    assert score.parts["exact"] or _json.key_of(gold) != _json.key_of(answer)

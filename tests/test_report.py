"""From predictions to the page: predictions on disk, self-check, transitions, guards, report.json, report.html."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser

import pytest
import report_fakes as fakes

from luthier.contracts import Scorer
from luthier.errors import UsageError
from luthier.evaluate import page, plots, predict, report, wording
from luthier.evaluate.fields import field_table
from luthier.evaluate.guards import guards, repetition
from luthier.evaluate.history import sharing_of, training_of
from luthier.evaluate.transitions import CELLS, transitions
from luthier.records import Completion, Example, Message, Origin, Prediction, Score

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    '" onmouseover="alert(1)" x="',
    "</style><style>*{display:none}</style>",
    "</textarea></title></pre></details></table></div><h1>owned</h1>",
    "<!-- --><b>bold</b><!--",
    "<![CDATA[<b>x</b>]]>",
    "<?php echo 1 ?>",
    "<iframe srcdoc='<script>1</script>'></iframe>",
    "<a href=javascript:alert(1)>x</a>",
    "<meta http-equiv=refresh content='0;url=http://x'>",
    "<base href=http://x/>",
    "<form action=http://x><input name=q>",
    "&lt;script&gt; &amp;#60;b&amp;#62; &#60;b&#62;",
    "{{ 7*7 }} {% for x in [] %} {# c #} ${7*7} <%= 7 %>",
    "{{ report.__class__.__mro__ }}",
    "\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link",
    "abc\u202edcba\u202c \u2066x\u2069 \u200fy",
    "a\u200bb\ufeffc\u2060d \U000e0041",
    "nul \x00 bell \x07 del \x7f nel \x85",
    "lone \ud800 surrogate",
    "line\u2028sep\u2029par",
    "<\x00script>alert(1)</script>",
    "＜script＞ ‹b›",
    "`onload=alert(1)`",
    "x" * 5000 + "<b>",
]


@pytest.fixture(scope="module")
def whole():
    return fakes.build(count=90, draws=400)


@pytest.fixture(scope="module")
def small():
    return fakes.build(count=16, draws=100)


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_predictions_survive_the_disk(tmp_path):
    scorers = fakes.scorers_of("json_fields", "bleu")
    rows = [
        *fakes.examples(5, 0, "a.jsonl"),
        Example((Message("user", "q\u2028\n"), Message("assistant", "答\ud800")), Origin("b")),
    ]
    told = predict.pair(
        rows, [Completion(text, stop="length") for text in ("", "{}", "🎉", '{"item": 1}', "x\r\ny", "z")]
    )
    told = predict.score_all(told, scorers, rows)
    predict.save(tmp_path / "p.jsonl", told)
    assert predict.load(tmp_path / "p.jsonl") == told
    assert told[0].lineage == (rows[0].id,) and told[0].origin == "a.jsonl:1" and told[0].stop == "length"


def test_every_item_needs_an_answer():
    with pytest.raises(ValueError, match="shorter"):
        predict.pair(fakes.examples(2, 0, "a"), [Completion("x")])


class Half(Scorer):
    """Gives every answer half a point; its own gold too."""

    def score(self, answer, gold, example=None):
        return Score(0.5)


class NotNumber(Scorer):
    """Gives what is not a number, and wants the example."""

    def score(self, answer, gold, example=None):
        return Score(float("nan"), parts={"seen": example.id if example else ""})


def test_a_value_that_is_no_number_is_unscored():
    rows = fakes.examples(1, 0, "a")
    score = predict.score_all(predict.pair(rows, [Completion("x")]), {"bad": NotNumber()}, rows)[0].scores["bad"]
    assert score.value is None and "nan" in score.reason and score.parts["seen"] == rows[0].id


def test_self_check_gives_the_chance_level():
    golds = ["yes"] * 50 + ["no"] * 50
    chance = predict.self_check(fakes.scorers_of("exact", "f1"), golds)
    assert 0.3 < chance["exact"] < 0.7 and chance["f1"] == chance["exact"]
    assert predict.self_check(fakes.scorers_of("exact"), ["今", "天", "好"]) == {"exact": 0.0}


def test_self_check_names_every_metric_that_does_not_fit():
    with pytest.raises(UsageError) as caught:
        predict.self_check({"half": Half(), **fakes.scorers_of("json_fields", "exact")}, ["free text", "more text"])
    told = [str(fault) for fault in caught.value.faults]
    assert len(told) == 2 and "half" in told[0] and "0.500" in told[0] and "not JSON" in told[1]
    assert caught.value.exit_code == 2


# ---- transitions, fields, guards ------------------------------------------------------------------------------------


def rows_of(pairs, metric="exact"):
    """Base and tuned predictions from (gold, base answer, tuned answer)."""
    scorers = fakes.scorers_of(metric)
    examples = [
        Example((Message("user", f"question {i}"), Message("assistant", gold)), Origin("d.csv", i + 1))
        for i, (gold, *_) in enumerate(pairs)
    ]
    sides = [predict.pair(examples, [Completion(row[side]) for row in pairs]) for side in (1, 2)]
    return [predict.score_all(side, scorers, examples) for side in sides], scorers[metric]


def test_transitions_of_exact():
    (base, tuned), scorer = rows_of(
        [("a", "a", "a"), ("a", "a", "b"), ("a", "b", "a"), ("a", "b", "c"), ("a", "b", "a")]
    )
    found = transitions(base, tuned, "exact", scorer)
    assert found.counts == {"broken": 1, "stuck": 1, "fixed": 2, "kept": 1}
    item = found.items["broken"][0]
    assert (item["origin"], item["question"], item["gold"], item["base"], item["tuned"]) == (
        "d.csv:2",
        "question 1",
        "a",
        "a",
        "b",
    )
    assert item["scores"] == {"base": 1.0, "tuned": 0.0} and item["fields"] == []


def test_transitions_of_records_count_whole_records_and_fields():
    gold = '{"a": 1, "b": 2}'
    (base, tuned), scorer = rows_of(
        [(gold, '{"a": 1}', gold), (gold, gold, '{"a": 1, "b": 3, "c": 4}'), ("text", "", "")], "json_fields"
    )
    found = transitions(base, tuned, "json_fields", scorer)
    assert found.counts == {"broken": 1, "stuck": 0, "fixed": 1, "kept": 0} and found.unscored == 1
    lines = {line["name"]: line for line in found.items["broken"][0]["fields"]}
    assert lines["b"] == {
        "name": "b",
        "gold": 2,
        "wanted": True,
        "base": 2,
        "base_tag": "match",
        "tuned": 3,
        "tuned_tag": "mismatch",
    }
    assert lines["c"]["tuned_tag"] == "invented" and not lines["c"]["wanted"]
    fields = field_table(base, tuned, "json_fields")
    assert fields["a"]["transitions"] == {"broken": 0, "stuck": 0, "fixed": 0, "kept": 2}
    assert fields["b"]["transitions"] == {"broken": 1, "stuck": 0, "fixed": 1, "kept": 0}
    assert fields["b"]["tags"] == {"match": 1, "mismatch": 1, "omitted": 0, "invented": 0}


def test_transitions_of_a_graded_metric_say_their_threshold():
    (base, tuned), scorer = rows_of([("red bike shed", "red bike", "red bike shed"), ("red bike shed", "x", "y")], "f1")
    found = transitions(base, tuned, "f1", scorer)
    assert found.counts == {"broken": 0, "stuck": 1, "fixed": 0, "kept": 1} and "0.5" in found.rule


def test_fields_in_lists_are_one_field():
    gold = '{"lines": [{"item": "a"}, {"item": "b"}]}'
    (base, tuned), _ = rows_of([(gold, "", '{"lines": [{"item": "a"}, {"item": "x"}]}')] * 3, "json_fields")
    table = field_table(base, tuned, "json_fields")
    assert list(table) == ["lines[].item"] and table["lines[].item"]["tuned"] == 0.5 and table["lines[].item"]["n"] == 3


def told(text, stop="end", gold="a", question="what is it?"):
    return Prediction("i", question, gold, text, stop, "f:1")


def test_guards_are_red_only_above_their_limits():
    rows = [told("fine")] * 19 + [told(" \n")]
    assert guards(rows)["empty"] | {"outputs": 0} == guards(rows)["empty"] | {"outputs": 0, "share": 0.05, "red": False}
    assert guards([*rows, told("")])["empty"]["red"]
    assert guards([told("x", "length")] * 2 + [told("x")] * 8)["truncated"]["red"]
    assert "unparsed" not in guards(rows)


def test_guards_show_three_different_raw_outputs_and_prefer_browsed_rows():
    judged = [told(f"cut {i}", "length") for i in range(9)]
    assert guards([*judged, *judged])["truncated"]["outputs"] == ["cut 0", "cut 1", "cut 2"]
    assert guards(judged, [told("dev", "length"), told("fine")])["truncated"]["outputs"] == ["dev", "cut 0", "cut 1"]


def test_unparsed_answers_are_caught():
    (base, _), _ = rows_of([('{"a": 1}', "no", "no")] * 3 + [('{"a": 1}', "{}", "{}")], "json_fields")
    assert guards(base)["unparsed"]["share"] == 0.75 and guards(base)["unparsed"]["red"]


def test_repetition_and_echo():
    loop = "I am sorry for that. " * 10
    assert repetition(loop) > 0.8 and repetition("one two three four") == 0 and repetition("今天很好" * 10) > 0.8
    assert guards([told(loop)])["repetition"]["share"] == 1
    assert guards([told(loop, gold=loop)])["repetition"]["share"] == 0
    question = "could you please mend my bike by friday?"
    assert guards([told(f"You said: {question.upper()}", question=question)])["echo"]["red"]
    assert not guards([told(question, question=question, gold=question)])["echo"]["red"]


# ---- report.json ----------------------------------------------------------------------------------------------------


def test_the_report_has_its_promised_keys_and_is_json(whole):
    assert json.loads(json.dumps(whole, allow_nan=False)) == json.loads(json.dumps(whole))
    wanted = {"metric", "base", "tuned", "difference", "low", "high", "p_value", "n", "verdict", "sentence", "p_better"}
    assert wanted <= whole["primary"].keys() and wanted <= whole["primary_vs_few_shot"].keys()
    assert set(whole["systems"]) == {"base", "base_few_shot", "tuned"}
    for system in whole["systems"].values():
        assert set(system["scores"]) == set(whole["metrics"]) == {"json_fields", "exact", "f1", "chrf"}
        assert all(score["low"] <= score["value"] <= score["high"] for score in system["scores"].values())
        assert system["seconds"] > 0 and "empty" in system["guards"]
    assert (
        set(whole["transitions"]) == {"fixed", "broken", "kept", "stuck"} and sum(whole["transitions"].values()) == 90
    )
    assert 0 < whole["smallest_detectable_gain"] < 1
    assert set(whole["fields"]) == {"intent", "item", "problem", "day", "time", "urgent"}
    assert whole["ledger"] == {"opened": 1, "comparisons": 8}
    assert (
        "version" in whole["provenance"]["metrics"]["chrf"]
        and "strict=False" in whole["provenance"]["metrics"]["exact"]
    )


def test_values_agree_with_the_predictions(whole):
    scorers = fakes.scorers_of("json_fields", "chrf")
    rows = fakes.examples(90, 1, "desk_test.jsonl")
    tuned = fakes.answered(rows, 0.95, 12, scorers)
    for name, scorer in scorers.items():
        value = scorer.aggregate([item.scores[name] for item in tuned])
        assert whole["systems"]["tuned"]["scores"][name]["value"] == pytest.approx(value)
        assert whole["metrics"][name]["tuned"] == pytest.approx(value)


def test_secondary_metrics_are_adjusted_and_the_primary_is_not(whole):
    metrics = whole["metrics"]
    assert metrics["json_fields"]["p_holm"] == metrics["json_fields"]["p_value"]
    assert metrics["exact"]["p_holm"] >= metrics["exact"]["p_value"]
    assert next(iter(metrics)) == "json_fields"


def test_the_sentence_has_numbers_and_counts(whole):
    p = whole["primary"]
    assert f"rose from {100 * p['base']:.1f} % to {100 * p['tuned']:.1f} %" in whole["sentence"]
    assert (
        f"n = 90); {whole['transitions']['fixed']} fixed, {whole['transitions']['broken']} broken." in whole["sentence"]
    )
    assert "Against the base model with examples" in whole["sentence"]
    assert report.sentence(whole) == whole["sentence"]


def test_items_come_from_dev_and_the_test_stays_sealed(whole):
    assert whole["items_from"] == "dev"
    shown = [item for found in whole["transition_examples"].values() for item in found] + whole["worst"]
    assert shown and all(item["origin"].startswith("desk.jsonl:") for item in shown)
    assert all(item["cell"] in ("broken", "stuck") for item in whole["worst"])
    cells = [item["cell"] for item in whole["worst"]]
    assert cells == sorted(cells)  # broken before stuck
    assert "desk_test.jsonl:" not in json.dumps(whole) + page.render(whole)


def test_items_are_left_out_without_dev_and_shown_when_the_test_is_opened():
    sealed = fakes.build(count=30, draws=100, browse=None)
    assert sealed["items_from"] == "" and sealed["worst"] == [] and sum(sealed["transitions"].values()) == 30
    assert "the test stays sealed" in page.render(sealed)
    opened = fakes.build(count=30, draws=100, open_test=True)
    assert opened["items_from"] == "test" and opened["worst"][0]["origin"].startswith("desk_test.jsonl:")
    assert "the test was opened for reading" in page.render(opened)


def test_the_shared_instruction_is_told_once(whole):
    assert whole["instruction"] == fakes.INSTRUCTION
    assert not any("Turn a message" in item["question"] for item in whole["worst"])
    assert report.shared_beginning(["short a", "short b"]) == ""
    assert report.shared_beginning(["x" * 50 + " one"]) == "" and report.shared_beginning([]) == ""
    assert report.shared_beginning(["word " * 10 + "alpha", "word " * 10 + "alps"]) == "word " * 10


def test_the_same_predictions_twice_are_not_better():
    scorers = fakes.scorers_of("json_fields", "exact", "bleu")
    answers = fakes.answered(fakes.examples(120, 1, "t"), 0.6, 1, scorers)
    same = fakes.build(systems={"base": answers, "tuned": answers}, scorers=scorers, browse=None, draws=200)
    assert all(metric["verdict"] in ("same", "cannot tell") for metric in same["metrics"].values())
    assert same["transitions"]["fixed"] == same["transitions"]["broken"] == 0
    assert same["primary_vs_few_shot"] is None and "rose" not in same["sentence"]
    assert "Better" not in page.render(same)


def test_a_worse_model_is_called_worse():
    worse = fakes.build(skill=0.6, base_skill=0.97, count=60, draws=200)
    assert worse["primary"]["verdict"] == "worse" and "fell from" in worse["sentence"]
    assert "Worse" in page.render(worse)


def test_systems_must_have_answered_the_same_items():
    scorers = fakes.scorers_of("json_fields")
    answers = fakes.answered(fakes.examples(10, 1, "t"), 0.6, 1, scorers)
    with pytest.raises(UsageError, match="same items"):
        fakes.build(systems={"base": answers[::-1], "tuned": answers}, scorers=scorers, browse=None)
    with pytest.raises(UsageError, match="answered 9 items, not the 10"):
        fakes.build(systems={"base": answers[1:], "tuned": answers}, scorers=scorers, browse=None)


def test_a_secondary_metric_that_scores_nothing_is_left_out_with_the_reason():
    scorers = fakes.scorers_of("exact", "json_fields")
    rows = [Example((Message("user", str(i)), Message("assistant", "yes")), Origin("t", i)) for i in range(9)]
    answers = predict.score_all(predict.pair(rows, [Completion("yes")] * 9), scorers, rows)
    spec = {"evaluate": {"primary": "exact"}}
    made = report.build(spec=spec, facts={}, systems={"base": answers, "tuned": answers}, scorers=scorers)
    assert list(made["metrics"]) == ["exact"] and "no item" in made["unscored_metrics"]["json_fields"]
    assert "json_fields is left out" in page.render(made)


def test_history_of_training():
    steps = fakes.steps(120, overfit=True)
    told = training_of(steps, {})
    assert told["best_step"] < 120 and "rose from" in told["overfit"] and len(told["dev"]) == 8
    assert training_of(steps, {"overfit": "", "best_step": 30})["overfit"] == ""
    assert training_of(fakes.steps(120), {})["overfit"] == ""
    assert training_of([], {}) == {} == sharing_of([])
    assert len(training_of(fakes.steps(1000), {})["loss"]) <= 240
    shared = sharing_of(steps)
    assert shared["ratio"] == pytest.approx(6210 / 1480) and shared["examples_per_second"] == pytest.approx(16 / 1.7)


def test_wording():
    assert wording.points(-0.0004) == "0.0" and wording.points(-0.031) == "−3.1" and wording.points(0.713) == "+71.3"
    assert wording.rounded(10422) == "11,000" and wording.rounded(7) == "7"
    assert wording.chance(0.00001) == "p < 0.001"


# ---- report.html ----------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Collects elements, attributes and text; complains about tags that do not close."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "base"})

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name) for name, _ in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p", "div", "span", "small", "b",
    "dl", "dt", "dd", "section", "svg", "path", "rect", "text", "tspan", "line", "polyline", "circle", "details", "summary",
    "table", "thead", "tbody", "tr", "th", "td", "code", "ul", "li", "i", "footer",
}  # fmt: skip


def poison(value, text):
    """The same report with `text` in place of every piece of text from data, keys of free mappings included."""
    if isinstance(value, dict):
        return {key: poison(inner, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [poison(inner, text) for inner in value]
    return text if isinstance(value, str) else value


KEEP = ("verdict", "cell", "items_from")


def poisoned(whole, text):
    bad = poison(copy.deepcopy(whole), text)

    def mend(value, source):
        if isinstance(value, dict):
            for key in value:
                if key in KEEP or key.endswith("_tag"):
                    value[key] = source[key]
                else:
                    mend(value[key], source[key])
        elif isinstance(value, list):
            for one, other in zip(value, source, strict=True):
                mend(one, other)

    mend(bad, whole)
    bad["fields"] = {text: next(iter(bad["fields"].values()))}
    bad["metrics"] = {text: bad["metrics"]["json_fields"], **bad["metrics"]}
    bad["data"][text], bad["checks"][text], bad["provenance"][text] = {text: [text, {text: 1}]}, text, text
    bad["unscored_metrics"] = {text: text}
    bad["guards"]["empty"] |= {"red": True, "outputs": [text, text]}
    bad["systems"]["base"]["guards"]["truncated"] |= {"red": True}
    bad["training"]["overfit"] = text
    return bad


def shape(html):
    found = Elements(html)
    return found.tags, found.attributes


def test_the_page_is_whole_offline_and_without_script(whole):
    html = page.render(whole)
    found = Elements(html)
    assert html.startswith("<!doctype html>") and not found.open
    assert set(found.tags) <= ALLOWED
    assert not any(name.startswith("on") or name in ("src", "href", "srcdoc", "action") for _, name in found.attributes)
    assert "default-src 'none'" in html and "http://" not in html and "https://" not in html and "url(" not in html
    assert (
        html.index('class="card verdict"') < html.index("What changed") < html.index("Scores") < html.index("Learning")
    )


def test_the_page_is_written_in_one_piece(whole, tmp_path):
    page.write_page(whole, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == page.render(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_makes_no_element_and_no_attribute(small, text):
    harmless = shape(page.render(poisoned(small, "plain text")))
    html = page.render(poisoned(small, text))
    assert shape(html) == harmless
    html.encode("utf-8")  # no half characters
    acting = {c for c in html if page._acts(c)}
    assert not acting
    if "7*7" in text:
        assert text[:9] in html  # shown, not evaluated


def test_hostile_text_is_still_readable(small):
    told = "".join(Elements(page.render(poisoned(small, "<script>alert('x')</script> \x1b[31m \u202e"))).text)
    assert "<script>alert('x')</script> ␛[31m ⟦U+202E⟧" in told


def test_visible_keeps_what_people_write():
    kept = "tab\tnew\nline 👩‍👩‍👧 می‌خواهم हिन्दी é"
    assert page.visible(kept) == kept
    assert page.visible("a\rb") == "a␍b" and page.visible("\ud800\u2028") == "⟦U+D800⟧⟦U+2028⟧"


def test_red_guards_stand_before_the_verdict():
    bad = fakes.build(skill=0.3, count=40, draws=100)
    html = page.render(bad)
    assert bad["guards"]["unparsed"]["red"]
    assert html.index("Read these answers before any score") < html.index('class="card verdict"')
    assert "Sure! I can help you with that." in html[: html.index('class="card verdict"')]


def test_a_report_without_training_or_records_draws_too():
    (base, tuned), scorer = rows_of([("a", "b", "a"), ("a", "a", "a")] * 12)
    spec = {"evaluate": {"primary": "exact"}}
    systems = {"base": base, "tuned": tuned}
    made = report.build(
        spec=spec, facts={}, systems=systems, scorers={"exact": scorer}, browse=systems, labels={"base": "run A"}
    )
    html = page.render(made)
    assert "run A" in html and "Learning" not in html and "Field by field" not in html and "d.csv:1" in html


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(10, 0, 5, 3), (0, 0, 0, 7), (1, 1, 1, 1), (500, 3, 0, 0)])
def test_ribbons_fill_the_height(counts):
    found = plots.flow(dict(zip(CELLS, counts, strict=True)))
    assert sum(ribbon["count"] for ribbon in found["ribbons"]) == sum(counts)
    assert sum(ribbon["thick"] for ribbon in found["ribbons"]) == pytest.approx(found["height"] - found["gap"])
    for side in ("before", "after"):
        assert sum(node["count"] for node in found[side]) == sum(counts)
        assert max(node["y"] + node["height"] for node in found[side]) <= found["height"] + 1e-6
    assert plots.flow(dict.fromkeys(CELLS, 0)) == {}


@pytest.mark.parametrize("losses", [[1.0], [0.0, 0.0], [5.0, 0.001], [2.0, 1.9, 1.8]])
def test_the_curve_stays_inside_its_frame(losses):
    steps = [{**fakes.steps(1)[0], "index": i + 1, "loss": loss, "dev_loss": loss} for i, loss in enumerate(losses)]
    found = plots.curve(training_of(steps, {}))
    if not any(losses):
        assert found == {}
        return
    for point in (*found["loss"].split(), *found["dev"].split()):
        x, y = map(float, point.split(","))
        assert 0 <= x <= found["width"] and -0.1 <= y <= found["height"]
    assert found["best"]["value"] == min(losses) and found["y_ticks"]

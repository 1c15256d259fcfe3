"""Closed sets of answers: the trie gives what each label gets alone, and the search finds its best."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from networks import KINDS, VOCABULARY, network

from luthier import registry
from luthier.errors import ModelError, UsageError
from luthier.model import choices as closed
from luthier.model import decode
from luthier.model.attention import refuse_sharing
from luthier.model.choices import Trie, choose, score

END = 3
LABELS = [[50, 60, 70, END], [50, 60, 71, 72, END], [50, 61, END], [90, END], [91, 92, 93, 94, 95, END], [50, END]]


def prompts(count=7, shared=40, seed=0):
    rng = random.Random(seed)
    stem = [rng.randrange(VOCABULARY) for _ in range(shared)]
    return [stem + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 20))] for _ in range(count)]


@torch.no_grad()
def apart(model, asked, labels):
    """Each label behind each prompt in a pass of its own."""
    table = torch.empty(len(asked), len(labels))
    for row, prompt in enumerate(asked):
        for column, label in enumerate(labels):
            logits = model(input_ids=torch.tensor([[*prompt, *label]])).logits[0].float()
            own = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
            table[row, column] = own.gather(1, torch.tensor(label)[:, None]).sum()
    return table


@pytest.mark.parametrize("kind", (*KINDS, "mistral"))
@pytest.mark.parametrize("shared", [0, 40])
def test_the_trie_gives_what_each_label_gets_alone(kind, shared):
    model, asked = network(kind), prompts(shared=shared)
    expected = apart(model, asked, LABELS)
    found = score(model, asked, LABELS, batch_size=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for row, (label, logprob) in enumerate(choose(model, asked, LABELS, batch_size=3)):
        assert label == int(expected[row].argmax())
        assert logprob == pytest.approx(float(expected[row].max()), abs=1e-4)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_soft_prompts_stand_before_choices_too(name):
    model = registry.make("methods", {"name": name, "tokens": 5}).attach(network("gemma3"), seed=1).model
    asked = prompts(4)
    torch.testing.assert_close(score(model, asked, LABELS), apart(model, asked, LABELS), rtol=0, atol=1e-4)


def many(count=120, seed=2):
    rng = random.Random(seed)
    texts = {tuple(rng.choice((20, 21, 22, 23)) for _ in range(rng.randrange(1, 6))) for _ in range(count)}
    return [[*text, END] for text in sorted(texts)]


@pytest.mark.parametrize("at_once", [1, 32])
def test_the_search_is_exact_and_runs_little_of_a_large_trie(at_once, monkeypatch):
    model, asked, labels = network("qwen3"), prompts(9), many()
    tokens, usual = [], decode.forward

    def counted(model, ids, memory, **options):
        tokens.append(ids.numel() if "sees" in options else 0)
        return usual(model, ids, memory, **options)

    monkeypatch.setattr(closed, "PASS_TOKENS", at_once)
    monkeypatch.setattr(decode, "forward", counted)
    found = choose(model, asked, labels, batch_size=4)
    monkeypatch.undo()
    expected = apart(model, asked, labels)
    assert [label for label, _ in found] == expected.argmax(1).tolist()
    assert sum(tokens) < len(asked) * len(Trie.of(labels).inner) / (3 if at_once == 1 else 1.5)
    assert at_once == 1 or len(tokens) < 20


def test_labels_without_an_end_may_begin_each_other():
    model, asked, labels = network("llama"), prompts(5), [[50], [50, 60], [50, 60, 70], [9]]
    torch.testing.assert_close(score(model, asked, labels), apart(model, asked, labels), rtol=0, atol=1e-4)
    assert {label for label, _ in choose(model, asked, labels)} <= {0, 3}  # what goes on is less likely


def test_one_choice_and_no_prompts():
    model = network("llama")
    assert choose(model, prompts(2), [[7]])[0][0] == 0
    assert choose(model, [], LABELS) == []
    assert score(model, [], LABELS).shape == (0, len(LABELS))


@pytest.mark.parametrize(
    ("labels", "what"), [([], "nothing"), ([[4], []], "choice 1 is empty"), ([[4], [4]], "choice 0")]
)
def test_unusable_choices_are_refused(labels, what):
    with pytest.raises(UsageError, match=what):
        score(network("llama"), prompts(1), labels)


def test_a_model_that_cannot_share_is_refused():
    model = network("llama")
    refuse_sharing(model, "it differs")
    with pytest.raises(ModelError, match="it differs"):
        choose(model, prompts(1), LABELS)


def test_a_tuned_model_answers_with_one_of_the_choices():
    from luthier.flows.answer import Tuned
    from luthier.flows.judge import answer_ids
    from luthier.model import catalog, load
    from luthier.text.tokenizer import Tokenizer

    folder = catalog.locate("tiny")
    tuned = Tuned.__new__(Tuned)
    tuned.model, tuned.tokenizer = load.load_model(folder, dtype="float32"), Tokenizer.from_folder(folder)
    tuned.template, tuned.card = registry.make("templates", "chat"), SimpleNamespace(metrics={"system": "Sort."})
    texts, questions = ["yes", "yes, but", "no"], ["Is it red?", "Was it a cup that I saw?"]
    found = tuned.choose(questions, texts)
    labels = [answer_ids(text, "Sort.", tuned.template, tuned.tokenizer) for text in texts]
    assert all(label[-1] in tuned.tokenizer.stop_ids for label in labels)
    expected = apart(tuned.model, [tuned.prompt(question) for question in questions], labels)
    for row, (text, logprob) in enumerate(found):
        assert text == texts[int(expected[row].argmax())]
        assert logprob == pytest.approx(float(expected[row].max()), abs=1e-4)

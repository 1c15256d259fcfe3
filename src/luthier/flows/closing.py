"""What follows the training runs of a study: all of them answer the test rows once, and other costs are measured."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from luthier import registry, store
from luthier.contracts import Adapted
from luthier.errors import LuthierError
from luthier.evaluate import forgetting, speed
from luthier.flows.events import Listener, Note, Stage
from luthier.flows.judge import Judge
from luthier.flows.pools import Result
from luthier.flows.trials import Bench
from luthier.records import Prediction

COPY_ROOM = 2.5  # base sizes of free memory that measuring speed on a copy of the base needs


def closing(bench: Bench, judge: Judge, finals: Mapping[str, Sequence[Result]], tell: Listener) -> dict[str, Any]:
    """Answers of the base and of every run, speed of every method, losses on general text, the base's on dev rows."""
    texts = forgetting.rows(bench.prepared.tokenizer)
    answers: dict[str, list[list[Prediction]]] = {}
    general: dict[str, list[Any]] = {}
    base = judge.answers("base", bench.base, tell, key="base")
    told = {"base": base, "answers": answers, "speed": {}, "base_general": _general(bench, bench.base, texts)}
    for label, results in finals.items():
        for result in (one for one in results if one["status"] == "complete"):
            with bench.loaded(result) as adapted:
                system = f"{result['trial']['method']['name']}-{result['key']}"
                answers.setdefault(label, []).append(
                    judge.answers(system, adapted.model, tell, key=result["digest"])
                )  # fmt: skip
                general.setdefault(label, []).append(_general(bench, adapted.model, texts))
    for label, results in finals.items():
        if label in answers:
            first = next(one for one in results if one["status"] == "complete")
            told["speed"][label] = _kept_speed(bench, first, label, tell)
    return {
        **told,
        "forgetting": {
            label: forgetting.rise(told["base_general"], each, texts, seed=bench.spec.evaluate.seed)
            for label, each in general.items()
        },
        "base_dev_loss": _dev_loss(bench),
        "seconds": dict(judge.seconds),
    }


def _general(bench: Bench, model: Any, texts: Any) -> Any:
    return forgetting.losses(model, texts, share=not bench.prepared.separate)


def _dev_loss(bench: Bench) -> float:
    """The base's loss on the task's dev rows: where every method starts."""
    import torch

    from luthier.model.batch import Batch
    from luthier.model.logprob import logprobs

    total = count = 0.0
    with torch.no_grad():
        for pack in bench.dev_packs:
            batch = Batch.of(pack, bench.base.device)
            loss = bench.prepared.objective.loss(logprobs(bench.base, batch), batch)
            total, count = total + float(loss.sum), count + loss.count
    return total / count


def _kept_speed(bench: Bench, result: Result, label: str, tell: Listener) -> dict[str, Any]:
    """Speed of answering, attached and merged; kept beside the trial, as a study may be killed here too."""
    path = bench.folder / "trials" / str(result["key"]) / "speed.json"
    if path.exists():
        return dict(store.read_json(path))
    tell(Stage("time the answers", label))
    found = _speed(bench, result, tell)
    store.write_json(path, found)
    return found


def _speed(bench: Bench, result: Result, tell: Listener) -> dict[str, Any]:
    """Measured on a copy of the base, so that base and tuned model can take turns without moving adapters about."""
    if not _room_for_copy(bench.base):
        tell(Note("no room for a second copy of the base: speed is not measured", "warning"))
        return {"attached": None, "merged": None}
    prompts = [row.ids[: row.prompt_length] for row in bench.dev[: speed.PROMPTS]]
    method = registry.make("methods", result["trial"]["method"], "method")
    adapted: Adapted = method.load(copy.deepcopy(bench.base), bench.adapter(result))
    adapted.model.eval()
    attached = speed.against(bench.base, adapted.model, prompts)
    merged = None
    if not method.not_merged:
        try:
            merged = speed.against(bench.base, adapted.merge().eval(), prompts)
        except LuthierError as error:  # such as a quantised base, into which nothing is folded
            tell(Note(f"{method.name} is not measured merged: {error}"))
    return {"attached": attached, "merged": merged}


def _room_for_copy(model: Any) -> bool:
    import psutil
    import torch

    size = sum(parameter.nbytes for parameter in model.parameters())
    if model.device.type == "cuda":
        return bool(torch.cuda.mem_get_info(model.device)[0] > COPY_ROOM * size)
    return bool(psutil.virtual_memory().available > COPY_ROOM * size)

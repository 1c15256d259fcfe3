"""`luthier evaluate RUN [--data FILE]`: judge a finished run again, on its own test rows or on new ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier import store
from luthier.data.read import read
from luthier.evaluate import page
from luthier.evaluate import report as reports
from luthier.flows.answer import Tuned
from luthier.flows.events import Listener, Stage, silent
from luthier.flows.judge import Judge
from luthier.flows.prepare import Prepared, prepare
from luthier.flows.train import identity_of, now, openings
from luthier.records import Example, Rendered


def evaluate(
    run: str | Path, data: str | Path | None = None, *, open_test: bool = False, on_event: Listener | None = None
) -> dict[str, Any]:
    """Judge base and tuned model and return the report.

    Without `data` the run's own test rows are used: the look is counted in the run's ledger and `report.json` is
    written anew. With a file, its rows are read like the task's and the report goes to `evaluations/<name>/`.
    `open_test` shows single test items in the report, and the report says so.
    """
    tell = on_event or silent
    found = store.open_run(run)
    tuned = Tuned(found)
    prepared = prepare(tuned.spec, split_history=sides_of(found), on_event=tell)
    rows = _rows(data, prepared) if data else prepared.test
    folder = found.folder / "evaluations" / Path(data).stem if data else found.predictions / "test"
    judge = _judge(tuned, prepared, rows, folder, () if data else prepared.rendered_test)
    chance = judge.check()
    assert tuned.adapted is not None, "loaded with its adapter"
    digest = tuned.card.files["adapter_model.safetensors"]
    tell(Stage("measure the base", f"{len(judge.examples)} rows"))
    with tuned.adapted.disabled():
        answers = {"base": judge.answers("base", tuned.model, tell, key="base")}
        if judge.fits():
            shown = [example.id for example in judge.shots]
            answers["base_few_shot"] = judge.answers("base_few_shot", tuned.model, tell, key=shown, shots=True)
    tell(Stage("measure the tuned model", f"{len(judge.examples)} rows"))
    answers["tuned"] = judge.answers("tuned", tuned.model, tell, key=digest)
    browse = None if data else _kept_dev(tuned, prepared, found)
    record = store.read_json(found.record)
    report = reports.build(
        spec=tuned.spec.model_dump(mode="json"),
        facts={
            "name": found.name if not data else f"{found.name} on {Path(data).name}",
            "created": now(),
            "seconds": judge.seconds,
            "training": record.get("training", {}),
            "data": prepared.facts() if not data else {"files": [{"name": Path(data).name, "rows": len(rows)}]},
            "ledger": {} if data else {"opened": openings(found)},
            "provenance": {**judge.identity, "max_new_tokens": judge.max_new_tokens, "chance": chance},
        },
        systems=answers,
        scorers=judge.scorers,
        steps=store.read_jsonl(found.steps),
        checks=prepared.check,
        browse=browse,
        open_test=open_test or bool(data),
    )
    target = found.folder if not data else folder
    store.write_json(target / "report.json", report)
    page.write_page(report, target / "report.html")
    return report


def sides_of(run: store.Run) -> dict[str, str] | None:
    """The sides that a run's rows were given."""
    return dict(store.read_json(run.split)["sides"]) if run.split.exists() else None


def _rows(data: str | Path, prepared: Prepared) -> list[Example]:
    """Rows of a new file, read as the task's own are."""
    asked = prepared.spec.data
    dataset = read(
        [data], format=asked.format, columns=asked.columns, tags=asked.tags, system=asked.system, on_bad=asked.on_bad
    )
    return dataset.examples


def _judge(
    tuned: Tuned, prepared: Prepared, rows: Sequence[Example], folder: Path, rendered: Sequence[Rendered]
) -> Judge:
    return Judge(
        examples=rows,
        shots_from=prepared.train,
        template=tuned.template,
        tokenizer=tuned.tokenizer,
        settings=tuned.spec.evaluate,
        folder=folder,
        identity=identity_of(tuned.model, prepared),
        context=prepared.context,
        rendered=rendered,
    )


def _kept_dev(tuned: Tuned, prepared: Prepared, run: store.Run) -> dict[str, Any] | None:
    """Answers to the dev rows that training left behind, scored again; they may be read item by item."""
    from luthier.evaluate import predict

    folder = run.predictions / "dev"
    if not all((folder / f"{system}.jsonl").exists() for system in ("base", "tuned")):
        return None
    judge = _judge(tuned, prepared, prepared.dev, folder, prepared.rendered_dev)
    return {system: judge.scored(predict.load(folder / f"{system}.jsonl")) for system in ("base", "tuned")}

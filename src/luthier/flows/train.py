"""`luthier train task.yaml`: from a task and its rows to a measured adapter. One page; the rooms do the work."""

from __future__ import annotations

import dataclasses
import datetime
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier import __version__, registry, store
from luthier import spec as specs
from luthier.contracts import Adapted, Method
from luthier.errors import TrainingError, UsageError
from luthier.evaluate import page
from luthier.evaluate import report as reports
from luthier.flows import launch
from luthier.flows.events import Listener, Note, Progress, Stage, silent
from luthier.flows.judge import Judge
from luthier.flows.lower import keep_lower
from luthier.flows.prepare import Prepared, prepare
from luthier.flows.team import Team
from luthier.hub import cards
from luthier.records import AdapterCard, Loss
from luthier.spec import ModelSpec, RunSpec

PROVED = 64  # rows from which the guard picks the shortest


def train(
    spec: RunSpec, *, resume: bool = False, overwrite: bool = False, on_event: Listener | None = None
) -> dict[str, Any]:
    """Train, judge and report one run; return what `report.json` holds.

    With `resume` a killed or interrupted run goes on where its newest good checkpoint stands and ends with the bytes
    that an uninterrupted run has (same machine, threads, dtype). Raises UsageError when the run exists otherwise.
    """
    if (count := launch.several(spec)) > 1:
        return launch.train(spec, count, resume=resume, overwrite=overwrite, on_event=on_event)
    team = Team.of(spec)
    tell = on_event if on_event and team.first else silent
    run = store.Run(Path(spec.runs) / spec.name)
    with team.holding(run) as own:  # where this process writes: the run itself in the first
        with team.in_turn():
            _make_room(own, resume, overwrite)
            prepared = prepare(spec, split_history=_split_history(run), on_event=tell)
            _begin(own, spec, prepared)
        base, identity = load_base(spec, prepared, tell, team)
        judge = judge_of(run, spec, prepared, identity, team=team)
        browse = judge_of(run, spec, prepared, identity, team=team, dev=True)

        answers, looked, chance = {}, {}, judge.check()
        tell(Stage("measure the base", f"{len(judge.examples)} test and {len(browse.examples)} dev rows"))
        answers["base"] = judge.answers("base", base, tell, key="base")
        looked["base"] = browse.answers("base", base, tell, key="base")
        if judge.fits():
            shown = [example.id for example in judge.shots]
            answers["base_few_shot"] = judge.answers("base_few_shot", base, tell, key=shown, shots=True)

        method: Method = registry.make("methods", spec.method, "method")
        adapted = _attach(method, base, prepared, team)
        outcome = _learn(run, own, spec, prepared, adapted, method, identity, resume, tell, team)
        card = _publish(run, spec, prepared, adapted, identity, outcome, team)

        tell(Stage("measure the tuned model", f"{len(judge.examples)} test and {len(browse.examples)} dev rows"))
        adapted.model.eval()
        digest = card.files["adapter_model.safetensors"]
        answers["tuned"] = judge.answers("tuned", adapted.model, tell, key=digest)
        looked["tuned"] = browse.answers("tuned", adapted.model, tell, key=digest)
        with team.in_turn():
            if not team.first:
                return dict(store.read_json(run.report))
            report = write_report(run, spec, prepared, judge, answers, looked, outcome, chance)
            run.update(ended=now(), status="complete", adapter=digest, sentence=report["sentence"])
        return report


def _attach(method: Method, base: Any, prepared: Prepared, team: Team) -> Adapted:
    evidence, seed = RunEvidence(base, prepared), prepared.spec.train.seed
    if not team.sharded:
        return method.attach(base, seed=seed, evidence=evidence)
    from luthier.training import sharded

    return sharded.attach(method, base, seed=seed, evidence=evidence)


def _publish(
    run: store.Run, spec: RunSpec, prepared: Prepared, adapted: Adapted, identity: dict[str, Any],
    outcome: dict[str, Any], team: Team,
) -> AdapterCard:  # fmt: skip
    """Write the adapter, in the first process; all of them get its card."""
    with team.in_turn():
        if not team.first:
            return cards.read(run.adapter)
        card = card_of(spec, prepared, identity, outcome)
        readme = cards.readme(card, "Trained with luthier; its measurements are in report.json of its run.")
        return cards.publish(
            run.adapter, adapted, card, template=prepared.template, tokenizer=prepared.tokenizer, readme=readme
        )


def _make_room(run: store.Run, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds training already, unless it is resumed or emptied on request."""
    if overwrite and not resume:
        for path in run.folder.iterdir():
            if path != run.lockfile:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (run.steps.exists() or run.adapter.exists()) and not resume:
        raise UsageError(
            "holds a run already",
            where=str(run.folder),
            remedy="go on with --resume, start over with --overwrite, or choose another `name`",
        )
    store.sweep_staging(run.folder)


def _begin(run: store.Run, spec: RunSpec, prepared: Prepared) -> None:
    """Record what is asked, once the rows are known to be fine: a mistake leaves no run behind."""
    store.write_text(run.spec, specs.dump(spec))
    store.write_json(run.split, prepared.split.as_dict())
    run.update(name=spec.name, status="running", began=now(), luthier=__version__)


def _split_history(run: store.Run) -> dict[str, str] | None:
    """The sides that rows of this run were given before: a resumed run never moves one."""
    return dict(store.read_json(run.split)["sides"]) if run.split.exists() else None


class RunEvidence:
    """The run's own rows, for methods that look at them before training; satisfies `contracts.Evidence`."""

    def __init__(self, model: Any, prepared: Prepared) -> None:
        self._model, self._prepared = model, prepared
        self.total_steps: int = prepared.feed(share=False).total_steps

    def losses(self, count: int) -> Iterator[Loss]:
        """The loss of each of `count` rows drawn by the run's seed."""
        from luthier.model.batch import Batch
        from luthier.model.logprob import logprobs
        from luthier.text import pack

        chosen = random.Random(self._prepared.spec.train.seed).sample(  # noqa: S311 - a sample, no secret
            self._prepared.rendered_train, min(count, len(self._prepared.rendered_train))
        )
        for row in chosen:
            for single in pack.plan([row], budget=self._prepared.spec.train.tokens_per_pack):
                batch = Batch.of(single, self._model.device)
                yield self._prepared.objective.loss(logprobs(self._model, batch), batch)


def load_base(
    spec: RunSpec, prepared: Prepared, tell: Listener, team: Team | None = None
) -> tuple[Any, dict[str, Any]]:
    """Load the base, in parts where the team's processes share it out, and say what decides its answers."""
    from luthier.model import catalog, load, proof, quantize

    tell(Stage("load the base", spec.model.name))
    if spec.train.threads and not (team and team.ranks):  # a team has divided its threads
        import torch

        torch.set_num_threads(spec.train.threads)
    from luthier.training import moments

    asked = spec.model
    for note in moments.require(spec.train.optimizer, load.pick_device(asked.device)):
        tell(Note(note, "warning"))
    base = load.load_model(
        prepared.model_folder, trust_remote_code=asked.trust_remote_code, quantize=spec.quantize,
        **_place(asked, apart=bool(team and team.sharded)),
    )  # fmt: skip
    if team and team.sharded:
        from luthier.training import sharded

        sharded.shard(base, load.pick_device(asked.device))
        tell(Note(f"each of {team.count} processes holds {sharded.held_bytes(base) / 1e6:,.1f} MB of the base"))
    if kept := quantize.found(base):
        told = quantize.bits(base)
        tell(
            Note(f"{kept['name']}: {told.matrices:.3f} bits a weight in matrices, {told.whole:.2f} in the whole model")
        )
    if reason := proof.prove_sharing(base, prepared.rendered_train[:PROVED]):
        prepared.separate = reason
        tell(Note(f"prefixes are not shared: {reason}; rows run padded, exact and slower", "warning"))
    return base, {**identity_of(base, prepared), "base_name": catalog.resolved_name(prepared.model_folder)}


def _place(asked: ModelSpec, *, apart: bool) -> dict[str, str]:
    """Number format and device of a base; one that will lie in parts is put together on the CPU."""
    from luthier.model import load

    if not apart:
        return {"dtype": asked.dtype, "device": asked.device}
    kind = load.pick_dtype(asked.dtype, load.pick_device(asked.device))
    return {"dtype": str(kind).removeprefix("torch."), "device": "cpu"}


def identity_of(base: Any, prepared: Prepared) -> dict[str, Any]:
    """All that decides a base's answers to a prompt: part of the key of every kept answer."""
    from luthier.model import catalog, quantize

    text, kept = prepared.tokenizer, quantize.found(base)
    return {
        **({"quantize": kept} if kept else {}),
        "base": catalog.base_hash(prepared.model_folder),
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "template": store.content_hash(
            [prepared.template.name, prepared.template.options.model_dump(mode="json"), prepared.template.source(text)]
        ),
        "tokenizer": text.hash,
    }


def judge_of(
    run: store.Run, spec: RunSpec, prepared: Prepared, identity: dict[str, Any], *, dev: bool = False,
    team: Team | None = None,
) -> Judge:  # fmt: skip
    """The test rows' judge, or the dev rows' (whose items may be read)."""
    return Judge(
        examples=prepared.dev if dev else prepared.test,
        shots_from=prepared.train,
        template=prepared.template,
        tokenizer=prepared.tokenizer,
        settings=spec.evaluate,
        folder=run.predictions / ("dev" if dev else "test"),
        identity={key: value for key, value in identity.items() if key != "base_name"},
        context=prepared.context,
        rendered=prepared.rendered_dev if dev else prepared.rendered_test,
        team=team or Team(),
    )


def _learn(
    run: store.Run, own: store.Run, spec: RunSpec, prepared: Prepared, adapted: Adapted, method: Method,
    identity: dict[str, Any], resume: bool, tell: Listener, team: Team,
) -> dict[str, Any]:  # fmt: skip
    """Run the loop; every step goes to `steps.jsonl`, the trackers and the listener. Returns the loop's outcome."""
    from luthier.flows.tracking import tracked
    from luthier.training.checkpoint import Checkpoints, fingerprint
    from luthier.training.loop import Training

    settings, shares = spec.train, not prepared.separate and spec.train.share_prefixes
    checkpoints = Checkpoints(
        run.checkpoints, keep=settings.keep,
        fingerprint=fingerprint(
            spec, data_hash=prepared.data_hash, base_hash=identity["base"], device=identity["device"],
            dtype=identity["dtype"],
        ),
    )  # fmt: skip
    plan = team.planner(adapted.model)
    dev_packs = plan(prepared.rendered_dev, budget=settings.tokens_per_pack, share=shares)
    training = Training(
        adapted,
        registry.make("objectives", spec.objective, "objective"),
        prepared.feed(share=shares, plan=plan),
        settings,
        device=adapted.model.device,
        dev_packs=dev_packs,
        lower=keep_lower(adapted.model, prepared, dev_packs, share=shares, tell=tell),
        method=method,
        checkpoints=checkpoints,
        resume=team.agreed(resume and bool(checkpoints.steps())),  # killed before the first one: a fresh start
        ranks=team.ranks,
    )
    for note in training.notes:
        tell(Note(note, "warning"))
    _forget_after(own, training.resumed_from or 0)
    total, began = training.feed.total_steps, time.perf_counter()
    tell(Stage("tune", f"{len(adapted.trainable())} tensors, {total} steps"))
    with tracked(spec, own, on_cpu=adapted.model.device.type == "cpu") as trackers:
        for step in training:
            store.append_jsonl(own.steps, dataclasses.asdict(step))
            trackers(step)
            done = step.index - (training.resumed_from or 0)
            tell(Progress(step, total, (time.perf_counter() - began) / done * (total - step.index)))
    outcome = training.outcome
    own.update(training=dataclasses.asdict(outcome))
    if outcome.ended == "interrupted":
        own.update(status="interrupted")
        raise TrainingError(
            f"stopped at step {outcome.steps} of {total}; everything is saved", remedy="the same command with --resume"
        )
    for text in (outcome.overfit, *outcome.notes[len(training.notes) :]):
        if text:
            tell(Note(text, "warning"))
    return dataclasses.asdict(outcome)


def _forget_after(run: store.Run, step: int) -> None:
    """Drop logged steps that the checkpoint does not know: they will be taken again."""
    kept = [line for line in store.read_jsonl(run.steps) if line["index"] <= step]
    store.write_jsonl(run.steps, kept)


def card_of(spec: RunSpec, prepared: Prepared, identity: dict[str, Any], outcome: dict[str, Any]) -> AdapterCard:
    """What the adapter folder will say about itself."""
    return AdapterCard(
        name=spec.name,
        base=identity["base_name"],
        base_hash=identity["base"],
        method=spec.method,
        template={**spec.template, **({"path": cards.TEMPLATE} if spec.template.get("name") == "jinja" else {})},
        template_hash=identity["template"],
        tokenizer_hash=identity["tokenizer"],
        data_hash=prepared.data_hash,
        dtype=identity["dtype"],
        quantize=identity.get("quantize", {}),
        metrics={
            "best_dev_loss": outcome["best_dev_loss"],
            "step": outcome["restored_step"],
            "system": prepared.system,
        },
    )


def write_report(
    run: store.Run, spec: RunSpec, prepared: Prepared, judge: Judge, answers: dict[str, Any], looked: dict[str, Any],
    outcome: dict[str, Any], chance: dict[str, float | None],
) -> dict[str, Any]:  # fmt: skip
    """Compare the systems' answers and write `report.json` and `report.html`."""
    report = reports.build(
        spec=spec.model_dump(mode="json"),
        facts={
            "name": spec.name,
            "created": now(),
            "seconds": judge.seconds,
            "training": outcome,
            "data": prepared.facts(),
            "ledger": {"opened": openings(run)},
            "provenance": {
                **judge.identity, "luthier": __version__, "data": prepared.data_hash, "seed": spec.train.seed,
                "max_new_tokens": judge.max_new_tokens, "chance": chance,
            },
        },
        systems=answers,
        scorers=judge.scorers,
        steps=store.read_jsonl(run.steps),
        checks=prepared.check,
        browse=looked if looked["base"] else None,
    )  # fmt: skip
    store.write_json(run.report, report)
    page.write_page(report, run.html)
    return report


def openings(run: store.Run) -> int:
    """Count this look at the test rows in the run's ledger and return the count."""
    told = store.read_json(run.record).get("test_openings", []) if run.record.exists() else []
    run.update(test_openings=[*told, now()])
    return len(told) + 1


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

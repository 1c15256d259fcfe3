"""`luthier export RUN --merged DIR`: fold the adapter into the base, and prove that nothing changed on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from luthier import store
from luthier.errors import ProofFailed, UsageError
from luthier.flows.answer import Tuned, method_of
from luthier.flows.prepare import held_out

PROBES = 8
# Merged weights round W + s B A once, attached ones round the two products apart; the bound is on the mean absolute
# difference of log-probabilities, in nats.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}


def export(run: str | Path, folder: str | Path) -> dict[str, Any]:
    """Write a plain model folder and return the proof; raise ProofFailed, and write nothing, where it does not hold."""
    import torch

    tuned = Tuned(store.open_run(run))
    method = method_of(tuned.card)
    final = Path(folder)
    if method.not_merged:
        raise UsageError(
            f"the method '{method.name}' cannot be merged into its base: {method.not_merged}",
            remedy="serve it attached",
        )
    if final.exists() and any(final.iterdir()):
        raise UsageError("is not empty", where=str(final), remedy="choose a new folder")
    probes = [tuned.prompt(example.prompt) for example in held_out(tuned.run)[:PROBES]]
    attached = [_logprobs(tuned.model, ids) for ids in probes]
    merged, base = _merged(tuned, method)
    after = [_logprobs(merged, ids) for ids in probes]
    differences = torch.tensor([float((a - b).abs().mean()) for a, b in zip(attached, after, strict=True)])
    agree = sum(int(a[-1].argmax() == b[-1].argmax()) for a, b in zip(attached, after, strict=True))
    proof: dict[str, Any] = {
        "probes": len(probes),
        "mean_difference": float(differences.mean()),
        "largest_difference": float(differences.max()),
        "tolerance": TOLERANCE[tuned.card.dtype],
        "same_next_token": agree,
        "base": base,
    }
    if proof["largest_difference"] > proof["tolerance"]:
        raise ProofFailed(f"merged and attached disagree: {proof}", remedy="export from a float32 run")

    def fill(staging: Path) -> None:
        merged.save_pretrained(staging, safe_serialization=True)
        tuned.tokenizer.save(staging)
        store.write_json(
            staging / "luthier-merged.json", {"run": tuned.card.name, "base": tuned.card.base, "proof": proof}
        )

    if final.exists():
        shutil.rmtree(final)  # empty, see above
    store.publish_folder(final, fill, about={"kind": "merged model", "name": tuned.card.name})
    return {"folder": str(final), **proof}


def _merged(tuned: Tuned, method: Any) -> tuple[Any, str]:
    """The plain model, and what the adapter was folded into: a quantised base is dequantised first.

    Folding into 4-bit matrices would round the update to their sixteen values; the dequantised ones are those that it
    was trained on.
    """
    from luthier.model import quantize

    assert tuned.adapted is not None, "loaded with its adapter"
    kept = quantize.found(tuned.model)
    if not kept:
        return tuned.adapted.merge(), "as it is"
    plain = quantize.dequantised(tuned.adapted.detach())
    return method.load(plain, tuned.run.adapter).merge(), f"dequantised from {kept['name']}"


def _logprobs(model: Any, ids: tuple[int, ...]) -> Any:
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].float()
    return torch.log_softmax(logits, -1)

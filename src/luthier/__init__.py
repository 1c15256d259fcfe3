"""Fine-tune a language model for one task, and learn honestly whether it helped.

import luthier
report = luthier.train("task.yaml")
print(report["sentence"])
print(luthier.load("runs/task").answer("My bike has a flat tyre, can I come on Friday?"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.flows.answer import Tuned
    from luthier.spec import RunSpec

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]


def load(run: str | Path) -> Tuned:
    """Load a run's tuned model, by the run's folder or its name below `runs/`, ready to answer.

    Raises UsageError for an unknown or unfinished run, CheckpointError for a damaged adapter or another base.
    """
    from luthier.flows import answer

    return answer.load(run)


def train(
    spec: str | Path | RunSpec,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Train, judge and report one run; return the content of its `report.json`.

    `spec` is a task YAML's path or a RunSpec, `overrides` are `key.subkey=value` strings for a path. `on_event` is
    told of progress (`luthier.flows.events`). Raises SpecError and DataError with all faults at once.
    """
    from luthier import spec as specs
    from luthier.flows import train as flow

    asked = specs.load(spec, overrides) if isinstance(spec, str | Path) else spec
    return flow.train(asked, resume=resume, overwrite=overwrite, on_event=on_event)

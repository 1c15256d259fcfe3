"""Optional trackers through accelerate: TensorBoard, Weights & Biases, MLflow. Off unless the task names one."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from luthier import store
from luthier.errors import MissingExtra
from luthier.records import Step
from luthier.spec import RunSpec


@contextmanager
def tracked(spec: RunSpec, run: store.Run, *, on_cpu: bool) -> Iterator[Callable[[Step], None]]:
    """Yield a function that sends a step to every tracker of the task; with none it does nothing."""
    names = spec.train.report_to
    if not names:
        yield lambda step: None
        return
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(f"train.report_to: {name} is not installed", remedy=f"pip install 'luthier[{name}]'")
    from accelerate import Accelerator

    # the loop has an accelerator of its own: both must agree on device and precision
    folder = str(run.folder / "trackers")
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", log_with=list(names), project_dir=folder)
    settings = {"method": spec.method["name"], "model": spec.model.name, "batch_size": spec.train.batch_size}
    accelerator.init_trackers(spec.name, config=settings)
    try:
        yield lambda step: accelerator.log(
            {key: value for key, value in dataclasses.asdict(step).items() if value is not None}, step=step.index
        )
    finally:
        for tracker in accelerator.trackers:  # `end_training` would also part this run's processes
            tracker.finish()

"""One run on several processes or machines, through Ray Train.

Gradients are added up where they are, by NCCL on GPUs and gloo on CPUs; the few numbers of an
update are on the host everywhere, so a group on GPUs has both backends. Each worker computes on the
GPU that Ray gave it.

Every worker takes a part of each update's requests and adds its gradient to that of the others
(:class:`~aurora_sgl.training.team.Team`), so the result is that of one process but for rounding.
Machines of a Ray cluster must reach the artifact root and, for objectives that learn from
proposals, the store.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.errors import AuroraError
from aurora_sgl.sequences.sequence import Sequences
from aurora_sgl.training.resume import Checkpoints
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.team import Team
from aurora_sgl.training.trainer import Progress, TrainResult, train

_RESULT = "result.pt"
_MISSING = 'more than one worker needs Ray: pip install "aurora-sgl[scale]"'
#: Progress that waits to be passed on; the run never waits for who reads it.
_QUEUED = 64
#: Ray gives its own processes 30 seconds to start, which at a run's low priority beside a busy
#: server may be too few; a later start finds the programs in memory.
STARTS = 4
_SLOW = "timed out during startup"


def train_on_workers(
    drafter: Drafter,
    sequences: Sequences,
    head: TargetHead,
    settings: TrainSettings,
    *,
    dev: Sequences | None = None,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainResult:
    """:func:`~aurora_sgl.training.trainer.train` on ``settings.workers`` processes.

    Joins the Ray cluster that ``RAY_ADDRESS`` names, else starts one on this machine and stops it
    afterwards. Everything given must be picklable. Raises ``AuroraError`` as ``train`` does, when
    Ray is not installed, and when a worker dies.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.queue import Queue
    except ImportError:
        raise AuroraError(_MISSING) from None
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    begun = not ray.is_initialized()
    if begun:
        _start(ray, settings.workers)
    try:
        queue = Queue(maxsize=_QUEUED, actor_options={"num_cpus": 0})
        watch = threading.Event()
        reader = threading.Thread(target=_pass_on, args=(queue, progress, watch), daemon=True)
        reader.start()
        job = {
            "given": ray.put((drafter, sequences, head, settings, dev, checkpoints)),
            "queue": queue,
        }
        with tempfile.TemporaryDirectory(prefix="aurora-ray-") as folder:
            trainer = TorchTrainer(
                _work,
                train_loop_config=job,
                torch_config=TorchConfig(backend=backend_of(gpu)),
                scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=gpu),
                run_config=RunConfig(name="run", storage_path=folder),
            )
            try:
                result = trainer.fit()
            except Exception as error:  # Ray's own classes differ between releases
                raise AuroraError(_cause(error)) from None
            finally:
                watch.set()
                reader.join(5)
            if result.checkpoint is None:
                raise AuroraError("the training workers ended without a result")
            with result.checkpoint.as_directory() as where:
                return _read(Path(where) / _RESULT)
    finally:
        if begun:
            ray.shutdown()


def backend_of(gpu: bool) -> str:
    """Of torch.distributed, by the device that a tensor is on."""
    return "cpu:gloo,cuda:nccl" if gpu else "gloo"


def on_own_device(settings: TrainSettings) -> TrainSettings:
    """The recipe for the device that Ray gave this worker, whichever number it has there."""
    from ray.train.torch import get_device

    return settings.model_copy(update={"device": str(get_device())})


def _start(ray: Any, workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not os.environ.get("RAY_ADDRESS"):
        # As many slots as workers, also where there are fewer cores; nothing listens outside.
        options |= {"num_cpus": workers + 1, "include_dashboard": False}
    for left in reversed(range(STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:  # a bare one, when its 30 seconds are over
            ray.shutdown()
            if not left or _SLOW not in str(error):
                raise AuroraError(f"Ray does not start: {_cause(error)}") from None


def _work(job: dict[str, Any]) -> None:
    """On every worker."""
    import ray
    from ray.train import Checkpoint, get_context, report

    context = get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    drafter, sequences, head, settings, dev, checkpoints = ray.get(job["given"])
    settings = on_own_device(settings)
    torch.set_num_threads(settings.threads)

    def progress(event: dict[str, Any]) -> None:
        with suppress(Exception):  # nobody reads, or too slowly
            job["queue"].put_nowait(event)

    result = train(
        drafter, sequences, head, settings,
        dev=dev, progress=progress, checkpoints=checkpoints, team=team,
    )  # fmt: skip
    if team.rank:
        report({})
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(result, Path(folder) / _RESULT)
        report({}, checkpoint=Checkpoint.from_directory(folder))


def _pass_on(queue: Any, progress: Progress | None, over: threading.Event) -> None:
    while not over.is_set() or not queue.empty():
        try:
            event = queue.get(timeout=0.2)
        except Exception:  # empty, or the cluster is gone
            if over.is_set():
                return
            time.sleep(0.05)
            continue
        if progress is not None:
            progress(event)


def _read(path: Path) -> TrainResult:
    result: TrainResult = torch.load(path, weights_only=False)
    return result


def _cause(error: BaseException) -> str:
    """The line of a worker's ``AuroraError``, or Ray's last word."""
    text = str(error)
    marks = [line for line in text.splitlines() if "AuroraError" in line]
    line = (marks or text.strip().splitlines() or [type(error).__name__])[-1]
    return line.partition("AuroraError:")[2].strip() or f"a training worker failed: {line.strip()}"

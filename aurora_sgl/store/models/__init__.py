"""The tables of the store, under the names of the public contract."""

from aurora_sgl.store.models.base import Base, BigInt, Json, UtcDateTime
from aurora_sgl.store.models.erasure import ErasedRequest, Erasure, TrainingRequest
from aurora_sgl.store.models.learning import (
    Alias,
    Deployment,
    DrafterVersion,
    Evaluation,
    TrainingRun,
    Trial,
    TrialWindow,
)
from aurora_sgl.store.models.notifications import (
    AlertRecord,
    Delivery,
    Notification,
    NotificationStart,
)
from aurora_sgl.store.models.operations import (
    DropCount,
    Lease,
    PruneRun,
    RetentionLimit,
    SpoolWatermark,
    StoreKey,
    Switch,
    TreeMemory,
)
from aurora_sgl.store.models.operators import (
    FreezeWindow,
    RolloutStage,
    SavedView,
    VersionNote,
)
from aurora_sgl.store.models.rollout import Audit, Drift, SchedulerState, Watch, WatchWindow
from aurora_sgl.store.models.serving import (
    AcceptanceEvent,
    AcceptanceHour,
    AcceptanceMinute,
    DeploymentGroup,
    Request,
    RequestTally,
    Server,
    Swap,
    Trace,
)

__all__ = [
    "AcceptanceEvent",
    "AcceptanceHour",
    "AcceptanceMinute",
    "AlertRecord",
    "Alias",
    "Audit",
    "Base",
    "BigInt",
    "Delivery",
    "Deployment",
    "DeploymentGroup",
    "DrafterVersion",
    "Drift",
    "DropCount",
    "ErasedRequest",
    "Erasure",
    "Evaluation",
    "FreezeWindow",
    "Json",
    "Lease",
    "Notification",
    "NotificationStart",
    "PruneRun",
    "Request",
    "RequestTally",
    "RetentionLimit",
    "RolloutStage",
    "SavedView",
    "SchedulerState",
    "Server",
    "SpoolWatermark",
    "StoreKey",
    "Swap",
    "Switch",
    "Trace",
    "TrainingRequest",
    "TrainingRun",
    "TreeMemory",
    "Trial",
    "TrialWindow",
    "UtcDateTime",
    "VersionNote",
    "Watch",
    "WatchWindow",
]

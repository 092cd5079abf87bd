"""The vocabulary: what the front end, the engine and the executor say to each other, as msgspec Structs.

Torch-free. Everything here can cross a process border as msgpack. Token ids, slots and pages are plain ints; times are
seconds on the monotonic clock; sizes are bytes.
"""

from .frames import Abort, ControlCall, ControlReply, FromEngine, Generate, Outputs, Ready, Refused, ToEngine, encode
from .models import (
    EngineStats,
    HandoffDoor,
    KVEvent,
    KVSpec,
    ModelInfo,
    ModelSpec,
    PluginCalls,
    SpeculativeInfo,
    SpeculativeStats,
    Stage,
)
from .requests import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    FinishReason,
    GrammarSpec,
    Handoff,
    HandoffReport,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from .steps import Drafting, Feature, GrammarLoad, PageGrant, PrefillChunk, SlotInit, SlotResult, StepPlan, StepResult

__all__ = [
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "MAX_STOP_IDS",
    "Abort",
    "ControlCall",
    "ControlReply",
    "Drafting",
    "EngineStats",
    "Feature",
    "FinishReason",
    "FromEngine",
    "Generate",
    "GrammarLoad",
    "GrammarSpec",
    "Handoff",
    "HandoffDoor",
    "HandoffReport",
    "KVEvent",
    "KVSpec",
    "ModelInfo",
    "ModelSpec",
    "Outputs",
    "PageGrant",
    "PluginCalls",
    "PrefillChunk",
    "Ready",
    "Refused",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "SlotInit",
    "SlotResult",
    "SpeculativeInfo",
    "SpeculativeStats",
    "Stage",
    "StepPlan",
    "StepResult",
    "ToEngine",
    "TokenLogprob",
    "encode",
]

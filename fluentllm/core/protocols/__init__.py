"""What plugins' objects promise: the typed half of the contract whose other half is `hookspecs`.

Torch-free: tensors and modules appear in annotations only. A factory is called once, at assembly; the engine then calls
plain bound methods of what it returned.
"""

from .answers import AnswerFormat, AnswerParser, CallRules, Piece, PieceKind, Tool, Where
from .attention import (
    PHASES,
    Appending,
    AttentionBackend,
    AttentionContext,
    AttentionSpec,
    FusedGQA,
    FusedMLA,
    MlaProducts,
    PartialAttention,
    PassPlan,
    Phase,
    PlannedPrefill,
)
from .drafting import (
    CountedProposer,
    DraftContext,
    DraftMemory,
    DraftReads,
    DraftTarget,
    MovableProposer,
    Proposer,
    ProposerContext,
    ProposerFactory,
)
from .grammars import GrammarCompiler, GrammarContext, GrammarMatcher, HostGrammar
from .models import BuildContext, Checkpoint, Model, ModelFamily, PackedTensor, StreamingCheckpoint, WeightsContext, WeightSlot
from .observers import RequestEvent
from .registration import (
    EngineCall,
    Register,
    RegisterCall,
    RegisterConfig,
    RegisterModel,
    RegisterRoute,
    RegisterWeights,
    Supports,
)
from .scheduling import Scheduler, SchedulerContext

__all__ = [
    "PHASES",
    "AnswerFormat",
    "AnswerParser",
    "Appending",
    "AttentionBackend",
    "AttentionContext",
    "AttentionSpec",
    "BuildContext",
    "CallRules",
    "Checkpoint",
    "CountedProposer",
    "DraftContext",
    "DraftMemory",
    "DraftReads",
    "DraftTarget",
    "EngineCall",
    "FusedGQA",
    "FusedMLA",
    "GrammarCompiler",
    "GrammarContext",
    "GrammarMatcher",
    "HostGrammar",
    "MlaProducts",
    "Model",
    "ModelFamily",
    "MovableProposer",
    "PackedTensor",
    "PartialAttention",
    "PassPlan",
    "Phase",
    "Piece",
    "PieceKind",
    "PlannedPrefill",
    "Proposer",
    "ProposerContext",
    "ProposerFactory",
    "Register",
    "RegisterCall",
    "RegisterConfig",
    "RegisterModel",
    "RegisterRoute",
    "RegisterWeights",
    "RequestEvent",
    "Scheduler",
    "SchedulerContext",
    "StreamingCheckpoint",
    "Supports",
    "Tool",
    "WeightSlot",
    "WeightsContext",
    "Where",
]

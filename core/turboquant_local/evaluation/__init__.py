"""Measure what a compressed KV cache costs a model: in predictions, retrieval, tool calls and bytes."""

from turboquant_local.evaluation.codecs.base import KVCodec
from turboquant_local.evaluation.codecs.registry import CODECS, find_codec
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec
from turboquant_local.evaluation.comparison import Comparison, Size, compare, size
from turboquant_local.evaluation.fidelity import UNCOMPRESSED, Fidelity, measure_fidelity
from turboquant_local.evaluation.layer_bits import LayerShare, divide_bits
from turboquant_local.evaluation.layers import LayerFidelity, measure_layers
from turboquant_local.evaluation.models import load_model
from turboquant_local.evaluation.retrieval import RetrievalCell, measure_retrieval
from turboquant_local.evaluation.tool_calls import ToolCallScore, measure_tool_calls
from turboquant_local.evaluation.verification import Thresholds, Verification, verify
from turboquant_local.evaluation.windows import cut_windows, read_text

__all__ = [
    "CODECS",
    "UNCOMPRESSED",
    "Comparison",
    "Fidelity",
    "KVCodec",
    "LayerFidelity",
    "LayerShare",
    "RetrievalCell",
    "Size",
    "Thresholds",
    "ToolCallScore",
    "TurboQuantCodec",
    "Verification",
    "compare",
    "cut_windows",
    "divide_bits",
    "find_codec",
    "load_model",
    "measure_fidelity",
    "measure_layers",
    "measure_retrieval",
    "measure_tool_calls",
    "read_text",
    "size",
    "verify",
]

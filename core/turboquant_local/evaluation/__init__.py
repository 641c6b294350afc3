"""Measure what a compressed KV cache costs a model: in predictions, retrieval, tool calls and bytes."""

from turboquant_local.evaluation.codecs.base import KVCodec
from turboquant_local.evaluation.codecs.turboquant import TurboQuantCodec
from turboquant_local.evaluation.fidelity import Fidelity, measure_fidelity
from turboquant_local.evaluation.windows import cut_windows, read_text

__all__ = ["Fidelity", "KVCodec", "TurboQuantCodec", "cut_windows", "measure_fidelity", "read_text"]

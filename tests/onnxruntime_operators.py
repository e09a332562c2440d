"""onnxruntime's own operators for ``onnx.reference``, in loops: what their documentation says, nothing of ours.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import numpy as np
import onnx.inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class GroupQueryAttention(OpRun):
    """Without rotation, window, soft cap or bias: those attributes are not known here."""

    op_domain = "com.microsoft"

    def _run(  # type: ignore[no-untyped-def]
        self, query, key, value, past_key, past_value, seqlens_k, total_sequence_length, num_heads, kv_num_heads, scale
    ):
        B, S, _ = query.shape
        D = query.shape[2] // num_heads
        assert total_sequence_length == seqlens_k.max() + 1
        present_key, present_value = past_key.copy(), past_value.copy()
        output = np.zeros_like(query)
        for b in range(B):
            past = seqlens_k[b] + 1 - S
            for new, present in ((key, present_key), (value, present_value)):
                for g in range(kv_num_heads):
                    present[b, g, past : past + S] = new[b, :, g * D : (g + 1) * D]
            for h in range(num_heads):
                g = h * kv_num_heads // num_heads
                for s in range(S):
                    seen = past + s + 1
                    scores = present_key[b, g, :seen] @ query[b, s, h * D : (h + 1) * D] * scale
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                    output[b, s, h * D : (h + 1) * D] = weights @ present_value[b, g, :seen]
        return output, present_key, present_value


class SkipSimplifiedLayerNormalization(OpRun):
    """Sum, then root-mean-square normalisation over the last axis."""

    op_domain = "com.microsoft"

    def _run(self, data, skip, gamma, epsilon):  # type: ignore[no-untyped-def]
        total = data + skip
        root = np.sqrt((total * total).mean(-1, keepdims=True) + np.asarray(epsilon, data.dtype))
        return total / root * gamma, np.zeros(0, data.dtype), np.zeros(0, data.dtype), total


def reference_evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """The ``onnx`` package's evaluator; its operators from outside do not reach into functions, so these are inlined."""
    inlined = onnx.inliner.inline_local_functions(model)
    imports = {
        item.domain: item for item in (*model.opset_import, *(o for f in model.functions for o in f.opset_import))
    }
    del inlined.opset_import[:]
    inlined.opset_import.extend(imports.values())  # the inliner forgets those of the functions
    return ReferenceEvaluator(inlined, new_ops=[GroupQueryAttention, SkipSimplifiedLayerNormalization])

"""The custom ops of the exported graph, in domain ``llama_export``: one table, :data:`OP_SPECS`, that needs no torch.

An op is one :class:`OpSpec`, from which every other description of it is derived. The torch schema, the ONNX schema, the ONNX function bodies, the translation from torch to ONNX, the evaluator and the
plugin fields all read the same table, so they cannot disagree. The maths in PyTorch is in
:mod:`llama_export.ops.torch_ops` and the files beside it.

A *target* is a set of function bodies. ``standard`` is right for every reader and is what ``model.onnx`` stores;
``onnxruntime`` is a faster wording for our own onnxruntime session, which may use onnxruntime's own operators, domain
``com.microsoft`` (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md). Bodies are written in ONNX's text syntax
(https://github.com/onnx/onnx/blob/main/docs/Syntax.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DOMAIN = "llama_export"
OPSET_VERSION = 24
"""Opset of the standard ops in graph and bodies: the first with TensorScatter and Attention's nonpad_kv_seqlen."""
Target = Literal["standard", "onnxruntime"]
TARGETS: tuple[Target, ...] = ("standard", "onnxruntime")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of an op."""

    name: str
    dtype: str
    """``T``: the model dtype (float32, float16, bfloat16), the same for all of them; else float32 or int64."""
    shape: str
    """For readers, e.g. ``[B, S, H*D]``."""
    alias_of: str | None = None
    """Outputs only: the input whose buffer this output may share."""


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """One attribute: always written to the node, never defaulted."""

    name: str
    type: Literal["int", "float"]
    doc: str


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One custom op. Inputs are fixed in number and order; a variant that needs another input is another op."""

    op_type: str
    """ONNX op_type in domain ``llama_export`` and plugin name; unique on its own, because parsers ignore the domain."""
    torch_name: str
    """``torch.ops.llama_export.<torch_name>``"""
    version: int
    """Raised when inputs, attributes or numerics change."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    bodies: Mapping[Target, str]
    """Target -> statements of the ONNX function, in terms of the names above."""

    @property
    def torch_schema(self) -> str:
        """The schema string of the torch op."""
        arguments = [f"Tensor {tensor.name}" for tensor in self.inputs]
        arguments += [f"{attribute.type} {attribute.name}" for attribute in self.attributes]
        returns = ["Tensor"] * len(self.outputs)
        return f"({', '.join(arguments)}) -> {returns[0] if len(returns) == 1 else '(' + ', '.join(returns) + ')'}"

    def onnx_schema(self) -> Any:
        """The ``onnx.defs.OpSchema``; without one the exporter and the checker refuse the node."""
        from onnx.defs import OpSchema

        kinds = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}
        types = {"T": "T", "float32": "tensor(float)", "int64": "tensor(int64)"}
        return OpSchema(
            self.op_type,
            DOMAIN,
            self.version,
            inputs=[OpSchema.FormalParameter(tensor.name, types[tensor.dtype]) for tensor in self.inputs],
            outputs=[OpSchema.FormalParameter(tensor.name, types[tensor.dtype]) for tensor in self.outputs],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "the model dtype")],
            attributes=[
                OpSchema.Attribute(item.name, kinds[item.type], item.doc, required=True) for item in self.attributes
            ],
        )

    def function_proto(self, target: Target) -> Any:
        """The ``onnx.FunctionProto`` of one target."""
        from onnx import parser

        attributes = ", ".join(item.name for item in self.attributes)
        inputs = ", ".join(tensor.name for tensor in self.inputs)
        outputs = ", ".join(tensor.name for tensor in self.outputs)
        imports = f'"" : {OPSET_VERSION}' + (', "com.microsoft" : 1' if "com.microsoft." in self.bodies[target] else "")
        return parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: [{imports}]>\n'
            f"{self.op_type} <{attributes}> ({inputs}) => ({outputs})\n{{\n{self.bodies[target]}\n}}"
        )


# ---- norms ------------------------------------------------------------------------------------------------------

_EPSILON = AttributeSpec("epsilon", "float", "added to the mean of squares, inside the root")
_NORM = "normed = RMSNormalization <axis: int = -1, stash_type: int = 1, epsilon: float = @epsilon> ({x}, weight)"
# onnxruntime's own operator for both, in one pass; the outputs between are for training.
_ADD_NORM_BY_ONNXRUNTIME = """
  normed, mean, inverse_root, new_residual =
      com.microsoft.SkipSimplifiedLayerNormalization <epsilon: float = @epsilon> (hidden_states, residual, weight)
"""
_ADD_NORM = "new_residual = Add (hidden_states, residual)\n" + _NORM.format(x="new_residual")

RMS_NORM = OpSpec(
    op_type="LlamaRMSNorm",
    torch_name="rms_norm",
    version=1,
    inputs=(TensorSpec("hidden_states", "T", "[.., E]"), TensorSpec("weight", "T", "[E]")),
    outputs=(TensorSpec("normed", "T", "[.., E]"),),
    attributes=(_EPSILON,),
    bodies={"standard": _NORM.format(x="hidden_states"), "onnxruntime": _NORM.format(x="hidden_states")},
)

ADD_RMS_NORM = OpSpec(
    op_type="LlamaAddRMSNorm",
    torch_name="add_rms_norm",
    version=1,
    inputs=(
        TensorSpec("hidden_states", "T", "[.., E]"),
        TensorSpec("residual", "T", "[.., E]"),
        TensorSpec("weight", "T", "[E]"),
    ),
    outputs=(TensorSpec("normed", "T", "[.., E]"), TensorSpec("new_residual", "T", "[.., E]")),
    attributes=(_EPSILON,),
    bodies={"standard": _ADD_NORM, "onnxruntime": _ADD_NORM_BY_ONNXRUNTIME},
)

# ---- attention --------------------------------------------------------------------------------------------------

# Rotation in the type of cos (float32), one rounding back to the model dtype: CastLike follows whatever type the model has.
_ROTATE = """
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  keep_rank = Constant <value_ints: ints = [0, 0, -1]> ()
  num_heads_0d = Constant <value_int: int = @num_heads> ()
  num_kv_heads_0d = Constant <value_int: int = @num_kv_heads> ()
  head_dim_0d = Constant <value_int: int = @head_dim> ()
  axis_0 = Constant <value_ints: ints = [0]> ()
  axis_1 = Constant <value_ints: ints = [1]> ()
  copy_axes = Constant <value_ints: ints = [0, 0]> ()
  num_heads_1d = Unsqueeze (num_heads_0d, axis_0)
  num_kv_heads_1d = Unsqueeze (num_kv_heads_0d, axis_0)
  head_dim_1d = Unsqueeze (head_dim_0d, axis_0)
  query_shape = Concat <axis: int = 0> (copy_axes, num_heads_1d, head_dim_1d)
  kv_shape = Concat <axis: int = 0> (copy_axes, num_kv_heads_1d, head_dim_1d)
  query_BSHD = Reshape (query, query_shape)
  key_BSGD = Reshape (key, kv_shape)
  value_BSGD = Reshape (value, kv_shape)
  query_BHSD = Transpose <perm: ints = [0, 2, 1, 3]> (query_BSHD)
  key_BGSD = Transpose <perm: ints = [0, 2, 1, 3]> (key_BSGD)
  value_BGSD = Transpose <perm: ints = [0, 2, 1, 3]> (value_BSGD)
  query_wide = CastLike (query_BHSD, cos)
  key_wide = CastLike (key_BGSD, cos)
  query_turned = RotaryEmbedding <interleaved: int = 0> (query_wide, cos, sin)
  key_turned = RotaryEmbedding <interleaved: int = 0> (key_wide, cos, sin)
  query_rope = CastLike (query_turned, query)
  key_rope = CastLike (key_turned, key)
  new_tokens_1d = Shape <start: int = 1, end: int = 2> (query)
  new_tokens = Squeeze (new_tokens_1d, axis_0)
  new_range = Range (zero, new_tokens, one)
"""
_APPEND = """
  present_key = TensorScatter <axis: int = 2, mode: string = "linear"> (past_key, key_rope, past_length)
  present_value = TensorScatter <axis: int = 2, mode: string = "linear"> (past_value, value_BGSD, past_length)
"""
_MERGE_HEADS = """
  attended_BSHD = Transpose <perm: ints = [0, 2, 1, 3]> (attended_BHSD)
  attn_output = Reshape (attended_BSHD, keep_rank)
"""
# Right for every reader: the mask says which cached key each query sees.
_ATTEND_BY_MASK = """
  capacity_1d = Shape <start: int = 2, end: int = 3> (past_key)
  capacity = Squeeze (capacity_1d, axis_0)
  cached_range = Range (zero, capacity, one)
  past_length_B1 = Unsqueeze (past_length, axis_1)
  positions_BS = Add (past_length_B1, new_range)
  mask_axes = Constant <value_ints: ints = [1, 3]> ()
  positions_B1S1 = Unsqueeze (positions_BS, mask_axes)
  visible = LessOrEqual (cached_range, positions_B1S1)
  attended_BHSD = Attention <is_causal: int = 0, scale: float = @scale> (query_rope, present_key, present_value, visible)
"""
# onnxruntime's own operator for all of it: it appends in place where past and present are one buffer, reads the valid
# tokens only, whatever the capacity, and shares a key head among its query heads. It takes B > 1 with S > 1 for empty
# rows only (runtime/session.py). ``last`` counts a row's tokens from 0, ``longest`` is the longest row's number of tokens. S is read
# from cos, which all layers share: onnxruntime then computes the lengths once, not in every layer.
_BY_ONNXRUNTIME = """
  axis_0 = Constant <value_ints: ints = [0]> ()
  one_1d = Constant <value_ints: ints = [1]> ()
  new_tokens = Shape <start: int = 1, end: int = 2> (cos)
  total_length = Add (past_length, new_tokens)
  last_int64 = Sub (total_length, one_1d)
  last = Cast <to: int = 6> (last_int64)
  longest_int64 = ReduceMax <keepdims: int = 0> (total_length, axis_0)
  longest = Cast <to: int = 6> (longest_int64)
  query_rope = RotaryEmbedding
      <interleaved: int = 0, num_heads: int = @num_heads, rotary_embedding_dim: int = @head_dim> (query, cos, sin)
  key_rope = RotaryEmbedding
      <interleaved: int = 0, num_heads: int = @num_kv_heads, rotary_embedding_dim: int = @head_dim> (key, cos, sin)
  attn_output, present_key, present_value = com.microsoft.GroupQueryAttention
      <num_heads: int = @num_heads, kv_num_heads: int = @num_kv_heads, scale: float = @scale>
      (query_rope, key_rope, value, past_key, past_value, last, longest)
"""

_PROJECTIONS_AND_ANGLES = (
    TensorSpec("query", "T", "[B, S, H*D]"),
    TensorSpec("key", "T", "[B, S, G*D]"),
    TensorSpec("value", "T", "[B, S, G*D]"),
    TensorSpec("cos", "float32", "[B, S, D/2]"),
    TensorSpec("sin", "float32", "[B, S, D/2]"),
)
_ATTENTION_ATTRIBUTES = (
    AttributeSpec("num_heads", "int", "H, query heads"),
    AttributeSpec("num_kv_heads", "int", "G, key/value heads"),
    AttributeSpec("head_dim", "int", "D, width of one head"),
    AttributeSpec("scale", "float", "multiplies the scores, 1 / sqrt(D) in Llama"),
)

ATTENTION = OpSpec(
    op_type="LlamaAttention",
    torch_name="attention",
    version=1,
    inputs=(
        *_PROJECTIONS_AND_ANGLES,
        TensorSpec("past_key", "T", "[B, G, C, D]"),
        TensorSpec("past_value", "T", "[B, G, C, D]"),
        TensorSpec("past_length", "int64", "[B]"),
    ),
    outputs=(
        TensorSpec("attn_output", "T", "[B, S, H*D]"),
        TensorSpec("present_key", "T", "[B, G, C, D]", alias_of="past_key"),
        TensorSpec("present_value", "T", "[B, G, C, D]", alias_of="past_value"),
    ),
    attributes=_ATTENTION_ATTRIBUTES,
    bodies={
        "standard": _ROTATE + _APPEND + _ATTEND_BY_MASK + _MERGE_HEADS,
        "onnxruntime": _BY_ONNXRUNTIME,
    },
)

# A query that sees nothing would be a softmax over nothing, which readers disagree about: it gets all earlier keys, so
# that the softmax is defined, and its result is then replaced by 0.
_ATTEND_PADDED = """
  is_key = Cast <to: int = 9> (attention_mask)
  is_key_wide = Cast <to: int = 7> (is_key)
  keys_so_far = CumSum (is_key_wide, one)
  sees_nothing = Equal (keys_so_far, zero)
  key_axis = Constant <value_ints: ints = [1]> ()
  query_axis = Constant <value_ints: ints = [2]> ()
  head_axis = Constant <value_ints: ints = [1]> ()
  query_range = Unsqueeze (new_range, axis_1)
  causal = LessOrEqual (new_range, query_range)
  is_key_B1S = Unsqueeze (is_key, key_axis)
  sees_nothing_BS1 = Unsqueeze (sees_nothing, query_axis)
  allowed = Or (is_key_B1S, sees_nothing_BS1)
  visible_BSS = And (allowed, causal)
  visible = Unsqueeze (visible_BSS, head_axis)
  attended = Attention <is_causal: int = 0, scale: float = @scale> (query_rope, key_rope, value_BGSD, visible)
  head_and_width = Constant <value_ints: ints = [1, 3]> ()
  nobody = Unsqueeze (sees_nothing, head_and_width)
  nothing_0d = Constant <value_float: float = 0.0> ()
  nothing = CastLike (nothing_0d, attended)
  attended_BHSD = Where (nobody, nothing, attended)
"""

MASKED_ATTENTION = OpSpec(
    op_type="LlamaMaskedAttention",
    torch_name="masked_attention",
    version=1,
    inputs=(
        *_PROJECTIONS_AND_ANGLES,
        TensorSpec("attention_mask", "int64", "[B, S]"),
    ),
    outputs=(TensorSpec("attn_output", "T", "[B, S, H*D]"),),
    attributes=_ATTENTION_ATTRIBUTES,
    bodies={
        "standard": _ROTATE + _ATTEND_PADDED + _MERGE_HEADS,
        "onnxruntime": _ROTATE + _ATTEND_PADDED + _MERGE_HEADS,
    },
)

OP_SPECS: dict[str, OpSpec] = {spec.op_type: spec for spec in (RMS_NORM, ADD_RMS_NORM, ATTENTION, MASKED_ATTENTION)}


def register_onnx_schemas() -> None:
    """Makes the ops known to the ``onnx`` package of this process; safe to call again."""
    import onnx.defs

    for spec in OP_SPECS.values():
        if not onnx.defs.has(spec.op_type, DOMAIN):
            onnx.defs.register_schema(spec.onnx_schema())


def function_protos(target: Target, head_dim: int) -> list[Any]:
    """The ``onnx.FunctionProto`` of every op for one target.

    onnxruntime's own attention operator takes a ``head_dim`` that is a multiple of 8 only. For any other the op keeps its
    standard body, whose cost grows with the capacity of the cache.
    """
    standard = {ATTENTION.op_type} if head_dim % 8 else set()
    return [spec.function_proto("standard" if name in standard else target) for name, spec in OP_SPECS.items()]

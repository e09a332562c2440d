#include "masked_attention_plugin.h"

#include "launch.h"
#include "shapes.h"

namespace llama_export
{
using namespace nvinfer1;

//! Rotated query [B, S, H*D], rotated key and value [B, G, S, D], past_length int64 [B] of zeros; each part aligned.
struct MaskedAttentionPlugin::Workspace : WorkspaceParts
{
    Workspace(AttentionParameters const& parameters, int64_t batch, int64_t tokens, int64_t elementBytes) noexcept
    {
        int64_t const rows = batch * tokens * parameters.head_dim * elementBytes;
        key = padded(rows * parameters.num_heads);
        value = key + padded(rows * parameters.num_kv_heads);
        pastLength = value + padded(rows * parameters.num_kv_heads);
        bytes = pastLength + padded(batch * static_cast<int64_t>(sizeof(int64_t)));
    }

    int64_t query{0}; //!< offsets, in bytes
    int64_t key;
    int64_t value;
    int64_t pastLength;
};

bool MaskedAttentionPlugin::loadKernels() noexcept
{
    int32_t const dtype = mParameters.dtype;
    int32_t const headDim = mParameters.head_dim;
    return loadKernel(kNAME, {"rotate_and_append", dtype, headDim}, mRotateAndAppend)
        && loadKernel(kNAME, {"attention_padded", dtype, headDim}, mAttend);
}

int32_t MaskedAttentionPlugin::getNbOutputs() const noexcept
{
    return kNUM_OUTPUTS;
}

int32_t MaskedAttentionPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (!checkCount(kNAME, "inputs", nbInputs, kNUM_INPUTS))
    {
        return kFAILURE;
    }
    for (int32_t i = 0; i < nbOutputs; ++i)
    {
        outputTypes[i] = inputTypes[kQUERY];
    }
    return kSUCCESS;
}

bool MaskedAttentionPlugin::checkShapes(Dims const* inputs) const noexcept
{
    Dims const& query = inputs[kQUERY];
    if (!checkHeadDim(kNAME, kKERNEL, mParameters) || !checkRank(kNAME, "query", query, 3))
    {
        return false;
    }
    int64_t const batch = query.d[0];
    int64_t const tokens = query.d[1];
    int64_t const half = mParameters.head_dim / 2;
    int64_t const queryWidth = static_cast<int64_t>(mParameters.num_heads) * mParameters.head_dim;
    int64_t const kvWidth = static_cast<int64_t>(mParameters.num_kv_heads) * mParameters.head_dim;
    ExpectedShape const expected[] = {
        {kQUERY, "query", 3, {batch, tokens, queryWidth, 0}, {"B", "S", "num_heads * head_dim", ""}},
        {kKEY, "key", 3, {batch, tokens, kvWidth, 0}, {"B", "S", "num_kv_heads * head_dim", ""}},
        {kVALUE, "value", 3, {batch, tokens, kvWidth, 0}, {"B", "S", "num_kv_heads * head_dim", ""}},
        {kCOS, "cos", 3, {batch, tokens, half, 0}, {"B", "S", "head_dim / 2", ""}},
        {kSIN, "sin", 3, {batch, tokens, half, 0}, {"B", "S", "head_dim / 2", ""}},
        {kATTENTION_MASK, "attention_mask", 2, {batch, tokens, 0, 0}, {"B", "S", "", ""}},
    };
    return checkExpectedShapes(kNAME, inputs, expected, sizeof expected / sizeof expected[0])
        && checkAttentionLimits(kNAME, mParameters, batch, tokens, tokens);
}

int32_t MaskedAttentionPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs,
    DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/, DimsExprs* outputs, int32_t nbOutputs,
    IExprBuilder& /*builder*/) noexcept
{
    if (!checkCount(kNAME, "inputs", nbInputs, kNUM_INPUTS) || !checkCount(kNAME, "outputs", nbOutputs, kNUM_OUTPUTS))
    {
        return kFAILURE;
    }
    Dims constants[kNUM_INPUTS];
    for (int32_t i = 0; i < kNUM_INPUTS; ++i)
    {
        constants[i] = constantDims(inputs[i]);
    }
    if (!checkShapes(constants))
    {
        return kFAILURE;
    }
    outputs[kATTN_OUTPUT] = inputs[kQUERY];
    return kSUCCESS;
}

bool MaskedAttentionPlugin::supportsFormatCombination(
    int32_t position, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    PluginTensorDesc const& tensor = inOut[position].desc;
    if (nbInputs != kNUM_INPUTS || nbOutputs != kNUM_OUTPUTS || tensor.format != TensorFormat::kLINEAR)
    {
        return false;
    }
    switch (position)
    {
    case kCOS:
    case kSIN: return tensor.type == DataType::kFLOAT;
    case kATTENTION_MASK: return tensor.type == DataType::kINT64;
    default:
        return tensor.type == inOut[kQUERY].desc.type && isDtypeServed(kKERNEL, static_cast<int32_t>(tensor.type));
    }
}

int32_t MaskedAttentionPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!checkCount(kNAME, "inputs", nbInputs, kNUM_INPUTS) || !checkCount(kNAME, "outputs", nbOutputs, kNUM_OUTPUTS))
    {
        return kFAILURE;
    }
    int64_t const bytes = largestWorkspace(in);
    if (bytes == kNO_WORKSPACE || noteDtype(in[kQUERY].desc.type) != kSUCCESS)
    {
        return kFAILURE;
    }
    noteWorkspace(bytes);
    return kSUCCESS;
}

//! The most bytes that a call within a profile needs; kNO_WORKSPACE, with the reason reported, where that is beyond the limits.
int64_t MaskedAttentionPlugin::largestWorkspace(DynamicPluginTensorDesc const* inputs) const noexcept
{
    Dims const& query = inputs[kQUERY].max;
    if (!checkLargestQuery(kNAME, mParameters, query, query.d[1]))
    {
        return kNO_WORKSPACE;
    }
    return Workspace(mParameters, query.d[0], query.d[1], elementSize(inputs[kQUERY].desc.type)).bytes;
}

size_t MaskedAttentionPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t /*nbInputs*/,
    DynamicPluginTensorDesc const* /*outputs*/, int32_t /*nbOutputs*/) const noexcept
{
    int64_t const bytes = largestWorkspace(inputs);
    return bytes == kNO_WORKSPACE ? kIMPOSSIBLE_WORKSPACE : static_cast<size_t>(bytes);
}

int32_t MaskedAttentionPlugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!checkCount(kNAME, "inputs", nbInputs, kNUM_INPUTS) || !checkCount(kNAME, "outputs", nbOutputs, kNUM_OUTPUTS))
    {
        return kFAILURE;
    }
    Dims dims[kNUM_INPUTS];
    for (int32_t i = 0; i < kNUM_INPUTS; ++i)
    {
        dims[i] = in[i].dims;
    }
    Dims const& query = dims[kQUERY];
    bool const fits = checkKnown(kNAME, dims, kNUM_INPUTS) && checkShapes(dims)
        && checkWorkspace(Workspace(mParameters, query.d[0], query.d[1], elementSize(in[kQUERY].type)).bytes);
    return fits && prepareKernels(in[kQUERY].type) ? kSUCCESS : kFAILURE;
}

bool MaskedAttentionPlugin::clearPastLength(Workspace const& parts, int64_t batch, cudaStream_t stream) const noexcept
{
    CudaDriver const* const driver = cudaDriver(kNAME);
    if (driver == nullptr)
    {
        return false;
    }
    CUresult const error
        = driver->memsetD8Async(parts.at(parts.pastLength), 0, static_cast<size_t>(batch) * sizeof(int64_t), stream);
    if (error != kCUDA_SUCCESS)
    {
        reportError(kNAME, "the workspace was not cleared: %s (%d)", driver->nameOf(error), error);
    }
    return error == kCUDA_SUCCESS;
}

//! Query, key and value -> the workspace.
bool MaskedAttentionPlugin::rotate(Workspace const& parts, int64_t batch, int64_t tokens, void const* const* inputs,
    cudaStream_t stream) const noexcept
{
    kernels::RotateAndAppendArguments arguments;
    arguments.query = deviceAddress(inputs[kQUERY]);
    arguments.key = deviceAddress(inputs[kKEY]);
    arguments.value = deviceAddress(inputs[kVALUE]);
    arguments.cos = deviceAddress(inputs[kCOS]);
    arguments.sin = deviceAddress(inputs[kSIN]);
    arguments.past_length = parts.at(parts.pastLength);
    arguments.rotated_query = parts.at(parts.query);
    arguments.present_key = parts.at(parts.key);
    arguments.present_value = parts.at(parts.value);
    arguments.new_tokens = static_cast<int32_t>(tokens);
    arguments.num_heads = mParameters.num_heads;
    arguments.num_kv_heads = mParameters.num_kv_heads;
    arguments.capacity = static_cast<int32_t>(tokens);
    arguments.head_dim = mParameters.head_dim;
    // TensorRT hands over dense tensors: from token to token is one row.
    arguments.query_stride = mParameters.num_heads * mParameters.head_dim;
    arguments.key_stride = mParameters.num_kv_heads * mParameters.head_dim;
    arguments.value_stride = mParameters.num_kv_heads * mParameters.head_dim;
    return launch(kNAME, mRotateAndAppend, Grid{batch * tokens, 1, 1}, arguments, stream);
}

//! Workspace -> attn_output.
bool MaskedAttentionPlugin::attend(Workspace const& parts, int64_t batch, int64_t tokens, void const* mask,
    void* attnOutput, cudaStream_t stream) const noexcept
{
    kernels::AttentionPaddedArguments arguments;
    arguments.rotated_query = parts.at(parts.query);
    arguments.rotated_key = parts.at(parts.key);
    arguments.value = parts.at(parts.value);
    arguments.attention_mask = deviceAddress(mask);
    arguments.attn_output = deviceAddress(attnOutput);
    arguments.scale = mParameters.scale;
    arguments.num_tokens = static_cast<int32_t>(tokens);
    arguments.num_heads = mParameters.num_heads;
    arguments.num_kv_heads = mParameters.num_kv_heads;
    arguments.head_dim = mParameters.head_dim;
    // A tile's rows are the (token, head) pairs of one group: they share its key and value head.
    int64_t const rows = tokens * (mParameters.num_heads / mParameters.num_kv_heads);
    Grid const grid{ceilDiv(rows, mAttend.image->rows), mParameters.num_kv_heads, batch};
    return launch(kNAME, mAttend, grid, arguments, stream);
}

int32_t MaskedAttentionPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    Dims const& query = inputDesc[kQUERY].dims;
    int64_t const batch = query.d[0];
    int64_t const tokens = query.d[1];
    if (!checkReady())
    {
        return kFAILURE;
    }
    if (batch == 0 || tokens == 0)
    {
        return kSUCCESS;
    }
    if (!checkAligned("query", inputs[kQUERY]) || !checkAligned("key", inputs[kKEY])
        || !checkAligned("value", inputs[kVALUE]) || !checkAligned("cos", inputs[kCOS])
        || !checkAligned("sin", inputs[kSIN]) || !checkAligned("attn_output", outputs[kATTN_OUTPUT])
        || !checkAligned("workspace", workspace))
    {
        return kFAILURE;
    }
    Workspace parts(mParameters, batch, tokens, elementSize(inputDesc[kQUERY].type));
    parts.start = workspace;
    if (!checkWorkspace(parts.bytes))
    {
        return kFAILURE;
    }
    bool const isDone = clearPastLength(parts, batch, stream) && rotate(parts, batch, tokens, inputs, stream)
        && attend(parts, batch, tokens, inputs[kATTENTION_MASK], outputs[kATTN_OUTPUT], stream);
    return isDone ? kSUCCESS : kFAILURE;
}
} // namespace llama_export

#include "attention_plugin.h"

#include "shapes.h"

#include <algorithm>

namespace llama_export
{
using namespace nvinfer1;

namespace
{
//! Keys of one piece of a cache: a function of its capacity alone, so that a row's result depends on no other row.
int64_t splitKeys(int64_t capacity) noexcept
{
    int64_t keys = 0;
    for (kernels::SplitKeys const& item : kernels::kSPLIT_KEYS) // ascending, and the last one is for all that are larger
    {
        keys = item.keys;
        if (capacity <= item.largestCapacity)
        {
            break;
        }
    }
    return keys;
}

int64_t numSplits(int64_t capacity) noexcept
{
    return std::max<int64_t>(1, ceilDiv(capacity, splitKeys(capacity)));
}

//! The most pieces of any cache up to this capacity. More than numSplits() of it where a shorter cache has shorter pieces: 1024
//! keys are 8 pieces of 128, 1100 keys are 5 of 256. Within one length of pieces the longest cache has the most.
int64_t mostSplits(int64_t capacity) noexcept
{
    int64_t most = 1;
    for (kernels::SplitKeys const& item : kernels::kSPLIT_KEYS)
    {
        most = std::max(most, ceilDiv(std::min(capacity, item.largestCapacity), item.keys));
        if (capacity <= item.largestCapacity)
        {
            break;
        }
    }
    return most;
}
} // namespace

struct AttentionPlugin::Sizes
{
    int64_t batch;
    int64_t newTokens;
    int64_t capacity;
};

AttentionPlugin::Sizes AttentionPlugin::sizesOf(Dims const& query, Dims const& cache) noexcept
{
    return {query.d[0], query.d[1], cache.d[2]};
}

//! Rotated query T [B, S, H*D], then of the pieces of a split cache: partial_output float32 [B, S, H, pieces, D] and
//! partial_softmax float32 [B, S, H, pieces, 2]; each part aligned.
struct AttentionPlugin::Workspace : WorkspaceParts
{
    //! `splitTokens`: as many of the new tokens as a split serves; 0 where there is none. `splits`: pieces of the cache.
    Workspace(AttentionParameters const& parameters, Sizes const& sizes, int64_t splitTokens, int64_t splits,
        int64_t elementBytes) noexcept
    {
        constexpr int64_t kFLOAT_BYTES = sizeof(float);
        int64_t const queryWidth = static_cast<int64_t>(parameters.num_heads) * parameters.head_dim;
        int64_t const pieces = sizes.batch * splitTokens * parameters.num_heads * splits;
        partialOutput = padded(sizes.batch * sizes.newTokens * queryWidth * elementBytes);
        partialSoftmax = partialOutput + padded(pieces * parameters.head_dim * kFLOAT_BYTES);
        bytes = partialSoftmax + padded(pieces * 2 * kFLOAT_BYTES);
    }

    int64_t rotatedQuery{0}; //!< offsets, in bytes
    int64_t partialOutput;
    int64_t partialSoftmax;
};

bool AttentionPlugin::loadKernels() noexcept
{
    int32_t const dtype = mParameters.dtype;
    int32_t const headDim = mParameters.head_dim;
    return loadKernel(kNAME, {"rotate_and_append", dtype, headDim}, mRotateAndAppend)
        && loadKernel(kNAME, {"attention_prefill", dtype, headDim}, mPrefill)
        && loadKernel(kNAME, {"attention_split", dtype, headDim}, mSplit)
        && loadKernel(kNAME, {"attention_combine", dtype, headDim}, mCombine);
}

//! Whether the cache is split between programs: few queries would not occupy the GPU.
bool AttentionPlugin::isSplit(int64_t newTokens) const noexcept
{
    return newTokens == 1
        || productOf({newTokens, mParameters.num_heads / mParameters.num_kv_heads}) <= kernels::kSPLIT_ROWS;
}

//! Checks the grids of the two kernels where the cache is split. What is not known yet is -1.
bool AttentionPlugin::checkSplitLimits(int64_t batch, int64_t newTokens, int64_t splits) const noexcept
{
    int64_t const groupSize = mParameters.num_heads / mParameters.num_kv_heads;
    return checkLimit(kNAME, "batch * new tokens * num_heads", productOf({batch, newTokens, mParameters.num_heads}),
               kMAX_GRID_X)
        && checkLimit(kNAME, "new tokens * heads in a group * pieces of the KV cache",
            productOf({newTokens, groupSize, splits}), kMAX_GRID_X);
}

int32_t AttentionPlugin::getNbOutputs() const noexcept
{
    return kNUM_OUTPUTS;
}

int32_t AttentionPlugin::getOutputDataTypes(
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

int32_t AttentionPlugin::getAliasedInput(int32_t output) noexcept
{
    switch (output)
    {
    case kPRESENT_KEY: return kPAST_KEY;
    case kPRESENT_VALUE: return kPAST_VALUE;
    default: return -1;
    }
}

bool AttentionPlugin::checkShapes(Dims const* inputs) const noexcept
{
    int64_t const headDim = mParameters.head_dim;
    int64_t const numKvHeads = mParameters.num_kv_heads;
    int64_t const queryWidth = mParameters.num_heads * headDim;
    int64_t const kvWidth = numKvHeads * headDim;
    if (!checkHeadDim(kNAME, kKERNEL, mParameters))
    {
        return false;
    }

    Dims const& query = inputs[kQUERY];
    Dims const& pastKey = inputs[kPAST_KEY];
    if (!checkRank(kNAME, "query", query, 3) || !checkRank(kNAME, "past_key", pastKey, 4))
    {
        return false;
    }
    int64_t const batch = query.d[0];
    int64_t const newTokens = query.d[1];
    int64_t const capacity = pastKey.d[2];
    ExpectedShape const expected[] = {
        {kQUERY, "query", 3, {batch, newTokens, queryWidth, 0}, {"B", "S", "num_heads * head_dim", ""}},
        {kKEY, "key", 3, {batch, newTokens, kvWidth, 0}, {"B", "S", "num_kv_heads * head_dim", ""}},
        {kVALUE, "value", 3, {batch, newTokens, kvWidth, 0}, {"B", "S", "num_kv_heads * head_dim", ""}},
        {kCOS, "cos", 3, {batch, newTokens, headDim / 2, 0}, {"B", "S", "head_dim / 2", ""}},
        {kSIN, "sin", 3, {batch, newTokens, headDim / 2, 0}, {"B", "S", "head_dim / 2", ""}},
        {kPAST_KEY, "past_key", 4, {batch, numKvHeads, capacity, headDim}, {"B", "num_kv_heads", "C", "head_dim"}},
        {kPAST_VALUE, "past_value", 4, {batch, numKvHeads, capacity, headDim}, {"B", "num_kv_heads", "C", "head_dim"}},
        {kPAST_LENGTH, "past_length", 1, {batch, 0, 0, 0}, {"B", "", "", ""}},
    };
    return checkExpectedShapes(kNAME, inputs, expected, sizeof expected / sizeof expected[0])
        && checkAttentionLimits(kNAME, mParameters, batch, newTokens, capacity)
        && (!isSplit(newTokens)
            || checkSplitLimits(batch, newTokens, capacity < 0 ? kUNKNOWN_DIMENSION : numSplits(capacity)));
}

int32_t AttentionPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const* /*shapeInputs*/,
    int32_t /*nbShapeInputs*/, DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& /*builder*/) noexcept
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
    outputs[kPRESENT_KEY] = inputs[kPAST_KEY];
    outputs[kPRESENT_VALUE] = inputs[kPAST_VALUE];
    return kSUCCESS;
}

bool AttentionPlugin::supportsFormatCombination(
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
    case kPAST_LENGTH: return tensor.type == DataType::kINT64;
    default:
        return tensor.type == inOut[kQUERY].desc.type && isDtypeServed(kKERNEL, static_cast<int32_t>(tensor.type));
    }
}

int32_t AttentionPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
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
int64_t AttentionPlugin::largestWorkspace(DynamicPluginTensorDesc const* inputs) const noexcept
{
    Dims const& query = inputs[kQUERY].max;
    Sizes const largest{query.d[0], query.d[1], inputs[kPAST_KEY].max.d[2]};
    // A call of fewer tokens than the largest may be split.
    int64_t const group = mParameters.num_heads / mParameters.num_kv_heads;
    int64_t const splitTokens = std::min(largest.newTokens, std::max<int64_t>(1, kernels::kSPLIT_ROWS / group));
    int64_t const splits = mostSplits(largest.capacity);
    if (!checkLargestQuery(kNAME, mParameters, query, largest.capacity)
        || !checkSplitLimits(largest.batch, splitTokens, splits))
    {
        return kNO_WORKSPACE;
    }
    return Workspace(mParameters, largest, splitTokens, splits, elementSize(inputs[kQUERY].desc.type)).bytes;
}

size_t AttentionPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t /*nbInputs*/,
    DynamicPluginTensorDesc const* /*outputs*/, int32_t /*nbOutputs*/) const noexcept
{
    int64_t const bytes = largestWorkspace(inputs);
    return bytes == kNO_WORKSPACE ? kIMPOSSIBLE_WORKSPACE : static_cast<size_t>(bytes);
}

//! The parts of one call's workspace.
AttentionPlugin::Workspace AttentionPlugin::workspaceOf(Sizes const& sizes, DataType type) const noexcept
{
    int64_t const splitTokens = isSplit(sizes.newTokens) ? sizes.newTokens : 0;
    return {mParameters, sizes, splitTokens, numSplits(sizes.capacity), elementSize(type)};
}

int32_t AttentionPlugin::onShapeChange(
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
    bool const fits = checkKnown(kNAME, dims, kNUM_INPUTS) && checkShapes(dims)
        && checkWorkspace(workspaceOf(sizesOf(dims[kQUERY], dims[kPAST_KEY]), in[kQUERY].type).bytes);
    return fits && prepareKernels(in[kQUERY].type) ? kSUCCESS : kFAILURE;
}

bool AttentionPlugin::copyCache(int64_t bytes, void const* past, void* present, cudaStream_t stream) const noexcept
{
    if (past == present || bytes == 0)
    {
        return true;
    }
    CudaDriver const* const driver = cudaDriver(kNAME);
    if (driver == nullptr)
    {
        return false;
    }
    CUresult const error
        = driver->memcpyDtoDAsync(deviceAddress(present), deviceAddress(past), static_cast<size_t>(bytes), stream);
    if (error != kCUDA_SUCCESS)
    {
        reportError(kNAME, "the KV cache was not copied to its output: %s (%d); %lld bytes", driver->nameOf(error), error,
            static_cast<long long>(bytes));
    }
    return error == kCUDA_SUCCESS;
}

//! Query -> workspace, key and value -> the cache, at past_length.
bool AttentionPlugin::rotateAndAppend(Sizes const& sizes, Workspace const& parts, void const* const* inputs,
    void* const* outputs, cudaStream_t stream) const noexcept
{
    kernels::RotateAndAppendArguments arguments;
    arguments.query = deviceAddress(inputs[kQUERY]);
    arguments.key = deviceAddress(inputs[kKEY]);
    arguments.value = deviceAddress(inputs[kVALUE]);
    arguments.cos = deviceAddress(inputs[kCOS]);
    arguments.sin = deviceAddress(inputs[kSIN]);
    arguments.past_length = deviceAddress(inputs[kPAST_LENGTH]);
    arguments.rotated_query = parts.at(parts.rotatedQuery);
    arguments.present_key = deviceAddress(outputs[kPRESENT_KEY]);
    arguments.present_value = deviceAddress(outputs[kPRESENT_VALUE]);
    arguments.new_tokens = static_cast<int32_t>(sizes.newTokens);
    arguments.num_heads = mParameters.num_heads;
    arguments.num_kv_heads = mParameters.num_kv_heads;
    arguments.capacity = static_cast<int32_t>(sizes.capacity);
    arguments.head_dim = mParameters.head_dim;
    // TensorRT hands over dense tensors: from token to token is one row.
    arguments.query_stride = mParameters.num_heads * mParameters.head_dim;
    arguments.key_stride = mParameters.num_kv_heads * mParameters.head_dim;
    arguments.value_stride = mParameters.num_kv_heads * mParameters.head_dim;
    return launch(kNAME, mRotateAndAppend, Grid{sizes.batch * sizes.newTokens, 1, 1}, arguments, stream);
}

//! What the two ways of attending over the cache have in common.
template <class Arguments>
Arguments AttentionPlugin::attentionArguments(
    Sizes const& sizes, Workspace const& parts, void const* pastLength, void* const* outputs) const noexcept
{
    Arguments arguments;
    arguments.rotated_query = parts.at(parts.rotatedQuery);
    arguments.present_key = deviceAddress(outputs[kPRESENT_KEY]);
    arguments.present_value = deviceAddress(outputs[kPRESENT_VALUE]);
    arguments.past_length = deviceAddress(pastLength);
    arguments.attn_output = deviceAddress(outputs[kATTN_OUTPUT]);
    arguments.scale = mParameters.scale;
    arguments.new_tokens = static_cast<int32_t>(sizes.newTokens);
    arguments.num_heads = mParameters.num_heads;
    arguments.num_kv_heads = mParameters.num_kv_heads;
    arguments.capacity = static_cast<int32_t>(sizes.capacity);
    arguments.head_dim = mParameters.head_dim;
    return arguments;
}

//! A tile's rows are the (token, head) pairs of one group: they share its key and value head.
Grid AttentionPlugin::gridOf(LoadedKernel const& kernel, Sizes const& sizes, int64_t pieces) const noexcept
{
    int64_t const rows = sizes.newTokens * (mParameters.num_heads / mParameters.num_kv_heads);
    return {ceilDiv(rows, kernel.image->rows) * pieces, mParameters.num_kv_heads, sizes.batch};
}

//! Workspace and cache -> attn_output.
bool AttentionPlugin::attendWhole(Sizes const& sizes, Workspace const& parts, void const* pastLength,
    void* const* outputs, cudaStream_t stream) const noexcept
{
    auto arguments = attentionArguments<kernels::AttentionPrefillArguments>(sizes, parts, pastLength, outputs);
    return launch(kNAME, mPrefill, gridOf(mPrefill, sizes, 1), arguments, stream);
}

//! The same by pieces of the cache, whose results are merged where there are several.
bool AttentionPlugin::attendInPieces(Sizes const& sizes, Workspace const& parts, void const* pastLength,
    void* const* outputs, cudaStream_t stream) const noexcept
{
    int64_t const pieces = numSplits(sizes.capacity);
    auto split = attentionArguments<kernels::AttentionSplitArguments>(sizes, parts, pastLength, outputs);
    split.partial_output = parts.at(parts.partialOutput);
    split.partial_softmax = parts.at(parts.partialSoftmax);
    split.num_splits = static_cast<int32_t>(pieces);
    split.split_keys = static_cast<int32_t>(splitKeys(sizes.capacity));
    if (!launch(kNAME, mSplit, gridOf(mSplit, sizes, pieces), split, stream))
    {
        return false;
    }
    if (pieces == 1)
    {
        return true;
    }
    kernels::AttentionCombineArguments combine;
    combine.partial_output = split.partial_output;
    combine.partial_softmax = split.partial_softmax;
    combine.past_length = split.past_length;
    combine.attn_output = split.attn_output;
    combine.new_tokens = split.new_tokens;
    combine.num_heads = split.num_heads;
    combine.capacity = split.capacity;
    combine.head_dim = split.head_dim;
    combine.num_splits = split.num_splits;
    combine.split_keys = split.split_keys;
    return launch(kNAME, mCombine, Grid{sizes.batch * sizes.newTokens * mParameters.num_heads, 1, 1}, combine, stream);
}

int32_t AttentionPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    Dims const& query = inputDesc[kQUERY].dims;
    Dims const& cache = inputDesc[kPAST_KEY].dims;
    Sizes const sizes = sizesOf(query, cache);
    int64_t const cacheBytes
        = cache.d[0] * cache.d[1] * cache.d[2] * cache.d[3] * elementSize(inputDesc[kPAST_KEY].type);
    Workspace parts = workspaceOf(sizes, inputDesc[kQUERY].type);
    parts.start = workspace;
    if (!checkReady() || !checkWorkspace(parts.bytes)
        || !copyCache(cacheBytes, inputs[kPAST_KEY], outputs[kPRESENT_KEY], stream)
        || !copyCache(cacheBytes, inputs[kPAST_VALUE], outputs[kPRESENT_VALUE], stream))
    {
        return kFAILURE;
    }
    if (sizes.batch == 0 || sizes.newTokens == 0)
    {
        return kSUCCESS;
    }
    if (!checkAligned("query", inputs[kQUERY]) || !checkAligned("key", inputs[kKEY])
        || !checkAligned("value", inputs[kVALUE]) || !checkAligned("cos", inputs[kCOS])
        || !checkAligned("sin", inputs[kSIN]) || !checkAligned("present_key", outputs[kPRESENT_KEY])
        || !checkAligned("present_value", outputs[kPRESENT_VALUE])
        || !checkAligned("attn_output", outputs[kATTN_OUTPUT]) || !checkAligned("workspace", workspace))
    {
        return kFAILURE;
    }
    void const* const pastLength = inputs[kPAST_LENGTH];
    bool const isDone = rotateAndAppend(sizes, parts, inputs, outputs, stream)
        && (isSplit(sizes.newTokens) ? attendInPieces(sizes, parts, pastLength, outputs, stream)
                                     : attendWhole(sizes, parts, pastLength, outputs, stream));
    return isDone ? kSUCCESS : kFAILURE;
}
} // namespace llama_export

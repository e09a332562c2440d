//! \file
//! Tensors for the fuzzer: shapes that fit a node, memory for them, and a call of enqueue with it.
#pragma once

#include "fuzz_fields.h"

#include <algorithm>

namespace fuzz
{
struct Sizes
{
    int64_t batch;
    int64_t tokens;
    int64_t capacity;
};

//! A size: small; or, if extremes are wanted, anything that shapes could agree on.
inline int64_t sizeFrom(Random& random, bool isOrdinary) noexcept
{
    if (isOrdinary || random.oneIn(2))
    {
        return random.below(9);
    }
    return random.oneIn(3) ? random.pick(kEDGES) : random.pick(kLARGE);
}

inline Dims dimsOf(std::initializer_list<int64_t> sizes) noexcept
{
    Dims dims{static_cast<int32_t>(sizes.size()), {}};
    int32_t axis = 0;
    for (int64_t const size : sizes)
    {
        dims.d[axis++] = size;
    }
    return dims;
}

//! The inputs of an attention of these sizes.
inline std::vector<Dims> attentionShapes(Op const& op, Attributes const& attributes, Sizes const& sizes)
{
    Dims const query = dimsOf({sizes.batch, sizes.tokens, attributes.numHeads * attributes.headDim});
    Dims const key = dimsOf({sizes.batch, sizes.tokens, attributes.numKvHeads * attributes.headDim});
    Dims const angles = dimsOf({sizes.batch, sizes.tokens, attributes.headDim / 2});
    if (op.kind == Kind::kMASKED)
    {
        return {query, key, key, angles, angles, dimsOf({sizes.batch, sizes.tokens})};
    }
    Dims const cache = dimsOf({sizes.batch, attributes.numKvHeads, sizes.capacity, attributes.headDim});
    return {query, key, key, angles, angles, cache, cache, dimsOf({sizes.batch})};
}

//! Shapes of the inputs that agree with each other and with the attributes.
inline std::vector<Dims> shapesOf(Op const& op, Attributes const& attributes, bool isOrdinary, Random& random)
{
    if (op.kind == Kind::kNORM)
    {
        Dims hidden{static_cast<int32_t>(random.below(isOrdinary ? 5 : Dims::MAX_DIMS)) + 1, {}};
        for (int32_t axis = 0; axis < hidden.nbDims; ++axis)
        {
            hidden.d[axis] = sizeFrom(random, isOrdinary);
        }
        std::vector<Dims> shapes(static_cast<size_t>(op.numInputs), hidden);
        shapes.back() = dimsOf({hidden.d[hidden.nbDims - 1]});
        return shapes;
    }
    int64_t const batch = sizeFrom(random, isOrdinary);
    int64_t const tokens = sizeFrom(random, isOrdinary);
    return attentionShapes(op, attributes, {batch, tokens, sizeFrom(random, isOrdinary)});
}

inline void mutateShapes(std::vector<Dims>& shapes, Random& random) noexcept
{
    constexpr int32_t kRANKS[] = {kMIN32, -1, 0, 1, 2, 3, 4, 5, 8, 9, 1000, kMAX32};
    Dims& dims = shapes[static_cast<size_t>(random.below(static_cast<int64_t>(shapes.size())))];
    int64_t& size = dims.d[random.below(dims.nbDims >= 1 && dims.nbDims <= Dims::MAX_DIMS ? dims.nbDims : 1)];
    switch (random.below(3))
    {
    case 0: dims.nbDims = random.pick(kRANKS); break;
    case 1: size = random.pick(kEDGES); break;
    default: size = size == kMAX64 ? kMIN64 : size + 1; break;
    }
}

inline bool isSame(Dims const& a, Dims const& b) noexcept
{
    return a.nbDims == b.nbDims && a.nbDims >= 0 && a.nbDims <= Dims::MAX_DIMS
        && std::memcmp(a.d, b.d, static_cast<size_t>(a.nbDims) * sizeof a.d[0]) == 0;
}

//! Whether a plugin may run these shapes: they agree, and every size is a size.
inline bool isConsistent(Op const& op, Attributes const& attributes, std::vector<Dims> const& shapes) noexcept
{
    for (Dims const& dims : shapes)
    {
        if (dims.nbDims < 1 || dims.nbDims > Dims::MAX_DIMS)
        {
            return false;
        }
        for (int32_t axis = 0; axis < dims.nbDims; ++axis)
        {
            if (dims.d[axis] < 0)
            {
                return false;
            }
        }
    }
    Dims const& first = shapes.front();
    if (op.kind == Kind::kNORM)
    {
        return isSame(shapes.back(), dimsOf({first.d[first.nbDims - 1]})) && (shapes.size() == 2 || isSame(first, shapes[1]));
    }
    Dims const key = dimsOf({first.d[0], first.d[1], attributes.numKvHeads * attributes.headDim});
    Dims const angles = dimsOf({first.d[0], first.d[1], attributes.headDim / 2});
    bool const areRows = isSame(first, dimsOf({first.d[0], first.d[1], attributes.numHeads * attributes.headDim}))
        && isSame(shapes[1], key) && isSame(shapes[2], key) && isSame(shapes[3], angles) && isSame(shapes[4], angles);
    if (op.kind == Kind::kMASKED)
    {
        return areRows && isSame(shapes[5], dimsOf({first.d[0], first.d[1]}));
    }
    Dims const cache = dimsOf({first.d[0], attributes.numKvHeads, shapes[kPAST_KEY].d[2], attributes.headDim});
    return areRows && isSame(shapes[5], cache) && isSame(shapes[6], cache) && isSame(shapes[7], dimsOf({first.d[0]}));
}

inline int64_t bytesOf(int32_t dtype) noexcept
{
    switch (dtype)
    {
    case 0: return 4;
    case 8: return 8;
    default: return 2;
    }
}

//! Bytes of a tensor; as many as the address space of the checking driver gives one, if there are more.
inline uint64_t tensorBytes(Dims const& dims, int32_t dtype) noexcept
{
    constexpr uint64_t kMOST = checking::kMOST_BYTES;
    unsigned __int128 bytes = static_cast<unsigned __int128>(bytesOf(dtype));
    for (int32_t axis = 0; axis < dims.nbDims; ++axis)
    {
        if (dims.d[axis] == 0)
        {
            return 0;
        }
        bytes = bytes > kMOST ? kMOST + 1 : bytes * static_cast<unsigned __int128>(dims.d[axis]);
    }
    return bytes > kMOST ? kMOST : static_cast<uint64_t>(bytes);
}

//! The type of a tensor of a node, inputs before outputs.
inline int32_t typeOf(Op const& op, int32_t tensor, int32_t dtype) noexcept
{
    constexpr int32_t kFLOAT32 = 0;
    constexpr int32_t kINT64 = 8;
    if (op.kind == Kind::kNORM)
    {
        return dtype;
    }
    if (tensor == 3 || tensor == 4) // cos, sin
    {
        return kFLOAT32;
    }
    return tensor == op.numInputs - 1 ? kINT64 : dtype; // past_length, attention_mask
}

//! Inputs and outputs; an output has the shape of the input it is derived from.
inline std::vector<PluginTensorDesc> descsOf(Op const& op, std::vector<Dims> const& shapes, int32_t dtype)
{
    std::vector<PluginTensorDesc> descs;
    for (int32_t i = 0; i < op.numInputs + op.numOutputs; ++i)
    {
        int32_t const output = i - op.numInputs;
        int32_t const source = output < 0 ? i : (output > 0 && op.kind == Kind::kATTENTION ? kPAST_KEY + output - 1 : 0);
        descs.push_back({shapes[static_cast<size_t>(source)], static_cast<DataType>(typeOf(op, i, dtype)),
            TensorFormat::kLINEAR, 1.0F});
    }
    return descs;
}

//! Bytes of the rotated query, which every workspace holds; more than can be had where a size is not known.
inline unsigned __int128 queryBytes(Dims const& query, int32_t dtype) noexcept
{
    unsigned __int128 bytes = static_cast<unsigned __int128>(bytesOf(dtype));
    for (int32_t axis = 0; axis < 3 && query.nbDims == 3; ++axis)
    {
        if (query.d[axis] < 0)
        {
            return kMORE_THAN_ANY_DEVICE_HAS;
        }
        if (query.d[axis] == 0)
        {
            return 0;
        }
        bytes = bytes > kMORE_THAN_ANY_DEVICE_HAS ? bytes : bytes * static_cast<unsigned __int128>(query.d[axis]);
    }
    return bytes;
}

//! As a profile of these shapes, and of those up to the largest.
inline std::vector<DynamicPluginTensorDesc> dynamicOf(
    std::vector<PluginTensorDesc> const& descs, std::vector<PluginTensorDesc> const& largest, Random& random)
{
    std::vector<DynamicPluginTensorDesc> made;
    for (size_t i = 0; i < descs.size(); ++i)
    {
        Dims const& dims = descs[i].dims;
        DynamicPluginTensorDesc dynamic{descs[i], dims, largest[i].dims, dims};
        for (int32_t axis = 0; axis < Dims::MAX_DIMS; ++axis)
        {
            if (dims.d[axis] != largest[i].dims.d[axis] || random.oneIn(2))
            {
                dynamic.desc.dims.d[axis] = -1;
                dynamic.min.d[axis] = 1;
            }
        }
        made.push_back(dynamic);
    }
    return made;
}

// ---- calls ----------------------------------------------------------------------------------------------------------

inline Plugin create(Op const& op, Fields& fields, TensorRTPhase phase)
{
    gDoing.call = "createPlugin";
    return Plugin(creatorOf(op).createPlugin("node", fields.collection(), phase));
}

//! What an engine stores makes the same plugin again.
inline Plugin restored(Op const& op, Plugin const& plugin)
{
    PluginFieldCollection const* const fields = plugin.runtime().getFieldsToSerialize();
    std::string const expected = stored(*fields);
    gDoing.call = "createPlugin from an engine";
    Plugin made(creatorOf(op).createPlugin("node", fields, TensorRTPhase::kRUNTIME));
    if (!made)
    {
        fail("what an engine stored is refused: %s", takeSentence().c_str());
    }
    expectSilence();
    if (stored(*made.runtime().getFieldsToSerialize()) != expected)
    {
        fail("a restored plugin stores other fields");
    }
    return made;
}

//! enqueue, after an accepted onShapeChange with these tensors; or after a refused one, which then has to refuse too.
inline void checkEnqueue(Op const& op, Plugin const& plugin, std::vector<PluginTensorDesc> const& descs,
    uint64_t workspaceBytes, Random& random, bool isRefused = false)
{
    gDoing.call = isRefused ? "enqueue after a refusal" : "enqueue";
    bool const isAliased = random.oneIn(2);
    int32_t const misaligned = !isRefused && random.oneIn(8) ? static_cast<int32_t>(random.below(op.numInputs + op.numOutputs)) : -1;
    std::vector<checking::Range> ranges;
    std::vector<void*> addresses;
    CUdeviceptr next = 0x10000;
    for (int32_t i = 0; i < op.numInputs + op.numOutputs + 1; ++i)
    {
        bool const isWorkspace = i == op.numInputs + op.numOutputs;
        PluginTensorDesc const& desc = descs[static_cast<size_t>(isWorkspace ? 0 : i)];
        uint64_t const bytes = isWorkspace ? workspaceBytes : tensorBytes(desc.dims, static_cast<int32_t>(desc.type));
        int32_t const output = i - op.numInputs;
        CUdeviceptr begin = next + (i == misaligned ? 1 + static_cast<CUdeviceptr>(random.below(15)) : 0);
        if (isAliased && op.kind == Kind::kATTENTION && (output == 1 || output == 2))
        {
            begin = reinterpret_cast<CUdeviceptr>(addresses[static_cast<size_t>(kPAST_KEY + output - 1)]);
        }
        ranges.push_back({begin, bytes});
        addresses.push_back(reinterpret_cast<void*>(begin));
        next += (bytes + 0x1ff) & ~CUdeviceptr{0xff};
    }
    checking::Thread& thread = checking::thisThread();
    CUstream const stream = reinterpret_cast<CUstream>(0x100 + random.below(16));
    thread.ranges = ranges.data();
    thread.numRanges = ranges.size();
    thread.stream = stream;
    thread.isEnqueuing = true;
    thread.launches = 0;
    thread.copies = 0;
    thread.failing = !isRefused && random.oneIn(8) ? static_cast<uint32_t>(random.next()) : 0;
    std::unique_ptr<void const*[]> const inputs(new void const*[static_cast<size_t>(op.numInputs)]);
    std::unique_ptr<void*[]> const outputs(new void*[static_cast<size_t>(op.numOutputs)]);
    std::copy(addresses.begin(), addresses.begin() + op.numInputs, inputs.get());
    std::copy(addresses.begin() + op.numInputs, addresses.end() - 1, outputs.get());
    int32_t const status = plugin.runtime().enqueue(
        descs.data(), descs.data() + op.numInputs, inputs.get(), outputs.get(), addresses.back(), stream);
    bool const isRight = misaligned < 0 && thread.failing == 0;
    Verdict const verdict = isRefused ? Verdict::kREFUSE : isRight ? Verdict::kACCEPT : Verdict::kEITHER;
    bool const isDone = judge(status == 0, verdict, random);
    if (isRefused && thread.launches + thread.copies > 0)
    {
        fail("a refused call launched a kernel or a copy");
    }
    Dims const& first = descs[kQUERY].dims;
    bool isEmpty = false;
    for (int32_t axis = 0; axis + 1 < first.nbDims; ++axis)
    {
        isEmpty = isEmpty || first.d[axis] == 0;
    }
    if (isDone && (thread.launches > 0) == isEmpty)
    {
        fail("%lld kernels were launched for a node that has %s to do", static_cast<long long>(thread.launches),
            isEmpty ? "nothing" : "something");
    }
    gTotals.runs += isDone ? 1 : 0;
    gTotals.launches += thread.launches;
    thread.isEnqueuing = false;
    thread.failing = 0;
    thread.numRanges = 0;
}
} // namespace fuzz

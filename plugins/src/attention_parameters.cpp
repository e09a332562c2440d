#include "attention_parameters.h"

#include "launch.h"
#include "shapes.h"

#include <cmath>
#include <limits>

namespace llama_export
{
using namespace nvinfer1;

namespace
{
//! Of one tensor. No device holds so many, and byte counts of a few such tensors stay within 63 bits.
constexpr int64_t kMAX_ELEMENTS = int64_t{1} << 50;
} // namespace

void readAttentionParameters(FieldReader& reader, AttentionParameters& parameters) noexcept
{
    reader.readInteger("num_heads", parameters.num_heads);
    reader.require(parameters.num_heads >= 1, "num_heads", parameters.num_heads, "at least 1");
    reader.readInteger("num_kv_heads", parameters.num_kv_heads);
    reader.require(parameters.num_kv_heads >= 1 && parameters.num_heads % parameters.num_kv_heads == 0, "num_kv_heads",
        parameters.num_kv_heads, "a divisor of num_heads");
    reader.readInteger("head_dim", parameters.head_dim);
    reader.require(parameters.head_dim >= 1, "head_dim", parameters.head_dim, "at least 1");
    reader.readFloat("scale", parameters.scale);
    reader.require(std::isfinite(parameters.scale) && parameters.scale > 0.0F, "scale", parameters.scale,
        "a finite number greater than 0");
}

void writeAttentionParameters(AttentionParameters const& parameters, PluginField* fields) noexcept
{
    fields[0] = {"num_heads", &parameters.num_heads, PluginFieldType::kINT32, 1};
    fields[1] = {"num_kv_heads", &parameters.num_kv_heads, PluginFieldType::kINT32, 1};
    fields[2] = {"head_dim", &parameters.head_dim, PluginFieldType::kINT32, 1};
    fields[3] = {"scale", &parameters.scale, PluginFieldType::kFLOAT32, 1};
}

bool checkGranted(char const* plugin, int64_t needed, int64_t granted) noexcept
{
    if (needed <= std::max<int64_t>(0, granted))
    {
        return true;
    }
    if (granted == kNO_WORKSPACE)
    {
        reportError(plugin,
            "these shapes need a workspace of %lld bytes: got one of unknown size, expected a plugin that was configured; "
            "hint: TensorRT has to call configurePlugin before the plugin runs",
            static_cast<long long>(needed));
        return false;
    }
    reportError(plugin,
        "the workspace is too small for these shapes: got %lld bytes, which the engine grants, expected at least %lld; hint: "
        "keep to the shapes of the optimization profile, or build the engine again",
        static_cast<long long>(granted), static_cast<long long>(needed));
    return false;
}

bool checkExpectedShapes(char const* plugin, Dims const* inputs, ExpectedShape const* expected, int32_t count) noexcept
{
    for (int32_t i = 0; i < count; ++i)
    {
        ExpectedShape const& tensor = expected[i];
        Dims const& dims = inputs[tensor.input];
        if (!checkRank(plugin, tensor.name, dims, tensor.rank))
        {
            return false;
        }
        for (int32_t axis = 0; axis < tensor.rank; ++axis)
        {
            if (!checkDimension(plugin, tensor.name, dims, axis, tensor.dims[axis], tensor.meanings[axis]))
            {
                return false;
            }
        }
    }
    return true;
}

bool checkHeadDim(char const* plugin, char const* kernel, AttentionParameters const& parameters) noexcept
{
    if (parameters.head_dim % 2 == 0 && isWidthServed(kernel, parameters.head_dim))
    {
        return true;
    }
    reportError(plugin, "no kernel serves this head_dim: got %d, expected an even number from 2 to 256; hint: build with "
                        "--ops %s=native",
        parameters.head_dim, plugin);
    return false;
}

bool checkAttentionLimits(
    char const* plugin, AttentionParameters const& parameters, int64_t batch, int64_t tokens, int64_t capacity) noexcept
{
    constexpr int64_t kMAX_INT32 = std::numeric_limits<int32_t>::max();
    int64_t const queryWidth = static_cast<int64_t>(parameters.num_heads) * parameters.head_dim;
    int64_t const groupSize = parameters.num_heads / parameters.num_kv_heads;
    return checkLimit(plugin, "the batch", batch, kMAX_GRID_YZ)
        && checkLimit(plugin, "num_kv_heads", parameters.num_kv_heads, kMAX_GRID_YZ)
        && checkLimit(plugin, "num_heads * head_dim", queryWidth, kMAX_INT32)
        && checkLimit(plugin, "the KV-cache capacity", capacity, kMAX_INT32)
        && checkLimit(plugin, "the KV-cache capacity * head_dim", productOf({capacity, parameters.head_dim}),
            kMAX_INT32)
        && checkLimit(plugin, "batch * new tokens", productOf({batch, tokens}), kMAX_INT32)
        && checkLimit(plugin, "new tokens * heads in a group", productOf({tokens, groupSize}), kMAX_INT32)
        && checkLimit(plugin, "the number of elements of the query", productOf({batch, tokens, queryWidth}), kMAX_ELEMENTS)
        && checkLimit(plugin, "the number of elements of the KV cache",
            productOf({batch, parameters.num_kv_heads, capacity, parameters.head_dim}), kMAX_ELEMENTS);
}

bool checkLargestQuery(
    char const* plugin, AttentionParameters const& parameters, Dims const& query, int64_t capacity) noexcept
{
    int64_t const width = static_cast<int64_t>(parameters.num_heads) * parameters.head_dim;
    if (capacity < 0)
    {
        reportError(plugin, "the largest KV-cache capacity is not known: got %lld", static_cast<long long>(capacity));
        return false;
    }
    return checkRank(plugin, "query", query, 3) && checkKnown(plugin, &query, 1)
        && checkDimension(plugin, "query", query, 2, width, "num_heads * head_dim")
        && checkAttentionLimits(plugin, parameters, query.d[0], query.d[1], capacity);
}
} // namespace llama_export

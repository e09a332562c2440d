#include "shapes.h"

#include "log.h"

namespace llama_export
{
using nvinfer1::Dims;

Dims constantDims(nvinfer1::DimsExprs const& dims) noexcept
{
    Dims result{dims.nbDims, {}};
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        result.d[i] = dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : kUNKNOWN_DIMENSION;
    }
    return result;
}

bool checkCount(char const* plugin, char const* what, int32_t got, int32_t expected) noexcept
{
    if (got != expected)
    {
        reportError(plugin, "wrong number of %s: got %d, expected %d", what, got, expected);
    }
    return got == expected;
}

bool checkRank(char const* plugin, char const* tensor, Dims const& dims, int32_t expected) noexcept
{
    if (dims.nbDims != expected)
    {
        reportError(plugin, "`%s` is of the wrong rank: got %d dimensions, expected %d", tensor, dims.nbDims, expected);
    }
    return dims.nbDims == expected;
}

bool checkDimension(char const* plugin, char const* tensor, Dims const& dims, int32_t axis, int64_t expected,
    char const* meaning) noexcept
{
    int64_t const got = dims.d[axis];
    if (got == expected || got == kUNKNOWN_DIMENSION || expected == kUNKNOWN_DIMENSION)
    {
        return true;
    }
    reportError(plugin, "dimension %d of `%s` does not fit: got %lld, expected %lld (%s)", axis, tensor,
        static_cast<long long>(got), static_cast<long long>(expected), meaning);
    return false;
}

bool checkLimit(char const* plugin, char const* what, int64_t got, int64_t limit) noexcept
{
    bool const fits = got <= limit;
    if (!fits)
    {
        reportError(plugin, "%s is too large for the kernels: got %lld, expected at most %lld", what,
            static_cast<long long>(got), static_cast<long long>(limit));
    }
    return fits;
}
} // namespace llama_export

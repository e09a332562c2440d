#include "shapes.h"

#include "log.h"

#include <limits>

namespace llama_export
{
using nvinfer1::Dims;

int64_t productOf(std::initializer_list<int64_t> sizes) noexcept
{
    int64_t product = 1;
    for (int64_t const size : sizes)
    {
        if (size < 0)
        {
            return kUNKNOWN_DIMENSION;
        }
        if (__builtin_mul_overflow(product, size, &product))
        {
            product = std::numeric_limits<int64_t>::max();
        }
    }
    return product;
}

Dims constantDims(nvinfer1::DimsExprs const& dims) noexcept
{
    Dims result{dims.nbDims, {}};
    for (int32_t i = 0; i < dims.nbDims && i < Dims::MAX_DIMS; ++i)
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

bool checkKnown(char const* plugin, Dims const* inputs, int32_t count) noexcept
{
    for (int32_t i = 0; i < count; ++i)
    {
        Dims const& dims = inputs[i];
        if (dims.nbDims < 0 || dims.nbDims > Dims::MAX_DIMS)
        {
            reportError(plugin, "input %d is of an impossible rank: got %d dimensions, expected 0 to %d", i, dims.nbDims,
                Dims::MAX_DIMS);
            return false;
        }
        for (int32_t axis = 0; axis < dims.nbDims; ++axis)
        {
            if (dims.d[axis] < 0)
            {
                reportError(plugin, "dimension %d of input %d is not known at run time: got %lld, expected 0 or more",
                    axis, i, static_cast<long long>(dims.d[axis]));
                return false;
            }
        }
    }
    return true;
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
    bool const isSize = got >= 0 || got == kUNKNOWN_DIMENSION;
    bool const fits = isSize && got <= limit;
    if (!isSize)
    {
        reportError(plugin, "%s is no size: got %lld, expected 0 to %lld", what, static_cast<long long>(got),
            static_cast<long long>(limit));
    }
    else if (!fits)
    {
        reportError(plugin, "%s is too large for the kernels: got %lld, expected at most %lld", what,
            static_cast<long long>(got), static_cast<long long>(limit));
    }
    return fits;
}
} // namespace llama_export

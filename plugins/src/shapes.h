//! \file
//! Checks of tensor shapes that say what they found. A dimension of -1 is not known yet and passes.
#pragma once

#include "tensorrt_plugin_abi.h"

#include <initializer_list>

namespace llama_export
{
constexpr int64_t kUNKNOWN_DIMENSION = -1;

//! The product of sizes: the largest integer where it is beyond that, -1 where a size is not known yet.
int64_t productOf(std::initializer_list<int64_t> sizes) noexcept;

//! Symbolic dimensions as numbers; those that are not constant become -1.
nvinfer1::Dims constantDims(nvinfer1::DimsExprs const& dims) noexcept;

//! Reports and returns false where the number of tensors is another.
bool checkCount(char const* plugin, char const* what, int32_t got, int32_t expected) noexcept;

//! Reports and returns false where the rank is another.
bool checkRank(char const* plugin, char const* tensor, nvinfer1::Dims const& dims, int32_t expected) noexcept;

//! Reports and returns false where a tensor has a rank that TensorRT has not, or a dimension that is still unknown when the
//! plugin is about to run.
bool checkKnown(char const* plugin, nvinfer1::Dims const* inputs, int32_t count) noexcept;

//! Reports and returns false where dimension `axis` is known and another; `meaning` explains the number expected.
bool checkDimension(char const* plugin, char const* tensor, nvinfer1::Dims const& dims, int32_t axis, int64_t expected,
    char const* meaning) noexcept;

//! Reports and returns false where a size is known and does not lie in 0..limit.
bool checkLimit(char const* plugin, char const* what, int64_t got, int64_t limit) noexcept;
} // namespace llama_export

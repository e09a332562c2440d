//! \file
//! What the two attention plugins share: their attributes, and checks of shapes against them.
#pragma once

#include "plugin_base.h"

namespace llama_export
{
struct AttentionParameters
{
    int32_t num_heads{1};
    int32_t num_kv_heads{1};
    int32_t head_dim{};
    float scale{}; //!< multiplies the scores
    int32_t dtype{kNO_DTYPE};
};

constexpr int32_t kNUM_ATTENTION_ATTRIBUTES = 4;

void readAttentionParameters(FieldReader& reader, AttentionParameters& parameters) noexcept;
void writeAttentionParameters(AttentionParameters const& parameters, nvinfer1::PluginField* fields) noexcept;

//! The shape an input must have; what is not known yet (a negative number) fits everything.
struct ExpectedShape
{
    int32_t input;
    char const* name;
    int32_t rank;
    int64_t dims[4];
    char const* meanings[4];
};

bool checkExpectedShapes(
    char const* plugin, nvinfer1::Dims const* inputs, ExpectedShape const* expected, int32_t count) noexcept;

//! An even head_dim that the kernels serve.
bool checkHeadDim(char const* plugin, char const* kernel, AttentionParameters const& parameters) noexcept;

//! Sizes that the kernels hold in 32 bits, or that are dimensions of a grid.
bool checkAttentionLimits(
    char const* plugin, AttentionParameters const& parameters, int64_t batch, int64_t tokens, int64_t capacity) noexcept;

//! The largest query and cache of an optimization profile, which the workspace has to serve: known, and within the limits.
bool checkLargestQuery(
    char const* plugin, AttentionParameters const& parameters, nvinfer1::Dims const& query, int64_t capacity) noexcept;
} // namespace llama_export

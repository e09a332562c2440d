//! \file
//! What the two attention plugins share: their attributes, and checks of shapes against them.
#pragma once

#include "plugin_base.h"

#include <algorithm>

namespace llama_export
{
//! Serialised where configurePlugin() has not told the largest shapes.
constexpr int64_t kNO_WORKSPACE = -1;

struct AttentionParameters
{
    int32_t num_heads{1};
    int32_t num_kv_heads{1};
    int32_t head_dim{};
    float scale{}; //!< multiplies the scores
    int32_t dtype{kNO_DTYPE};
    int64_t workspace_bytes{kNO_WORKSPACE}; //!< that TensorRT lends to every call: what configurePlugin() asked for
};

constexpr int32_t kNUM_ATTENTION_ATTRIBUTES = 4;

void readAttentionParameters(FieldReader& reader, AttentionParameters& parameters) noexcept;
void writeAttentionParameters(AttentionParameters const& parameters, nvinfer1::PluginField* fields) noexcept;

//! Reports and returns false where a call needs more workspace than TensorRT lends; `granted` may be kNO_WORKSPACE.
bool checkGranted(char const* plugin, int64_t needed, int64_t granted) noexcept;

//! What the two attention plugins share: the attributes, and the check that a call fits its workspace.
//!
//! TensorRT lends as much as getWorkspaceSize() asks for at the largest shapes of a profile, and runs every smaller shape with
//! it. So the plugins ask for the most that any shape up to the largest needs, note that number in configurePlugin(), and an
//! engine stores it. Before a launch the need is compared with it: an engine whose number came from another rule is refused,
//! where it would write beyond its workspace.
template <class Derived>
class AttentionBase : public PluginBase<Derived, AttentionParameters, kNUM_ATTENTION_ATTRIBUTES, kNUM_BASE_STORED + 1>
{
public:
    using Base = PluginBase<Derived, AttentionParameters, kNUM_ATTENTION_ATTRIBUTES, kNUM_BASE_STORED + 1>;
    using Base::Base;

    static void read(FieldReader& reader, AttentionParameters& parameters) noexcept
    {
        readAttentionParameters(reader, parameters);
    }
    static void write(AttentionParameters const& parameters, nvinfer1::PluginField* fields) noexcept
    {
        writeAttentionParameters(parameters, fields);
    }
    static void readStored(FieldReader& reader, AttentionParameters& parameters) noexcept
    {
        Base::readStored(reader, parameters);
        reader.readInteger("workspace_bytes", parameters.workspace_bytes);
        reader.require(parameters.workspace_bytes >= kNO_WORKSPACE, "workspace_bytes",
            static_cast<double>(parameters.workspace_bytes), "a number of bytes");
    }
    static void writeStored(AttentionParameters const& parameters, nvinfer1::PluginField* fields) noexcept
    {
        Base::writeStored(parameters, fields);
        fields[kNUM_BASE_STORED]
            = {"workspace_bytes", &parameters.workspace_bytes, nvinfer1::PluginFieldType::kINT64, 1};
    }

protected:
    //! Notes what was asked for. The most of all calls: one object may be configured for several profiles.
    void noteWorkspace(int64_t bytes) noexcept
    {
        this->mParameters.workspace_bytes = std::max(this->mParameters.workspace_bytes, bytes);
    }

    //! Reports a call that needs more than was asked for.
    bool checkWorkspace(int64_t needed) const noexcept
    {
        return checkGranted(Derived::kNAME, needed, this->mParameters.workspace_bytes);
    }
};

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

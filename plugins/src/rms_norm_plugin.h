//! \file
//! LlamaRMSNorm    (hidden_states [.., E], weight [E]; epsilon) -> normed [.., E]
//! LlamaAddRMSNorm (hidden_states [.., E], residual [.., E], weight [E]; epsilon) -> normed, new_residual [.., E]
//!
//! All tensors are of one type: float32, float16 or bfloat16. The kernels say how they round (kernels/rms_norm.py).
#pragma once

#include "launch.h"
#include "plugin_base.h"

namespace llama_export
{
//! Serialised where configurePlugin() has not told the hidden size.
constexpr int32_t kNO_HIDDEN_SIZE = -1;

struct RmsNormParameters
{
    float epsilon{};           //!< added to the mean of squares, inside the root
    int32_t dtype{kNO_DTYPE};
    int32_t hidden_size{kNO_HIDDEN_SIZE}; //!< E, which decides on the kernel
};

//! What the two norms share: everything but the residual.
template <class Derived>
class NormPlugin : public PluginBase<Derived, RmsNormParameters, 1, kNUM_BASE_STORED + 1>
{
public:
    using Base = PluginBase<Derived, RmsNormParameters, 1, kNUM_BASE_STORED + 1>;
    using Base::Base;

    static void read(FieldReader& reader, RmsNormParameters& parameters) noexcept;
    static void write(RmsNormParameters const& parameters, nvinfer1::PluginField* fields) noexcept;

    static void readStored(FieldReader& reader, RmsNormParameters& parameters) noexcept;
    static void writeStored(RmsNormParameters const& parameters, nvinfer1::PluginField* fields) noexcept;
    static bool isConfigured(RmsNormParameters const& parameters) noexcept;

    bool loadKernels() noexcept;

    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
        int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;

protected:
    //! Programs of the kernel, each of which takes a number of rows.
    Grid gridOf(int64_t rows) const noexcept
    {
        return {ceilDiv(rows, mKernel.image->rows), 1, 1};
    }

    LoadedKernel mKernel;

private:
    static bool checkShapes(nvinfer1::Dims const* inputs) noexcept;
};

class RmsNormPlugin final : public NormPlugin<RmsNormPlugin>
{
public:
    static constexpr char const* kNAME = "LlamaRMSNorm";
    static constexpr char const* kKERNEL = "rms_norm";
    enum Input : int32_t
    {
        kHIDDEN_STATES,
        kWEIGHT,
        kNUM_INPUTS
    };
    enum Output : int32_t
    {
        kNORMED,
        kNUM_OUTPUTS
    };
    using NormPlugin::NormPlugin;

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
};

class AddRmsNormPlugin final : public NormPlugin<AddRmsNormPlugin>
{
public:
    static constexpr char const* kNAME = "LlamaAddRMSNorm";
    static constexpr char const* kKERNEL = "add_rms_norm";
    enum Input : int32_t
    {
        kHIDDEN_STATES,
        kRESIDUAL,
        kWEIGHT,
        kNUM_INPUTS
    };
    enum Output : int32_t
    {
        kNORMED,
        kNEW_RESIDUAL,
        kNUM_OUTPUTS
    };
    using NormPlugin::NormPlugin;

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
};
} // namespace llama_export

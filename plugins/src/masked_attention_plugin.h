//! \file
//! LlamaMaskedAttention: rotates query and key and attends, causally, over one padded batch. There is no cache.
//!
//! B batch, S tokens, H num_heads, G num_kv_heads, D head_dim, T float32, float16 or bfloat16:
//!
//!   query T [B, S, H*D]   key, value T [B, S, G*D]   cos, sin float32 [B, S, D/2]   attention_mask int64 [B, S]
//!   -> attn_output T [B, S, H*D]
//!
//! The batch is appended to an empty cache of its own length, which lies in the workspace.
#pragma once

#include "attention_parameters.h"

namespace llama_export
{
class MaskedAttentionPlugin final : public AttentionBase<MaskedAttentionPlugin>
{
public:
    static constexpr char const* kNAME = "LlamaMaskedAttention";
    static constexpr char const* kKERNEL = "attention_padded";
    enum Input : int32_t
    {
        kQUERY,
        kKEY,
        kVALUE,
        kCOS,
        kSIN,
        kATTENTION_MASK,
        kNUM_INPUTS
    };
    enum Output : int32_t
    {
        kATTN_OUTPUT,
        kNUM_OUTPUTS
    };
    using AttentionBase::AttentionBase;

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
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;

private:
    struct Workspace; //!< the parts of it

    bool checkShapes(nvinfer1::Dims const* inputs) const noexcept;
    int64_t largestWorkspace(nvinfer1::DynamicPluginTensorDesc const* inputs) const noexcept;
    bool clearPastLength(Workspace const& parts, int64_t batch, cudaStream_t stream) const noexcept;
    bool rotate(Workspace const& parts, int64_t batch, int64_t tokens, void const* const* inputs,
        cudaStream_t stream) const noexcept;
    bool attend(Workspace const& parts, int64_t batch, int64_t tokens, void const* mask, void* attnOutput,
        cudaStream_t stream) const noexcept;

    LoadedKernel mRotateAndAppend;
    LoadedKernel mAttend;
};
} // namespace llama_export

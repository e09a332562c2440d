//! \file
//! LlamaAttention: rotates query and key, appends key and value to the static cache, attends over it.
//!
//! B batch, S new tokens, C kv_cache_capacity, H num_heads, G num_kv_heads, D head_dim, T float32, float16 or bfloat16:
//!
//!   query T [B, S, H*D]   key, value T [B, S, G*D]   cos, sin float32 [B, S, D/2]
//!   past_key, past_value T [B, G, C, D]   past_length int64 [B]
//!   -> attn_output T [B, S, H*D]   present_key, present_value T [B, G, C, D]
//!
//! present_key aliases past_key, present_value aliases past_value: bound to one buffer the cache is written in place, bound
//! to two it is copied first.
#pragma once

#include "attention_parameters.h"
#include "launch.h"

namespace llama_export
{
class AttentionPlugin final : public AttentionBase<AttentionPlugin>
{
public:
    static constexpr char const* kNAME = "LlamaAttention";
    static constexpr char const* kKERNEL = "rotate_and_append";
    enum Input : int32_t
    {
        kQUERY,
        kKEY,
        kVALUE,
        kCOS,
        kSIN,
        kPAST_KEY,
        kPAST_VALUE,
        kPAST_LENGTH,
        kNUM_INPUTS
    };
    enum Output : int32_t
    {
        kATTN_OUTPUT,
        kPRESENT_KEY,
        kPRESENT_VALUE,
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
    int32_t getAliasedInput(int32_t output) noexcept override;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;

private:
    struct Sizes;     //!< of one enqueue
    struct Workspace; //!< what lies where in it

    bool checkShapes(nvinfer1::Dims const* inputs) const noexcept;
    bool copyCache(int64_t bytes, void const* past, void* present, cudaStream_t stream) const noexcept;
    bool isSplit(int64_t newTokens) const noexcept;
    bool checkSplitLimits(int64_t batch, int64_t newTokens, int64_t splits) const noexcept;
    int64_t largestWorkspace(nvinfer1::DynamicPluginTensorDesc const* inputs) const noexcept;
    Workspace workspaceOf(Sizes const& sizes, nvinfer1::DataType type) const noexcept;
    static Sizes sizesOf(nvinfer1::Dims const& query, nvinfer1::Dims const& cache) noexcept;
    bool rotateAndAppend(Sizes const& sizes, Workspace const& parts, void const* const* inputs, void* const* outputs,
        cudaStream_t stream) const noexcept;
    template <class Arguments>
    Arguments attentionArguments(Sizes const& sizes, Workspace const& parts, void const* pastLength,
        void* const* outputs) const noexcept;
    Grid gridOf(LoadedKernel const& kernel, Sizes const& sizes, int64_t pieces) const noexcept;
    bool attendWhole(Sizes const& sizes, Workspace const& parts, void const* pastLength, void* const* outputs,
        cudaStream_t stream) const noexcept;
    bool attendInPieces(Sizes const& sizes, Workspace const& parts, void const* pastLength, void* const* outputs,
        cudaStream_t stream) const noexcept;

    LoadedKernel mRotateAndAppend;
    LoadedKernel mPrefill;
    LoadedKernel mSplit;
    LoadedKernel mCombine;
};
} // namespace llama_export

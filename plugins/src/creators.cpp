//! \file
//! What TensorRT calls when it loads the library, and what tools may ask it. Nothing else is exported (exports.map).

#include "abi.h"
#include "attention_plugin.h"
#include "log.h"
#include "masked_attention_plugin.h"
#include "rms_norm_plugin.h"

#ifndef LLAMA_EXPORT_PLUGINS_VERSION
#error "LLAMA_EXPORT_PLUGINS_VERSION comes from pyproject.toml through CMake"
#endif

namespace
{
llama_export::PluginCreator<llama_export::RmsNormPlugin> gRmsNormCreator;
llama_export::PluginCreator<llama_export::AddRmsNormPlugin> gAddRmsNormCreator;
llama_export::PluginCreator<llama_export::AttentionPlugin> gAttentionCreator;
llama_export::PluginCreator<llama_export::MaskedAttentionPlugin> gMaskedAttentionCreator;
nvinfer1::IPluginCreatorInterface* const gCreators[]
    = {&gRmsNormCreator, &gAddRmsNormCreator, &gAttentionCreator, &gMaskedAttentionCreator};
} // namespace

#define LLAMA_EXPORT_API extern "C" __attribute__((visibility("default")))

//! All plugin creators (TensorRT 10 and later).
LLAMA_EXPORT_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept
{
    count = sizeof gCreators / sizeof gCreators[0];
    return gCreators;
}

//! The creators of the older plugin interfaces, of which there are none; TensorRT wants the function to exist.
LLAMA_EXPORT_API nvinfer1::IPluginCreatorInterface* const* getPluginCreators(int32_t& count) noexcept
{
    count = 0;
    return nullptr;
}

//! TensorRT's logger, as long as the library is loaded.
LLAMA_EXPORT_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    llama_export::useLoggerFinder(finder);
}

//! `0.1.0`
LLAMA_EXPORT_API char const* llama_export_plugins_version() noexcept
{
    return LLAMA_EXPORT_PLUGINS_VERSION;
}

//! An engine runs on the libraries that give the number of the library it was built with.
LLAMA_EXPORT_API int32_t llama_export_plugins_abi() noexcept
{
    return llama_export::kABI;
}

//! Copies the latest error sentence that has not been taken yet into `buffer`, of `size` bytes, and forgets it; returns its
//! length, 0 if there is none. For tools: TensorRT-RTX lends no logger while it parses, and reports only that a plugin failed.
LLAMA_EXPORT_API int32_t llama_export_plugins_take_error(char* buffer, int32_t size) noexcept
{
    return llama_export::takeError(buffer, size);
}

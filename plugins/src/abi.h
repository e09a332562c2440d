//! \file
//! The number that ties an engine to the libraries that can run it. CMake takes it from llama_export_plugins/__init__.py.
#pragma once

#include <cstdint>

#ifndef LLAMA_EXPORT_PLUGINS_ABI
#error "LLAMA_EXPORT_PLUGINS_ABI comes from llama_export_plugins/__init__.py through CMake"
#endif

namespace llama_export
{
//! Raised when an engine of the previous library would not run on this one: other inputs, attributes, stored fields, or
//! another rule for the size of the workspace. Every plugin stores it in the engine as the field `abi`.
inline constexpr int32_t kABI = LLAMA_EXPORT_PLUGINS_ABI;
} // namespace llama_export

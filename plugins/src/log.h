//! \file
//! Where the library's sentences go: TensorRT's logger if it gave us one, else stderr.
#pragma once

#include "tensorrt_plugin_abi.h"

namespace llama_export
{
//! What setLoggerFinder() was given; nullptr takes it back.
void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

//! Reports an error of `plugin` as one sentence: what, got, expected, hint. The caller then returns its failure code.
//! The latest sentence is kept for takeError(): TensorRT-RTX has no logger to give while it parses or loads.
[[gnu::format(printf, 2, 3)]] void reportError(char const* plugin, char const* format, ...) noexcept;

//! Copies the latest sentence that has not been taken yet into `buffer`, of `size` bytes, and forgets it.
//! Returns the number of bytes of the sentence, 0 if there is none.
int32_t takeError(char* buffer, int32_t size) noexcept;
} // namespace llama_export

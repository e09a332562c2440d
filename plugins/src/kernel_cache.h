//! \file
//! The compiled kernels embedded in this library: which image serves a request, and the loaded function of it.
#pragma once

#include "cuda_driver.h"
#include "kernel_table.h"

namespace llama_export
{
//! What a plugin asks for.
struct KernelRequest
{
    char const* kernel; //!< name in the table, e.g. "rms_norm"
    int32_t dtype;      //!< of TensorRT: 0 float32, 1 float16, 7 bfloat16
    int32_t width;      //!< attention: head_dim; norms: hidden_size
};

//! A function that is ready to launch in the context it was loaded in.
struct LoadedKernel
{
    CUfunction function{};
    kernels::KernelImage const* image{};
};

//! Whether there is a compiled kernel for this dtype, whatever the chip: known without a GPU.
bool isDtypeServed(char const* kernel, int32_t dtype) noexcept;

//! Whether there is a compiled kernel for this width, whatever the dtype and the chip: known without a GPU.
bool isWidthServed(char const* kernel, int64_t width) noexcept;

//! The image to run on a chip; nullptr if there is none. `computeCapability` is 10 * major + minor.
kernels::KernelImage const* selectImage(KernelRequest const& request, int32_t computeCapability) noexcept;

//! Loads a kernel into the current context, once per context and image. Not to be called during stream capture.
//! On failure reports why in the name of `plugin`, and returns false.
bool loadKernel(char const* plugin, KernelRequest const& request, LoadedKernel& loaded) noexcept;
} // namespace llama_export

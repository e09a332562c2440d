//! \file
//! The few functions of the CUDA driver API that a plugin needs, found at run time: the library has to load, and its
//! plugins have to build engines, on machines without a GPU. Names and values are those of cuda.h.
#pragma once

#include <cstddef>
#include <cstdint>

using CUresult = int32_t;
using CUdevice = int32_t;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;

namespace llama_export
{
constexpr CUresult kCUDA_SUCCESS = 0;
constexpr int32_t kDEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int32_t kDEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int32_t kFUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;

struct CudaDriver
{
    CUresult (*ctxGetCurrent)(CUcontext* context);
    CUresult (*ctxGetId)(CUcontext context, unsigned long long* id);
    CUresult (*ctxGetDevice)(CUdevice* device);
    CUresult (*deviceGetAttribute)(int32_t* value, int32_t attribute, CUdevice device);
    CUresult (*moduleLoadData)(CUmodule* module, void const* image);
    CUresult (*moduleGetFunction)(CUfunction* function, CUmodule module, char const* name);
    CUresult (*funcSetAttribute)(CUfunction function, int32_t attribute, int32_t value);
    CUresult (*launchKernel)(CUfunction function, uint32_t gridX, uint32_t gridY, uint32_t gridZ, uint32_t blockX,
        uint32_t blockY, uint32_t blockZ, uint32_t sharedBytes, CUstream stream, void** parameters, void** extra);
    CUresult (*memcpyDtoDAsync)(CUdeviceptr destination, CUdeviceptr source, size_t bytes, CUstream stream);
    CUresult (*memsetD8Async)(CUdeviceptr destination, uint8_t value, size_t bytes, CUstream stream);
    CUresult (*getErrorName)(CUresult error, char const** name);

    //! `CUDA_ERROR_INVALID_VALUE`, or `an error that the driver has no name for`.
    char const* nameOf(CUresult error) const noexcept;
};

//! The driver, opened on first use. Without one: nullptr, the reason reported in the name of `plugin`, and the next call
//! tries again. The environment variable LLAMA_EXPORT_LIBCUDA opens another library than libcuda.so.1 (the tests'
//! stand-in).
CudaDriver const* cudaDriver(char const* plugin) noexcept;
} // namespace llama_export

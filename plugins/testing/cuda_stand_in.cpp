//! \file
//! Stands in for libcuda.so.1: every driver function that the plugins use is answered by a function of Python (harness.py).

#include "cuda_driver.h"

namespace
{
llama_export::CudaDriver gAnswers{};
} // namespace

#define STAND_IN_API extern "C" __attribute__((visibility("default")))

//! To be called before the plugin library opens this one.
STAND_IN_API void stand_in_set_answers(llama_export::CudaDriver const* answers)
{
    gAnswers = *answers;
}

STAND_IN_API CUresult cuCtxGetCurrent(CUcontext* context)
{
    return gAnswers.ctxGetCurrent(context);
}

STAND_IN_API CUresult cuCtxGetId(CUcontext context, unsigned long long* id)
{
    return gAnswers.ctxGetId(context, id);
}

STAND_IN_API CUresult cuCtxGetDevice(CUdevice* device)
{
    return gAnswers.ctxGetDevice(device);
}

STAND_IN_API CUresult cuDeviceGetAttribute(int32_t* value, int32_t attribute, CUdevice device)
{
    return gAnswers.deviceGetAttribute(value, attribute, device);
}

STAND_IN_API CUresult cuModuleLoadData(CUmodule* module, void const* image)
{
    return gAnswers.moduleLoadData(module, image);
}

STAND_IN_API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name)
{
    return gAnswers.moduleGetFunction(function, module, name);
}

STAND_IN_API CUresult cuFuncSetAttribute(CUfunction function, int32_t attribute, int32_t value)
{
    return gAnswers.funcSetAttribute(function, attribute, value);
}

STAND_IN_API CUresult cuLaunchKernel(CUfunction function, uint32_t gridX, uint32_t gridY, uint32_t gridZ, uint32_t blockX,
    uint32_t blockY, uint32_t blockZ, uint32_t sharedBytes, CUstream stream, void** parameters, void** extra)
{
    return gAnswers.launchKernel(
        function, gridX, gridY, gridZ, blockX, blockY, blockZ, sharedBytes, stream, parameters, extra);
}

STAND_IN_API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr destination, CUdeviceptr source, size_t bytes, CUstream stream)
{
    return gAnswers.memcpyDtoDAsync(destination, source, bytes, stream);
}

STAND_IN_API CUresult cuMemsetD8Async(CUdeviceptr destination, uint8_t value, size_t bytes, CUstream stream)
{
    return gAnswers.memsetD8Async(destination, value, bytes, stream);
}

STAND_IN_API CUresult cuGetErrorName(CUresult error, char const** name)
{
    return gAnswers.getErrorName(error, name);
}

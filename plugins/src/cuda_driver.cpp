#include "cuda_driver.h"

#include "log.h"
#include "old_glibc.h"

#include <cstdlib>
#include <dlfcn.h>
#include <mutex>

namespace llama_export
{
namespace
{
//! Finds one function; `missing` keeps the name of the first that is not there.
template <class Function>
void find(void* library, char const* name, Function& function, char const*& missing) noexcept
{
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr && missing == nullptr)
    {
        missing = name;
    }
}

bool openDriver(char const* plugin, CudaDriver& driver) noexcept
{
    char const* const chosen = std::getenv("LLAMA_EXPORT_LIBCUDA");
    char const* const name = chosen != nullptr ? chosen : "libcuda.so.1";
    void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        reportError(plugin,
            "no CUDA driver: got `%s`, expected `%s` of an NVIDIA driver; hint: run engines on a machine with an NVIDIA GPU",
            dlerror(), name);
        return false;
    }
    char const* missing = nullptr;
    find(library, "cuCtxGetCurrent", driver.ctxGetCurrent, missing);
    find(library, "cuCtxGetId", driver.ctxGetId, missing); // CUDA 12
    find(library, "cuCtxGetDevice", driver.ctxGetDevice, missing);
    find(library, "cuDeviceGetAttribute", driver.deviceGetAttribute, missing);
    find(library, "cuModuleLoadData", driver.moduleLoadData, missing);
    find(library, "cuModuleGetFunction", driver.moduleGetFunction, missing);
    find(library, "cuFuncSetAttribute", driver.funcSetAttribute, missing);
    find(library, "cuLaunchKernel", driver.launchKernel, missing);
    find(library, "cuMemcpyDtoDAsync_v2", driver.memcpyDtoDAsync, missing);
    find(library, "cuMemsetD8Async", driver.memsetD8Async, missing);
    find(library, "cuGetErrorName", driver.getErrorName, missing);
    if (missing != nullptr)
    {
        reportError(plugin, "`%s` is no usable CUDA driver: it lacks `%s`; hint: install a driver for CUDA 12 or later",
            name, missing);
        dlclose(library);
        return false;
    }
    return true;
}
} // namespace

char const* CudaDriver::nameOf(CUresult error) const noexcept
{
    char const* name = nullptr;
    return getErrorName(error, &name) == kCUDA_SUCCESS && name != nullptr ? name
                                                                         : "an error that the driver has no name for";
}

CudaDriver const* cudaDriver(char const* plugin) noexcept
{
    static std::mutex mutex;
    static CudaDriver driver{};
    static bool isOpen = false;
    std::lock_guard<std::mutex> const lock(mutex);
    if (!isOpen)
    {
        isOpen = openDriver(plugin, driver);
    }
    return isOpen ? &driver : nullptr;
}
} // namespace llama_export

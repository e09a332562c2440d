#include "kernel_cache.h"

#include "log.h"

#include <cstring>
#include <mutex>
#include <new>

namespace llama_export
{
namespace
{
using kernels::KernelImage;
using kernels::kImageCount;
using kernels::kImages;

//! From 9.0 up a cubin uses features of its own chip (targets `sm_90a`, `sm_100a`, ...) and runs on no other.
constexpr int32_t kFIRST_EXACT_COMPUTE_CAPABILITY = 90;
//! The kernels are written for no GPU before this one.
constexpr int32_t kOLDEST_COMPUTE_CAPABILITY = 80;
//! More dynamic shared memory than this has to be asked for.
constexpr uint32_t kDEFAULT_SHARED_BYTES = 48 * 1024;

bool isOf(KernelImage const& image, KernelRequest const& request) noexcept
{
    return std::strcmp(image.kernel, request.kernel) == 0 && image.dtype == request.dtype
        && (image.masked ? image.width >= request.width : image.width == request.width);
}

bool runsOn(KernelImage const& image, int32_t computeCapability) noexcept
{
    if (image.ptx) // the driver compiles it for any later chip
    {
        return image.compute_capability <= computeCapability;
    }
    if (image.compute_capability >= kFIRST_EXACT_COMPUTE_CAPABILITY)
    {
        return image.compute_capability == computeCapability;
    }
    return image.compute_capability / 10 == computeCapability / 10 && image.compute_capability <= computeCapability;
}

//! An exact width before a padded one, less padding before more, compiled code before PTX, a later chip before an earlier.
bool isBetter(KernelImage const& a, KernelImage const& b) noexcept
{
    if (a.masked != b.masked)
    {
        return !a.masked;
    }
    if (a.width != b.width)
    {
        return a.width < b.width;
    }
    if (a.ptx != b.ptx)
    {
        return !a.ptx;
    }
    return a.compute_capability > b.compute_capability;
}

//! A context and its loaded kernels. The id tells a new context from a destroyed one that had the same address.
struct ContextKey
{
    CUcontext context;
    unsigned long long id;
};

struct CacheEntry
{
    ContextKey key;
    LoadedKernel kernel;
    CacheEntry* next;
};

//! Newest first. Entries live as long as the process: modules end with their context, and plugins may outlive either.
CacheEntry* gLoaded = nullptr;
std::mutex gLoadedMutex;

bool currentContext(char const* plugin, CudaDriver const& driver, ContextKey& key, int32_t& computeCapability) noexcept
{
    CUdevice device{};
    int32_t major = 0;
    int32_t minor = 0;
    CUresult error = driver.ctxGetCurrent(&key.context);
    if (error == kCUDA_SUCCESS && key.context == nullptr)
    {
        reportError(plugin, "no CUDA context is current on this thread; hint: create the execution context on the thread "
                            "that uses the GPU");
        return false;
    }
    if (error == kCUDA_SUCCESS)
    {
        error = driver.ctxGetId(key.context, &key.id);
    }
    if (error == kCUDA_SUCCESS)
    {
        error = driver.ctxGetDevice(&device);
    }
    if (error == kCUDA_SUCCESS)
    {
        error = driver.deviceGetAttribute(&major, kDEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
    }
    if (error == kCUDA_SUCCESS)
    {
        error = driver.deviceGetAttribute(&minor, kDEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
    }
    if (error != kCUDA_SUCCESS)
    {
        reportError(plugin, "the CUDA driver cannot say which GPU this is: %s (%d)", driver.nameOf(error), error);
        return false;
    }
    computeCapability = 10 * major + minor;
    return true;
}

bool loadImage(char const* plugin, CudaDriver const& driver, KernelImage const& image, CUfunction& function) noexcept
{
    CUmodule module{};
    CUresult error = driver.moduleLoadData(&module, image.begin);
    if (error != kCUDA_SUCCESS)
    {
        reportError(plugin, "the CUDA driver refuses kernel `%s` compiled for %s%d: %s (%d); hint: update the NVIDIA driver",
            image.kernel, image.ptx ? "compute_" : "sm_", image.compute_capability, driver.nameOf(error), error);
        return false;
    }
    error = driver.moduleGetFunction(&function, module, image.entry);
    if (error == kCUDA_SUCCESS && image.shared > kDEFAULT_SHARED_BYTES)
    {
        error = driver.funcSetAttribute(
            function, kFUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int32_t>(image.shared));
    }
    if (error != kCUDA_SUCCESS)
    {
        reportError(plugin, "kernel `%s` cannot be used with %u bytes of shared memory: %s (%d)", image.kernel,
            image.shared, driver.nameOf(error), error);
        return false;
    }
    return true;
}
} // namespace

bool isDtypeServed(char const* kernel, int32_t dtype) noexcept
{
    for (size_t i = 0; i < kImageCount; ++i)
    {
        if (std::strcmp(kImages[i].kernel, kernel) == 0 && kImages[i].dtype == dtype)
        {
            return true;
        }
    }
    return false;
}

bool isWidthServed(char const* kernel, int64_t width) noexcept
{
    for (size_t i = 0; i < kImageCount; ++i)
    {
        KernelImage const& image = kImages[i];
        if (std::strcmp(image.kernel, kernel) == 0
            && (image.masked ? image.width >= width : image.width == width))
        {
            return true;
        }
    }
    return false;
}

KernelImage const* selectImage(KernelRequest const& request, int32_t computeCapability) noexcept
{
    KernelImage const* best = nullptr;
    for (size_t i = 0; i < kImageCount; ++i)
    {
        KernelImage const& image = kImages[i];
        if (isOf(image, request) && runsOn(image, computeCapability) && (best == nullptr || isBetter(image, *best)))
        {
            best = &image;
        }
    }
    return best;
}

bool loadKernel(char const* plugin, KernelRequest const& request, LoadedKernel& loaded) noexcept
{
    CudaDriver const* const driver = cudaDriver(plugin);
    ContextKey key{};
    int32_t computeCapability = 0;
    if (driver == nullptr || !currentContext(plugin, *driver, key, computeCapability))
    {
        return false;
    }
    KernelImage const* const image = selectImage(request, computeCapability);
    if (image == nullptr)
    {
        reportError(plugin,
            "no kernel `%s` of TensorRT data type %d, %d wide, for this GPU: got compute capability %d.%d, expected 8.0 "
            "or later and one that the library was built for; hint: %s",
            request.kernel, request.dtype, request.width, computeCapability / 10, computeCapability % 10,
            computeCapability < kOLDEST_COMPUTE_CAPABILITY
                ? "build the engine with --ops native"
                : "rebuild the library without LLAMA_EXPORT_CHIPS, or with 80 among them");
        return false;
    }

    std::lock_guard<std::mutex> const lock(gLoadedMutex);
    for (CacheEntry const* entry = gLoaded; entry != nullptr; entry = entry->next)
    {
        if (entry->key.context == key.context && entry->key.id == key.id && entry->kernel.image == image)
        {
            loaded = entry->kernel;
            return true;
        }
    }
    CUfunction function{};
    if (!loadImage(plugin, *driver, *image, function))
    {
        return false;
    }
    CacheEntry* const entry = new (std::nothrow) CacheEntry{key, {function, image}, gLoaded};
    if (entry == nullptr)
    {
        reportError(plugin, "out of host memory");
        return false;
    }
    gLoaded = entry;
    loaded = entry->kernel;
    return true;
}
} // namespace llama_export

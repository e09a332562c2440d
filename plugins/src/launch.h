//! \file
//! One kernel launch: the arguments of the generated `kernel_arguments.h`, in the order the kernel was compiled with.
#pragma once

#include "kernel_arguments.h"
#include "kernel_cache.h"
#include "log.h"

namespace llama_export
{
//! CUDA's limits of a grid.
constexpr int64_t kMAX_GRID_X = 0x7fffffff;
constexpr int64_t kMAX_GRID_YZ = 65535;

struct Grid
{
    int64_t x;
    int64_t y;
    int64_t z;
};

inline int64_t ceilDiv(int64_t a, int64_t b) noexcept
{
    return (a + b - 1) / b;
}

//! The size of a part of a workspace, such that the next part is aligned.
inline int64_t padded(int64_t bytes) noexcept
{
    constexpr int64_t kALIGNMENT = 256;
    return ceilDiv(bytes, kALIGNMENT) * kALIGNMENT;
}

inline CUdeviceptr deviceAddress(void const* pointer) noexcept
{
    return reinterpret_cast<CUdeviceptr>(pointer);
}

//! Scratch memory that TensorRT lends for one call; who derives from it says which part begins where.
struct WorkspaceParts
{
    //! Address of the part that begins `offset` bytes into the workspace.
    CUdeviceptr at(int64_t offset) const noexcept
    {
        return deviceAddress(start) + static_cast<CUdeviceptr>(offset);
    }

    void* start{};
    int64_t bytes{}; //!< of the whole
};

//! Puts the kernel on the stream. Neither allocates nor waits, so it may be captured into a CUDA graph.
template <class Arguments>
bool launch(char const* plugin, LoadedKernel const& kernel, Grid const& grid, Arguments& arguments,
    cudaStream_t stream) noexcept
{
    constexpr uint32_t kTHREADS_PER_WARP = 32;
    CudaDriver const* const driver = cudaDriver(plugin);
    if (driver == nullptr)
    {
        return false;
    }
    // The casts below would wrap a grid that is too large to a legal one.
    if (grid.x < 1 || grid.x > kMAX_GRID_X || grid.y < 1 || grid.y > kMAX_GRID_YZ || grid.z < 1 || grid.z > kMAX_GRID_YZ)
    {
        reportError(plugin,
            "kernel `%s` cannot be launched with grid %lld x %lld x %lld, expected at most %lld x %lld x %lld",
            Arguments::kKernel, static_cast<long long>(grid.x), static_cast<long long>(grid.y),
            static_cast<long long>(grid.z), static_cast<long long>(kMAX_GRID_X), static_cast<long long>(kMAX_GRID_YZ),
            static_cast<long long>(kMAX_GRID_YZ));
        return false;
    }
    CUresult const error = driver->launchKernel(kernel.function, static_cast<uint32_t>(grid.x),
        static_cast<uint32_t>(grid.y), static_cast<uint32_t>(grid.z), kTHREADS_PER_WARP * kernel.image->warps, 1, 1,
        kernel.image->shared, stream, arguments.pointers(), nullptr);
    if (error != kCUDA_SUCCESS)
    {
        reportError(plugin, "kernel `%s` was not launched: %s (%d); grid %lld x %lld x %lld", Arguments::kKernel,
            driver->nameOf(error), error, static_cast<long long>(grid.x), static_cast<long long>(grid.y),
            static_cast<long long>(grid.z));
        return false;
    }
    return true;
}
} // namespace llama_export

//! \file
//! A CUDA driver without a GPU that judges every call: what the real one, or the kernels behind it, would not forgive ends
//! the program with a sentence. It takes no lock, so that it hides no race of the library from ThreadSanitizer.
#pragma once

#include "cuda_driver.h"

namespace checking
{
constexpr int32_t kNO_CONTEXT = -1;
constexpr int32_t kNUM_CONTEXTS = 4;

constexpr uint64_t kMOST_BYTES = uint64_t{1} << 59; //!< of one tensor: larger ones count as this large

//! Device memory. Nothing lies behind the addresses, so it may be of any size.
struct Range
{
    CUdeviceptr begin;
    uint64_t bytes;
};

enum DriverFunction : int32_t
{
    kCTX_GET_CURRENT,
    kCTX_GET_ID,
    kCTX_GET_DEVICE,
    kDEVICE_GET_ATTRIBUTE,
    kMODULE_LOAD_DATA,
    kMODULE_GET_FUNCTION,
    kFUNC_SET_ATTRIBUTE,
    kLAUNCH_KERNEL,
    kMEMCPY,
    kMEMSET,
    kGET_ERROR_NAME,
    kNUM_DRIVER_FUNCTIONS
};

//! What the driver knows of the thread that calls it.
struct Thread
{
    int32_t context{kNO_CONTEXT};
    CUstream stream{};       //!< the only one that may be used
    Range const* ranges{};   //!< the memory that may be touched
    size_t numRanges{0};
    bool isEnqueuing{false}; //!< else nothing may be put on a stream; while it is, nothing may be loaded
    uint32_t failing{0};     //!< bit f: DriverFunction f answers with an error
    int64_t launches{0};
    int64_t copies{0};
};
Thread& thisThread() noexcept;

//! Says what the calling thread is doing, in the sentence of a failure.
using Describe = void (*)() noexcept;
void describeFailuresWith(Describe describe) noexcept;

//! Ends the program.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(char const* format, ...) noexcept;

//! Destroys a context and makes another at its address: its modules are gone. No thread may be using it.
void recreateContext(int32_t context, int32_t computeCapability) noexcept;
int32_t computeCapability(int32_t context) noexcept;

//! Makes this the driver behind the `cu...` functions of cuda_stand_in.cpp.
void install() noexcept;
} // namespace checking

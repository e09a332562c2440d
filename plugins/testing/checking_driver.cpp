#include "checking_driver.h"

#include "kernel_signatures.h"
#include "kernel_table.h"

#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

extern "C" void stand_in_set_answers(llama_export::CudaDriver const* answers);

namespace checking
{
namespace
{
using llama_export::kernels::KernelImage;
using llama_export::kernels::kImageCount;
using llama_export::kernels::kImages;
using llama_export::kernels::KernelSignature;
using llama_export::kernels::kSignatures;

constexpr CUresult kCUDA_ERROR_OUT_OF_MEMORY = 2;
constexpr CUresult kCUDA_ERROR_INVALID_VALUE = 1;
constexpr CUresult kCUDA_ERROR_NO_BINARY_FOR_GPU = 209;
constexpr uint32_t kDEFAULT_SHARED_BYTES = 48 * 1024;
constexpr uint32_t kMAX_GRID_X = 0x7fffffff;
constexpr uint32_t kMAX_GRID_YZ = 65535;
constexpr int32_t kNUM_SCRATCH = 2; //!< pointers that Triton's calling convention adds; these kernels use none

//! An image in a context. Its address is the CUfunction, the address after that the CUmodule.
struct Function
{
    std::atomic<bool> isModule{false};
    std::atomic<bool> isReady{false}; //!< has all that a launch needs
    std::atomic<uint32_t> sharedLimit{kDEFAULT_SHARED_BYTES};
};

struct Context
{
    std::atomic<unsigned long long> id{0};
    std::atomic<int32_t> computeCapability{89};
    Function functions[kImageCount];
};

Context gContexts[kNUM_CONTEXTS];
std::atomic<unsigned long long> gNextId{100};
Describe gDescribe = nullptr;

bool isFailing(DriverFunction function) noexcept
{
    return (thisThread().failing >> function & 1U) != 0;
}

Context& currentContext(char const* call) noexcept
{
    int32_t const context = thisThread().context;
    if (context == kNO_CONTEXT)
    {
        fail("%s without a current context", call);
    }
    return gContexts[context];
}

//! The image of the current context that a handle stands for.
size_t indexOf(char const* call, void const* handle) noexcept
{
    Context const& context = currentContext(call);
    uintptr_t const begin = reinterpret_cast<uintptr_t>(context.functions);
    uintptr_t const offset = reinterpret_cast<uintptr_t>(handle) - begin;
    if (offset >= sizeof context.functions || offset % sizeof(Function) != 0)
    {
        fail("%s was given a handle that is none of the current context: %p", call, handle);
    }
    return offset / sizeof(Function);
}

//! CUDA's rule: PTX runs on its chip and later ones, a cubin on its major version, and from 9.0 up on its chip only.
bool runsOn(KernelImage const& image, int32_t chip) noexcept
{
    if (image.ptx)
    {
        return image.compute_capability <= chip;
    }
    return image.compute_capability >= 90 ? image.compute_capability == chip
                                          : image.compute_capability / 10 == chip / 10 && image.compute_capability <= chip;
}

void checkStream(char const* call, CUstream stream) noexcept
{
    if (!thisThread().isEnqueuing || stream != thisThread().stream)
    {
        fail("%s outside of enqueue, or on another stream than enqueue was given", call);
    }
}

//! Fails unless `bytes` from an address on lie in one range.
void checkMemory(char const* what, CUdeviceptr address, uint64_t bytes) noexcept
{
    Thread const& thread = thisThread();
    for (size_t i = 0; i < thread.numRanges; ++i)
    {
        Range const& range = thread.ranges[i];
        if (address >= range.begin && address - range.begin <= range.bytes && bytes <= range.bytes - (address - range.begin))
        {
            return;
        }
    }
    fail("%s: %llu bytes at 0x%llx lie in no tensor of this plugin", what, static_cast<unsigned long long>(bytes), address);
}

KernelSignature const& signatureOf(KernelImage const& image) noexcept
{
    for (KernelSignature const& signature : kSignatures)
    {
        if (std::strcmp(signature.kernel, image.kernel) == 0)
        {
            return signature;
        }
    }
    fail("kernel `%s` has no signature", image.kernel);
}

//! The sizes that one launch was given: what its kernel reads and writes, as plugins/kernels/*.py index it.
class Launch
{
public:
    Launch(KernelImage const& image, KernelSignature const& signature, void** parameters, int64_t gridX, int64_t gridZ) noexcept
        : mImage(image)
        , mSignature(signature)
        , mParameters(parameters)
    {
        mTokens = integer(is("attention_padded") ? "num_tokens" : "new_tokens");
        mHeads = integer("num_heads");
        bool const isOfRows = is("rotate_and_append") || is("attention_combine"); // programs: a token each, or a head of one
        int64_t const programs = is("rotate_and_append") ? mTokens : mTokens * mHeads;
        if (isOfRows && (programs < 1 || gridX % programs != 0))
        {
            fail("kernel `%s` has %lld programs for batches of %lld", image.kernel, static_cast<long long>(gridX),
                static_cast<long long>(programs));
        }
        mBatch = isOfRows ? gridX / programs : gridZ;
    }

    //! Bytes from a pointer on that the kernel may touch.
    uint64_t bytesAt(char const* argument) const noexcept
    {
        int64_t const element = mImage.dtype == 0 ? 4 : 2;
        int64_t const width = integer("head_dim");
        int64_t const kvHeads = integer("num_kv_heads");
        int64_t const pieces = integer("num_splits");
        auto const named = [argument](char const* name) { return std::strcmp(argument, name) == 0; };
        if (is("rotate_and_append") && (named("query") || named("key") || named("value"))) // tokens a stride apart
        {
            std::string const stride = std::string(argument) + "_stride";
            int64_t const row = (named("query") ? mHeads : kvHeads) * width;
            return product({mBatch * mTokens - 1, integer(stride.c_str()), element}) + product({row, element});
        }
        if (named("cos") || named("sin"))
        {
            return product({mBatch, mTokens, width / 2, 4});
        }
        if (named("past_length"))
        {
            return product({mBatch, 8});
        }
        if (named("attention_mask"))
        {
            return product({mBatch, mTokens, 8});
        }
        if (named("rotated_query") || named("attn_output"))
        {
            return product({mBatch, mTokens, mHeads, width, element});
        }
        if (named("present_key") || named("present_value"))
        {
            return product({mBatch, kvHeads, integer("capacity"), width, element});
        }
        if (named("rotated_key") || named("value"))
        {
            return product({mBatch, kvHeads, mTokens, width, element});
        }
        if (named("partial_output") || named("partial_softmax"))
        {
            return product({mBatch, mTokens, mHeads, pieces, named("partial_output") ? width : 2, 4});
        }
        if (named("weight"))
        {
            return product({integer("hidden_size"), element});
        }
        if (named("hidden_states") || named("residual") || named("normed") || named("new_residual"))
        {
            return product({integer("num_rows"), integer("hidden_size"), element});
        }
        fail("kernel `%s` has an argument of unknown extent: `%s`", mImage.kernel, argument);
    }

private:
    bool is(char const* kernel) const noexcept
    {
        return std::strcmp(mImage.kernel, kernel) == 0;
    }

    //! The value of an integer argument; 0 where the kernel has none of that name.
    int64_t integer(char const* name) const noexcept
    {
        for (size_t i = 0; mSignature.kinds[i] != '\0'; ++i)
        {
            if (mSignature.kinds[i] == 'i' && std::strcmp(mSignature.names[i], name) == 0)
            {
                int32_t value{};
                std::memcpy(&value, mParameters[i], sizeof value);
                return value;
            }
        }
        return 0;
    }

    //! The largest size of a tensor where the product is beyond that.
    static uint64_t product(std::initializer_list<int64_t> sizes) noexcept
    {
        unsigned __int128 bytes = 1;
        for (int64_t const size : sizes)
        {
            if (size <= 0)
            {
                return 0;
            }
            bytes = bytes > kMOST_BYTES ? bytes : bytes * static_cast<unsigned __int128>(size);
        }
        return bytes > kMOST_BYTES ? kMOST_BYTES : static_cast<uint64_t>(bytes);
    }

    KernelImage const& mImage;
    KernelSignature const& mSignature;
    void** mParameters;
    int64_t mTokens{0};
    int64_t mHeads{0};
    int64_t mBatch{0};
};

//! Reads every argument from where it lies, as the driver would: an argument that is gone is AddressSanitizer's to find. What a
//! pointer stands for has to lie in one tensor or in the workspace, apart from that of every other pointer.
void checkArguments(KernelImage const& image, void** parameters, int64_t gridX, int64_t gridZ) noexcept
{
    KernelSignature const& signature = signatureOf(image);
    char const* const kinds = signature.kinds;
    Launch const launch(image, signature, parameters, gridX, gridZ);
    std::vector<Range> touched;
    size_t const count = std::strlen(kinds);
    for (size_t i = 0; i < count + kNUM_SCRATCH; ++i)
    {
        char const kind = i < count ? kinds[i] : 's';
        CUdeviceptr pointer{};
        int32_t integer{};
        float number{};
        switch (kind)
        {
        case 'p':
        {
            std::memcpy(&pointer, parameters[i], sizeof pointer);
            uint64_t const bytes = launch.bytesAt(signature.names[i]);
            checkMemory(image.kernel, pointer, bytes);
            for (Range const& other : touched)
            {
                if (pointer < other.begin + other.bytes && other.begin < pointer + bytes)
                {
                    fail("kernel `%s`: `%s` overlaps another argument", image.kernel, signature.names[i]);
                }
            }
            touched.push_back({pointer, bytes});
            break;
        }
        case 's':
            std::memcpy(&pointer, parameters[i], sizeof pointer);
            if (pointer != 0)
            {
                fail("kernel `%s` has no scratch memory, but was given a pointer to some", image.kernel);
            }
            break;
        case 'i':
            std::memcpy(&integer, parameters[i], sizeof integer);
            if (integer < 0) // every one of them is a size: a negative one has lost its upper bits
            {
                fail("argument %zu of kernel `%s` is negative: %d", i, image.kernel, integer);
            }
            break;
        case 'f':
            std::memcpy(&number, parameters[i], sizeof number);
            if (!std::isfinite(number) || number <= 0.0F)
            {
                fail("argument %zu of kernel `%s` is no positive number: %g", i, image.kernel, static_cast<double>(number));
            }
            break;
        default: fail("kernel `%s` has an argument of unknown kind `%c`", image.kernel, kind);
        }
    }
}

CUresult ctxGetCurrent(CUcontext* context)
{
    if (isFailing(kCTX_GET_CURRENT))
    {
        return kCUDA_ERROR_OUT_OF_MEMORY;
    }
    int32_t const current = thisThread().context;
    *context = current == kNO_CONTEXT ? nullptr : reinterpret_cast<CUcontext>(&gContexts[current]);
    return llama_export::kCUDA_SUCCESS;
}

CUresult ctxGetId(CUcontext context, unsigned long long* id)
{
    if (isFailing(kCTX_GET_ID))
    {
        return kCUDA_ERROR_OUT_OF_MEMORY;
    }
    *id = reinterpret_cast<Context*>(context)->id.load(std::memory_order_relaxed);
    return llama_export::kCUDA_SUCCESS;
}

CUresult ctxGetDevice(CUdevice* device)
{
    if (isFailing(kCTX_GET_DEVICE))
    {
        return kCUDA_ERROR_OUT_OF_MEMORY;
    }
    currentContext("cuCtxGetDevice");
    *device = thisThread().context;
    return llama_export::kCUDA_SUCCESS;
}

CUresult deviceGetAttribute(int32_t* value, int32_t attribute, CUdevice device)
{
    if (isFailing(kDEVICE_GET_ATTRIBUTE))
    {
        return kCUDA_ERROR_OUT_OF_MEMORY;
    }
    int32_t const chip = computeCapability(device);
    switch (attribute)
    {
    case llama_export::kDEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = chip / 10; break;
    case llama_export::kDEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = chip % 10; break;
    default: *value = 108; break; // whatever else is asked for, e.g. the number of multiprocessors
    }
    return llama_export::kCUDA_SUCCESS;
}

CUresult moduleLoadData(CUmodule* module, void const* image)
{
    if (isFailing(kMODULE_LOAD_DATA))
    {
        return kCUDA_ERROR_OUT_OF_MEMORY;
    }
    Context& context = currentContext("cuModuleLoadData");
    if (thisThread().isEnqueuing)
    {
        fail("cuModuleLoadData during enqueue, which may be captured");
    }
    for (size_t i = 0; i < kImageCount; ++i)
    {
        if (kImages[i].begin != image)
        {
            continue;
        }
        if (!runsOn(kImages[i], context.computeCapability.load(std::memory_order_relaxed)))
        {
            return kCUDA_ERROR_NO_BINARY_FOR_GPU;
        }
        Function& function = context.functions[i];
        if (function.isReady.load(std::memory_order_relaxed))
        {
            fail("kernel `%s` is loaded twice into one context", kImages[i].kernel);
        }
        function.isModule.store(true, std::memory_order_relaxed);
        *module = reinterpret_cast<CUmodule>(reinterpret_cast<uintptr_t>(&function) + 1);
        return llama_export::kCUDA_SUCCESS;
    }
    fail("cuModuleLoadData was given no image of this library: %p", image);
}

CUresult moduleGetFunction(CUfunction* result, CUmodule module, char const* name)
{
    if (isFailing(kMODULE_GET_FUNCTION))
    {
        return kCUDA_ERROR_OUT_OF_MEMORY;
    }
    size_t const index = indexOf("cuModuleGetFunction", reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(module) - 1));
    Function& function = currentContext("cuModuleGetFunction").functions[index];
    if (!function.isModule.load(std::memory_order_relaxed) || std::strcmp(name, kImages[index].entry) != 0)
    {
        fail("cuModuleGetFunction: the image of `%s` is not loaded, or has no entry `%s`", kImages[index].kernel, name);
    }
    function.isReady.store(kImages[index].shared <= kDEFAULT_SHARED_BYTES, std::memory_order_relaxed);
    *result = reinterpret_cast<CUfunction>(&function);
    return llama_export::kCUDA_SUCCESS;
}

CUresult funcSetAttribute(CUfunction handle, int32_t attribute, int32_t value)
{
    if (isFailing(kFUNC_SET_ATTRIBUTE))
    {
        return kCUDA_ERROR_OUT_OF_MEMORY;
    }
    size_t const index = indexOf("cuFuncSetAttribute", handle);
    Function& function = currentContext("cuFuncSetAttribute").functions[index];
    if (attribute != llama_export::kFUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0)
    {
        return kCUDA_ERROR_INVALID_VALUE;
    }
    function.sharedLimit.store(static_cast<uint32_t>(value), std::memory_order_relaxed);
    function.isReady.store(true, std::memory_order_relaxed);
    return llama_export::kCUDA_SUCCESS;
}

CUresult launchKernel(CUfunction handle, uint32_t gridX, uint32_t gridY, uint32_t gridZ, uint32_t blockX, uint32_t blockY,
    uint32_t blockZ, uint32_t sharedBytes, CUstream stream, void** parameters, void** extra)
{
    checkStream("cuLaunchKernel", stream);
    size_t const index = indexOf("cuLaunchKernel", handle);
    KernelImage const& image = kImages[index];
    Function const& function = currentContext("cuLaunchKernel").functions[index];
    if (!function.isReady.load(std::memory_order_relaxed))
    {
        fail("kernel `%s` is launched in a context that it is not loaded in", image.kernel);
    }
    if (gridX < 1 || gridX > kMAX_GRID_X || gridY < 1 || gridY > kMAX_GRID_YZ || gridZ < 1 || gridZ > kMAX_GRID_YZ)
    {
        fail("CUDA refuses the grid of kernel `%s`: %u x %u x %u", image.kernel, gridX, gridY, gridZ);
    }
    if (blockX != 32 * image.warps || blockY != 1 || blockZ != 1)
    {
        fail("kernel `%s` was compiled for %u warps, launched with %u threads", image.kernel, image.warps, blockX);
    }
    if (sharedBytes != image.shared || sharedBytes > function.sharedLimit.load(std::memory_order_relaxed))
    {
        fail("kernel `%s` needs %u bytes of shared memory: got %u, allowed are %u", image.kernel, image.shared, sharedBytes,
            function.sharedLimit.load(std::memory_order_relaxed));
    }
    if (extra != nullptr)
    {
        fail("kernel `%s` is given its arguments twice", image.kernel);
    }
    checkArguments(image, parameters, gridX, gridZ);
    if (isFailing(kLAUNCH_KERNEL))
    {
        return kCUDA_ERROR_OUT_OF_MEMORY;
    }
    ++thisThread().launches;
    return llama_export::kCUDA_SUCCESS;
}

CUresult memcpyDtoDAsync(CUdeviceptr destination, CUdeviceptr source, size_t bytes, CUstream stream)
{
    checkStream("cuMemcpyDtoDAsync", stream);
    checkMemory("the destination of a copy", destination, bytes);
    checkMemory("the source of a copy", source, bytes);
    if (isFailing(kMEMCPY))
    {
        return kCUDA_ERROR_OUT_OF_MEMORY;
    }
    ++thisThread().copies;
    return llama_export::kCUDA_SUCCESS;
}

CUresult memsetD8Async(CUdeviceptr destination, uint8_t /*value*/, size_t bytes, CUstream stream)
{
    checkStream("cuMemsetD8Async", stream);
    checkMemory("the destination of a memset", destination, bytes);
    return isFailing(kMEMSET) ? kCUDA_ERROR_OUT_OF_MEMORY : llama_export::kCUDA_SUCCESS;
}

CUresult getErrorName(CUresult error, char const** name)
{
    if (isFailing(kGET_ERROR_NAME))
    {
        return kCUDA_ERROR_INVALID_VALUE;
    }
    *name = error == kCUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
    return llama_export::kCUDA_SUCCESS;
}
} // namespace

Thread& thisThread() noexcept
{
    thread_local Thread thread;
    return thread;
}

void describeFailuresWith(Describe describe) noexcept
{
    gDescribe = describe;
}

void fail(char const* format, ...) noexcept
{
    std::fputs("FAILED: ", stderr);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
    if (gDescribe != nullptr)
    {
        gDescribe();
    }
    std::_Exit(1);
}

void recreateContext(int32_t context, int32_t computeCapability) noexcept
{
    Context& made = gContexts[context];
    made.id.store(gNextId.fetch_add(1));
    made.computeCapability.store(computeCapability);
    for (Function& function : made.functions)
    {
        function.isModule.store(false);
        function.isReady.store(false);
        function.sharedLimit.store(kDEFAULT_SHARED_BYTES);
    }
}

int32_t computeCapability(int32_t context) noexcept
{
    return gContexts[context].computeCapability.load(std::memory_order_relaxed);
}

void install() noexcept
{
    static llama_export::CudaDriver const driver{ctxGetCurrent, ctxGetId, ctxGetDevice, deviceGetAttribute, moduleLoadData,
        moduleGetFunction, funcSetAttribute, launchKernel, memcpyDtoDAsync, memsetD8Async, getErrorName};
    stand_in_set_answers(&driver);
}
} // namespace checking

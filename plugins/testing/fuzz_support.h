//! \file
//! What the modes of fuzz_plugins share: chance, the sentences of failures and refusals, and the ops.
#pragma once

#include "checking_driver.h"
#include "tensorrt_plugin_abi.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

extern "C"
{
    nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept;
    void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;
    int32_t llama_export_plugins_abi() noexcept;
    int32_t llama_export_plugins_take_error(char* buffer, int32_t size) noexcept;
}

namespace fuzz
{
using namespace nvinfer1;
using checking::fail;

inline constexpr int64_t kMIN64 = std::numeric_limits<int64_t>::min();
inline constexpr int64_t kMAX64 = std::numeric_limits<int64_t>::max();
inline constexpr int32_t kMIN32 = std::numeric_limits<int32_t>::min();
inline constexpr int32_t kMAX32 = std::numeric_limits<int32_t>::max();
inline constexpr int32_t kNO_DTYPE = -1;
inline constexpr int64_t kNO_WORKSPACE = -1;
inline constexpr int64_t kROOMY_WORKSPACE = int64_t{1} << 50; //!< bytes: enough for what is ordinary
inline constexpr int32_t kMAX_HEAD_DIM = 256; //!< the widest that a kernel serves
inline constexpr int32_t kMAX_TENSORS = 16;
inline constexpr size_t kMORE_THAN_ANY_DEVICE_HAS = size_t{1} << 62; //!< bytes: a workspace that a plugin answers instead of failing

// ---- chance -------------------------------------------------------------------------------------------------------

//! splitmix64: the inputs of a seed are the same on every machine.
class Random
{
public:
    explicit Random(uint64_t seed) noexcept
        : mState(seed)
    {
    }
    uint64_t next() noexcept
    {
        mState += 0x9e3779b97f4a7c15U;
        uint64_t value = mState;
        value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9U;
        value = (value ^ (value >> 27)) * 0x94d049bb133111ebU;
        return value ^ (value >> 31);
    }
    //! 0 .. limit - 1
    int64_t below(int64_t limit) noexcept
    {
        return static_cast<int64_t>(next() % static_cast<uint64_t>(limit));
    }
    bool oneIn(int64_t count) noexcept
    {
        return below(count) == 0;
    }
    template <class Item, size_t Count>
    Item const& pick(Item const (&items)[Count]) noexcept
    {
        return items[below(Count)];
    }

private:
    uint64_t mState;
};

//! Where integers end or lose bits, and what products of them overflow.
inline constexpr int64_t kEDGES[] = {kMIN64, kMIN64 + 1, kMIN32 - int64_t{1}, kMIN32, -65536, -2, -1, 0, 1, 2, 127, 128, 255,
    256, 257, 32767, 65535, 65536, kMAX32 - int64_t{1}, kMAX32, kMAX32 + int64_t{1}, int64_t{1} << 32, int64_t{1} << 40,
    int64_t{1} << 62, kMAX64 - 1, kMAX64};
inline constexpr int64_t kLARGE[] = {4096, 65535, 65536, 131072, kMAX32 / 2, kMAX32, kMAX32 + int64_t{1}, int64_t{1} << 40, kMAX64};
inline constexpr double kNUMBERS[] = {0.0, -0.0, 1.0, -1.0, 1e-5, 0.5, 1e300, -1e300, 3.5e38, 1e-300, 1e-45, 1e-40,
    std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
    -std::numeric_limits<double>::infinity()};
inline constexpr int32_t kDTYPES[] = {0, 1, 7}; //!< float32, float16, bfloat16
inline constexpr int32_t kOTHER_DTYPES[] = {-2, -1, 2, 3, 4, 8, 9, 99, kMIN32, kMAX32};
inline constexpr int32_t kCHIPS[] = {75, 80, 86, 90, 120}; //!< besides that of the library, 8.9

// ---- what is being done, for the sentence of a failure ----------------------------------------------------------------

struct Doing
{
    uint64_t seed{0};
    int64_t input{-1};
    char const* op{""};
    char const* call{""};
    char const* mode{"--count"};
};
inline thread_local Doing gDoing;

inline void describe() noexcept
{
    Doing const& doing = gDoing;
    std::fprintf(stderr, "in %s of %s: --seed %llu --first %lld %s 1\n", doing.call, doing.op,
        static_cast<unsigned long long>(doing.seed), static_cast<long long>(doing.input), doing.mode);
}

//! How far the inputs got: a generator whose inputs are all refused at once finds nothing.
struct Totals
{
    int64_t plugins{0};
    int64_t refusals{0};
    int64_t runs{0}; //!< enqueue succeeded
    int64_t launches{0};
};
inline Totals gTotals; // of the main thread: only it counts

// ---- the sentences ------------------------------------------------------------------------------------------------

//! Lent to the library in the place of TensorRT's.
class QuietLogger final : public ILogger, public ILoggerFinder
{
public:
    void log(Severity /*severity*/, AsciiChar const* message) noexcept override
    {
        mBytes.fetch_add(std::strlen(message), std::memory_order_relaxed);
    }
    ILogger* findLogger() override
    {
        return this;
    }

private:
    std::atomic<size_t> mBytes{0};
};

//! The latest sentence, into a buffer that ends where the library was told.
inline std::string takeSentence() noexcept
{
    int32_t const length = llama_export_plugins_take_error(nullptr, 0);
    std::unique_ptr<char[]> const buffer(new char[static_cast<size_t>(length) + 1]);
    buffer[0] = '\0';
    llama_export_plugins_take_error(buffer.get(), length + 1);
    return buffer.get();
}

inline void expectSilence() noexcept
{
    std::string const sentence = takeSentence();
    if (!sentence.empty())
    {
        fail("a call that succeeded left a sentence: %s", sentence.c_str());
    }
}

//! A refusal says one sentence, `Op: ...`.
inline void expectSentence(Random& random) noexcept
{
    int32_t const length = llama_export_plugins_take_error(nullptr, 0);
    if (random.oneIn(8)) // a buffer too small for it
    {
        int32_t const size = static_cast<int32_t>(random.below(40)) + 1;
        std::unique_ptr<char[]> const buffer(new char[static_cast<size_t>(size)]);
        if (llama_export_plugins_take_error(buffer.get(), size) != length
            || std::strlen(buffer.get()) >= static_cast<size_t>(size))
        {
            fail("a sentence of %d bytes was cut in another way to %d", length, size);
        }
    }
    else
    {
        std::string const sentence = takeSentence();
        if (sentence.rfind(std::string(gDoing.op) + ": ", 0) != 0 || sentence.size() < std::strlen(gDoing.op) + 10)
        {
            fail("a refusal left no sentence: `%s`", sentence.c_str());
        }
    }
    expectSilence();
}

enum class Verdict
{
    kACCEPT,
    kREFUSE,
    kEITHER
};

//! Whether the call was accepted, after checking that it may have been, and its sentence.
inline bool judge(bool isAccepted, Verdict expected, Random& random) noexcept
{
    if (isAccepted && expected == Verdict::kREFUSE)
    {
        fail("accepted, expected a refusal");
    }
    if (!isAccepted && expected == Verdict::kACCEPT)
    {
        fail("refused, expected to be accepted: %s", takeSentence().c_str());
    }
    if (isAccepted)
    {
        expectSilence();
    }
    else
    {
        expectSentence(random);
        ++gTotals.refusals;
    }
    return isAccepted;
}

// ---- the ops ------------------------------------------------------------------------------------------------------

enum class Kind
{
    kNORM,
    kATTENTION,
    kMASKED
};

struct Op
{
    char const* name;
    Kind kind;
    int32_t numInputs;
    int32_t numOutputs;
};
inline constexpr Op kOPS[] = {{"LlamaRMSNorm", Kind::kNORM, 2, 1}, {"LlamaAddRMSNorm", Kind::kNORM, 3, 2},
    {"LlamaAttention", Kind::kATTENTION, 8, 3}, {"LlamaMaskedAttention", Kind::kMASKED, 6, 1}};
inline constexpr int32_t kQUERY = 0;
inline constexpr int32_t kPAST_KEY = 5;
inline constexpr int32_t kPAST_VALUE = 6;

//! Values of all attributes; an op reads some.
struct Attributes
{
    int64_t numHeads{1};
    int64_t numKvHeads{1};
    int64_t headDim{64};
    double number{1e-5}; //!< epsilon or scale
    int64_t dtype{kNO_DTYPE};
    int64_t hiddenSize{-1}; //!< of the norms; -1: not known yet
    int64_t workspaceBytes{kNO_WORKSPACE}; //!< of the attentions
    int64_t abi{llama_export_plugins_abi()};
};

inline IPluginCreatorV3One& creatorOf(Op const& op) noexcept
{
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i)
    {
        IPluginCreatorV3One& creator = *static_cast<IPluginCreatorV3One*>(creators[i]);
        if (std::strcmp(creator.getPluginName(), op.name) == 0)
        {
            return creator;
        }
    }
    fail("there is no creator of %s", op.name);
}

//! A plugin and its capabilities.
class Plugin
{
public:
    explicit Plugin(IPluginV3* plugin) noexcept
        : mPlugin(plugin)
    {
    }
    IPluginV3* operator->() const noexcept
    {
        return mPlugin.get();
    }
    explicit operator bool() const noexcept
    {
        return mPlugin != nullptr;
    }
    IPluginV3OneCore& core() const noexcept
    {
        return *static_cast<IPluginV3OneCore*>(mPlugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    }
    IPluginV3OneBuildV2& build() const noexcept
    {
        return *static_cast<IPluginV3OneBuildV2*>(mPlugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    }
    IPluginV3OneRuntime& runtime() const noexcept
    {
        return *static_cast<IPluginV3OneRuntime*>(mPlugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    }

private:
    std::unique_ptr<IPluginV3> mPlugin;
};
} // namespace fuzz

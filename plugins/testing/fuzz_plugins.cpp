//! \file
//! Makes TensorRT's calls with arguments that TensorRT, ONNX files and engines may hold and with ones that none of them
//! should, against the driver of checking_driver.h. Built with AddressSanitizer and UndefinedBehaviorSanitizer, or with
//! ThreadSanitizer; the plugins' sources are linked in. No GPU, no memory behind the tensors, the same inputs for a seed.
//!
//!   fuzz_plugins --seed 1 --count 20000              random inputs, one after the other
//!   fuzz_plugins --seed 1 --first 1234 --count 1     one of them again
//!   fuzz_plugins --threads 4 --count 200             rounds of threads that share plugins, and CUDA contexts in pairs
//!
//! What must hold, besides that no sanitizer objects:
//!   - what is right is accepted; what is certainly wrong is refused, and the refusal leaves one sentence that names the op;
//!   - what is accepted leaves no sentence, survives being stored and restored, and equals its clones;
//!   - the workspace that a plugin asks for holds the rotated query, whatever its size, or none can be had;
//!   - after onShapeChange has accepted, enqueue puts only kernels, copies and grids on the stream that the driver takes.

#include "checking_driver.h"
#include "symbolic_dimension.h"
#include "tensorrt_plugin_abi.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

using namespace nvinfer1;
using checking::fail;
using testing_support::Dimension;
using testing_support::NoExpressions;

extern "C"
{
    IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept;
    void setLoggerFinder(ILoggerFinder* finder) noexcept;
    int32_t llama_export_plugins_take_error(char* buffer, int32_t size) noexcept;
    //! Of the sanitizers, where there is one.
    __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
    char const* __asan_default_options();
}

//! Arguments of a launch that lie in a frame that has been left are found only on request.
extern "C" __attribute__((visibility("default"))) char const* __asan_default_options()
{
    return "detect_stack_use_after_return=1";
}

namespace
{
void describe() noexcept;
} // namespace

//! UndefinedBehaviorSanitizer's own callback.
extern "C" __attribute__((visibility("default"))) void __ubsan_on_report()
{
    describe();
}

namespace
{
constexpr int64_t kMIN64 = std::numeric_limits<int64_t>::min();
constexpr int64_t kMAX64 = std::numeric_limits<int64_t>::max();
constexpr int32_t kMIN32 = std::numeric_limits<int32_t>::min();
constexpr int32_t kMAX32 = std::numeric_limits<int32_t>::max();
constexpr int32_t kNO_DTYPE = -1;
constexpr int32_t kMAX_HEAD_DIM = 256; //!< the widest that a kernel serves
constexpr int32_t kMAX_TENSORS = 16;
constexpr size_t kMORE_THAN_ANY_DEVICE_HAS = size_t{1} << 62; //!< bytes: a workspace that a plugin answers instead of failing

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
constexpr int64_t kEDGES[] = {kMIN64, kMIN64 + 1, kMIN32 - int64_t{1}, kMIN32, -65536, -2, -1, 0, 1, 2, 127, 128, 255,
    256, 257, 32767, 65535, 65536, kMAX32 - int64_t{1}, kMAX32, kMAX32 + int64_t{1}, int64_t{1} << 32, int64_t{1} << 40,
    int64_t{1} << 62, kMAX64 - 1, kMAX64};
constexpr int64_t kLARGE[] = {4096, 65535, 65536, 131072, kMAX32 / 2, kMAX32, kMAX32 + int64_t{1}, int64_t{1} << 40, kMAX64};
constexpr double kNUMBERS[] = {0.0, -0.0, 1.0, -1.0, 1e-5, 0.5, 1e300, -1e300, 3.5e38, 1e-300, 1e-45, 1e-40,
    std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
    -std::numeric_limits<double>::infinity()};
constexpr int32_t kDTYPES[] = {0, 1, 7}; //!< float32, float16, bfloat16
constexpr int32_t kOTHER_DTYPES[] = {-2, -1, 2, 3, 4, 8, 9, 99, kMIN32, kMAX32};
constexpr int32_t kCHIPS[] = {75, 80, 86, 90, 120}; //!< besides that of the library, 8.9

// ---- what is being done, for the sentence of a failure ----------------------------------------------------------------

struct Doing
{
    uint64_t seed{0};
    int64_t input{-1};
    char const* op{""};
    char const* call{""};
};
thread_local Doing gDoing;

void describe() noexcept
{
    Doing const& doing = gDoing;
    std::fprintf(stderr, "in %s of %s: --seed %llu --first %lld --count 1\n", doing.call, doing.op,
        static_cast<unsigned long long>(doing.seed), static_cast<long long>(doing.input));
}

//! How far the inputs got: a generator whose inputs are all refused at once finds nothing.
struct Totals
{
    int64_t plugins{0};
    int64_t refusals{0};
    int64_t runs{0}; //!< enqueue succeeded
    int64_t launches{0};
};
Totals gTotals; // of the main thread: only it counts

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
std::string takeSentence() noexcept
{
    int32_t const length = llama_export_plugins_take_error(nullptr, 0);
    std::unique_ptr<char[]> const buffer(new char[static_cast<size_t>(length) + 1]);
    buffer[0] = '\0';
    llama_export_plugins_take_error(buffer.get(), length + 1);
    return buffer.get();
}

void expectSilence() noexcept
{
    std::string const sentence = takeSentence();
    if (!sentence.empty())
    {
        fail("a call that succeeded left a sentence: %s", sentence.c_str());
    }
}

//! A refusal says one sentence, `Op: ...`.
void expectSentence(Random& random) noexcept
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
bool judge(bool isAccepted, Verdict expected, Random& random) noexcept
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
constexpr Op kOPS[] = {{"LlamaRMSNorm", Kind::kNORM, 2, 1}, {"LlamaAddRMSNorm", Kind::kNORM, 3, 2},
    {"LlamaAttention", Kind::kATTENTION, 8, 3}, {"LlamaMaskedAttention", Kind::kMASKED, 6, 1}};
constexpr int32_t kQUERY = 0;
constexpr int32_t kPAST_KEY = 5;
constexpr int32_t kPAST_VALUE = 6;

//! Values of all attributes; an op reads some.
struct Attributes
{
    int64_t numHeads{1};
    int64_t numKvHeads{1};
    int64_t headDim{64};
    double number{1e-5}; //!< epsilon or scale
    int64_t dtype{kNO_DTYPE};
    int64_t hiddenSize{-1}; //!< of the norms; -1: not known yet
};

IPluginCreatorV3One& creatorOf(Op const& op) noexcept
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

// ---- fields -------------------------------------------------------------------------------------------------------

size_t sizeOf(PluginFieldType type) noexcept
{
    switch (type)
    {
    case PluginFieldType::kINT8:
    case PluginFieldType::kCHAR: return 1;
    case PluginFieldType::kFLOAT16:
    case PluginFieldType::kBF16:
    case PluginFieldType::kINT16: return 2;
    case PluginFieldType::kFLOAT32:
    case PluginFieldType::kINT32: return 4;
    case PluginFieldType::kFLOAT64:
    case PluginFieldType::kINT64: return 8;
    case PluginFieldType::kDIMS: return sizeof(Dims);
    case PluginFieldType::kUNKNOWN: break;
    }
    return 0;
}

//! One field in memory that ends where its name and its value end. The value is not aligned: nobody promises that.
class Field
{
public:
    Field(char const* name, PluginFieldType type)
        : mName(new char[std::strlen(name) + 1])
    {
        std::strcpy(mName.get(), name);
        field = {mName.get(), nullptr, type, 1};
        resize(sizeOf(type));
    }
    void resize(size_t bytes)
    {
        mData.reset(new unsigned char[bytes + 1]());
        field.data = mData.get() + 1;
    }
    template <class Value>
    void set(Value value) noexcept
    {
        std::memcpy(mData.get() + 1, &value, sizeof value);
    }
    static Field integer(Random& random, char const* name, int64_t value)
    {
        bool const fits8 = value >= -128 && value < 128;
        bool const fits16 = value >= -32768 && value < 32768;
        bool const fits32 = value >= kMIN32 && value <= kMAX32;
        PluginFieldType type = PluginFieldType::kINT64;
        if (fits32 && !random.oneIn(4)) // as the ONNX parser gives them
        {
            type = PluginFieldType::kINT32;
        }
        else if (fits8 && random.oneIn(3))
        {
            type = PluginFieldType::kINT8;
        }
        else if (fits16 && random.oneIn(2))
        {
            type = PluginFieldType::kINT16;
        }
        Field made(name, type);
        switch (type)
        {
        case PluginFieldType::kINT8: made.set(static_cast<int8_t>(value)); break;
        case PluginFieldType::kINT16: made.set(static_cast<int16_t>(value)); break;
        case PluginFieldType::kINT32: made.set(static_cast<int32_t>(value)); break;
        default: made.set(value); break;
        }
        return made;
    }
    static Field number(Random& random, char const* name, double value)
    {
        bool const isDouble = random.oneIn(4);
        Field made(name, isDouble ? PluginFieldType::kFLOAT64 : PluginFieldType::kFLOAT32);
        if (isDouble)
        {
            made.set(value);
        }
        else
        {
            made.set(static_cast<float>(value));
        }
        return made;
    }

    PluginField field{};

private:
    std::unique_ptr<char[]> mName;
    std::unique_ptr<unsigned char[]> mData;
};

//! The collection in memory of its own.
class Fields
{
public:
    PluginFieldCollection const* collection()
    {
        if (isNull)
        {
            return nullptr;
        }
        mArray.reset(new PluginField[items.size()]);
        for (size_t i = 0; i < items.size(); ++i)
        {
            mArray[i] = items[i].field;
        }
        int32_t const given = count != kCOUNT_THEM ? count : static_cast<int32_t>(items.size());
        mCollection = {given, hasArray ? mArray.get() : nullptr};
        return &mCollection;
    }

    static constexpr int32_t kCOUNT_THEM = kMAX32;
    std::vector<Field> items;
    bool isNull{false};
    bool hasArray{true};
    int32_t count{kCOUNT_THEM};

private:
    std::unique_ptr<PluginField[]> mArray;
    PluginFieldCollection mCollection{};
};

Fields fieldsOf(Op const& op, Attributes const& attributes, TensorRTPhase phase, Random& random)
{
    Fields made;
    if (op.kind == Kind::kNORM)
    {
        made.items.push_back(Field::number(random, "epsilon", attributes.number));
    }
    else
    {
        made.items.push_back(Field::integer(random, "num_heads", attributes.numHeads));
        made.items.push_back(Field::integer(random, "num_kv_heads", attributes.numKvHeads));
        made.items.push_back(Field::integer(random, "head_dim", attributes.headDim));
        made.items.push_back(Field::number(random, "scale", attributes.number));
    }
    if (phase == TensorRTPhase::kRUNTIME)
    {
        made.items.push_back(Field::integer(random, "dtype", attributes.dtype));
        if (op.kind == Kind::kNORM)
        {
            made.items.push_back(Field::integer(random, "hidden_size", attributes.hiddenSize));
        }
    }
    return made;
}

//! Makes one thing wrong, and says what has to become of it.
Verdict mutateFields(Fields& fields, Random& random)
{
    constexpr char const* kNAMES[] = {"", "num_head", "num_heads ", "epsilon_", "EPSILON", "dtype\n", "%s%n%s"};
    constexpr int32_t kLENGTHS[] = {0, -1, 2, 1024, kMIN32, kMAX32};
    std::vector<Field>& items = fields.items;
    size_t const index = static_cast<size_t>(random.below(static_cast<int64_t>(items.size())));
    Field& item = items[index];
    switch (random.below(10))
    {
    case 0: items.erase(items.begin() + static_cast<std::ptrdiff_t>(index)); return Verdict::kREFUSE;
    case 1: // twice, under another type perhaps
        items.emplace_back(item.field.name, random.oneIn(2) ? item.field.type : PluginFieldType::kINT8);
        return Verdict::kREFUSE;
    case 2: items.push_back(Field::integer(random, random.pick(kNAMES), 1)); return Verdict::kREFUSE;
    case 3:
        item.field.type = static_cast<PluginFieldType>(random.oneIn(8) ? random.pick(kEDGES) : random.below(11));
        item.resize(sizeOf(item.field.type));
        return Verdict::kEITHER; // an integer of another width, zero
    case 4:
        item.field.length = random.pick(kLENGTHS);
        if (item.field.length == 0)
        {
            item.resize(0);
        }
        return Verdict::kREFUSE;
    case 5: item.field.data = nullptr; return Verdict::kREFUSE;
    case 6: item.field.name = nullptr; return Verdict::kREFUSE;
    case 7:
    {
        Field made(random.oneIn(3) ? std::string(2000, 'x').c_str() : random.pick(kNAMES), item.field.type);
        item = std::move(made);
        return Verdict::kREFUSE;
    }
    case 8:
        switch (random.below(3))
        {
        case 0: fields.isNull = true; break;
        case 1: fields.count = -static_cast<int32_t>(random.below(kMAX32)) - 1; break;
        default: fields.hasArray = false; break;
        }
        return Verdict::kREFUSE;
    default: // a value
        if (item.field.type == PluginFieldType::kFLOAT32 || item.field.type == PluginFieldType::kFLOAT64)
        {
            Field made = Field::number(random, item.field.name, random.pick(kNUMBERS));
            item = std::move(made);
        }
        else
        {
            Field made = Field::integer(random, item.field.name, random.pick(kEDGES));
            item = std::move(made);
        }
        return Verdict::kEITHER;
    }
}

//! The stored fields as bytes: names, types, values.
std::string stored(PluginFieldCollection const& fields)
{
    std::string bytes;
    for (int32_t i = 0; i < fields.nbFields; ++i)
    {
        PluginField const& field = fields.fields[i];
        bytes += field.name;
        bytes += ':';
        bytes += std::to_string(static_cast<int32_t>(field.type));
        bytes.append(static_cast<char const*>(field.data), sizeOf(field.type) * static_cast<size_t>(field.length));
    }
    return bytes;
}

Attributes attributesOf(PluginFieldCollection const& fields)
{
    Attributes found;
    for (int32_t i = 0; i < fields.nbFields; ++i)
    {
        PluginField const& field = fields.fields[i];
        int32_t integer{};
        float number{};
        std::memcpy(&integer, field.data, sizeof integer);
        std::memcpy(&number, field.data, sizeof number);
        std::string const name = field.name;
        if (name == "num_heads")
        {
            found.numHeads = integer;
        }
        else if (name == "num_kv_heads")
        {
            found.numKvHeads = integer;
        }
        else if (name == "head_dim")
        {
            found.headDim = integer;
        }
        else if (name == "dtype")
        {
            found.dtype = integer;
        }
        else if (name == "hidden_size")
        {
            found.hiddenSize = integer;
        }
        else
        {
            found.number = static_cast<double>(number);
        }
    }
    return found;
}

//! What an accepted plugin may hold: the tables of README.md.
void checkAttributes(Op const& op, Attributes const& attributes) noexcept
{
    bool const isDtype = attributes.dtype == kNO_DTYPE || attributes.dtype == kDTYPES[0] || attributes.dtype == kDTYPES[1]
        || attributes.dtype == kDTYPES[2];
    bool const isNorm = op.kind == Kind::kNORM;
    bool const areHeads = attributes.numKvHeads >= 1 && attributes.numHeads >= attributes.numKvHeads
        && attributes.numHeads % attributes.numKvHeads == 0 && attributes.headDim >= 1;
    bool const isHiddenSize = attributes.hiddenSize == -1 || attributes.hiddenSize >= 1;
    bool const isNumber = std::isfinite(attributes.number) && attributes.number > 0.0 && (!isNorm || attributes.number < 1.0);
    if (!isDtype || !isHiddenSize || !isNumber || (!isNorm && !areHeads))
    {
        fail("accepted heads %lld / %lld, head_dim %lld, number %g, dtype %lld", static_cast<long long>(attributes.numHeads),
            static_cast<long long>(attributes.numKvHeads), static_cast<long long>(attributes.headDim), attributes.number,
            static_cast<long long>(attributes.dtype));
    }
}

// ---- shapes -------------------------------------------------------------------------------------------------------

struct Sizes
{
    int64_t batch;
    int64_t tokens;
    int64_t capacity;
};

//! A size: small; or, if extremes are wanted, anything that shapes could agree on.
int64_t sizeFrom(Random& random, bool isOrdinary) noexcept
{
    if (isOrdinary || random.oneIn(2))
    {
        return random.below(9);
    }
    return random.oneIn(3) ? random.pick(kEDGES) : random.pick(kLARGE);
}

Dims dimsOf(std::initializer_list<int64_t> sizes) noexcept
{
    Dims dims{static_cast<int32_t>(sizes.size()), {}};
    int32_t axis = 0;
    for (int64_t const size : sizes)
    {
        dims.d[axis++] = size;
    }
    return dims;
}

//! Shapes of the inputs that agree with each other and with the attributes.
std::vector<Dims> shapesOf(Op const& op, Attributes const& attributes, bool isOrdinary, Random& random)
{
    if (op.kind == Kind::kNORM)
    {
        Dims hidden{static_cast<int32_t>(random.below(isOrdinary ? 5 : Dims::MAX_DIMS)) + 1, {}};
        for (int32_t axis = 0; axis < hidden.nbDims; ++axis)
        {
            hidden.d[axis] = sizeFrom(random, isOrdinary);
        }
        std::vector<Dims> shapes(static_cast<size_t>(op.numInputs), hidden);
        shapes.back() = dimsOf({hidden.d[hidden.nbDims - 1]});
        return shapes;
    }
    Sizes const sizes{sizeFrom(random, isOrdinary), sizeFrom(random, isOrdinary), sizeFrom(random, isOrdinary)};
    Dims const query = dimsOf({sizes.batch, sizes.tokens, attributes.numHeads * attributes.headDim});
    Dims const key = dimsOf({sizes.batch, sizes.tokens, attributes.numKvHeads * attributes.headDim});
    Dims const angles = dimsOf({sizes.batch, sizes.tokens, attributes.headDim / 2});
    if (op.kind == Kind::kMASKED)
    {
        return {query, key, key, angles, angles, dimsOf({sizes.batch, sizes.tokens})};
    }
    Dims const cache = dimsOf({sizes.batch, attributes.numKvHeads, sizes.capacity, attributes.headDim});
    return {query, key, key, angles, angles, cache, cache, dimsOf({sizes.batch})};
}

void mutateShapes(std::vector<Dims>& shapes, Random& random) noexcept
{
    constexpr int32_t kRANKS[] = {kMIN32, -1, 0, 1, 2, 3, 4, 5, 8, 9, 1000, kMAX32};
    Dims& dims = shapes[static_cast<size_t>(random.below(static_cast<int64_t>(shapes.size())))];
    int64_t& size = dims.d[random.below(dims.nbDims >= 1 && dims.nbDims <= Dims::MAX_DIMS ? dims.nbDims : 1)];
    switch (random.below(3))
    {
    case 0: dims.nbDims = random.pick(kRANKS); break;
    case 1: size = random.pick(kEDGES); break;
    default: size = size == kMAX64 ? kMIN64 : size + 1; break;
    }
}

bool isSame(Dims const& a, Dims const& b) noexcept
{
    return a.nbDims == b.nbDims && a.nbDims >= 0 && a.nbDims <= Dims::MAX_DIMS
        && std::memcmp(a.d, b.d, static_cast<size_t>(a.nbDims) * sizeof a.d[0]) == 0;
}

//! Whether a plugin may run these shapes: they agree, and every size is a size.
bool isConsistent(Op const& op, Attributes const& attributes, std::vector<Dims> const& shapes) noexcept
{
    for (Dims const& dims : shapes)
    {
        if (dims.nbDims < 1 || dims.nbDims > Dims::MAX_DIMS)
        {
            return false;
        }
        for (int32_t axis = 0; axis < dims.nbDims; ++axis)
        {
            if (dims.d[axis] < 0)
            {
                return false;
            }
        }
    }
    Dims const& first = shapes.front();
    if (op.kind == Kind::kNORM)
    {
        return isSame(shapes.back(), dimsOf({first.d[first.nbDims - 1]})) && (shapes.size() == 2 || isSame(first, shapes[1]));
    }
    Dims const key = dimsOf({first.d[0], first.d[1], attributes.numKvHeads * attributes.headDim});
    Dims const angles = dimsOf({first.d[0], first.d[1], attributes.headDim / 2});
    bool const areRows = isSame(first, dimsOf({first.d[0], first.d[1], attributes.numHeads * attributes.headDim}))
        && isSame(shapes[1], key) && isSame(shapes[2], key) && isSame(shapes[3], angles) && isSame(shapes[4], angles);
    if (op.kind == Kind::kMASKED)
    {
        return areRows && isSame(shapes[5], dimsOf({first.d[0], first.d[1]}));
    }
    Dims const cache = dimsOf({first.d[0], attributes.numKvHeads, shapes[kPAST_KEY].d[2], attributes.headDim});
    return areRows && isSame(shapes[5], cache) && isSame(shapes[6], cache) && isSame(shapes[7], dimsOf({first.d[0]}));
}

int64_t bytesOf(int32_t dtype) noexcept
{
    switch (dtype)
    {
    case 0: return 4;
    case 8: return 8;
    default: return 2;
    }
}

//! Bytes of a tensor; as many as the address space of the checking driver gives one, if there are more.
uint64_t tensorBytes(Dims const& dims, int32_t dtype) noexcept
{
    constexpr uint64_t kMOST = uint64_t{1} << 59;
    unsigned __int128 bytes = static_cast<unsigned __int128>(bytesOf(dtype));
    for (int32_t axis = 0; axis < dims.nbDims; ++axis)
    {
        if (dims.d[axis] == 0)
        {
            return 0;
        }
        bytes = bytes > kMOST ? kMOST + 1 : bytes * static_cast<unsigned __int128>(dims.d[axis]);
    }
    return bytes > kMOST ? kMOST : static_cast<uint64_t>(bytes);
}

//! The type of a tensor of a node, inputs before outputs.
int32_t typeOf(Op const& op, int32_t tensor, int32_t dtype) noexcept
{
    constexpr int32_t kFLOAT32 = 0;
    constexpr int32_t kINT64 = 8;
    if (op.kind == Kind::kNORM)
    {
        return dtype;
    }
    if (tensor == 3 || tensor == 4) // cos, sin
    {
        return kFLOAT32;
    }
    return tensor == op.numInputs - 1 ? kINT64 : dtype; // past_length, attention_mask
}

//! Inputs and outputs; an output has the shape of the input it is derived from.
std::vector<PluginTensorDesc> descsOf(Op const& op, std::vector<Dims> const& shapes, int32_t dtype)
{
    std::vector<PluginTensorDesc> descs;
    for (int32_t i = 0; i < op.numInputs + op.numOutputs; ++i)
    {
        int32_t const output = i - op.numInputs;
        int32_t const source = output < 0 ? i : (output > 0 && op.kind == Kind::kATTENTION ? kPAST_KEY + output - 1 : 0);
        descs.push_back({shapes[static_cast<size_t>(source)], static_cast<DataType>(typeOf(op, i, dtype)),
            TensorFormat::kLINEAR, 1.0F});
    }
    return descs;
}

//! As a profile whose largest shapes these are.
std::vector<DynamicPluginTensorDesc> dynamicOf(std::vector<PluginTensorDesc> const& descs, Random& random)
{
    std::vector<DynamicPluginTensorDesc> made;
    for (PluginTensorDesc const& desc : descs)
    {
        DynamicPluginTensorDesc dynamic{desc, desc.dims, desc.dims, desc.dims};
        for (int32_t axis = 0; axis < Dims::MAX_DIMS; ++axis)
        {
            if (random.oneIn(2))
            {
                dynamic.desc.dims.d[axis] = -1;
                dynamic.min.d[axis] = 1;
            }
        }
        made.push_back(dynamic);
    }
    return made;
}

// ---- the calls ----------------------------------------------------------------------------------------------------

Plugin create(Op const& op, Fields& fields, TensorRTPhase phase)
{
    gDoing.call = "createPlugin";
    return Plugin(creatorOf(op).createPlugin("node", fields.collection(), phase));
}

//! Counts that are wrong now and then; the arrays behind them are of that length.
int32_t countOr(int32_t right, bool isWrong, Random& random) noexcept
{
    int32_t const wrong = static_cast<int32_t>(random.below(kMAX_TENSORS));
    return isWrong ? wrong : right;
}

void checkOutputTypes(Op const& op, Plugin const& plugin, Random& random)
{
    gDoing.call = "getOutputDataTypes";
    bool const isWrong = random.oneIn(8);
    int32_t const numInputs = countOr(op.numInputs, isWrong, random);
    std::unique_ptr<DataType[]> const inputs(new DataType[static_cast<size_t>(numInputs)]);
    std::unique_ptr<DataType[]> const outputs(new DataType[static_cast<size_t>(op.numOutputs)]);
    int32_t const dtype = random.pick(kDTYPES);
    for (int32_t i = 0; i < numInputs; ++i)
    {
        inputs[i] = static_cast<DataType>(typeOf(op, i, dtype));
    }
    int32_t const status = plugin.build().getOutputDataTypes(outputs.get(), op.numOutputs, inputs.get(), numInputs);
    bool const isRight = numInputs == op.numInputs;
    judge(status == 0, isRight ? Verdict::kACCEPT : Verdict::kREFUSE, random);
    for (int32_t i = 0; isRight && i < op.numOutputs; ++i)
    {
        if (outputs[i] != static_cast<DataType>(dtype))
        {
            fail("output %d has type %d, expected %d", i, static_cast<int32_t>(outputs[i]), dtype);
        }
    }
}

void checkAliases(Op const& op, Plugin const& plugin, Random& random)
{
    gDoing.call = "getAliasedInput";
    int32_t const output = static_cast<int32_t>(random.oneIn(4) ? random.pick(kEDGES) : random.below(4));
    bool const isCache = op.kind == Kind::kATTENTION && (output == 1 || output == 2);
    if (plugin.build().getAliasedInput(output) != (isCache ? kPAST_KEY + output - 1 : -1))
    {
        fail("output %d is aliased to another input", output);
    }
    expectSilence();
}

void checkOutputShapes(Op const& op, Plugin const& plugin, std::vector<Dims> const& shapes, Verdict verdict, Random& random)
{
    gDoing.call = "getOutputShapes";
    int32_t const numInputs = countOr(op.numInputs, random.oneIn(16), random);
    int32_t const numOutputs = countOr(op.numOutputs, random.oneIn(16), random);
    std::unique_ptr<DimsExprs[]> const inputs(new DimsExprs[static_cast<size_t>(numInputs)]());
    std::unique_ptr<DimsExprs[]> const outputs(new DimsExprs[static_cast<size_t>(numOutputs)]());
    std::unique_ptr<Dimension[]> const dimensions(new Dimension[kMAX_TENSORS * Dims::MAX_DIMS]);
    bool const isSymbolic = random.oneIn(2);
    for (int32_t i = 0; i < numInputs; ++i)
    {
        Dims const& dims = shapes[static_cast<size_t>(i) % shapes.size()];
        inputs[i].nbDims = dims.nbDims;
        for (int32_t axis = 0; axis < dims.nbDims && axis < Dims::MAX_DIMS; ++axis)
        {
            Dimension& dimension = dimensions[i * Dims::MAX_DIMS + axis];
            dimension.set(dims.d[axis], !(isSymbolic && random.oneIn(2)));
            inputs[i].d[axis] = &dimension;
        }
    }
    NoExpressions builder;
    int32_t const status
        = plugin.build().getOutputShapes(inputs.get(), numInputs, nullptr, 0, outputs.get(), numOutputs, builder);
    bool const isRight = numInputs == op.numInputs && numOutputs == op.numOutputs;
    if (!judge(status == 0, isRight ? verdict : Verdict::kREFUSE, random))
    {
        return;
    }
    for (int32_t i = 0; i < numOutputs; ++i)
    {
        int32_t const source = i > 0 && op.kind == Kind::kATTENTION ? kPAST_KEY + i - 1 : 0;
        if (std::memcmp(&outputs[i], &inputs[source], sizeof outputs[i]) != 0)
        {
            fail("output %d has another shape than input %d", i, source);
        }
    }
}

//! A question, not a refusal: TensorRT asks for every type, and no answer leaves a sentence.
void checkFormats(Op const& op, Plugin const& plugin, std::vector<PluginTensorDesc> const& right, Random& random)
{
    gDoing.call = "supportsFormatCombination";
    std::vector<PluginTensorDesc> descs = right;
    int32_t const total = op.numInputs + op.numOutputs;
    int32_t const wrong = random.oneIn(2) ? static_cast<int32_t>(random.below(total)) : -1;
    if (wrong >= 0 && random.oneIn(4))
    {
        descs[static_cast<size_t>(wrong)].format = static_cast<TensorFormat>(random.below(12) + 1);
    }
    else if (wrong >= 0)
    {
        DataType const type = descs[static_cast<size_t>(wrong)].type;
        do
        {
            int32_t const other = random.oneIn(2) ? random.pick(kDTYPES) : random.pick(kOTHER_DTYPES);
            descs[static_cast<size_t>(wrong)].type = static_cast<DataType>(other);
        } while (descs[static_cast<size_t>(wrong)].type == type);
    }
    std::vector<DynamicPluginTensorDesc> const tensors = dynamicOf(descs, random);
    bool isTaken = true;
    for (int32_t position = 0; position < total; ++position)
    {
        isTaken = plugin.build().supportsFormatCombination(position, tensors.data(), op.numInputs, op.numOutputs) && isTaken;
    }
    if (isTaken != (wrong < 0))
    {
        fail("tensor %d is of another type or format, all are %s", wrong, isTaken ? "taken" : "not taken");
    }
    int32_t const otherInputs = static_cast<int32_t>(random.below(total)); // as many tensors, of another op
    if (otherInputs != op.numInputs
        && plugin.build().supportsFormatCombination(0, tensors.data(), otherInputs, total - otherInputs))
    {
        fail("%d inputs are taken", otherInputs);
    }
    expectSilence();
}

//! configurePlugin and getWorkspaceSize. The data type of the plugin afterwards; kNO_DTYPE if it refused.
int32_t checkConfigure(Op const& op, Plugin const& plugin, std::vector<PluginTensorDesc> const& descs, int32_t dtype,
    bool isServed, Random& random)
{
    gDoing.call = "configurePlugin";
    std::vector<DynamicPluginTensorDesc> const tensors = dynamicOf(descs, random);
    int32_t const numInputs = countOr(op.numInputs, random.oneIn(16), random);
    bool const isRight = numInputs == op.numInputs && isServed;
    int32_t const given = numInputs < static_cast<int32_t>(tensors.size()) ? numInputs : op.numInputs;
    int32_t const status = plugin.build().configurePlugin(tensors.data(), numInputs, tensors.data() + given, op.numOutputs);
    if (!judge(status == 0, isRight ? Verdict::kACCEPT : Verdict::kREFUSE, random))
    {
        return kNO_DTYPE;
    }
    gDoing.call = "getWorkspaceSize";
    std::unique_ptr<DynamicPluginTensorDesc[]> const inputs(new DynamicPluginTensorDesc[static_cast<size_t>(op.numInputs)]);
    std::copy(tensors.begin(), tensors.begin() + op.numInputs, inputs.get());
    size_t const bytes = plugin.build().getWorkspaceSize(
        inputs.get(), op.numInputs, tensors.data() + op.numInputs, op.numOutputs);
    if (op.kind == Kind::kNORM)
    {
        expectSilence();
        return dtype;
    }
    judge(bytes < kMORE_THAN_ANY_DEVICE_HAS, Verdict::kEITHER, random);
    Dims const& query = inputs[kQUERY].max;
    unsigned __int128 needed = static_cast<unsigned __int128>(bytesOf(dtype));
    for (int32_t axis = 0; axis < 3 && query.nbDims == 3; ++axis)
    {
        if (query.d[axis] < 0)
        {
            needed = kMORE_THAN_ANY_DEVICE_HAS; // must not be a number that could be had
            break;
        }
        needed = needed > kMORE_THAN_ANY_DEVICE_HAS ? needed : needed * static_cast<unsigned __int128>(query.d[axis]);
        needed = query.d[axis] == 0 ? 0 : needed;
        if (query.d[axis] == 0)
        {
            break;
        }
    }
    if (bytes < kMORE_THAN_ANY_DEVICE_HAS && bytes < needed)
    {
        fail("a workspace of %zu bytes does not hold the rotated query", bytes);
    }
    return dtype;
}

//! A clone equals its origin, also when that is gone.
void checkClone(Plugin& plugin, Random& random)
{
    gDoing.call = "clone";
    std::string const expected = stored(*plugin.runtime().getFieldsToSerialize());
    Plugin copy(plugin->clone());
    if (!copy)
    {
        fail("no clone");
    }
    if (random.oneIn(2))
    {
        std::swap(plugin, copy);
    }
    copy = Plugin(nullptr);
    if (stored(*plugin.runtime().getFieldsToSerialize()) != expected)
    {
        fail("a clone stores other fields than its origin");
    }
    expectSilence();
}

//! What an engine stores makes the same plugin again.
Plugin restored(Op const& op, Plugin const& plugin)
{
    PluginFieldCollection const* const fields = plugin.runtime().getFieldsToSerialize();
    std::string const expected = stored(*fields);
    gDoing.call = "createPlugin from an engine";
    Plugin made(creatorOf(op).createPlugin("node", fields, TensorRTPhase::kRUNTIME));
    if (!made)
    {
        fail("what an engine stored is refused: %s", takeSentence().c_str());
    }
    expectSilence();
    if (stored(*made.runtime().getFieldsToSerialize()) != expected)
    {
        fail("a restored plugin stores other fields");
    }
    return made;
}

//! enqueue, after an accepted onShapeChange with these tensors.
void checkEnqueue(
    Op const& op, Plugin const& plugin, std::vector<PluginTensorDesc> const& descs, uint64_t workspaceBytes, Random& random)
{
    gDoing.call = "enqueue";
    bool const isAliased = random.oneIn(2);
    int32_t const misaligned = random.oneIn(8) ? static_cast<int32_t>(random.below(op.numInputs + op.numOutputs)) : -1;
    std::vector<checking::Range> ranges;
    std::vector<void*> addresses;
    CUdeviceptr next = 0x10000;
    for (int32_t i = 0; i < op.numInputs + op.numOutputs + 1; ++i)
    {
        bool const isWorkspace = i == op.numInputs + op.numOutputs;
        PluginTensorDesc const& desc = descs[static_cast<size_t>(isWorkspace ? 0 : i)];
        uint64_t const bytes = isWorkspace ? workspaceBytes : tensorBytes(desc.dims, static_cast<int32_t>(desc.type));
        int32_t const output = i - op.numInputs;
        CUdeviceptr begin = next + (i == misaligned ? 1 + static_cast<CUdeviceptr>(random.below(15)) : 0);
        if (isAliased && op.kind == Kind::kATTENTION && (output == 1 || output == 2))
        {
            begin = reinterpret_cast<CUdeviceptr>(addresses[static_cast<size_t>(kPAST_KEY + output - 1)]);
        }
        ranges.push_back({begin, bytes});
        addresses.push_back(reinterpret_cast<void*>(begin));
        next += (bytes + 0x1ff) & ~CUdeviceptr{0xff};
    }
    checking::Thread& thread = checking::thisThread();
    CUstream const stream = reinterpret_cast<CUstream>(0x100 + random.below(16));
    thread.ranges = ranges.data();
    thread.numRanges = ranges.size();
    thread.stream = stream;
    thread.isEnqueuing = true;
    thread.launches = 0;
    thread.failing = random.oneIn(8) ? static_cast<uint32_t>(random.next()) : 0;
    std::unique_ptr<void const*[]> const inputs(new void const*[static_cast<size_t>(op.numInputs)]);
    std::unique_ptr<void*[]> const outputs(new void*[static_cast<size_t>(op.numOutputs)]);
    std::copy(addresses.begin(), addresses.begin() + op.numInputs, inputs.get());
    std::copy(addresses.begin() + op.numInputs, addresses.end() - 1, outputs.get());
    int32_t const status = plugin.runtime().enqueue(
        descs.data(), descs.data() + op.numInputs, inputs.get(), outputs.get(), addresses.back(), stream);
    bool const isRight = misaligned < 0 && thread.failing == 0;
    bool const isDone = judge(status == 0, isRight ? Verdict::kACCEPT : Verdict::kEITHER, random);
    Dims const& first = descs[kQUERY].dims;
    bool isEmpty = false;
    for (int32_t axis = 0; axis + 1 < first.nbDims; ++axis)
    {
        isEmpty = isEmpty || first.d[axis] == 0;
    }
    if (isDone && (thread.launches > 0) == isEmpty)
    {
        fail("%lld kernels were launched for a node that has %s to do", static_cast<long long>(thread.launches),
            isEmpty ? "nothing" : "something");
    }
    gTotals.runs += isDone ? 1 : 0;
    gTotals.launches += thread.launches;
    thread.isEnqueuing = false;
    thread.failing = 0;
    thread.numRanges = 0;
}

//! One execution context: attach, then shapes and launches.
void checkContext(Op const& op, Plugin const& restoredPlugin, bool isOrdinary, Random& random)
{
    checking::Thread& thread = checking::thisThread();
    thread.context = random.oneIn(16) ? checking::kNO_CONTEXT : static_cast<int32_t>(random.below(checking::kNUM_CONTEXTS));
    if (thread.context != checking::kNO_CONTEXT && random.oneIn(256))
    {
        checking::recreateContext(thread.context, random.oneIn(2) ? random.pick(kCHIPS) : 89);
    }
    thread.failing = random.oneIn(16) ? static_cast<uint32_t>(random.next()) : 0;
    bool isUsable = thread.context != checking::kNO_CONTEXT && checking::computeCapability(thread.context) == 89
        && thread.failing == 0;
    gDoing.call = "attachToContext";
    Plugin const attached(restoredPlugin.runtime().attachToContext(nullptr));
    if (!attached)
    {
        fail("attachToContext gave nothing");
    }
    Attributes const attributes = attributesOf(*restoredPlugin.runtime().getFieldsToSerialize());
    bool const isServed = op.kind == Kind::kNORM || (attributes.headDim % 2 == 0 && attributes.headDim <= kMAX_HEAD_DIM);
    if (isUsable && isServed)
    {
        expectSilence();
    }
    else
    {
        takeSentence();
    }
    thread.failing = random.oneIn(4) ? thread.failing : 0;
    isUsable = thread.context != checking::kNO_CONTEXT && checking::computeCapability(thread.context) == 89
        && thread.failing == 0;

    int32_t dtype = static_cast<int32_t>(attributes.dtype);
    dtype = dtype == kNO_DTYPE || random.oneIn(8) ? random.pick(kDTYPES) : dtype;
    for (int64_t changes = random.below(3) + 1; changes > 0; --changes)
    {
        std::vector<Dims> shapes = shapesOf(op, attributes, isOrdinary, random);
        bool const isMutated = random.oneIn(3);
        if (isMutated)
        {
            mutateShapes(shapes, random);
        }
        bool const isDtypeWrong = random.oneIn(32);
        std::vector<PluginTensorDesc> descs = descsOf(op, shapes, isDtypeWrong ? random.pick(kOTHER_DTYPES) : dtype);
        int32_t const numInputs = countOr(op.numInputs, random.oneIn(32), random);
        bool const isRight = isOrdinary && isUsable && isServed;
        bool const isConsistentNow = isConsistent(op, attributes, shapes);
        Verdict verdict = isRight && !isMutated ? Verdict::kACCEPT : Verdict::kEITHER;
        if (!isConsistentNow || isDtypeWrong || !isServed || numInputs != op.numInputs)
        {
            verdict = Verdict::kREFUSE;
        }
        gDoing.call = "onShapeChange";
        int32_t const given = numInputs < static_cast<int32_t>(descs.size()) ? numInputs : op.numInputs;
        int32_t const status = attached.runtime().onShapeChange(descs.data(), numInputs, descs.data() + given, op.numOutputs);
        if (!judge(status == 0, verdict, random))
        {
            continue;
        }
        gDoing.call = "getWorkspaceSize";
        size_t const workspaceBytes = attached.build().getWorkspaceSize(
            dynamicOf(descs, random).data(), op.numInputs, nullptr, op.numOutputs);
        // Extreme sizes may run themselves while the workspace, which is for smaller ones too, cannot be had.
        bool const isWorkspace = workspaceBytes < kMORE_THAN_ANY_DEVICE_HAS;
        if (!judge(isWorkspace, isOrdinary ? Verdict::kACCEPT : Verdict::kEITHER, random))
        {
            continue;
        }
        checkEnqueue(op, attached, descs, workspaceBytes, random);
        dtype = random.oneIn(4) ? random.pick(kDTYPES) : dtype;
    }
    thread.failing = 0;
}

//! enqueue without kernels says so: TensorRT may have ignored what onShapeChange returned.
void checkUnready(Op const& op, Plugin const& plugin, Random& random)
{
    gDoing.call = "enqueue without kernels";
    Attributes const attributes = attributesOf(*plugin.runtime().getFieldsToSerialize());
    std::vector<Dims> const shapes = op.kind == Kind::kNORM
        ? std::vector<Dims>{dimsOf({2, 8}), dimsOf({2, 8}), dimsOf({8})}
        : shapesOf(op, attributes, true, random);
    std::vector<PluginTensorDesc> const descs = op.kind == Kind::kNORM
        ? std::vector<PluginTensorDesc>(static_cast<size_t>(op.numInputs + op.numOutputs),
            {shapes[0], DataType::kFLOAT, TensorFormat::kLINEAR, 1.0F})
        : descsOf(op, shapes, 0);
    void* addresses[kMAX_TENSORS]{};
    void const* const* const inputs = addresses;
    int32_t const status
        = plugin.runtime().enqueue(descs.data(), descs.data() + op.numInputs, inputs, addresses, nullptr, nullptr);
    judge(status == 0, Verdict::kREFUSE, random);
}

// ---- one input ----------------------------------------------------------------------------------------------------

Attributes randomAttributes(bool isOrdinary, Random& random) noexcept
{
    constexpr int64_t kHEAD_DIMS[] = {2, 16, 30, 64, 80, 96, 128, 256};
    constexpr double kSCALES[] = {1e-5, 1e-6, 0.125, 0.5, 1e-38};
    constexpr int64_t kHEADS[] = {1, 1, 2, 3, 8, 65535, 65536, 1 << 20};
    Attributes made;
    made.numKvHeads = isOrdinary ? random.below(4) + 1 : random.pick(kHEADS);
    made.numHeads = made.numKvHeads * (random.below(5) + 1);
    made.headDim = random.pick(kHEAD_DIMS);
    if (!isOrdinary && random.oneIn(8))
    {
        made.headDim = random.below(600) + 1;
    }
    if (!isOrdinary && random.oneIn(8)) // as many heads as 32 bits hold
    {
        made.numKvHeads = random.oneIn(2) ? 1 : 2;
        made.numHeads = kMAX32 / 2 * made.numKvHeads;
    }
    made.number = random.pick(kSCALES);
    made.dtype = random.oneIn(4) ? kNO_DTYPE : random.pick(kDTYPES);
    made.hiddenSize = random.oneIn(4) ? -1 : random.below(20000) + 1;
    return made;
}

void fuzzOne(uint64_t seed, int64_t input)
{
    Random random(seed * 0x2545f4914f6cdd1dU + static_cast<uint64_t>(input));
    Op const& op = random.pick(kOPS);
    gDoing = {seed, input, op.name, "createPlugin"};

    bool isOrdinary = random.oneIn(2);
    TensorRTPhase const phase = random.oneIn(2) ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME;
    Fields fields = fieldsOf(op, randomAttributes(isOrdinary, random), phase, random);
    Verdict verdict = Verdict::kACCEPT;
    if (random.oneIn(3))
    {
        verdict = mutateFields(fields, random);
        isOrdinary = false;
    }
    Plugin plugin = create(op, fields, phase);
    if (!judge(static_cast<bool>(plugin), verdict, random))
    {
        return;
    }
    ++gTotals.plugins;
    gDoing.call = "getFieldsToSerialize";
    Attributes const attributes = attributesOf(*plugin.runtime().getFieldsToSerialize());
    checkAttributes(op, attributes);
    fields = Fields(); // a plugin keeps none of the memory it was created from
    bool const isServed = op.kind == Kind::kNORM || (attributes.headDim % 2 == 0 && attributes.headDim <= kMAX_HEAD_DIM);
    if (std::strcmp(plugin.core().getPluginName(), op.name) != 0 || plugin.build().getNbOutputs() != op.numOutputs)
    {
        fail("is %s of %d outputs", plugin.core().getPluginName(), plugin.build().getNbOutputs());
    }
    checkClone(plugin, random);
    checkOutputTypes(op, plugin, random);
    checkAliases(op, plugin, random);

    std::vector<Dims> shapes = shapesOf(op, attributes, isOrdinary, random);
    std::vector<Dims> const agreeing = shapes;
    bool const isMutated = random.oneIn(2);
    if (isMutated)
    {
        mutateShapes(shapes, random);
    }
    checkOutputShapes(op, plugin, shapes,
        !isServed ? Verdict::kREFUSE : (isOrdinary && !isMutated ? Verdict::kACCEPT : Verdict::kEITHER), random);
    if (phase == TensorRTPhase::kBUILD)
    {
        int32_t const dtype = random.oneIn(8) ? random.pick(kOTHER_DTYPES) : random.pick(kDTYPES);
        bool const isDtypeServed = dtype == 0 || dtype == 1 || dtype == 7;
        if (isDtypeServed)
        {
            checkFormats(op, plugin, descsOf(op, agreeing, dtype), random);
        }
        std::vector<PluginTensorDesc> const descs = descsOf(op, random.oneIn(2) ? shapes : agreeing, dtype);
        int32_t const configured = checkConfigure(op, plugin, descs, dtype, isDtypeServed, random);
        int64_t const now = attributesOf(*plugin.runtime().getFieldsToSerialize()).dtype;
        if (now != configured)
        {
            fail("stores dtype %lld, was configured for %d", static_cast<long long>(now), configured);
        }
        checkClone(plugin, random);
    }
    Plugin const made = restored(op, plugin);
    if (random.oneIn(2))
    {
        plugin = Plugin(nullptr);
    }
    if (random.oneIn(16))
    {
        checkUnready(op, made, random);
    }
    checkContext(op, made, isOrdinary, random);
}

//! Without a driver, and with a library that is none: every context refuses and says why. Once one is open it stays.
void checkMissingDrivers(uint64_t seed)
{
    Random random(seed);
    for (char const* const name : {"/nowhere/libcuda.so.1", "libm.so.6"})
    {
        setenv("LLAMA_EXPORT_LIBCUDA", name, 1);
        for (Op const& op : kOPS)
        {
            gDoing = {seed, -1, op.name, "attachToContext without a driver"};
            Attributes attributes;
            attributes.dtype = 0;
            attributes.hiddenSize = 64;
            Fields fields = fieldsOf(op, attributes, TensorRTPhase::kRUNTIME, random);
            Plugin const plugin = create(op, fields, TensorRTPhase::kRUNTIME);
            Plugin const attached(plugin.runtime().attachToContext(nullptr));
            judge(false, Verdict::kREFUSE, random);
            std::vector<PluginTensorDesc> const descs = descsOf(op, shapesOf(op, attributes, true, random), 0);
            int32_t const status = attached.runtime().onShapeChange(
                descs.data(), op.numInputs, descs.data() + op.numInputs, op.numOutputs);
            judge(status == 0, Verdict::kREFUSE, random);
            checkUnready(op, attached, random);
        }
    }
}

// ---- threads ------------------------------------------------------------------------------------------------------

//! Lets threads start together. The library sees no other order between them.
class Barrier
{
public:
    explicit Barrier(int32_t threads) noexcept
        : mThreads(threads)
    {
    }
    void wait() noexcept
    {
        int32_t const round = mRound.load();
        if (mWaiting.fetch_add(1) + 1 == mThreads)
        {
            mWaiting.store(0);
            mRound.fetch_add(1);
            return;
        }
        while (mRound.load() == round)
        {
            std::this_thread::yield();
        }
    }

private:
    int32_t const mThreads;
    std::atomic<int32_t> mWaiting{0};
    std::atomic<int32_t> mRound{0};
};

//! What all threads use: the plugins of an engine, and the sentences that their refusals can leave.
struct Shared
{
    std::vector<Plugin> plugins;
    std::vector<std::string> expected;
    std::vector<std::string> sentences;
};

Attributes sharedAttributes() noexcept
{
    Attributes attributes;
    attributes.numHeads = 4;
    attributes.numKvHeads = 2;
    attributes.number = 0.125;
    attributes.dtype = 1;
    attributes.hiddenSize = 8;
    return attributes;
}

//! A refusal of its own for each op.
void refuse(Op const& op)
{
    Random random(0);
    Fields fields = fieldsOf(op, sharedAttributes(), TensorRTPhase::kBUILD, random);
    fields.items.pop_back();
    if (create(op, fields, TensorRTPhase::kBUILD))
    {
        fail("accepted, expected a refusal");
    }
}

Shared makeShared()
{
    Shared shared;
    Random random(0);
    for (Op const& op : kOPS)
    {
        gDoing.op = op.name;
        Fields fields = fieldsOf(op, sharedAttributes(), TensorRTPhase::kRUNTIME, random);
        shared.plugins.push_back(create(op, fields, TensorRTPhase::kRUNTIME));
        if (!shared.plugins.back())
        {
            fail("refused, expected to be accepted: %s", takeSentence().c_str());
        }
        shared.expected.push_back(stored(*shared.plugins.back().runtime().getFieldsToSerialize()));
        refuse(op);
        shared.sentences.push_back(takeSentence());
    }
    return shared;
}

//! One round of one thread: an execution context for each plugin, and refusals in between.
void runRound(Shared const& shared, int32_t thread, int64_t round)
{
    Random random(static_cast<uint64_t>(1000 * round + thread));
    checking::thisThread().context = thread % (checking::kNUM_CONTEXTS / 2); // two threads share one
    size_t const first = static_cast<size_t>(random.below(4));
    for (size_t i = 0; i < 4; ++i)
    {
        size_t const index = (first + i) % 4;
        Op const& op = kOPS[index];
        gDoing = {0, round, op.name, "a thread"};
        Plugin const& plugin = shared.plugins[index];
        Plugin const attached(plugin.runtime().attachToContext(nullptr));
        if (stored(*plugin.runtime().getFieldsToSerialize()) != shared.expected[index])
        {
            fail("an engine's plugin stores other fields while it is used");
        }
        Plugin const copy(plugin->clone());
        if (stored(*copy.runtime().getFieldsToSerialize()) != shared.expected[index])
        {
            fail("a clone stores other fields than its origin");
        }
        Attributes const attributes = attributesOf(*copy.runtime().getFieldsToSerialize());
        std::vector<Dims> const shapes = shapesOf(op, attributes, true, random);
        std::vector<PluginTensorDesc> const descs = descsOf(op, shapes, random.oneIn(4) ? 0 : 1);
        if (attached.runtime().onShapeChange(descs.data(), op.numInputs, descs.data() + op.numInputs, op.numOutputs) != 0)
        {
            fail("refused, expected to be accepted: %s", takeSentence().c_str());
        }
        checking::Thread& driver = checking::thisThread();
        checking::Range const everything{0, ~uint64_t{0}};
        driver.ranges = &everything;
        driver.numRanges = 1;
        driver.stream = reinterpret_cast<CUstream>(0x100 + static_cast<uintptr_t>(thread));
        driver.isEnqueuing = true;
        void* addresses[kMAX_TENSORS];
        for (int32_t tensor = 0; tensor < kMAX_TENSORS; ++tensor)
        {
            addresses[tensor] = reinterpret_cast<void*>(uintptr_t{0x10000} * static_cast<uintptr_t>(tensor + 1));
        }
        void const* const* const inputs = addresses;
        if (attached.runtime().enqueue(descs.data(), descs.data() + op.numInputs, inputs, addresses + op.numInputs,
                addresses[kMAX_TENSORS - 1], driver.stream)
            != 0)
        {
            fail("enqueue failed: %s", takeSentence().c_str());
        }
        driver.isEnqueuing = false;
        driver.numRanges = 0;

        refuse(op);
        char buffer[1024];
        if (llama_export_plugins_take_error(buffer, sizeof buffer) > 0) // else another thread has taken it
        {
            bool isKnown = false;
            for (std::string const& sentence : shared.sentences)
            {
                isKnown = isKnown || sentence == buffer;
            }
            if (!isKnown)
            {
                fail("nobody reported this: %s", buffer);
            }
        }
    }
}

void runThreads(int32_t numThreads, int64_t rounds, QuietLogger& logger)
{
    constexpr int64_t kROUNDS_OF_A_CONTEXT = 4;
    Shared const shared = makeShared();
    Barrier barrier(numThreads);
    std::vector<std::thread> threads;
    for (int32_t thread = 0; thread < numThreads; ++thread)
    {
        threads.emplace_back([&, thread] {
            for (int64_t round = 0; round < rounds; ++round)
            {
                if (thread == 0 && round % kROUNDS_OF_A_CONTEXT == 0) // the kernels have to be loaded again
                {
                    for (int32_t context = 0; context < checking::kNUM_CONTEXTS; ++context)
                    {
                        checking::recreateContext(context, 89);
                    }
                }
                barrier.wait();
                if (thread == 1)
                {
                    setLoggerFinder(&logger); // as a second runtime that loads the library does
                }
                runRound(shared, thread, round);
                barrier.wait();
            }
        });
    }
    for (std::thread& thread : threads)
    {
        thread.join();
    }
}

//! The number after an option.
int64_t option(int count, char** arguments, char const* name, int64_t otherwise) noexcept
{
    for (int i = 1; i + 1 < count; i += 2)
    {
        if (std::strcmp(arguments[i], name) == 0)
        {
            return std::strtoll(arguments[i + 1], nullptr, 10);
        }
    }
    return otherwise;
}
} // namespace

int main(int count, char** arguments)
{
    checking::describeFailuresWith(describe);
    if (__sanitizer_set_death_callback != nullptr)
    {
        __sanitizer_set_death_callback(describe);
    }
    checking::install();
    for (int32_t context = 0; context < checking::kNUM_CONTEXTS; ++context)
    {
        checking::recreateContext(context, 89);
    }
    static QuietLogger logger;
    setLoggerFinder(&logger);
    uint64_t const seed = static_cast<uint64_t>(option(count, arguments, "--seed", 1));
    int64_t const first = option(count, arguments, "--first", 0);
    int64_t const inputs = option(count, arguments, "--count", 20000);
    int32_t const threads = static_cast<int32_t>(option(count, arguments, "--threads", 0));
    char const* const thisProgram = ""; // dlopen() takes it for the program, which holds cuda_stand_in.cpp
    if (threads > 0)
    {
        setenv("LLAMA_EXPORT_LIBCUDA", thisProgram, 1);
        runThreads(threads, inputs, logger);
        std::printf("%lld rounds of %d threads\n", static_cast<long long>(inputs), threads);
        return 0;
    }
    checkMissingDrivers(seed);
    setenv("LLAMA_EXPORT_LIBCUDA", thisProgram, 1);
    for (int64_t input = first; input < first + inputs; ++input)
    {
        fuzzOne(seed, input);
    }
    std::printf("%lld inputs of seed %llu: %lld plugins, %lld refusals, %lld runs, %lld kernel launches\n",
        static_cast<long long>(inputs), static_cast<unsigned long long>(seed), static_cast<long long>(gTotals.plugins),
        static_cast<long long>(gTotals.refusals), static_cast<long long>(gTotals.runs),
        static_cast<long long>(gTotals.launches));
    return 0;
}

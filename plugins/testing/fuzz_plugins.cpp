//! \file
//! Makes TensorRT's calls with arguments that TensorRT, ONNX files and engines may hold and with ones that none of them
//! should, against the driver of checking_driver.h. Built with AddressSanitizer and UndefinedBehaviorSanitizer, or with
//! ThreadSanitizer; the plugins' sources are linked in. No GPU, no memory behind the tensors, the same inputs for a seed.
//!
//!   fuzz_plugins --seed 1 --count 20000              random inputs, one after the other
//!   fuzz_plugins --seed 1 --first 1234 --count 1     one of them again
//!   fuzz_plugins --seed 1 --profiles 5000            random shapes within the profile of a plugin (fuzz_profiles.h)
//!   fuzz_plugins --threads 4 --count 200             rounds of threads that share plugins, and CUDA contexts in pairs
//!
//! What must hold, besides that no sanitizer objects:
//!   - what is right is accepted; what is certainly wrong is refused, and the refusal leaves one sentence that names the op;
//!   - what is accepted leaves no sentence, survives being stored and restored, and equals its clones;
//!   - the workspace that a plugin asks for holds the rotated query, whatever its size, or none can be had;
//!   - after onShapeChange has accepted, enqueue puts only kernels, copies and grids on the stream that the driver takes.

#include "checking_driver.h"
#include "fuzz_profiles.h"
#include "fuzz_tensors.h"
#include "symbolic_dimension.h"

#include <thread>

using namespace fuzz;
using testing_support::Dimension;
using testing_support::NoExpressions;

extern "C"
{
    //! Of the sanitizers, where there is one.
    __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
    char const* __asan_default_options();
}

//! Arguments of a launch that lie in a frame that has been left are found only on request.
extern "C" __attribute__((visibility("default"))) char const* __asan_default_options()
{
    return "detect_stack_use_after_return=1";
}

//! UndefinedBehaviorSanitizer's own callback.
extern "C" __attribute__((visibility("default"))) void __ubsan_on_report()
{
    describe();
}

namespace
{
// ---- the calls ----------------------------------------------------------------------------------------------------

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
    std::vector<DynamicPluginTensorDesc> const tensors = dynamicOf(descs, descs, random);
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

//! configurePlugin and getWorkspaceSize. The data type of the plugin afterwards; kNO_DTYPE if it refused. `isOrdinary`: no size
//! is beyond the limits.
int32_t checkConfigure(Op const& op, Plugin const& plugin, std::vector<PluginTensorDesc> const& descs,
    std::vector<PluginTensorDesc> const& largest, int32_t dtype, bool isServed, bool isOrdinary, Random& random)
{
    gDoing.call = "configurePlugin";
    std::vector<DynamicPluginTensorDesc> const tensors = dynamicOf(descs, largest, random);
    int32_t const numInputs = countOr(op.numInputs, random.oneIn(16), random);
    bool const isRight = numInputs == op.numInputs && isServed;
    int32_t const given = numInputs < static_cast<int32_t>(tensors.size()) ? numInputs : op.numInputs;
    int32_t const status = plugin.build().configurePlugin(tensors.data(), numInputs, tensors.data() + given, op.numOutputs);
    Verdict const verdict = isOrdinary || op.kind == Kind::kNORM ? Verdict::kACCEPT : Verdict::kEITHER;
    if (!judge(status == 0, isRight ? verdict : Verdict::kREFUSE, random))
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
    judge(bytes < kMORE_THAN_ANY_DEVICE_HAS, Verdict::kACCEPT, random);
    if (attributesOf(*plugin.runtime().getFieldsToSerialize()).workspaceBytes != static_cast<int64_t>(bytes))
    {
        fail("an engine would store another workspace than TensorRT lends: %zu bytes", bytes);
    }
    Dims const& query = inputs[kQUERY].max;
    if (bytes < queryBytes(query, dtype))
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

    // What TensorRT lends, as the engine says.
    uint64_t const workspaceBytes = static_cast<uint64_t>(std::max<int64_t>(0, attributes.workspaceBytes));
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
        if (verdict != Verdict::kREFUSE && op.kind != Kind::kNORM)
        {
            gDoing.call = "getWorkspaceSize";
            size_t const sufficient
                = attached.build().getWorkspaceSize(dynamicOf(descs, descs, random).data(), op.numInputs, nullptr, op.numOutputs);
            takeSentence(); // extreme sizes may run themselves while the workspace, which is for smaller ones too, cannot be had
            unsigned __int128 const least = queryBytes(descs[kQUERY].dims, dtype);
            verdict = workspaceBytes < least ? Verdict::kREFUSE : workspaceBytes < sufficient ? Verdict::kEITHER : verdict;
        }
        gDoing.call = "onShapeChange";
        int32_t const given = numInputs < static_cast<int32_t>(descs.size()) ? numInputs : op.numInputs;
        int32_t const status = attached.runtime().onShapeChange(descs.data(), numInputs, descs.data() + given, op.numOutputs);
        if (!judge(status == 0, verdict, random))
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
    made.workspaceBytes = random.oneIn(8) ? kNO_WORKSPACE : random.oneIn(8) ? random.below(1 << 16) : kROOMY_WORKSPACE;
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
        bool const isAgreeing = !isMutated || random.oneIn(2);
        std::vector<PluginTensorDesc> const descs = descsOf(op, isAgreeing ? agreeing : shapes, dtype);
        // What a context runs later is smaller than the largest, or may be: its shapes are made without knowing these.
        bool const isRoomy = isAgreeing && isOrdinary && op.kind != Kind::kNORM && !random.oneIn(4);
        std::vector<PluginTensorDesc> const largest
            = isRoomy ? descsOf(op, attentionShapes(op, attributes, {8, 8, 8}), dtype) : descs;
        int32_t const configured
            = checkConfigure(op, plugin, descs, largest, dtype, isDtypeServed, isAgreeing && isOrdinary, random);
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
            attributes.workspaceBytes = kROOMY_WORKSPACE;
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
    attributes.workspaceBytes = kROOMY_WORKSPACE;
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
            addresses[tensor] = reinterpret_cast<void*>(uintptr_t{0x1000000} * static_cast<uintptr_t>(tensor + 1));
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
    int64_t const sequences = option(count, arguments, "--profiles", 0);
    int32_t const threads = static_cast<int32_t>(option(count, arguments, "--threads", 0));
    char const* const thisProgram = ""; // dlopen() takes it for the program, which holds cuda_stand_in.cpp
    if (threads > 0)
    {
        setenv("LLAMA_EXPORT_LIBCUDA", thisProgram, 1);
        runThreads(threads, inputs, logger);
        std::printf("%lld rounds of %d threads\n", static_cast<long long>(inputs), threads);
        return 0;
    }
    if (sequences > 0)
    {
        setenv("LLAMA_EXPORT_LIBCUDA", thisProgram, 1);
        runProfiles(seed, first, sequences);
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

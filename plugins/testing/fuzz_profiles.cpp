#include "fuzz_profiles.h"

#include "fuzz_tensors.h"

namespace fuzz
{
namespace
{
//! Around the capacities at which a cache is cut into pieces of another length, and the usual ones.
constexpr int64_t kCAPACITIES[] = {1, 64, 127, 128, 129, 1000, 1023, 1024, 1025, 1100, 1792, 1793, 2048, 4096, 8191, 8192,
    8193, 8200, 15872, 15873, 16384, 40000, 131072};
constexpr int64_t kTOKENS[] = {1, 1, 2, 3, 4, 5, 8, 15, 16, 17, 37, 128, 512};
constexpr int64_t kGROUPS[] = {1, 1, 2, 3, 4, 5, 8, 16, 17, 32}; //!< query heads of a key/value head
constexpr int64_t kHEAD_DIMS[] = {2, 16, 30, 64, 80, 96, 128, 256};
constexpr int64_t kHIDDEN_SIZES[] = {1, 8, 72, 768, 769, 4096, 16384, 16400};

struct Counts
{
    int64_t shapes{0};   //!< within the profile, all accepted
    int64_t beyond{0};   //!< beyond it
    int64_t refused{0};  //!< of those
    int64_t clones{0};
};

//! A plugin that runs in a CUDA context.
struct Running
{
    Plugin plugin;
    int32_t context;
};

//! A size up to the largest: the ends, the edges of the table above, anything.
int64_t sizeUpTo(int64_t largest, Random& random) noexcept
{
    switch (random.below(4))
    {
    case 0: return largest;
    case 1: return std::min<int64_t>(1, largest);
    case 2: return std::min(largest, random.pick(kCAPACITIES));
    default: return random.below(largest + 1);
    }
}

//! What a sequence keeps, and what its shapes are made of.
struct Profile
{
    Op const& op;
    Attributes attributes;
    Sizes largest;
    Dims rows; //!< of a norm, the hidden size last

    std::vector<Dims> shapesFor(Sizes const& sizes, Dims const& hidden) const
    {
        if (op.kind != Kind::kNORM)
        {
            return attentionShapes(op, attributes, sizes);
        }
        std::vector<Dims> shapes(static_cast<size_t>(op.numInputs), hidden);
        shapes.back() = dimsOf({hidden.d[hidden.nbDims - 1]});
        return shapes;
    }
    std::vector<Dims> largestShapes() const
    {
        return shapesFor(largest, rows);
    }
    std::vector<Dims> shapesWithin(Random& random) const
    {
        Dims hidden = rows;
        for (int32_t axis = 0; axis + 1 < hidden.nbDims; ++axis)
        {
            hidden.d[axis] = sizeUpTo(rows.d[axis], random);
        }
        int64_t const batch = sizeUpTo(largest.batch, random);
        int64_t const tokens = sizeUpTo(largest.tokens, random);
        return shapesFor({batch, tokens, sizeUpTo(largest.capacity, random)}, hidden);
    }
    //! One size is larger than the largest.
    std::vector<Dims> shapesBeyond(Random& random) const
    {
        Sizes sizes = largest;
        int64_t& size = random.oneIn(3) ? sizes.batch : random.oneIn(2) ? sizes.tokens : sizes.capacity;
        size += random.oneIn(2) ? 1 : random.below(20000);
        return shapesFor(sizes, rows);
    }
};

Profile randomProfile(Random& random)
{
    Profile made{random.pick(kOPS), {}, {}, {}};
    made.attributes.numKvHeads = random.below(4) + 1;
    made.attributes.numHeads = made.attributes.numKvHeads * random.pick(kGROUPS);
    made.attributes.headDim = random.pick(kHEAD_DIMS);
    made.attributes.number = 0.125;
    made.largest = {random.below(4) + 1, random.oneIn(2) ? random.pick(kTOKENS) : random.below(600) + 1,
        random.oneIn(2) ? random.pick(kCAPACITIES) : random.below(20000) + 1};
    made.rows.nbDims = static_cast<int32_t>(random.below(4)) + 1;
    for (int32_t axis = 0; axis < made.rows.nbDims; ++axis)
    {
        made.rows.d[axis] = random.below(40) + 1;
    }
    made.rows.d[made.rows.nbDims - 1] = random.pick(kHIDDEN_SIZES);
    return made;
}

void runSequence(uint64_t seed, int64_t input, Counts& counts)
{
    Random random(seed * 0x9fb21c651e98df25U + static_cast<uint64_t>(input));
    Profile const profile = randomProfile(random);
    Op const& op = profile.op;
    gDoing = {seed, input, op.name, "createPlugin", "--profiles"};
    checking::Thread& thread = checking::thisThread();
    thread.failing = 0;

    Fields fields = fieldsOf(op, profile.attributes, TensorRTPhase::kBUILD, random);
    Plugin plugin = create(op, fields, TensorRTPhase::kBUILD);
    judge(static_cast<bool>(plugin), Verdict::kACCEPT, random);
    int32_t const dtype = random.pick(kDTYPES);
    std::vector<PluginTensorDesc> const largest = descsOf(op, profile.largestShapes(), dtype);
    std::vector<DynamicPluginTensorDesc> const tensors
        = dynamicOf(descsOf(op, profile.shapesWithin(random), dtype), largest, random);
    gDoing.call = "configurePlugin";
    judge(plugin.build().configurePlugin(tensors.data(), op.numInputs, tensors.data() + op.numInputs, op.numOutputs) == 0,
        Verdict::kACCEPT, random);
    gDoing.call = "getWorkspaceSize";
    size_t const workspaceBytes
        = plugin.build().getWorkspaceSize(tensors.data(), op.numInputs, tensors.data() + op.numInputs, op.numOutputs);
    judge(workspaceBytes < kMORE_THAN_ANY_DEVICE_HAS, Verdict::kACCEPT, random);
    Plugin const made = restored(op, plugin);

    std::vector<Running> running;
    for (int64_t steps = random.below(7) + 2; steps > 0; --steps)
    {
        int32_t const context = static_cast<int32_t>(random.below(checking::kNUM_CONTEXTS));
        thread.context = context;
        gDoing.call = "attachToContext";
        if (running.empty() || random.oneIn(4))
        {
            running.push_back({Plugin(made.runtime().attachToContext(nullptr)), context});
        }
        else if (random.oneIn(4))
        {
            gDoing.call = "clone";
            Running const& origin = running[static_cast<size_t>(random.below(static_cast<int64_t>(running.size())))];
            Plugin clone(origin.plugin->clone());
            running.push_back({std::move(clone), context});
            ++counts.clones;
        }
        expectSilence();
        Running const& now = running[static_cast<size_t>(random.below(static_cast<int64_t>(running.size())))];
        thread.context = now.context;
        bool const isBeyond = op.kind != Kind::kNORM && random.oneIn(6);
        std::vector<PluginTensorDesc> const descs
            = descsOf(op, isBeyond ? profile.shapesBeyond(random) : profile.shapesWithin(random), dtype);
        gDoing.call = "onShapeChange";
        int32_t const status
            = now.plugin.runtime().onShapeChange(descs.data(), op.numInputs, descs.data() + op.numInputs, op.numOutputs);
        bool const isAccepted = judge(status == 0, isBeyond ? Verdict::kEITHER : Verdict::kACCEPT, random);
        checkEnqueue(op, now.plugin, descs, workspaceBytes, random, !isAccepted);
        counts.shapes += isBeyond ? 0 : 1;
        counts.beyond += isBeyond ? 1 : 0;
        counts.refused += isAccepted ? 0 : 1;
    }
}
} // namespace

void runProfiles(uint64_t seed, int64_t first, int64_t count)
{
    Counts counts;
    for (int64_t input = first; input < first + count; ++input)
    {
        runSequence(seed, input, counts);
    }
    std::printf("%lld sequences of seed %llu: %lld shapes, %lld beyond, %lld refused, %lld clones, %lld runs, %lld kernel launches\n",
        static_cast<long long>(count), static_cast<unsigned long long>(seed), static_cast<long long>(counts.shapes),
        static_cast<long long>(counts.beyond), static_cast<long long>(counts.refused), static_cast<long long>(counts.clones),
        static_cast<long long>(gTotals.runs), static_cast<long long>(gTotals.launches));
}
} // namespace fuzz

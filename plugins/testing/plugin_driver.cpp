//! \file
//! The calls that TensorRT makes of a plugin, one C function for each, so that Python can make them (harness.py).
//! Structures cross as TensorRT lays them out (tensorrt_plugin_abi.h); plugins are opaque pointers.

#include "symbolic_dimension.h"
#include "tensorrt_plugin_abi.h"

using namespace nvinfer1;
using testing_support::Dimension;
using testing_support::NoExpressions;

namespace
{
IPluginCreatorV3One& creatorOf(IPluginCreatorInterface* creator) noexcept
{
    return *static_cast<IPluginCreatorV3One*>(creator);
}

IPluginV3OneCore& coreOf(IPluginV3* plugin) noexcept
{
    return *static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
}

IPluginV3OneBuildV2& buildOf(IPluginV3* plugin) noexcept
{
    return *static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime& runtimeOf(IPluginV3* plugin) noexcept
{
    return *static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

using LogCallback = void (*)(int32_t severity, char const* message);

class CallbackLogger final : public ILogger, public ILoggerFinder
{
public:
    LogCallback callback{};
    void log(Severity severity, AsciiChar const* message) noexcept override
    {
        callback(static_cast<int32_t>(severity), message);
    }
    ILogger* findLogger() override
    {
        return callback != nullptr ? this : nullptr;
    }
};
} // namespace

#define DRIVER_API extern "C" __attribute__((visibility("default")))

//! The argument for setLoggerFinder(); without a callback there is a finder, but it finds no logger.
DRIVER_API ILoggerFinder* driver_logger_finder(LogCallback callback)
{
    static CallbackLogger logger;
    logger.callback = callback;
    return &logger;
}

DRIVER_API char const* creator_name(IPluginCreatorInterface* creator)
{
    return creatorOf(creator).getPluginName();
}

DRIVER_API char const* creator_version(IPluginCreatorInterface* creator)
{
    return creatorOf(creator).getPluginVersion();
}

DRIVER_API char const* creator_namespace(IPluginCreatorInterface* creator)
{
    return creatorOf(creator).getPluginNamespace();
}

DRIVER_API char const* creator_kind(IPluginCreatorInterface* creator)
{
    return creator->getInterfaceInfo().kind;
}

DRIVER_API PluginFieldCollection const* creator_fields(IPluginCreatorInterface* creator)
{
    return creatorOf(creator).getFieldNames();
}

DRIVER_API IPluginV3* creator_create(IPluginCreatorInterface* creator, PluginFieldCollection const* fields, int32_t phase)
{
    return creatorOf(creator).createPlugin("driver", fields, static_cast<TensorRTPhase>(phase));
}

DRIVER_API void plugin_destroy(IPluginV3* plugin)
{
    delete plugin;
}

DRIVER_API IPluginV3* plugin_clone(IPluginV3* plugin)
{
    return plugin->clone();
}

DRIVER_API char const* plugin_name(IPluginV3* plugin)
{
    return coreOf(plugin).getPluginName();
}

DRIVER_API int32_t plugin_build_interface_version(IPluginV3* plugin)
{
    return buildOf(plugin).getInterfaceInfo().major;
}

DRIVER_API int32_t plugin_num_outputs(IPluginV3* plugin)
{
    return buildOf(plugin).getNbOutputs();
}

DRIVER_API int32_t plugin_output_types(
    IPluginV3* plugin, DataType const* inputTypes, int32_t numInputs, DataType* outputTypes, int32_t numOutputs)
{
    return buildOf(plugin).getOutputDataTypes(outputTypes, numOutputs, inputTypes, numInputs);
}

//! Shapes of the outputs: an input's dimension is symbolic where `desc.dims` is -1, and its value is in `max`.
DRIVER_API int32_t plugin_output_shapes(
    IPluginV3* plugin, DynamicPluginTensorDesc const* inputs, int32_t numInputs, Dims* outputs, int32_t numOutputs)
{
    constexpr int32_t kMAX_TENSORS = 16;
    static Dimension dimensions[kMAX_TENSORS][Dims::MAX_DIMS];
    DimsExprs inputExpressions[kMAX_TENSORS]{};
    DimsExprs outputExpressions[kMAX_TENSORS]{};
    if (numInputs > kMAX_TENSORS || numOutputs > kMAX_TENSORS)
    {
        return -1;
    }
    for (int32_t i = 0; i < numInputs; ++i)
    {
        inputExpressions[i].nbDims = inputs[i].desc.dims.nbDims;
        for (int32_t axis = 0; axis < inputs[i].desc.dims.nbDims; ++axis)
        {
            dimensions[i][axis].set(inputs[i].max.d[axis], inputs[i].desc.dims.d[axis] != -1);
            inputExpressions[i].d[axis] = &dimensions[i][axis];
        }
    }
    NoExpressions builder;
    int32_t const status = buildOf(plugin).getOutputShapes(
        inputExpressions, numInputs, nullptr, 0, outputExpressions, numOutputs, builder);
    for (int32_t i = 0; status == 0 && i < numOutputs; ++i)
    {
        outputs[i].nbDims = outputExpressions[i].nbDims;
        for (int32_t axis = 0; axis < outputs[i].nbDims; ++axis)
        {
            outputs[i].d[axis] = static_cast<Dimension const*>(outputExpressions[i].d[axis])->value();
        }
    }
    return status;
}

DRIVER_API int32_t plugin_aliased_input(IPluginV3* plugin, int32_t output)
{
    return buildOf(plugin).getAliasedInput(output);
}

DRIVER_API bool plugin_supports(
    IPluginV3* plugin, int32_t position, DynamicPluginTensorDesc const* tensors, int32_t numInputs, int32_t numOutputs)
{
    return buildOf(plugin).supportsFormatCombination(position, tensors, numInputs, numOutputs);
}

DRIVER_API int32_t plugin_configure(
    IPluginV3* plugin, DynamicPluginTensorDesc const* tensors, int32_t numInputs, int32_t numOutputs)
{
    return buildOf(plugin).configurePlugin(tensors, numInputs, tensors + numInputs, numOutputs);
}

DRIVER_API size_t plugin_workspace_bytes(
    IPluginV3* plugin, DynamicPluginTensorDesc const* tensors, int32_t numInputs, int32_t numOutputs)
{
    return buildOf(plugin).getWorkspaceSize(tensors, numInputs, tensors + numInputs, numOutputs);
}

DRIVER_API PluginFieldCollection const* plugin_serialize(IPluginV3* plugin)
{
    return runtimeOf(plugin).getFieldsToSerialize();
}

DRIVER_API IPluginV3* plugin_attach(IPluginV3* plugin)
{
    return runtimeOf(plugin).attachToContext(nullptr);
}

DRIVER_API int32_t plugin_shape_change(
    IPluginV3* plugin, PluginTensorDesc const* tensors, int32_t numInputs, int32_t numOutputs)
{
    return runtimeOf(plugin).onShapeChange(tensors, numInputs, tensors + numInputs, numOutputs);
}

DRIVER_API int32_t plugin_enqueue(IPluginV3* plugin, PluginTensorDesc const* tensors, int32_t numInputs,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream)
{
    return runtimeOf(plugin).enqueue(tensors, tensors + numInputs, inputs, outputs, workspace, stream);
}

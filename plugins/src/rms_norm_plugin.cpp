#include "rms_norm_plugin.h"

#include "shapes.h"

#include <limits>

namespace llama_export
{
using namespace nvinfer1;

namespace
{
int64_t numRows(Dims const& dims) noexcept
{
    int64_t rows = 1;
    for (int32_t i = 0; i + 1 < dims.nbDims; ++i)
    {
        rows = productOf({rows, dims.d[i]});
    }
    return rows;
}

int64_t hiddenSize(Dims const& dims) noexcept
{
    return dims.d[dims.nbDims - 1];
}
} // namespace

template <class Derived>
void NormPlugin<Derived>::read(FieldReader& reader, RmsNormParameters& parameters) noexcept
{
    reader.readFloat("epsilon", parameters.epsilon);
    reader.require(parameters.epsilon > 0.0F && parameters.epsilon < 1.0F, "epsilon", parameters.epsilon,
        "a number between 0 and 1");
}

template <class Derived>
void NormPlugin<Derived>::write(RmsNormParameters const& parameters, PluginField* fields) noexcept
{
    fields[0] = {"epsilon", &parameters.epsilon, PluginFieldType::kFLOAT32, 1};
}

template <class Derived>
void NormPlugin<Derived>::readStored(FieldReader& reader, RmsNormParameters& parameters) noexcept
{
    Base::readStored(reader, parameters);
    reader.readInteger("hidden_size", parameters.hidden_size);
    reader.require(parameters.hidden_size == kNO_HIDDEN_SIZE || parameters.hidden_size > 0, "hidden_size",
        parameters.hidden_size, "a positive number");
}

template <class Derived>
void NormPlugin<Derived>::writeStored(RmsNormParameters const& parameters, PluginField* fields) noexcept
{
    Base::writeStored(parameters, fields);
    fields[kNUM_BASE_STORED] = {"hidden_size", &parameters.hidden_size, PluginFieldType::kINT32, 1};
}

template <class Derived>
bool NormPlugin<Derived>::isConfigured(RmsNormParameters const& parameters) noexcept
{
    return Base::isConfigured(parameters) && parameters.hidden_size != kNO_HIDDEN_SIZE;
}

template <class Derived>
bool NormPlugin<Derived>::loadKernels() noexcept
{
    KernelRequest const request{Derived::kKERNEL, this->mParameters.dtype, this->mParameters.hidden_size};
    return loadKernel(Derived::kNAME, request, mKernel);
}

template <class Derived>
int32_t NormPlugin<Derived>::getNbOutputs() const noexcept
{
    return Derived::kNUM_OUTPUTS;
}

template <class Derived>
int32_t NormPlugin<Derived>::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (!checkCount(Derived::kNAME, "inputs", nbInputs, Derived::kNUM_INPUTS))
    {
        return kFAILURE;
    }
    for (int32_t i = 0; i < nbOutputs; ++i)
    {
        outputTypes[i] = inputTypes[Derived::kHIDDEN_STATES];
    }
    return kSUCCESS;
}

template <class Derived>
bool NormPlugin<Derived>::checkShapes(Dims const* inputs) noexcept
{
    Dims const& hidden = inputs[Derived::kHIDDEN_STATES];
    if (hidden.nbDims < 1 || hidden.nbDims > Dims::MAX_DIMS)
    {
        reportError(Derived::kNAME, "`hidden_states` is of the wrong rank: got %d dimensions, expected 1 to %d",
            hidden.nbDims, Dims::MAX_DIMS);
        return false;
    }
    for (int32_t i = 0; i < Derived::kWEIGHT; ++i) // hidden_states and, where there is one, the residual
    {
        if (!checkRank(Derived::kNAME, "residual", inputs[i], hidden.nbDims))
        {
            return false;
        }
        for (int32_t axis = 0; axis < hidden.nbDims; ++axis)
        {
            if (!checkDimension(Derived::kNAME, "residual", inputs[i], axis, hidden.d[axis], "as hidden_states"))
            {
                return false;
            }
        }
    }
    return checkRank(Derived::kNAME, "weight", inputs[Derived::kWEIGHT], 1)
        && checkDimension(Derived::kNAME, "weight", inputs[Derived::kWEIGHT], 0, hiddenSize(hidden), "hidden_size")
        && checkLimit(Derived::kNAME, "hidden_size", hiddenSize(hidden), std::numeric_limits<int32_t>::max());
}

template <class Derived>
int32_t NormPlugin<Derived>::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const* /*shapeInputs*/,
    int32_t /*nbShapeInputs*/, DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& /*builder*/) noexcept
{
    if (!checkCount(Derived::kNAME, "inputs", nbInputs, Derived::kNUM_INPUTS)
        || !checkCount(Derived::kNAME, "outputs", nbOutputs, Derived::kNUM_OUTPUTS))
    {
        return kFAILURE;
    }
    Dims constants[Derived::kNUM_INPUTS];
    for (int32_t i = 0; i < nbInputs; ++i)
    {
        constants[i] = constantDims(inputs[i]);
    }
    if (!checkShapes(constants))
    {
        return kFAILURE;
    }
    for (int32_t i = 0; i < nbOutputs; ++i)
    {
        outputs[i] = inputs[Derived::kHIDDEN_STATES];
    }
    return kSUCCESS;
}

template <class Derived>
bool NormPlugin<Derived>::supportsFormatCombination(
    int32_t position, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    DataType const modelType = inOut[Derived::kHIDDEN_STATES].desc.type;
    PluginTensorDesc const& tensor = inOut[position].desc;
    return nbInputs == Derived::kNUM_INPUTS && nbOutputs == Derived::kNUM_OUTPUTS
        && isDtypeServed(Derived::kKERNEL, static_cast<int32_t>(modelType)) && tensor.type == modelType
        && tensor.format == TensorFormat::kLINEAR;
}

template <class Derived>
int32_t NormPlugin<Derived>::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!checkCount(Derived::kNAME, "inputs", nbInputs, Derived::kNUM_INPUTS)
        || !checkCount(Derived::kNAME, "outputs", nbOutputs, Derived::kNUM_OUTPUTS))
    {
        return kFAILURE;
    }
    if (this->noteDtype(in[Derived::kHIDDEN_STATES].desc.type) != kSUCCESS)
    {
        return kFAILURE;
    }
    Dims const& weight = in[Derived::kWEIGHT].desc.dims;
    bool const isKnown = weight.nbDims == 1 && weight.d[0] > 0 && weight.d[0] <= std::numeric_limits<int32_t>::max();
    this->mParameters.hidden_size = isKnown ? static_cast<int32_t>(weight.d[0]) : kNO_HIDDEN_SIZE;
    return kSUCCESS;
}

template <class Derived>
int32_t NormPlugin<Derived>::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    if (!checkCount(Derived::kNAME, "inputs", nbInputs, Derived::kNUM_INPUTS)
        || !checkCount(Derived::kNAME, "outputs", nbOutputs, Derived::kNUM_OUTPUTS))
    {
        return kFAILURE;
    }
    Dims dims[Derived::kNUM_INPUTS];
    for (int32_t i = 0; i < nbInputs; ++i)
    {
        dims[i] = in[i].dims;
    }
    bool const fits = checkKnown(Derived::kNAME, dims, Derived::kNUM_INPUTS) && checkShapes(dims)
        && checkLimit(Derived::kNAME, "the number of rows", numRows(dims[Derived::kHIDDEN_STATES]),
            std::numeric_limits<int32_t>::max());
    if (!fits)
    {
        return kFAILURE;
    }
    int32_t const size = static_cast<int32_t>(hiddenSize(dims[Derived::kHIDDEN_STATES]));
    if (this->mParameters.hidden_size != size)
    {
        this->mParameters.hidden_size = size;
        this->mIsReady = false;
    }
    return this->prepareKernels(in[Derived::kHIDDEN_STATES].type) ? kSUCCESS : kFAILURE;
}

int32_t RmsNormPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* /*workspace*/, cudaStream_t stream) noexcept
{
    Dims const& dims = inputDesc[kHIDDEN_STATES].dims;
    int64_t const rows = numRows(dims);
    if (rows == 0)
    {
        return kSUCCESS;
    }
    if (!checkReady() || !checkAligned("hidden_states", inputs[kHIDDEN_STATES])
        || !checkAligned("weight", inputs[kWEIGHT]) || !checkAligned("normed", outputs[kNORMED]))
    {
        return kFAILURE;
    }
    kernels::RmsNormArguments arguments;
    arguments.hidden_states = deviceAddress(inputs[kHIDDEN_STATES]);
    arguments.weight = deviceAddress(inputs[kWEIGHT]);
    arguments.normed = deviceAddress(outputs[kNORMED]);
    arguments.num_rows = static_cast<int32_t>(rows);
    arguments.hidden_size = static_cast<int32_t>(hiddenSize(dims));
    arguments.epsilon = mParameters.epsilon;
    return launch(kNAME, mKernel, gridOf(rows), arguments, stream) ? kSUCCESS : kFAILURE;
}

int32_t AddRmsNormPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* /*workspace*/, cudaStream_t stream) noexcept
{
    Dims const& dims = inputDesc[kHIDDEN_STATES].dims;
    int64_t const rows = numRows(dims);
    if (rows == 0)
    {
        return kSUCCESS;
    }
    if (!checkReady() || !checkAligned("hidden_states", inputs[kHIDDEN_STATES])
        || !checkAligned("residual", inputs[kRESIDUAL]) || !checkAligned("weight", inputs[kWEIGHT])
        || !checkAligned("normed", outputs[kNORMED]) || !checkAligned("new_residual", outputs[kNEW_RESIDUAL]))
    {
        return kFAILURE;
    }
    kernels::AddRmsNormArguments arguments;
    arguments.hidden_states = deviceAddress(inputs[kHIDDEN_STATES]);
    arguments.residual = deviceAddress(inputs[kRESIDUAL]);
    arguments.weight = deviceAddress(inputs[kWEIGHT]);
    arguments.normed = deviceAddress(outputs[kNORMED]);
    arguments.new_residual = deviceAddress(outputs[kNEW_RESIDUAL]);
    arguments.num_rows = static_cast<int32_t>(rows);
    arguments.hidden_size = static_cast<int32_t>(hiddenSize(dims));
    arguments.epsilon = mParameters.epsilon;
    return launch(kNAME, mKernel, gridOf(rows), arguments, stream) ? kSUCCESS : kFAILURE;
}

template class NormPlugin<RmsNormPlugin>;
template class NormPlugin<AddRmsNormPlugin>;
} // namespace llama_export

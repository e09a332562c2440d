//! \file
//! What the plugins share: the capabilities in one object, cloning, serialised fields, and their creator.
#pragma once

#include "abi.h"
#include "fields.h"
#include "kernel_cache.h"
#include "log.h"

#include <new>

namespace llama_export
{
constexpr char const* kPLUGIN_VERSION = "1";
//! Where the ONNX parser looks for a creator when the model also holds a function of that name; it misses any other namespace.
constexpr char const* kPLUGIN_NAMESPACE = "";

constexpr int32_t kSUCCESS = 0;
constexpr int32_t kFAILURE = -1;

//! Serialised where configurePlugin() has not told the data type.
constexpr int32_t kNO_DTYPE = -1;

//! What getWorkspaceSize(), which cannot fail, answers for shapes that are beyond the limits: nothing can give as much, and a
//! caller may still round it up.
constexpr size_t kIMPOSSIBLE_WORKSPACE = size_t{1} << 62;

//! Bytes of one element of the data types that the kernels take.
inline int64_t elementSize(nvinfer1::DataType type) noexcept
{
    return type == nvinfer1::DataType::kFLOAT ? 4 : 2;
}

//! `abi` and `dtype`: what every plugin stores in an engine beside its attributes.
constexpr int32_t kNUM_BASE_STORED = 2;

//! One object is the plugin and its three capabilities.
//!
//! `Derived` supplies
//!   kNAME                    the op_type of the ONNX node
//!   kKERNEL                  a kernel that it always launches: the data types of that one are those of the plugin
//!   Parameters               a struct of its attributes, and `int32_t dtype`
//!   read(FieldReader&, Parameters&)          reads the attributes and checks their ranges
//!   write(Parameters const&, PluginField*)   the attributes as fields
//!   loadKernels()            loads the kernels for mParameters into the current CUDA context
//! and the virtual functions that this class leaves pure; where an engine must store more than kNUM_BASE_STORED fields, also
//!   readStored(FieldReader&, Parameters&), writeStored(Parameters const&, PluginField*), isConfigured(Parameters const&)
template <class Derived, class Parameters_, int32_t NumAttributes, int32_t NumStored>
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuildV2,
                   public nvinfer1::IPluginV3OneRuntime
{
public:
    using Parameters = Parameters_;
    static constexpr int32_t kNUM_ATTRIBUTES = NumAttributes;

    explicit PluginBase(Parameters const& parameters) noexcept
        : mParameters(parameters)
    {
        describeFields();
    }

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override
    {
        return copy();
    }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override
    {
        return Derived::kNAME;
    }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return kPLUGIN_VERSION;
    }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kPLUGIN_NAMESPACE;
    }

    //! A clone whose kernels are loaded, here rather than in enqueue(), which may run inside a stream capture.
    //! Where they cannot be loaded the reason is reported, and the clone refuses in onShapeChange(): TensorRT checks
    //! that result.
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept override
    {
        Derived* const attached = copy();
        if (attached != nullptr && Derived::isConfigured(attached->mParameters))
        {
            attached->mIsReady = attached->loadKernels();
        }
        return attached;
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return &mFieldCollection;
    }

    //! What an engine stores beside the attributes: the rules it was built by, and what configurePlugin() found out. `abi` is
    //! read before everything else (FieldReader::requireAbi).
    static void writeStored(Parameters const& parameters, nvinfer1::PluginField* fields) noexcept
    {
        fields[0] = {"abi", &kABI, nvinfer1::PluginFieldType::kINT32, 1};
        fields[1] = {"dtype", &parameters.dtype, nvinfer1::PluginFieldType::kINT32, 1};
    }
    static void readStored(FieldReader& reader, Parameters& parameters) noexcept
    {
        reader.readInteger("dtype", parameters.dtype);
        reader.require(parameters.dtype == kNO_DTYPE || isDtypeServed(Derived::kKERNEL, parameters.dtype), "dtype",
            parameters.dtype, "a TensorRT data type that this library has kernels for");
    }

    //! Whether enough is known to choose the kernels.
    static bool isConfigured(Parameters const& parameters) noexcept
    {
        return parameters.dtype != kNO_DTYPE;
    }

protected:
    //! Notes the data type that an engine stores; reports one that no kernel takes.
    int32_t noteDtype(nvinfer1::DataType dtype) noexcept
    {
        if (!isDtypeServed(Derived::kKERNEL, static_cast<int32_t>(dtype)))
        {
            reportError(Derived::kNAME,
                "no kernel takes TensorRT data type %d, expected float32 (0), float16 (1) or bfloat16 (7)",
                static_cast<int32_t>(dtype));
            return kFAILURE;
        }
        mParameters.dtype = static_cast<int32_t>(dtype);
        return kSUCCESS;
    }

    //! Loads the kernels unless those of this dtype are loaded already.
    bool prepareKernels(nvinfer1::DataType dtype) noexcept
    {
        if (!mIsReady || mParameters.dtype != static_cast<int32_t>(dtype))
        {
            mParameters.dtype = static_cast<int32_t>(dtype);
            mIsReady = static_cast<Derived*>(this)->loadKernels();
        }
        return mIsReady;
    }

    //! Reports a pointer that the kernels cannot load from 16 bytes at a time: they were compiled to rely on it.
    static bool checkAligned(char const* tensor, void const* pointer) noexcept
    {
        constexpr uintptr_t kALIGNMENT = 16;
        bool const isAligned = reinterpret_cast<uintptr_t>(pointer) % kALIGNMENT == 0;
        if (!isAligned)
        {
            reportError(Derived::kNAME, "`%s` is misaligned: got address %p, expected a multiple of %d", tensor, pointer,
                static_cast<int>(kALIGNMENT));
        }
        return isAligned;
    }

    bool checkReady() const noexcept
    {
        if (!mIsReady)
        {
            reportError(Derived::kNAME, "enqueue without loaded kernels; hint: an earlier message says why");
        }
        return mIsReady;
    }

    Parameters mParameters;
    bool mIsReady{false};

private:
    //! Points the fields at this object's own parameters. Once for each object, not when they are asked for: an engine may be
    //! stored by one thread while another makes a context of the same plugin.
    void describeFields() noexcept
    {
        Derived::write(mParameters, mFields);
        Derived::writeStored(mParameters, mFields + NumAttributes);
        mFieldCollection = {NumAttributes + NumStored, mFields};
    }

    Derived* copy() const noexcept
    {
        Derived* const made = new (std::nothrow) Derived(static_cast<Derived const&>(*this));
        if (made == nullptr)
        {
            reportError(Derived::kNAME, "out of host memory");
            return nullptr;
        }
        made->describeFields();
        made->mIsReady = false; // the kernels are those of the context that the origin was attached to
        return made;
    }

    nvinfer1::PluginField mFields[NumAttributes + NumStored]{};
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

template <class Plugin>
class PluginCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    PluginCreator() noexcept
    {
        Plugin::write({}, mFields);
        for (nvinfer1::PluginField& field : mFields) // names and types only
        {
            field.data = nullptr;
        }
    }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override
    {
        return Plugin::kNAME;
    }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override
    {
        return kPLUGIN_VERSION;
    }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kPLUGIN_NAMESPACE;
    }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mFieldCollection;
    }

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* /*name*/,
        nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase phase) noexcept override
    {
        typename Plugin::Parameters parameters;
        FieldReader reader(Plugin::kNAME, fields);
        bool const isStored = phase == nvinfer1::TensorRTPhase::kRUNTIME;
        if (isStored)
        {
            reader.requireAbi();
        }
        Plugin::read(reader, parameters);
        if (isStored)
        {
            Plugin::readStored(reader, parameters);
        }
        if (!reader.finish())
        {
            return nullptr;
        }
        Plugin* const plugin = new (std::nothrow) Plugin(parameters);
        if (plugin == nullptr)
        {
            reportError(Plugin::kNAME, "out of host memory");
        }
        return plugin;
    }

private:
    nvinfer1::PluginField mFields[Plugin::kNUM_ATTRIBUTES]{};
    nvinfer1::PluginFieldCollection mFieldCollection{Plugin::kNUM_ATTRIBUTES, mFields};
};
} // namespace llama_export

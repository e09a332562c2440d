#include "fields.h"

#include "abi.h"
#include "log.h"

#include <cstring>
#include <limits>

namespace llama_export
{
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace
{
//! Reads one element; fields need not be aligned.
template <class Value>
Value load(PluginField const& field) noexcept
{
    Value value{};
    std::memcpy(&value, field.data, sizeof value);
    return value;
}

char const* nameOf(PluginFieldType type) noexcept
{
    switch (type)
    {
    case PluginFieldType::kFLOAT16: return "float16";
    case PluginFieldType::kFLOAT32: return "float32";
    case PluginFieldType::kFLOAT64: return "float64";
    case PluginFieldType::kINT8: return "int8";
    case PluginFieldType::kINT16: return "int16";
    case PluginFieldType::kINT32: return "int32";
    case PluginFieldType::kCHAR: return "string";
    case PluginFieldType::kDIMS: return "dims";
    case PluginFieldType::kBF16: return "bfloat16";
    case PluginFieldType::kINT64: return "int64";
    case PluginFieldType::kUNKNOWN: break;
    }
    return "unknown";
}
} // namespace

FieldReader::FieldReader(char const* plugin, nvinfer1::PluginFieldCollection const* fields) noexcept
    : mPlugin(plugin)
    , mFields(fields)
{
    if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr))
    {
        reportError(plugin, "createPlugin was given no field collection");
        mIsGood = false;
    }
}

bool FieldReader::has(char const* name) const noexcept
{
    for (int32_t i = 0; mIsGood && i < mFields->nbFields; ++i)
    {
        if (mFields->fields[i].name != nullptr && std::strcmp(mFields->fields[i].name, name) == 0)
        {
            return true;
        }
    }
    return false;
}

PluginField const* FieldReader::find(char const* name) noexcept
{
    if (!mIsGood)
    {
        return nullptr;
    }
    PluginField const* found = nullptr;
    for (int32_t i = 0; i < mFields->nbFields; ++i)
    {
        PluginField const& field = mFields->fields[i];
        if (field.name != nullptr && std::strcmp(field.name, name) == 0)
        {
            if (found != nullptr)
            {
                reportError(mPlugin, "field `%s` is given twice, expected once", name);
                mIsGood = false;
                return nullptr;
            }
            found = &field;
        }
    }
    if (found == nullptr)
    {
        reportError(mPlugin, "field `%s` is missing: got %d other fields; hint: export the model with the llama-export of "
                             "this library's version",
            name, mFields->nbFields);
        mIsGood = false;
        return nullptr;
    }
    if (found->data == nullptr || found->length != 1)
    {
        reportError(mPlugin, "field `%s` has to hold one value: got %d", name, found->data == nullptr ? 0 : found->length);
        mIsGood = false;
        return nullptr;
    }
    ++mRead;
    return found;
}

void FieldReader::reportType(PluginField const& field, char const* expected) noexcept
{
    reportError(mPlugin, "field `%s` is of the wrong type: got %s, expected %s", field.name, nameOf(field.type), expected);
    mIsGood = false;
}

void FieldReader::readInteger(char const* name, int64_t& value) noexcept
{
    PluginField const* const field = find(name);
    if (field == nullptr)
    {
        return;
    }
    switch (field->type)
    {
    case PluginFieldType::kINT8: value = load<int8_t>(*field); break;
    case PluginFieldType::kINT16: value = load<int16_t>(*field); break;
    case PluginFieldType::kINT32: value = load<int32_t>(*field); break;
    case PluginFieldType::kINT64: value = load<int64_t>(*field); break;
    default: reportType(*field, "an integer"); break;
    }
}

void FieldReader::readInteger(char const* name, int32_t& value) noexcept
{
    int64_t wide = value;
    readInteger(name, wide);
    require(wide >= std::numeric_limits<int32_t>::min() && wide <= std::numeric_limits<int32_t>::max(), name,
        static_cast<double>(wide), "a 32-bit integer");
    value = static_cast<int32_t>(wide);
}

void FieldReader::readFloat(char const* name, float& value) noexcept
{
    PluginField const* const field = find(name);
    if (field == nullptr)
    {
        return;
    }
    switch (field->type)
    {
    case PluginFieldType::kFLOAT32: value = load<float>(*field); break;
    case PluginFieldType::kFLOAT64: value = static_cast<float>(load<double>(*field)); break;
    default: reportType(*field, "float32"); break;
    }
}

void FieldReader::require(bool condition, char const* name, double got, char const* expected) noexcept
{
    if (mIsGood && !condition)
    {
        reportError(mPlugin, "field `%s` is out of range: got %.9g, expected %s", name, got, expected);
        mIsGood = false;
    }
}

void FieldReader::requireAbi() noexcept
{
    constexpr char const* kHINT = "hint: build the engine again with this library, or load the library that built it";
    if (mIsGood && !has("abi"))
    {
        reportError(mPlugin, "another plugin library built this engine: got no ABI number, expected %d; %s", kABI, kHINT);
        mIsGood = false;
    }
    int32_t abi = 0;
    readInteger("abi", abi);
    if (mIsGood && abi != kABI)
    {
        reportError(mPlugin, "another plugin library built this engine: got ABI %d, expected %d; %s", abi, kABI, kHINT);
        mIsGood = false;
    }
}

bool FieldReader::finish() noexcept
{
    if (mIsGood && mRead != mFields->nbFields)
    {
        reportError(mPlugin,
            "got %d fields, expected %d: an unknown field changes the meaning of the op; hint: export and build with the "
            "llama-export of this library's version",
            mFields->nbFields, mRead);
        mIsGood = false;
    }
    return mIsGood;
}
} // namespace llama_export

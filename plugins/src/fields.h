//! \file
//! Plugin fields: the attributes of the ONNX node at build, and what an engine stores of them.
#pragma once

#include "tensorrt_plugin_abi.h"

namespace llama_export
{
//! Reads a plugin's fields by name. Fails closed: a field that is missing, of another type, repeated or unknown is
//! reported, and every read after a failure is skipped.
class FieldReader
{
public:
    FieldReader(char const* plugin, nvinfer1::PluginFieldCollection const* fields) noexcept;

    //! One integer, of any type that holds integers: ONNX INT attributes arrive as kINT32 whatever the creator declared.
    void readInteger(char const* name, int32_t& value) noexcept;
    void readInteger(char const* name, int64_t& value) noexcept;

    //! One floating-point number.
    void readFloat(char const* name, float& value) noexcept;

    //! Reports a value that is out of range.
    void require(bool condition, char const* name, double got, char const* expected) noexcept;

    //! Reports an engine that another library's rules made: `abi` is missing, or holds another number than kABI.
    void requireAbi() noexcept;

    //! Reports fields that nobody read. True if nothing was reported at all.
    bool finish() noexcept;

private:
    bool has(char const* name) const noexcept;
    nvinfer1::PluginField const* find(char const* name) noexcept;
    void reportType(nvinfer1::PluginField const& field, char const* expected) noexcept;

    char const* mPlugin;
    nvinfer1::PluginFieldCollection const* mFields;
    int32_t mRead{0};
    bool mIsGood{true};
};
} // namespace llama_export

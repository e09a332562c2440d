//! \file
//! Plugin fields for the fuzzer: right ones, wrong ones, and what a plugin stores.
#pragma once

#include "fuzz_support.h"

#include <cmath>
#include <cstdlib>
#include <utility>
#include <vector>

namespace fuzz
{
inline size_t sizeOf(PluginFieldType type) noexcept
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

inline Fields fieldsOf(Op const& op, Attributes const& attributes, TensorRTPhase phase, Random& random)
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
        bool const isNorm = op.kind == Kind::kNORM;
        made.items.push_back(Field::integer(random, "abi", attributes.abi));
        made.items.push_back(Field::integer(random, "dtype", attributes.dtype));
        made.items.push_back(isNorm ? Field::integer(random, "hidden_size", attributes.hiddenSize)
                                    : Field::integer(random, "workspace_bytes", attributes.workspaceBytes));
    }
    return made;
}

//! Makes one thing wrong, and says what has to become of it.
inline Verdict mutateFields(Fields& fields, Random& random)
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
            bool const isAbi = std::strcmp(item.field.name, "abi") == 0; // none of the edges is the right one
            Field made = Field::integer(random, item.field.name, random.pick(kEDGES));
            item = std::move(made);
            return isAbi ? Verdict::kREFUSE : Verdict::kEITHER;
        }
        return Verdict::kEITHER;
    }
}

//! The stored fields as bytes: names, types, values.
inline std::string stored(PluginFieldCollection const& fields)
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

inline Attributes attributesOf(PluginFieldCollection const& fields)
{
    Attributes found;
    for (int32_t i = 0; i < fields.nbFields; ++i)
    {
        PluginField const& field = fields.fields[i];
        int32_t integer{};
        float number{};
        int64_t wide{};
        if (field.type == PluginFieldType::kINT64)
        {
            std::memcpy(&wide, field.data, sizeof wide);
        }
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
        else if (name == "workspace_bytes")
        {
            found.workspaceBytes = wide;
        }
        else if (name == "abi")
        {
            found.abi = integer;
        }
        else
        {
            found.number = static_cast<double>(number);
        }
    }
    return found;
}

//! What an accepted plugin may hold: the tables of README.md.
inline void checkAttributes(Op const& op, Attributes const& attributes) noexcept
{
    bool const isDtype = attributes.dtype == kNO_DTYPE || attributes.dtype == kDTYPES[0] || attributes.dtype == kDTYPES[1]
        || attributes.dtype == kDTYPES[2];
    bool const isNorm = op.kind == Kind::kNORM;
    bool const areHeads = attributes.numKvHeads >= 1 && attributes.numHeads >= attributes.numKvHeads
        && attributes.numHeads % attributes.numKvHeads == 0 && attributes.headDim >= 1;
    bool const isHiddenSize = attributes.hiddenSize == -1 || attributes.hiddenSize >= 1;
    bool const isNumber = std::isfinite(attributes.number) && attributes.number > 0.0 && (!isNorm || attributes.number < 1.0);
    bool const isStored = attributes.abi == llama_export_plugins_abi() && attributes.workspaceBytes >= kNO_WORKSPACE;
    if (!isDtype || !isHiddenSize || !isStored || !isNumber || (!isNorm && !areHeads))
    {
        fail("accepted heads %lld / %lld, head_dim %lld, number %g, dtype %lld", static_cast<long long>(attributes.numHeads),
            static_cast<long long>(attributes.numKvHeads), static_cast<long long>(attributes.headDim), attributes.number,
            static_cast<long long>(attributes.dtype));
    }
}
} // namespace fuzz

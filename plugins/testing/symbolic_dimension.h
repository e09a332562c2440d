//! \file
//! The expressions that TensorRT hands to getOutputShapes(), for the programs here that make its calls.
#pragma once

#include "tensorrt_plugin_abi.h"

#include <limits>

namespace testing_support
{
//! A dimension as the builder sees it: symbolic where the profile leaves it open, though its maker knows the value. Who asks an
//! open one for its constant gets a number that no shape holds.
class Dimension final : public nvinfer1::IDimensionExpr
{
public:
    Dimension() noexcept
    {
        mImpl = &mValue;
    }
    void set(int64_t value, bool isConstant) noexcept
    {
        mValue.value = value;
        mValue.isKnown = isConstant;
    }
    int64_t value() const noexcept
    {
        return mValue.value;
    }

private:
    struct Value final : nvinfer1::apiv::VDimensionExpr
    {
        int64_t value{};
        bool isKnown{};
        bool isConstant() const override
        {
            return isKnown;
        }
        int64_t getConstantValue() const override
        {
            return isKnown ? value : std::numeric_limits<int64_t>::min();
        }
        bool isSizeTensor() const override
        {
            return false;
        }
    };
    Value mValue;
};

//! No plugin of ours computes with dimensions.
class NoExpressions final : public nvinfer1::IExprBuilder
{
};
} // namespace testing_support

//! \file
//! The mode of fuzz_plugins that runs plugins below the largest shapes of their profile, as every engine does.
#pragma once

#include <cstdint>

namespace fuzz
{
//! Runs `count` sequences. Each configures one plugin for random largest shapes, stores and restores it, and then runs random
//! shapes from the smallest to the largest, in random order, on the restored plugin's contexts and on clones of them. The
//! workspace is exactly what getWorkspaceSize() asked for at the largest shapes. What must hold:
//!   - every shape within the profile is accepted, and no launch, copy or memset touches a byte outside the workspace and the
//!     tensors, or lets two of its arguments overlap (checking_driver.cpp);
//!   - a shape beyond the profile runs within the same memory, or onShapeChange and enqueue refuse it;
//!   - a clone in another CUDA context runs the kernels of that context.
void runProfiles(uint64_t seed, int64_t first, int64_t count);
} // namespace fuzz

// Every rule. FORGE_RULE names one of them, RuleInfo::cuda on the host side.
#pragma once
#include "rules/adam.cuh"
#include "rules/lion.cuh"
#include "rules/sgd.cuh"

namespace forge {

// For kernels that apply none.
struct NoRule {
    static constexpr int STATES = 0;
    FORGE_DEVICE static void update(const float *, float, float, float &, float *) {}
};

} // namespace forge

// The scalars of a step from device memory, where the host does not know them (a captured graph):
// the constants that src/rule computes on the host otherwise, in fp64 as well.
#include "prelude.cuh"
#include "rules.cuh"

using namespace forge;

// forge_step_scalars of the C ABI.
struct ScalarsInMemory {
    u64 step, seed;
    double grad_scale;
    double hyper[16];
};

FORGE_DEVICE StepScalars scalars_of(const ScalarsInMemory &source, u32 parameter, u32 maximize) {
    StepScalars s{};
    const double scale = maximize != 0 ? -source.grad_scale : source.grad_scale;
    FORGE_RULE::constants(static_cast<double>(source.step), scale, source.hyper, s.constants);
    s.grad_scale = static_cast<float>(scale);
    s.key[0] = static_cast<u32>(source.seed);
    s.key[1] = parameter;
    s.step = static_cast<u32>(source.step);
    s.seed_high = static_cast<u32>(source.seed >> 32);
    return s;
}

extern "C" __global__ void __launch_bounds__(1)
    forge_prologue(const ScalarsInMemory *source, u32 parameter, u32 maximize, StepScalars *out) {
    *out = scalars_of(*source, parameter, maximize);
}

// For rules whose constants the host cannot compute: those that the caller defined with per-step
// values.
extern "C" __global__ void __launch_bounds__(1)
    forge_prologue_of_values(const __grid_constant__ ScalarsInMemory source, u32 parameter,
                             u32 maximize, StepScalars *out) {
    *out = scalars_of(source, parameter, maximize);
}

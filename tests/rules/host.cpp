// A rule of kernels/rules as a program of the host: reads elements, updates them, writes them back.
// With FORGE_EXACT all its arithmetic is IEEE's, so that a GPU gives the same bits as this does.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#define __device__
#define __forceinline__ inline

static unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
static float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
static float __fsqrt_rn(float x) { return std::sqrt(x); }
static unsigned long long __cvta_generic_to_shared(const void *p) {
    return reinterpret_cast<unsigned long long>(p);
}
using std::copysignf;
using std::fmaxf;
using std::fminf;

#include "rules.cuh"

struct Element {
    float g, w, states[3];
};

int main() {
    float constants[16], scale;
    std::uint64_t count;
    if (std::fread(constants, sizeof constants, 1, stdin) != 1 ||
        std::fread(&scale, sizeof scale, 1, stdin) != 1 ||
        std::fread(&count, sizeof count, 1, stdin) != 1)
        return 1;
    std::vector<Element> elements(count);
    if (std::fread(elements.data(), sizeof(Element), count, stdin) != count)
        return 1;
    for (Element &e : elements)
        FORGE_RULE::update(constants, e.g, scale, e.w, e.states);
    return std::fwrite(elements.data(), sizeof(Element), count, stdout) == count ? 0 : 1;
}

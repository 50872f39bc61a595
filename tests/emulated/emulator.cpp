// A kernel as a function of the host. FORGE_EMULATED_SOURCE names the source,
// FORGE_EMULATED_KERNELS its kernels: X(one) X(another).
#include "device.h"

#include FORGE_EMULATED_SOURCE

#include <utility>

namespace {

template <class... Parameters> struct Call {
    void (*kernel)(Parameters...);
    void **parameters;

    template <size_t... I> void with(std::index_sequence<I...>) const {
        kernel(*static_cast<std::remove_cv_t<Parameters> *>(parameters[I])...);
    }
    static void run(void *self) {
        static_cast<Call *>(self)->with(std::index_sequence_for<Parameters...>());
    }
};

template <class... Parameters>
const char *launch(void (*kernel)(Parameters...), void **parameters, unsigned blocks,
                   unsigned threads, unsigned shared_bytes, emulated::Order order) {
    if (shared_bytes > MOST_SHARED)
        return "more dynamic shared memory than there is";
    Call<Parameters...> call{kernel, parameters};
    emulated::body = call.run;
    emulated::body_data = &call;
    const std::unique_ptr<unsigned char[]> stacks(new unsigned char[threads * emulated::STACK]);
    gridDim = {blocks, 1, 1};
    for (unsigned i = 0; i < blocks; ++i) {
        blockIdx = {order == emulated::Order::Ascending ? i : blocks - 1 - i, 0, 0};
        if (const char *wrong = emulated::run_block(threads, shared_bytes, order, stacks.get()))
            return wrong;
    }
    return nullptr;
}

} // namespace

// As cuLaunchKernel; `order`: of blocks, warps and lanes, 0 or 1. Returns what went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char *
forge_emulate(const char *name, unsigned blocks, unsigned threads, unsigned shared_bytes,
              void **parameters, unsigned order) {
    const auto way = static_cast<emulated::Order>(order);
#define X(kernel)                                                                                  \
    if (std::strcmp(name, #kernel) == 0)                                                           \
        return launch(kernel, parameters, blocks, threads, shared_bytes, way);
    FORGE_EMULATED_KERNELS
#undef X
    return "no such kernel";
}

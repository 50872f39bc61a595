// What a fused kernel makes of dW: backend::cuda::sm90::Mode.
#pragma once

namespace forge {

enum class Mode { Update = 0, Accumulate = 1, Norm = 2 };
constexpr Mode MODE = static_cast<Mode>(FORGE_MODE);

} // namespace forge

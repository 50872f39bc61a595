// The maps of many weights that share a launch of the fused kernel of 9.0: all are those of the
// first weight with addresses of their own.
#include "ptx.cuh"

namespace forge {

// Two for each of 6 arrays and 3 arrays of scales, and those of dY and X.
constexpr int MOST_MAPS = 20;
constexpr int WORDS = 3758;

// backend::cuda::sm90::group fills it; as many bytes as drivers take by value since CUDA 12.1.
struct GroupMaps {
    TensorMap first[MOST_MAPS];
    u8 *weights; // forge::GroupWeight of launch.cuh: maps, then the parameter's id
    u32 maps;    // of a weight
    u32 reserved;
    // Of each weight: its maps' addresses, then its parameter's id.
    u64 words[WORDS];
};
static_assert(sizeof(GroupMaps) <= 32764, "what drivers take by value since CUDA 12.1");

} // namespace forge

using namespace forge;

// A block for each weight, a thread for each of its maps and one for the id.
extern "C" __global__ void __launch_bounds__(32)
    forge_group_maps(const __grid_constant__ GroupMaps all) {
    const u32 i = threadIdx.x;
    if (i > all.maps)
        return;
    const u64 word = all.words[blockIdx.x * (all.maps + 1) + i];
    u8 *at = all.weights + (blockIdx.x * (all.maps + 1) + i) * sizeof(TensorMap);
    if (i == all.maps) {
        *reinterpret_cast<u32 *>(at) = static_cast<u32>(word);
        return;
    }
    TensorMap *map = reinterpret_cast<TensorMap *>(at);
    *map = all.first[i];
    tensor_map_address(map, word);
    tensor_map_release();
}

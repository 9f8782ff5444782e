// The barrier of a cooperative launch.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { cuda_emulator::wait_for(cuda_emulator::Wait::grid); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

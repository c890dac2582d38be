// States of stages after their start tokens.
#pragma once

#include <vector>

#include "cpu/cache_lines.h"
#include "decode/parts.h"

namespace mblm::decode {

using StartMemory = std::vector<cpu::cache_lines::Vector<float>>;

// Computes the start state of every stage that is not hosted and points the parts to it.
StartMemory add_start_states(Parts& parts);

}  // namespace mblm::decode

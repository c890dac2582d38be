// Which tokens may follow, or end a row: a deterministic automaton over classes of tokens, checked
// by mblm/inference/automaton.py. From every state that a transition leads to, one that accepts is
// reached; a class without tokens has no transitions.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace mblm::decode {

struct Automaton {
  std::vector<int32_t> class_of;  // (num_tokens)
  std::vector<int32_t> next;      // (states, classes), -1 where forbidden
  std::vector<int32_t> distance;  // (states), fewest tokens to acceptance, 0 where it accepts
  int64_t classes = 0;
  int32_t start = 0;

  int32_t step(int32_t state, int64_t token) const {
    return state < 0 ? -1 : next[state * classes + class_of[token]];
  }
  bool accepts(int32_t state) const { return state >= 0 && distance[state] == 0; }
  // Whether tokens of a class may be chosen with `left` tokens to choose, this one included: where
  // acceptance can be reached with so many, it stays reachable.
  bool allows(int32_t state, int32_t of_class, int64_t left) const {
    const int32_t after = next[state * classes + of_class];
    return after >= 0 && (distance[state] > left || distance[after] <= left - 1);
  }
  // The same of every token.
  void mark_allowed(int32_t state, int64_t left, uint8_t* allowed) const {
    const int32_t* const after = next.data() + state * classes;
    const bool is_bound = distance[state] <= left;
    for (size_t token = 0; token < class_of.size(); ++token) {
      const int32_t to = after[class_of[token]];
      allowed[token] = to >= 0 && (!is_bound || distance[to] < left);
    }
  }
  // Whether it accepts, and nothing may follow.
  bool is_complete(int32_t state) const {
    return accepts(state) && !allows_any(state, std::numeric_limits<int32_t>::max());
  }
  bool allows_any(int32_t state, int64_t left) const {
    for (int32_t c = 0; c < classes; ++c) {
      if (allows(state, c, left)) return true;
    }
    return false;
  }
};

}  // namespace mblm::decode

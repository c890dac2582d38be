// Where a row's state lies in pages and blobs, and whose they are.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "decode/pages.h"
#include "decode/parts.h"
#include "decode/rows.h"

namespace mblm::decode {

// What a row has of a stage. A blob holds the recurrent state (delayed halves; or a scan's states
// and the convolution's windows, each of all layers), the last output, and the context from above.
// A page holds keys (layers, heads, positions, head_dim) and as many values.
struct StageLayout {
  // A part of it, by the name that it is saved with.
  struct Part {
    std::string name;
    std::vector<int64_t> shape;  // 0 positions of what lies in pages
    int64_t at;                  // where it begins in the blob, or in a page
    bool is_paged = false;

    bool operator==(const Part&) const = default;
  };

  StageLayout(const Parts& parts, int64_t n);

  std::vector<Part> saved;
  int64_t dim = 0, seq_len = 0, layers = 0;
  int64_t state = 0;   // floats of the recurrent state, at the beginning of the blob
  int64_t ssm = 0;     // of those, the scan's; the windows come next
  int64_t output = 0;  // where it begins, (dim)
  int64_t context = 0, context_size = 0;  // (seq_len, dim); none for the most global stage
  int64_t blob = 0;                       // floats
  int64_t planes = 0;                     // of layers and heads; 0 without keys and values
  int64_t head_dim = 0;
  int64_t page_positions = 0;
  int64_t plane = 0;   // floats from a layer's head to the next
  int64_t values = 0;  // where they begin in a page
  int64_t page = 0;    // floats

  bool has_pages() const { return planes > 0; }
  bool operator==(const StageLayout&) const = default;
};

class Memory {
 public:
  explicit Memory(const Parts& parts);

  const StageLayout& layout(int64_t n) const { return layouts_[n]; }

  // Whether rows of other weights lie as these do.
  bool fits(const Parts& parts) const { return Memory(parts).layouts_ == layouts_; }

  // Makes all that a row writes to its own while it takes in bytes [taken, to), byte after byte or,
  // if it jumps, only what is left of them in the end; and room for so many more bytes in its
  // lists. Throws std::bad_alloc, the row's state being the same as before.
  void reserve(const Parts& parts, Row& row, int64_t to, bool jumps);

  // Has a stage's first page, which is its own, begin with the start token's keys and values.
  void write_start(const Parts& parts, int64_t n, StageState& stage) const;

  // Memory for a stage's state with so many positions, the start token counted.
  void allocate(const Parts& parts, int64_t n, StageState& stage, int64_t positions);

  // Makes room for so many more bytes in a row's lists. Throws std::bad_alloc.
  void reserve_lists(Row& row, int64_t room) const;

  // What rows' bytes lie in.
  Pool& bytes() const { return *bytes_; }

  // Copies keys and values of positions [begin, end), which lie in one page.
  void copy_positions(int64_t n, const float* from, float* to, int64_t begin, int64_t end) const;

 private:
  void own_blob(int64_t n, StageState& stage);
  void own_pages(const Parts& parts, int64_t n, StageState& stage, int64_t kept, int64_t begin,
                 int64_t end);

  std::vector<StageLayout> layouts_;
  std::vector<std::unique_ptr<Pool>> blobs_, pages_;
  std::unique_ptr<Pool> bytes_ = std::make_unique<Pool>(Bytes::kPage);
};

}  // namespace mblm::decode

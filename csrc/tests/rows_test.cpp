// Tests of where rows are, what they share, and who uses them.
#include "decode/rows.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "check.h"
#include "decode/memory.h"
#include "decode/schedule.h"

using namespace mblm;
using namespace mblm::decode;

// Blocks of memory that there are still to be had.
int64_t blocks_left = INT64_MAX;

void* operator new(std::size_t size, std::align_val_t alignment) {
  if (blocks_left-- <= 0) throw std::bad_alloc();
  const auto align = std::size_t(alignment);
  if (void* memory = std::aligned_alloc(align, (size + align - 1) / align * align)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}

// What each stage has taken in, byte by byte, told in words: before a byte, the stage that is due
// takes in its patch, and those below begin anew.
void schedule_is_what_happens_byte_by_byte() {
  const std::vector<std::vector<int64_t>> all = {{5}, {4, 3}, {1, 1}, {3, 1, 2}, {2, 3, 4}};
  for (const std::vector<int64_t>& seq_lens : all) {
    const Schedule schedule(seq_lens);
    const int64_t stages = schedule.stages(), local = stages - 1;
    std::vector<int64_t> begins(stages, 0), positions(stages, 0);
    for (int64_t taken = 0; taken < 100; ++taken) {
      for (int64_t n = 0; n < stages; ++n) {
        CHECK(schedule.position(n, taken) == positions[n]);
        CHECK(taken == 0 || schedule.begin(n, taken) == begins[n]);
      }
      const int64_t due = schedule.due(taken);
      const std::vector<int64_t> before = positions;
      for (int64_t n = 0; n < stages; ++n) {
        const bool is_anew = taken == 0 || n > due;
        if (is_anew) positions[n] = 0;
        if (is_anew && n > 0) begins[n] = taken;
        if (taken > 0 && n == due && n < local) ++positions[n];
      }
      ++positions[local];
      for (int64_t n = 0; n < stages; ++n) {
        const bool is_anew = taken == 0 || n > due;
        const int64_t more = positions[n] - (is_anew ? 0 : before[n]);
        CHECK(schedule.begins_anew(n, taken, taken + 1) == is_anew);
        CHECK(schedule.new_positions(n, taken, taken + 1) == more);
        CHECK(schedule.touches(n, taken, taken + 1) == (is_anew || more > 0));
      }
    }
  }
}

void a_jump_takes_in_the_last_sequences_alone() {
  const Schedule schedule({8, 4});
  CHECK(schedule.new_positions(0, 3, 18) == 4);  // the patches that end before the last byte
  CHECK(schedule.new_positions(1, 3, 18) == 2);
  CHECK(schedule.new_positions(1, 17, 18) == 1);
  CHECK(!schedule.touches(0, 17, 20) && schedule.touches(0, 17, 21));
}

void blocks_are_shared_until_they_are_copied() {
  Pool pool(3);
  Block one(pool);
  one.data()[2] = 7;
  CHECK(!one.is_shared());
  {
    const Block other = one;
    CHECK(one.is_shared() && other.data() == one.data());
  }
  CHECK(!one.is_shared() && one.data()[2] == 7);
  float* const memory = one.data();
  one = Block();
  CHECK(!one);
  CHECK(Block(pool).data() == memory);  // what was given back is used again
}

// A model of two Transformer stages without weights: what memory needs to know.
Parts some_parts() {
  Parts parts;
  parts.schedule = Schedule({100, 4});
  parts.start_id = 1;
  for (int64_t n = 0; n < 2; ++n) {
    cpu::TransformerStage stage;
    stage.dim = 6;
    stage.heads = 2;
    stage.head_dim = 3;
    stage.layers.resize(2);
    StageParts of;
    of.dim = 6;
    of.model = stage;
    static const std::vector<float> start(4096, 0.5f);
    of.start.page = start.data();
    parts.stages.push_back(of);
  }
  return parts;
}

void a_copy_writes_to_pages_of_its_own() {
  const Parts parts = some_parts();
  Memory memory(parts);
  Row row;
  row.stages.resize(2);
  memory.reserve(parts, row, 300, false);  // 74 patches: two pages
  CHECK(row.stages[0].pages.size() == 2 && row.stages[1].pages.size() == 1);
  CHECK(row.stages[0].keys[0][0] == 0.5f && row.stages[1].values[0][0] == 0.5f);
  row.taken = row.length = 300;
  row.stages[0].keys[1][0] = 3;

  Row copy;
  static_cast<RowState&>(copy) = row;
  memory.reserve(parts, copy, 310, false);
  CHECK(copy.stages[0].keys[0] == row.stages[0].keys[0]);  // the first page is written no more
  CHECK(copy.stages[0].keys[1] != row.stages[0].keys[1] && copy.stages[0].keys[1][0] == 3);
  CHECK(copy.stages[1].blob.data() != row.stages[1].blob.data());
  memory.reserve(parts, row, 301, false);  // inside the local patch: nothing above
  CHECK(row.stages[0].blob.data() != copy.stages[0].blob.data());
}

// At a patch's end, what comes next begins the local stage anew, but may not come.
void without_memory_a_row_stays_what_it_is() {
  const Parts parts = some_parts();
  bool is_enough = false;
  for (int64_t blocks = 0; !is_enough; ++blocks) {
    Memory memory(parts);
    Row row;
    row.stages.resize(2);
    memory.reserve(parts, row, 300, false);
    row.taken = row.length = 300;
    for (int64_t n = 0; n < 2; ++n) {
      std::fill_n(row.stages[n].blob.data(), memory.layout(n).blob, 3.f);
      row.stages[n].keys.back()[0] = 4;
    }
    Row copy;
    static_cast<RowState&>(copy) = row;
    blocks_left = blocks;
    try {
      memory.reserve(parts, copy, 301, true);
      is_enough = true;
    } catch (const std::bad_alloc&) {
    }
    blocks_left = INT64_MAX;
    for (int64_t n = 0; n < 2; ++n) {
      const float* const blob = copy.stages[n].blob.data();
      const auto is_kept = [](float value) { return value == 3; };
      CHECK(std::all_of(blob, blob + memory.layout(n).blob, is_kept));
      CHECK(copy.stages[n].keys.back()[0] == 4);
    }
  }
}

template <class Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void a_row_is_in_one_call_at_a_time() {
  Rows rows(1);
  const std::vector<RowId> ids = rows.add(3);
  const auto lease = [&](std::vector<RowId> of) {
    return error_of([&] { const Rows::Lease held(rows, of); });
  };
  CHECK(lease(ids).empty() && lease(ids).empty());
  CHECK(lease({ids[0], ids[1], ids[0]}).find("twice") != std::string::npos);
  CHECK(lease({ids[0], 99}).find("no such row") != std::string::npos);
  CHECK(lease({-1}).find("no such row") != std::string::npos);
  {
    const Rows::Lease held(rows, std::vector<RowId>{ids[1]});
    CHECK(lease({ids[0], ids[1]}).find("in another call") != std::string::npos);
    CHECK(lease({ids[0]}).empty());
  }
  CHECK(lease(ids).empty());
}

void a_dropped_row_never_comes_back() {
  Rows rows(1);
  const std::vector<RowId> ids = rows.add(2);
  {
    const Rows::Lease held(rows, ids);
    held[0].length = 5;
    rows.drop(std::vector<RowId>{ids[0], ids[0], 77});
    CHECK(held[0].length == 5);  // until the call ends
  }
  CHECK(!error_of([&] { const Rows::Lease held(rows, std::vector<RowId>{ids[0]}); }).empty());
  const RowId again = rows.add(1)[0];
  CHECK(again != ids[0] && (again & 0xffffffff) == ids[0]);
  rows.drop(std::vector<RowId>{ids[0]});
  CHECK(error_of([&] { const Rows::Lease held(rows, std::vector<RowId>{again, ids[1]}); }).empty());
  CHECK(!error_of([&] { rows.add(int64_t(1) << 40); }).empty());
}

int main() {
  schedule_is_what_happens_byte_by_byte();
  a_jump_takes_in_the_last_sequences_alone();
  blocks_are_shared_until_they_are_copied();
  a_copy_writes_to_pages_of_its_own();
  without_memory_a_row_stays_what_it_is();
  a_row_is_in_one_call_at_a_time();
  a_dropped_row_never_comes_back();
  return test::result();
}

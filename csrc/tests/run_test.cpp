// Tests of runs with three stages, one above the other: a team of threads gives the bits of one
// thread, rows that run side by side those of rows alone, and drafts, right, wrong or proposed,
// those of none. Under the thread sanitizer, that no barrier is missing.
#include "decode/run.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>
#include <type_traits>

#include "check.h"
#include "decode/start.h"
#include "models.h"
#include "on_team.h"

using namespace mblm;
using namespace mblm::decode;
using cpu::Team;

// Of widths that two threads share evenly, and three do not.
constexpr test::Sizes kSizes = {24, 96, 4, 8, 20, 3, 2, 2};
constexpr int64_t kDim = kSizes.dim, kVocabulary = 50;
const std::vector<int64_t> kSeqLens = {6, 4, 5};  // bytes of a position: 20, 5 and 1
constexpr auto kNever = Team::Clock::time_point::max();

void add_tables(test::Store& store, int64_t positions, cpu::TransformerStage& stage) {
  stage.angles = positions;
  stage.cos = store.vector(positions * kSizes.head_dim / 2);
  stage.sin = store.vector(positions * kSizes.head_dim / 2);
}
template <class Stage>
void add_tables(test::Store&, int64_t, Stage&) {}

// Three stages of one kind.
template <class Stage>
struct Model {
  test::Store store;
  Parts parts;
  StartMemory starts;

  explicit Model(test::WeightType type) : store(type, test::Device::kCpu) {
    const Schedule& schedule = parts.schedule = Schedule(kSeqLens);
    for (int64_t n = 0; n < schedule.stages(); ++n) {
      StageParts& of = parts.stages.emplace_back();
      Stage stage;
      test::fill(store, kSizes, stage);
      add_tables(store, 1 + schedule.seq_len(n), stage);
      of.dim = kDim;
      of.model = stage;
      of.start_token = store.vector(kDim);
      of.table = store.vector(kVocabulary * kDim);
      of.fixed = store.vector(schedule.seq_len(n) * kDim);
      if (n + 1 == schedule.stages()) break;
      const int64_t flat = schedule.patch_size(n) * kDim;
      of.flat_norm = {store.vector(flat), store.vector(flat), 1e-5f};
      of.project = store.matrix(kDim, flat);
      of.norm = {store.vector(kDim), store.vector(kDim), 1e-5f};
      of.to_context = store.matrix(schedule.seq_len(n + 1) * kDim, kDim);
    }
    parts.to_logits = store.matrix(kVocabulary, kDim);
    parts.empty_logits = store.vector(kVocabulary);
    starts = add_start_states(parts);
  }
};

// Numbers of a lane that its n-th byte always gets. No atomics, so that the thread sanitizer sees
// who waits for them. With a delay, all other threads do, for so long.
class FixedDraws : public Draws {
 public:
  explicit FixedDraws(std::chrono::milliseconds delay) : delay_(delay) {}

  const float* of(int64_t lane, int64_t n) noexcept override {
    std::this_thread::sleep_for(delay_);
    std::vector<float>& values = numbers_[lane];
    for (int64_t i = 0; i < kVocabulary; ++i) {
      values[i] = float(((n * kVocabulary + i) * 37 + lane * 11) % 101 + 1) / 103;
    }
    return values.data();
  }
  Numbers ahead(int64_t, int64_t) override { return {}; }
  void pass_on(int64_t, int64_t) noexcept override {}
  void leave(int64_t, int64_t) noexcept override {}
  void put_back(int64_t) noexcept override {}
  const void* generator() const override { return nullptr; }

 private:
  const std::chrono::milliseconds delay_;
  std::vector<std::vector<float>> numbers_ =
      std::vector(8, std::vector<float>(size_t(kVocabulary)));
};

// A row that begins with so many bytes and has so many more chosen.
struct Wish {
  int64_t lane, length, count;
  std::vector<int64_t> draft = {};  // what is drafted, from the first byte on
};

struct How {
  int64_t threads = 1;
  bool in_pieces = false;  // a round at a time, with memory for a few bytes
  std::chrono::milliseconds delay = {};
  bool is_greedy = false, proposes = false;
};

// What a run leaves of a row.
struct Left {
  std::vector<int64_t> ids;
  std::vector<float> log_probs, states;

  bool operator==(const Left&) const = default;
};

struct Result {
  std::vector<Left> rows;
  int64_t calls = 0;  // of teams that chose bytes
};

template <class Stage>
class Runner {
 public:
  Runner(test::WeightType type, const How& how)
      : how_(how),
        model_(type),
        memory_(model_.parts),
        draws_(std::make_shared<FixedDraws>(how.delay)) {}

  Result choose(const std::vector<Wish>& wishes) {
    std::vector<Row> rows(wishes.size());
    feed(wishes, rows);
    for (size_t i = 0; i < rows.size(); ++i) begin(wishes[i], rows[i]);
    Result result;
    result.calls = run(wishes, rows);
    for (const Row& row : rows) result.rows.push_back(left_of(row));
    return result;
  }

 private:
  // Gives the rows their first bytes, the last of which is pending.
  void feed(const std::vector<Wish>& wishes, std::vector<Row>& rows) {
    std::vector<Member> members;
    for (size_t i = 0; i < rows.size(); ++i) {
      Row& row = rows[i];
      row.stages.resize(kSeqLens.size());
      row.length = wishes[i].length;
      if (row.length == 0) continue;
      memory_.reserve(model_.parts, row, row.length - 1, true);
      for (int64_t k = 0; k < row.length; ++k) row.bytes.push_back(int32_t(7 * k % kVocabulary));
      members.push_back({.row = &row, .to = row.length - 1});
    }
    Run run(model_.parts, memory_, Run::Kind::kTakeIn, members, space_);
    while (goes(members)) work(run, how_.threads, kNever);
  }

  void begin(const Wish& wish, Row& row) {
    Plan& plan = row.plan.emplace();
    plan.max_tokens = wish.count;
    plan.room = 1000;
    plan.sampling.top_k = how_.is_greedy ? 1 : 5;
    if (how_.proposes) {
      plan.draft = Proposer::kMost;
      plan.proposer = std::make_unique<Proposer>();
    }
    plan.lane = Lane(draws_, wish.lane, 0);
    plan.wants_log_probs = true;
  }

  // Returns how many teams worked on it: one of all threads, and of one thread after that.
  int64_t run(const std::vector<Wish>& wishes, std::vector<Row>& rows) {
    std::vector<Member> members;
    for (Row& row : rows) members.push_back({.row = &row});
    Run run(model_.parts, memory_, Run::Kind::kChoose, members, space_);
    const auto until = how_.in_pieces ? Team::Clock::now() : kNever;
    int64_t calls = 0;
    while (goes(members)) {
      for (size_t i = 0; i < rows.size(); ++i) {
        if (members[i].goes() && !rows[i].plan->end) reserve_and_draft(wishes[i], members[i]);
      }
      work(run, calls == 0 ? how_.threads : 1, until);
      ++calls;
    }
    CHECK(how_.delay.count() == 0 || calls > 1);
    return calls;
  }

  void reserve_and_draft(const Wish& wish, Member& member) {
    Row& row = *member.row;
    const int64_t last = row.length + row.plan->left() - 1;
    member.to = std::max(row.taken, how_.in_pieces ? std::min(last, row.taken + 7) : last);
    memory_.reserve(model_.parts, row, member.to, false);
    const auto chosen = size_t(row.plan->count);
    member.draft = {};
    if (chosen < wish.draft.size()) member.draft = std::span(wish.draft).subspan(chosen);
  }

  static bool goes(const std::vector<Member>& members) {
    return std::any_of(members.begin(), members.end(), [](const Member& m) { return m.goes(); });
  }

  void work(Run& run, int64_t threads, Team::Clock::time_point until) {
    const int64_t prepared = run.prepare(threads);
    test::on_team(threads, [&](const cpu::Worker& worker) {
      worker.prepared.resize(prepared);
      run.work(worker, until);
    });
  }

  // What stages hold of a row but keys and values, which what comes next depends on.
  Left left_of(const Row& row) const {
    Left left{row.ids, row.log_probs, {}};
    for (size_t n = 0; n < kSeqLens.size(); ++n) {
      const StageLayout& layout = memory_.layout(int64_t(n));
      const float* const blob = row.stages[n].blob.data();
      const auto append = [&](int64_t at, int64_t size) {
        left.states.insert(left.states.end(), blob + at, blob + at + size);
      };
      append(0, layout.state);
      append(layout.output, layout.dim);
      append(layout.context, layout.context_size);
    }
    return left;
  }

  const How how_;
  const Model<Stage> model_;
  Memory memory_;
  Workspace space_;
  const std::shared_ptr<FixedDraws> draws_;
};

template <class Stage>
Result choose(test::WeightType type, const std::vector<Wish>& wishes, const How& how = {}) {
  return Runner<Stage>(type, how).choose(wishes);
}

const std::vector<Wish> kWishes = {{0, 0, 67}, {1, 16, 4}, {2, 6, 31}};

template <class Stage>
void a_team_and_neighbors_change_no_bit(test::WeightType type) {
  const auto together = choose<Stage>(type, kWishes).rows;
  for (size_t i = 0; i < kWishes.size(); ++i) {
    CHECK(int64_t(together[i].ids.size()) == kWishes[i].count);
  }
  for (const int64_t threads : {2, 3}) {
    CHECK(choose<Stage>(type, kWishes, {.threads = threads}).rows == together);
  }
  for (size_t i = 0; i < kWishes.size(); ++i) {
    for (const int64_t threads : {1, 3}) {
      CHECK(choose<Stage>(type, {kWishes[i]}, {.threads = threads}).rows[0] == together[i]);
    }
  }
}

// A thread that is to look around after every round goes on where it was.
template <class Stage>
void a_run_in_pieces_changes_no_bit(test::WeightType type) {
  const Result pieces = choose<Stage>(type, kWishes, {.in_pieces = true});
  CHECK(pieces.rows == choose<Stage>(type, kWishes).rows);
  CHECK(pieces.calls >= kWishes[0].count);
}

// A team that waits for most of its time leaves the rest to one thread.
template <class Stage>
void a_crowded_team_changes_no_bit(test::WeightType type) {
  const std::vector<Wish> wishes = {{0, 11, 19}, {1, 0, 7}};
  const How slow = {.threads = 2, .delay = std::chrono::milliseconds(3)};
  CHECK(choose<Stage>(type, wishes, slow).rows == choose<Stage>(type, wishes).rows);
}

// Right ones, which take fewer rounds; some with wrong bytes; and none but wrong ones.
template <class Stage>
void drafts_change_no_bit(test::WeightType type) {
  const Result without = choose<Stage>(type, kWishes, {.in_pieces = true});
  std::vector<Wish> wishes = kWishes;
  for (size_t i = 0; i < wishes.size(); ++i) wishes[i].draft = without.rows[i].ids;
  const Result right = choose<Stage>(type, wishes, {.in_pieces = true});
  CHECK(right.rows == without.rows && 2 * right.calls < without.calls);
  const auto spoil = [](int64_t& id) { id = (id + 1) % kVocabulary; };
  for (size_t k = 2; k < wishes[0].draft.size(); k += 7) spoil(wishes[0].draft[k]);
  for (int64_t& id : wishes[2].draft) spoil(id);
  // In pieces, there is another draft in each.
  CHECK(choose<Stage>(type, wishes, {.in_pieces = true}).rows == without.rows);
  for (const int64_t threads : {1, 2, 3}) {
    CHECK(choose<Stage>(type, wishes, {.threads = threads}).rows == without.rows);
  }
}

// What is proposed; how often that is depends on what passes take.
template <class Stage>
void what_is_proposed_changes_no_bit(test::WeightType type) {
  std::vector<Wish> wishes = {{0, 3, 110}, {1, 16, 90}, {2, 6, 100}};
  const How how = {.in_pieces = true, .is_greedy = true};
  const Result without = choose<Stage>(type, wishes, how);
  How proposing = how;
  proposing.proposes = true;
  CHECK(choose<Stage>(type, wishes, proposing).rows == without.rows);
  // A row that is alone waits for no other: each round chooses a byte, or more.
  int64_t rounds = 0, drafted_rounds = 0;
  for (const Wish& wish : wishes) {
    rounds += choose<Stage>(type, {wish}, how).calls;
    drafted_rounds += choose<Stage>(type, {wish}, proposing).calls;
  }
  CHECK(drafted_rounds <= rounds);
  const bool repeats = std::is_same_v<Stage, cpu::TransformerStage>;
  CHECK(!repeats || drafted_rounds < rounds);
  proposing.in_pieces = false;
  for (const int64_t threads : {1, 3}) {
    proposing.threads = threads;
    CHECK(choose<Stage>(type, wishes, proposing).rows == without.rows);
  }
}

template <class Stage>
void all(test::WeightType type) {
  a_team_and_neighbors_change_no_bit<Stage>(type);
  a_run_in_pieces_changes_no_bit<Stage>(type);
  a_crowded_team_changes_no_bit<Stage>(type);
  drafts_change_no_bit<Stage>(type);
  what_is_proposed_changes_no_bit<Stage>(type);
}

int main() {
  all<cpu::TransformerStage>(test::WeightType::kInt8);
  all<cpu::TransformerStage>(test::WeightType::kFloat32);
  all<cpu::Mamba1Stage>(test::WeightType::kFloat32);
  all<cpu::Mamba2Stage>(test::WeightType::kFloat32);
  return test::result();
}

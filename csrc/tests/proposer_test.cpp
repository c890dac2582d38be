// Tests of what drafts are worth and cost, and of the memory of a row's bytes. What is proposed is
// what Python proposes: see tests/inference/test_proposer.py.
#include "decode/proposer.h"

#include <cmath>
#include <random>
#include <string>

#include "check.h"
#include "decode/call.h"

using namespace mblm;
using namespace mblm::decode;

// Bytes that come one by one, and what is proposed after them.
struct Text {
  Pool pool{Bytes::kPage};
  Bytes bytes;
  Proposer proposer;

  void write(const std::string& text) {
    for (const char letter : text) add(letter);
  }
  void add(int32_t id) {
    bytes.reserve(pool, 1);
    bytes.push_back(id);
    proposer.reserve(bytes, bytes.size());
    proposer.follow(bytes);
  }
  std::string proposed(int64_t most = 6, const Price& price = {}) {
    std::string text;
    for (const int64_t id : proposer.propose(bytes, most, price)) text += char(id);
    return text;
  }
};

std::string after(const std::string& text) {
  Text of;
  of.write(text);
  return of.proposed();
}

void little_is_proposed_where_it_is_seldom_right() {
  Text text;
  for (int64_t i = 0; i < 40; ++i) text.write("the " + std::string(1, char('0' + i)));
  text.write("the ");
  CHECK(text.proposed(6, {.each = 0.3}).empty() && text.proposed(6, {.any = 0.3}).empty());
  for (int64_t i = 0; i < 60; ++i) text.write("the same ");
  CHECK(text.proposed(6, {.each = 0.3}).size() == 6);
  CHECK(text.proposed(4, {.any = 1, .each = 0.3}).size() == 4);
  CHECK(text.proposed(4, {.any = 3, .each = 0.3}).empty());
}

// Those that are hardly ever right cost nothing, and are as many as the other language proposes.
void all_are_proposed_where_none_costs_anything() {
  Text text;
  for (int32_t i = 0; i < 700; ++i) {
    text.write("the ");
    text.add(1000 + i);
  }
  text.write("abcdefghi, abc");
  CHECK(text.proposed() == "defghi");
}

void copies_of_bytes_write_to_pages_of_their_own() {
  Pool pool(Bytes::kPage);
  Bytes one;
  const auto write = [&](Bytes& bytes, int32_t id, int64_t count) {
    bytes.reserve(pool, 3 * count);  // more than is written
    for (int64_t i = 0; i < count; ++i) bytes.push_back(id);
  };
  write(one, 1, Bytes::kPage - 1);
  Bytes other = one;
  write(one, 2, Bytes::kPage);
  write(other, 3, Bytes::kPage);
  for (int64_t i = 0; i < one.size(); ++i) {
    const bool is_later = i >= Bytes::kPage - 1;
    CHECK(one[i] == (is_later ? 2 : 1) && other[i] == (is_later ? 3 : 1));
  }
  one.shorten(Bytes::kPage);
  write(one, 4, 2);
  CHECK(one[Bytes::kPage] == 4 && other[Bytes::kPage] == 3);
}

// The table grows, and a copy of the bytes goes on by itself.
void many_bytes_are_found_again() {
  std::mt19937 random(1);
  std::string noise;
  for (int64_t i = 0; i < 5000; ++i) noise += char(random() % 128);
  for (const int64_t at : {0, 1020, 4990}) {
    CHECK(after(noise + noise.substr(at, 4)) == (noise + noise).substr(at + 4, 6));
  }
  Text text;
  text.write(noise);
  Text copy;
  copy.bytes = text.bytes;
  copy.write("12345" + noise.substr(0, 4));
  text.write("6789");
  CHECK(copy.proposed() == noise.substr(4, 6) && copy.bytes[5000] == '1' &&
        text.bytes[5000] == '6');
}

bool is_near(const Price& price, double any, double each) {
  return std::abs(price.any - any) < 0.1 && std::abs(price.each - each) < 0.05;
}

void a_price_follows_what_rounds_cost() {
  for (const int64_t rows : {1, 4}) {
    Pace pace;
    Text text;
    text.write("-----");
    CHECK(text.proposed(6, pace.price(1)).empty());
    for (int64_t i = 0; i < 1000; ++i) {
      const int64_t drafted = i % 7;
      const double seconds = drafted ? 13 + double(drafted) : 10;
      pace.note(rows, drafted, i % 50 == 7 ? 20 * seconds : seconds);
    }
    // A margin above 0.3 and 0.1 of a round, in which each row chooses a byte.
    const auto [any, each] = pace.price(1);
    CHECK(is_near({any / double(rows), each / double(rows)}, 0.36, 0.12));
    CHECK(pace.price(2).each > 1.5 * each);
  }
}

// The first round of all finds nothing in the caches.
void a_slow_beginning_makes_no_drafts_costly_and_what_was_costly_is_tried_again() {
  Pace pace;
  pace.note(1, 0, 50);
  for (int64_t i = 0; i < 100; ++i) pace.note(1, 0, 10);
  const Price expected = pace.price(1);
  CHECK(expected.any < 0.5 && expected.each < 0.5);
  for (int64_t i = 0; i < 100; ++i) pace.note(1, 1 + i % 3, 10 + 15 * double(1 + i % 3));
  CHECK(pace.price(1).each > 1);
  for (int64_t i = 0; i < 5000; ++i) pace.note(1, 0, 10);
  CHECK(is_near(pace.price(1), expected.any, expected.each));
}

// Eight rows take longer than one, which says nothing of drafts.
void every_number_of_rows_has_a_pace_of_its_own() {
  Workspace space;
  for (int64_t i = 0; i < 200; ++i) {
    space.pace(8).note(8, i % 2 * 20, 50 + 2. * double(i % 2 * 20));
    space.pace(1).note(1, i % 2 * 5, 10 + 2. * double(i % 2 * 5));
  }
  const auto [any, each] = space.pace(1).price(1);
  CHECK(std::abs(any + 5 * each - 1.2) < 0.1);
  CHECK(&space.pace(8) == &space.pace(15) && &space.pace(1000) == &space.pace(5000));
}

void a_clock_that_stands_still_is_no_rate() {
  Pace pace;
  for (const int64_t drafted : {0, 3, 0, 3}) pace.note(1, drafted, 0);
  CHECK(std::isfinite(pace.price(1).any) && std::isfinite(pace.price(1).each));
}

int main() {
  little_is_proposed_where_it_is_seldom_right();
  all_are_proposed_where_none_costs_anything();
  copies_of_bytes_write_to_pages_of_their_own();
  many_bytes_are_found_again();
  a_price_follows_what_rounds_cost();
  a_slow_beginning_makes_no_drafts_costly_and_what_was_costly_is_tried_again();
  every_number_of_rows_has_a_pace_of_its_own();
  a_clock_that_stands_still_is_no_rate();
  return test::result();
}

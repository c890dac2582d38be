// Tests of the exponential in lanes against std::exp.
#include "cpu/lanes.h"

#include <limits>

#include "check.h"

using namespace mblm;

float exp_of(float x) {
  // In a lane of its own, so that a mistake that mixes lanes shows.
  cpu::FloatLanes lanes = cpu::FloatLanes{} + 1.0f;
  lanes[5] = x;
  const float in_lane = cpu::exp(lanes)[5], alone = cpu::vector_exp(x);
  CHECK(in_lane == alone || std::fabs(in_lane - alone) <= 3e-7f * alone ||
        (std::isnan(in_lane) && std::isnan(alone)));
  return in_lane;
}

void is_close_over_the_whole_range() {
  double worst = 0;
  for (double x = -86.9; x < 88.7; x += 0.00037) {
    const float argument = float(x);
    const double expected = std::exp(double(argument));
    const double error = std::fabs(double(exp_of(argument)) - expected) / expected;
    worst = std::fmax(worst, error / (1 + std::fabs(x)));
  }
  std::printf("exp: relative error at most %g (1 + |x|)\n", worst);
  CHECK(worst < 1e-7);
}

void small_arguments_lose_nothing() {
  for (double x = -1; x < 1; x += 0.0001) {
    const double expected = std::exp(double(float(x)));
    CHECK(std::fabs(double(exp_of(float(x))) - expected) < 2e-7 * expected);
  }
}

void special_values() {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(exp_of(0.0f) == 1.0f);
  CHECK(exp_of(-0.0f) == 1.0f);
  CHECK(exp_of(-1e-30f) == 1.0f);
  CHECK(exp_of(-100.0f) == 0.0f);
  CHECK(exp_of(-1e38f) == 0.0f);
  CHECK(exp_of(-infinity) == 0.0f);
  CHECK(exp_of(89.0f) == infinity);
  CHECK(exp_of(infinity) == infinity);
  CHECK(std::isnan(exp_of(std::numeric_limits<float>::quiet_NaN())));
}

void sums_and_doubles() {
  const float floats[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const double doubles[4] = {1, 2, 4, -750};
  CHECK(cpu::sum(cpu::load(floats)) == 255);
  CHECK(cpu::sum(cpu::load(doubles)) == -743);
  const cpu::DoubleLanes powers = cpu::exp(cpu::load(doubles));
  for (int lane = 0; lane < 4; ++lane) CHECK(powers[lane] == std::exp(doubles[lane]));
}

int main() {
  is_close_over_the_whole_range();
  small_arguments_lose_nothing();
  special_values();
  sums_and_doubles();
  return test::result();
}

// The warp-wide matrix instructions, fragment by fragment as PTX defines them.
#include "primitives.cuh"

namespace tidal::emulation {

void load_matrices(uint32_t (&to)[4], const char* row, bool transposed) {
  check_readable("ldmatrix");
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an odd address");
  const char* const what = transposed ? "ldmatrix.trans" : "ldmatrix";
  const char* slots = exchange(&row, sizeof(row), what);
  const int lane = thread_index() % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t halves[2];
    for (int i = 0; i < 2; ++i) {
      const int from_row = transposed ? 2 * (lane % 4) + i : lane / 4;
      const int column = transposed ? lane / 4 : 2 * (lane % 4) + i;
      const char* from = from_lane<const char*>(slots, matrix * 8 + from_row);
      std::memcpy(&halves[i], from + 2 * column, 2);
    }
    to[matrix] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
}

template <class T>
void multiply(float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    float a[8], b[4];
  } mine;
  const uint32_t b[2] = {b0, b1};
  for (int r = 0; r < 4; ++r) {
    mine.a[2 * r] = to_float(T{}, static_cast<uint16_t>(a[r]));
    mine.a[2 * r + 1] = to_float(T{}, static_cast<uint16_t>(a[r] >> 16));
  }
  for (int r = 0; r < 2; ++r) {
    mine.b[2 * r] = to_float(T{}, static_cast<uint16_t>(b[r]));
    mine.b[2 * r + 1] = to_float(T{}, static_cast<uint16_t>(b[r] >> 16));
  }
  static_assert(sizeof(Fragments) <= kSlotBytes);
  const char* slots = exchange(&mine, sizeof(mine), "mma");
  const int lane = thread_index() % 32;
  for (int r = 0; r < 4; ++r) {
    const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
    float sum = to[r];
    for (int quad = 0; quad < 4; ++quad) {
      const auto left = from_lane<Fragments>(slots, (row % 8) * 4 + quad);
      const auto right = from_lane<Fragments>(slots, column * 4 + quad);
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 2; ++i) {
          sum += left.a[2 * (row / 8 + 2 * half) + i] * right.b[2 * half + i];
        }
      }
    }
    to[r] = sum;
  }
}

template void multiply<bf16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply<fp16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

}  // namespace tidal::emulation

// The rows that are not all zeros: the tokens of a gradient that a backward pass has to look at.
#include <array>
#include <cstring>
#include <vector>

#include "operations.h"
#include "tensors.h"

namespace bidora {
namespace {

// Whether any of these bytes, whole elements, is not of a zero; `mask`: the bits of 8 bytes but their elements' signs
bool any_nonzero(const char* data, int64_t bytes, uint64_t mask) {
  constexpr int64_t kWords = 16;  // looked at together; most rows end with the first ones
  uint64_t words[kWords];
  int64_t at = 0;
  for (; at + int64_t(sizeof words) <= bytes; at += sizeof words) {
    std::memcpy(words, data + at, sizeof words);
    uint64_t found = 0;
    for (uint64_t word : words) found |= word & mask;
    if (found != 0) return true;
  }
  std::memset(words, 0, sizeof words);
  std::memcpy(words, data + at, size_t(bytes - at));
  uint64_t found = 0;
  for (uint64_t word : words) found |= word & mask;
  return found != 0;
}

}  // namespace

Tensor nonzero_rows(const Tensor& t, int64_t multiple) {
  STD_TORCH_CHECK(t.dim() >= 2, "nonzero_rows takes [..., columns], got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(multiple >= 1, "multiple must be 1 or more, got ", multiple);
  const int64_t rows = rows_of(t), columns = t.size(t.dim() - 1);
  const Matrix m = matrix(t, "t", rows, columns);
  const int64_t element = m.dtype == Dtype::f64 ? 8 : m.dtype == Dtype::f32 ? 4 : 2;
  const uint64_t mask = element == 8 ? ~(uint64_t(1) << 63) : element == 4 ? 0x7FFFFFFF7FFFFFFF : 0x7FFF7FFF7FFF7FFF;  // -0 is 0
  std::vector<char> chosen(static_cast<size_t>(rows), 0);
  torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      chosen[size_t(i)] = columns > 0 && any_nonzero(static_cast<const char*>(m.data) + i * m.stride * element, columns * element, mask);
  });
  int64_t count = 0;
  for (char one : chosen) count += one;
  int64_t wanted = std::min(rows, (count + multiple - 1) / multiple * multiple);
  Tensor found = torch::stable::new_empty(t, std::array<int64_t, 1>{wanted}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(found.mutable_data_ptr());
  for (int64_t i = 0, others = wanted - count; i < rows; ++i)
    if (chosen[size_t(i)] || others-- > 0) *to++ = i;
  return found;
}

}  // namespace bidora

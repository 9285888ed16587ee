// Vectors of the compiler, and rows of 16-bit numbers to and from them. Included once per instruction set.
#pragma once

#include <stdint.h>

#include "kernels.h"

#ifndef BIDORA_ISA
#error "BIDORA_ISA names the namespace of this instruction set"
#endif

namespace bidora {
namespace BIDORA_ISA {

#define BIDORA_INLINE static inline __attribute__((always_inline))
#define BIDORA_INLINE_MEMBER inline __attribute__((always_inline))

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(BIDORA_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(BIDORA_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int64_t kLanes = BIDORA_VECTOR_BYTES / sizeof(T);
template <typename T>
constexpr int64_t kPanel = 2 * kLanes<T>;  // two vectors: with four rows, eight accumulators hide the latency of a multiply-add

template <typename T>
BIDORA_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
BIDORA_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

constexpr int64_t kAheadBytes = 4096;  // between a request for memory and its use, in rows that come from it

// Requests the lines of memory that a panel's `bytes` from `p` on are in, for the L2 cache: from there they come in time
BIDORA_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(p) + line, 0, 2);
}

template <typename T>
BIDORA_INLINE T lane_sum(Vector<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

BIDORA_INLINE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

BIDORA_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

BIDORA_INLINE float from_bf16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

BIDORA_INLINE float from_f16(uint16_t h) {
  // the exponent moves from bias 15 to 127; 0.5 has the unit in the last place of fp16's subnormal numbers, 2^-24, and taking it
  // away again never meets a subnormal fp32, which a processor may be told to read as 0
  uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  uint32_t bits = magnitude + (112u << 23);
  bits = (h & 0x7c00) == 0 ? float_to_bits(bits_to_float((h & 0x03ffu) | 0x3f000000u) - 0.5f) : bits;
  bits = (h & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000u) : bits;
  return bits_to_float(bits | uint32_t(h & 0x8000) << 16);
}

BIDORA_INLINE uint16_t to_bf16(float value) {
  uint32_t bits = float_to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded);
}

// Away from zero with the probability of the part cut off, `noise` having 16 random low bits
BIDORA_INLINE uint16_t dithered_bf16(float value, uint32_t noise) {
  uint32_t bits = float_to_bits(value);
  uint32_t rounded = (bits + (noise & 0xffffu)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded);
}

BIDORA_INLINE uint16_t to_f16(float value) {
  uint32_t bits = float_to_bits(value);
  uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // 0.5 has the unit in the last place 2^-24, that of fp16's subnormal numbers: adding it rounds to them
  uint32_t subnormal = float_to_bits(bits_to_float(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16_t(sign | half);
}

// `count` elements of a row, starting at element `offset`, as T
template <typename T>
BIDORA_INLINE void read_row(const Matrix& m, int64_t row, int64_t offset, int64_t count, T* to) {
  int64_t start = row * m.stride + offset;
  switch (m.dtype) {
    case Dtype::f64: {
      const double* p = static_cast<const double*>(m.data) + start;
      for (int64_t i = 0; i < count; ++i) to[i] = T(p[i]);
      return;
    }
    case Dtype::f32: {
      const float* p = static_cast<const float*>(m.data) + start;
      for (int64_t i = 0; i < count; ++i) to[i] = T(p[i]);
      return;
    }
    case Dtype::bf16: {
      const uint16_t* p = static_cast<const uint16_t*>(m.data) + start;
      for (int64_t i = 0; i < count; ++i) to[i] = T(from_bf16(p[i]));
      return;
    }
    case Dtype::f16: {
      const uint16_t* p = static_cast<const uint16_t*>(m.data) + start;
      for (int64_t i = 0; i < count; ++i) to[i] = T(from_f16(p[i]));
      return;
    }
  }
}

template <typename T>
BIDORA_INLINE void write_row(const Matrix& m, int64_t row, int64_t offset, int64_t count, const T* from) {
  int64_t start = row * m.stride + offset;
  switch (m.dtype) {
    case Dtype::f64: {
      double* p = static_cast<double*>(m.data) + start;
      for (int64_t i = 0; i < count; ++i) p[i] = double(from[i]);
      return;
    }
    case Dtype::f32: {
      float* p = static_cast<float*>(m.data) + start;
      for (int64_t i = 0; i < count; ++i) p[i] = float(from[i]);
      return;
    }
    case Dtype::bf16: {
      uint16_t* p = static_cast<uint16_t*>(m.data) + start;
      for (int64_t i = 0; i < count; ++i) p[i] = to_bf16(float(from[i]));
      return;
    }
    case Dtype::f16: {
      uint16_t* p = static_cast<uint16_t*>(m.data) + start;
      for (int64_t i = 0; i < count; ++i) p[i] = to_f16(float(from[i]));
      return;
    }
  }
}

// The same into bf16 with a fixed dither: noise of the row and of the column, added, is uniform and independent along either
template <typename T>
BIDORA_INLINE void write_dithered(const Matrix& m, int64_t row, int64_t offset, int64_t count, const T* from, const uint32_t* noise) {
  uint16_t* p = static_cast<uint16_t*>(m.data) + row * m.stride + offset;
  const uint32_t own = mixed(uint32_t(row) ^ 0x9e3779b9u);
  for (int64_t i = 0; i < count; ++i) p[i] = dithered_bf16(float(from[i]), own + noise[offset + i]);
}

BIDORA_INLINE int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

template <typename T>
constexpr Dtype kOwnDtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;

// The row in place where it already holds T, else a converted copy in `scratch`
template <typename T>
BIDORA_INLINE const T* row_as(const Matrix& m, int64_t row, int64_t count, T* scratch) {
  if (m.dtype == kOwnDtype<T>) return static_cast<const T*>(m.data) + row * m.stride;
  read_row(m, row, 0, count, scratch);
  return scratch;
}

}  // namespace BIDORA_ISA
}  // namespace bidora
